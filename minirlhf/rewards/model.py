"""A reward model as a reward source.

It reads the policy's token ids or, where it has a tokenizer of its own, the texts.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from minirlhf import interrupt
from minirlhf.data.arguments import NONE
from minirlhf.data.batching import cut_by_tokens
from minirlhf.data.encoding import strip_eos
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
        for part in cut_by_tokens(lengths, len(rows), micro_batch_tokens):
            interrupt.check()
            tokens = pad_right([rows[i] for i in part.tolist()])
            check_known(tokens, model.config.vocab_size, "the reward model")
            scores[part] = model(tokens.to(device), lengths[part].to(device)).float().cpu()
    return scores


def reencode(
    tokenizer: Tokenizer, prompt: str | Messages, text: str, reason: str,
    arguments: Mapping[str, object] = NONE,
) -> tuple[list[int], list[int]]:
    """(prompt ids, response ids) in a reward model's own tokenizer, as its training makes them.

    Messages go through its chat template, the response as the assistant's turn. An eos stands at
    the end unless the response is truncated.

    Args:
        text: the response, without eos.
        reason: why it ended: eos, stop or length.
        arguments: as in `Tokenizer.render_chat`.
    """
    if isinstance(prompt, str):
        ((head, tail),) = tokenizer.encode_parts([(prompt, text)])
    else:
        turn = [{"role": "assistant", "content": text}]
        head, tail = tokenizer.encode_dialogue(prompt, turn, resume=True, arguments=arguments)
    ended = bool(tail) and tail[-1] in tokenizer.eos_ids  # a template ends the turn itself
    if reason == "length":
        return head, tail[:-1] if ended else tail
    return head, tail if ended else [*tail, tokenizer.eos_ids[0]]


def end_of(
    tokenizer: Tokenizer, prompt: str | Messages, drawn: int, arguments: Mapping[str, object] = NONE
) -> int:
    """The eos that ends a response in a reward model's training.

    Args:
        drawn: the last id that the policy sampled, for a prompt that the template refuses.
    """
    first, *others = tokenizer.eos_ids
    if not others:
        return first
    try:
        return reencode(tokenizer, prompt, "a", "eos", arguments)[1][-1]
    except UserError:
        return drawn if drawn in others else first


def model_reward(
    model: RewardModel, tokenizer: Tokenizer, micro_batch_tokens: int, own_tokenizer: bool = False,
    name: str = "--reward",
) -> RewardSource:
    """Texts end as in the model's training: with its own eos, or without one where the response is
    truncated. A response that a stop string ended is scored as the text before it, with eos.

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

    def row(batch: Completions, i: int) -> list[int]:
        text, reason = batch.completions[i], batch.finish_reasons[i]
        if own_tokenizer:
            prompt, response = reencode(
                tokenizer, batch.prompts[i], text, reason, batch.arguments(i)
            )
        else:
            prompt, response = batch.prompt_ids[i], batch.response_ids[i]
            if reason != "length":  # of several eos the policy may have drawn another
                last, asked = response[-1], batch.prompts[i]
                if reason == "eos":
                    own = response[:-1]
                else:
                    own = tokenizer.ids_of_answer(asked, prompt, response, text)
                response = [*own, end_of(tokenizer, asked, last, batch.arguments(i))]
        if model.read_before_eos:
            response = strip_eos(response, tokenizer.eos_ids)
        return prompt + response

    def score(batch: Completions) -> Tensor:
        ids = [row(batch, i) for i in range(len(batch.completions))]
        again = " once it is re-encoded" if own_tokenizer else ""
        for i, size in enumerate(map(len, ids)):
            if not 0 < size <= model.config.longest_row:
                what = f"text {i} has {size} tokens{again}"
                legal = f"the reward model reads 1 to {model.config.longest_row}"
                raise UserError(name, what, f"{legal}: change max_prompt_length or max_new_tokens")
        return score_texts(model, ids, micro_batch_tokens)

    return score
