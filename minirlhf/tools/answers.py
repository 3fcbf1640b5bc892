"""The replies of `minirlhf serve`: what a request's body asks for, and its scores."""

import json
import math
from collections.abc import Callable

from torch import Tensor

from minirlhf.data.arguments import ARGUMENTS, template_arguments
from minirlhf.data.ending import completed
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.errors import UserError
from minirlhf.models.heads import RewardModel
from minirlhf.rewards.model import model_reward
from minirlhf.rewards.source import Completions, RewardSource

SLICE = 64  # texts that are scored between two pauses
Pause = Callable[[], None]  # lets others be scored in between
Answer = Callable[[object, Pause], dict]
BODY = 'either {"items": [item, ...]} or {"messages": [text, ...]}, with at least one'
ITEM = (
    '{"id": text or whole number, another one for each, "prompt": text or [{"role": text, '
    '"content": text}, ...], "completion": text, "finish_reason": "eos", "stop" or "length", '
    '"columns": {"tools": [schema, ...], "chat_template_kwargs": {...}}}'
)


def completions_of(items: list) -> tuple[list, Completions]:
    """(ids, texts) of the items of a request.

    Raises:
        UserError: an item is not of the form.
    """
    found: dict[str | int, tuple] = {}
    for i, item in enumerate(items):
        match {"finish_reason": "eos", "columns": {}} | item if isinstance(item, dict) else item:
            case {
                "id": str() | int() as id, "prompt": prompt, "completion": str(text),
                "finish_reason": "eos" | "stop" | "length" as reason, "columns": dict(columns),
            } if _is_prompt(prompt) and not isinstance(id, bool) and id not in found:
                if not isinstance(prompt, str):
                    template_arguments(columns, f"items[{i}]")  # refuses wrong ones
                found[id] = prompt, text, reason, columns
            case _:
                raise UserError(f"items[{i}]", f"is {json.dumps(item)[:200]}", ITEM)
    prompts, texts, reasons, columns = map(list, zip(*found.values(), strict=True))
    no_ids: list[list[int]] = [[] for _ in found]  # of the policy: the texts are encoded here
    read = {name: [others.get(name) for others in columns] for name in ARGUMENTS}
    return list(found), Completions(prompts, no_ids, texts, no_ids, reasons, read)


def _is_prompt(value: object) -> bool:
    match value:
        case str():
            return True
        case [_, *_]:
            return all(
                isinstance(turn, dict) and isinstance(turn.get("role"), str)
                and isinstance(turn.get("content"), str) for turn in value
            )
    return False


def in_slices(source: RewardSource, batch: Completions, pause: Pause) -> list[float]:
    """Scores of a batch of any size, with pauses in between."""
    scores: list[float] = []
    for start in range(0, len(batch.completions), SLICE):
        if start:
            pause()
        part = slice(start, start + SLICE)
        columns = {name: values[part] for name, values in batch.columns.items()}
        try:
            scores += source(Completions(*(rows[part] for rows in batch[:-1]), columns)).tolist()
        except UserError as error:
            where = f"{error.where} from {start} on" if start else error.where
            raise UserError(where, error.what, error.do, error.code) from error
    return scores


def answer_with(model: RewardModel, tokenizer: Tokenizer, micro_batch_tokens: int) -> Answer:
    """Reply to a request's body, of either form; it pauses after every 64 texts.

    Raises:
        UserError: when called: the body is of neither form, a text is too long, or a score is not
            finite.
    """
    by_text = model_reward(model, tokenizer, micro_batch_tokens, own_tokenizer=True, name="items")
    by_ids = model_reward(model, tokenizer, micro_batch_tokens, name="messages")

    def of_whole_texts(batch: Completions) -> Tensor:
        ids = [tokenizer.encode_marked(text) for text in batch.completions]
        if model.whole:
            ids = [completed(tokenizer, [], row) for row in ids]
        return by_ids(batch._replace(response_ids=ids))

    def answer(body: object, pause: Pause = lambda: None) -> dict:
        match body:
            case {"items": [_, *_] as items} if "messages" not in body:
                ids, batch = completions_of(items)
                scores = in_slices(by_text, batch, pause)
                reply = [{"id": id, "score": s} for id, s in zip(ids, scores, strict=True)]
            case {"messages": [_, *_] as texts} if (
                "items" not in body and all(isinstance(text, str) for text in texts)
            ):
                none: list[list[int]] = [[] for _ in texts]
                as_it_is = ["length"] * len(texts)  # no eos is added
                batch = Completions(texts, none, texts, none, as_it_is, {})
                scores = reply = in_slices(of_whole_texts, batch, pause)
            case _:
                raise UserError("body", f"is {json.dumps(body)[:200]}", BODY)
        for i, score in enumerate(scores):
            if not math.isfinite(score):
                raise UserError(f"score {i}", f"is {score}", "the weights of --model diverged")
        return {"scores": reply}

    return answer
