"""A reward model as a reward source.

It reads the policy's token ids or, where it has a tokenizer of its own, the texts.
"""

import json
from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import Tensor

from minirlhf import interrupt
from minirlhf.console import progress
from minirlhf.data.arguments import NONE
from minirlhf.data.batching import cut_by_tokens
from minirlhf.data.encoding import read_part
from minirlhf.data.ending import closed, completed, end_ids, tail_of
from minirlhf.data.parts import Messages
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.errors import UserError
from minirlhf.models.alignment import check_known, pad_right
from minirlhf.models.heads import RewardModel
from minirlhf.models.pretrained import in_memory
from minirlhf.rewards.source import Completions, RewardSource


@torch.no_grad()
def score_texts(
    model: RewardModel, rows: list[list[int]], micro_batch_tokens: int = 4096
) -> Tensor:
    """(N,) float32 scores of N texts, given as ids, on the CPU."""
    lengths, scores = torch.tensor([len(row) for row in rows]), torch.zeros(len(rows))
    with in_memory(model):
        device = model.score.weight.device
        parts = list(cut_by_tokens(lengths, len(rows), micro_batch_tokens))
        for part in progress(parts, "score", unit=" micro-batches"):
            interrupt.check()
            tokens = pad_right([rows[i] for i in part.tolist()])
            check_known(tokens, model.config.vocab_size, "the reward model")
            scores[part] = model(tokens.to(device), lengths[part].to(device)).float().cpu()
    return scores


def reencode(
    tokenizer: Tokenizer, prompt: str | Messages, text: str, reason: str,
    arguments: Mapping[str, object] = NONE, whole: bool = True,
) -> tuple[list[int], list[int]]:
    """(prompt ids, response ids) in a reward model's own tokenizer, as its training makes them.

    Messages go through its chat template, the response as the assistant's turn or as what its last
    turn goes on with. An eos stands behind a string. A truncated response has no end.

    Args:
        text: the response, without eos.
        reason: why it ended: eos, stop or length.
        arguments: as in `Tokenizer.render_chat`.
        whole: as in `Tokenizer.encode_dialogue`.
    """
    cut = reason == "length"
    if isinstance(prompt, str):
        ((head, tail),) = tokenizer.encode_parts([(prompt, text)])
        return head, tail if cut else [*tail, tokenizer.eos_ids[0]]
    turn = [{"role": "assistant", "content": text}]
    head, tail = tokenizer.encode_dialogue(
        prompt, turn, resume=True, cut=cut, whole=whole, arguments=arguments
    )
    if cut or whole or (tail and tail[-1] in tokenizer.eos_ids):
        return head, tail
    return head, [*tail, tokenizer.eos_ids[0]]


def scores_read(model: RewardModel, tokenizer: Tokenizer) -> str:
    """Where the model reads its scores, in a line."""
    messages = "at the end of turn, as its config.json says"
    if model.whole:
        messages, tail = "at the end of the rendered text", tail_of(tokenizer)
        messages += f", tail {json.dumps(tail)} included" if tail else ""
    pads = model.unread in tokenizer.eos_ids
    strings = "before their eos, which pads elsewhere" if pads else "at their eos"
    return f"messages {messages}; strings {strings}"


def model_reward(
    model: RewardModel, tokenizer: Tokenizer, micro_batch_tokens: int, own_tokenizer: bool = False,
    name: str = "--reward",
) -> RewardSource:
    """Texts end as in the model's training, in the place of the eos that the policy drew: messages
    as the model's chat template ends them, strings with eos, truncated ones with nothing. A
    response that a stop string ended is scored as the text before it, ended alike.

    Args:
        tokenizer: the reward model's.
        own_tokenizer: the policy has another one, so texts are re-encoded and the policy's ids are
            not used.
        name: what errors call it.
    Raises:
        UserError: the tokenizer names no eos; a row is longer than what the model reads, or empty.
    """
    if not tokenizer.eos_ids:
        what = "names no eos token, and a text that is scored must end with one"
        raise UserError(tokenizer.folder, what, "set eos_token in tokenizer_config.json")
    whole = model.whole

    def ended(batch: Completions, i: int) -> list[int]:
        """A response in ids, with its end in the place of its eos or stop string."""
        prompt, text, head = batch.prompts[i], batch.completions[i], batch.prompt_ids[i]
        first, *others = tokenizer.eos_ids
        *own, drawn = batch.response_ids[i]
        if batch.finish_reasons[i] == "stop":
            own = tokenizer.ids_of_answer(prompt, head, [*own, drawn], text)
        if isinstance(prompt, str):
            return completed(tokenizer, head, [*own, first]) if whole else [*own, first]
        with suppress(UserError):  # the template refuses the prompt
            end = end_ids(tokenizer, prompt, whole, batch.arguments(i))
            if end is None:
                return reencode(tokenizer, prompt, text, "eos", batch.arguments(i))[1]
            return closed(own, end)
        return [*own, drawn if drawn in others else first]

    def row(batch: Completions, i: int) -> list[int]:
        prompt, text, reason = batch.prompts[i], batch.completions[i], batch.finish_reasons[i]
        if own_tokenizer:
            head, tail = reencode(tokenizer, prompt, text, reason, batch.arguments(i), whole)
        else:
            head, tail = batch.prompt_ids[i], batch.response_ids[i]
            tail = tail if reason == "length" else ended(batch, i)
        return read_part(head + tail, model.unread)

    def score(batch: Completions) -> Tensor:
        ids = [row(batch, i) for i in range(len(batch.completions))]
        again = " once it is re-encoded" if own_tokenizer else ""
        for i, size in enumerate(map(len, ids)):
            if not 0 < size <= model.config.longest_row:
                what = f"text {i} has {size} tokens{again}"
                legal = f"the reward model reads 1 to {model.config.longest_row}"
                do = "lower --max-prompt-length or --max-new-tokens"
                raise UserError(name, what, f"{legal}: {do}")
        return score_texts(model, ids, micro_batch_tokens)

    return score
