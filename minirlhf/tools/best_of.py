"""The best of several responses to each prompt, by a reward: `minirlhf best-of`.

Its file is for `minirlhf sft`: {"prompt", "completion", "score"}, the best response (best-of-n, as
in Stiennon et al. 2020, arXiv:2009.01325), or with --threshold those that reach it (rejection
sampling, as in Yuan et al. 2023, arXiv:2308.01825). With --pairs it is for DPO or `minirlhf
reward`: {"prompt", "chosen", "rejected", "chosen_score", "rejected_score"}, the best and the worst.

Responses are those that `minirlhf sample` draws with the same settings. One that the length limit
cut is neither chosen nor rejected, since whoever learns a text learns that it ends there; nor is
one without a text. What becomes of each prompt is kept beside --out until all are done: the same
command, given again, goes on where it stopped.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from math import fsum
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from minirlhf import interrupt, streams
from minirlhf.batches.collect import columns_of
from minirlhf.batches.collect import sample as sample_rollout
from minirlhf.data.arguments import ARGUMENTS
from minirlhf.data.examples import Prompt, encoded_text, load_prompts
from minirlhf.data.tokenizer import Tokenizer, load_tokenizer
from minirlhf.errors import OK, STOPPED, Stopped, UserError, run
from minirlhf.files import atomic, folders
from minirlhf.files.sieve import RowPolicy
from minirlhf.models import pretrained
from minirlhf.models.heads import RewardModel
from minirlhf.models.sampling import Sampling
from minirlhf.models.transformer import CausalLM
from minirlhf.rewards import load
from minirlhf.rewards.parse import locate, parse_source
from minirlhf.rewards.source import RewardSource, as_scores
from minirlhf.run import flags
from minirlhf.run.machine import choose_device, choose_dtype
from minirlhf.setup.common import check_base
from minirlhf.setup.policy import check_models, fits_scorers
from minirlhf.setup.policy_data import Data, longer_prompts, prompt_room
from minirlhf.tools.sampling_settings import BestOfConfig
from minirlhf.tools.unfinished import begin, facts_of, outcomes

SAME = "whose responses all score the same"
ALONE = "with one response alone that could be chosen"
NONE_ENDED = "without a response that has a text and an end"
NONE_REACHES = "without a response that reaches --threshold"
NONE_BELOW = "without a response below --threshold"


class Response(NamedTuple):
    text: str
    score: float
    finish_reason: str  # eos | stop | length

    @property
    def why_not(self) -> str:
        """Why it is never chosen; "" where it may be."""
        if self.finish_reason == "length":
            return "cut by --max-new-tokens"
        return "" if self.text.strip() else "without a text"


# ------------------------------------------------------------------------------------- the choice


def ranked(responses: list[Response]) -> list[Response]:
    """Those that may be chosen, the best first, each text once; of equal scores the first drawn."""
    first: dict[str, Response] = {}
    for response in responses:
        if not response.why_not:
            first.setdefault(response.text, response)
    return sorted(first.values(), key=lambda response: -response.score)


def best(responses: list[Response], threshold: float | None, keep: int) -> list[Response] | str:
    """The best response, or the `keep` best of those that reach a threshold; or why there is none.
    Without a threshold a best response is better than another one.

    >>> said = [Response("a", 1.0, "eos"), Response("b", 0.0, "eos"), Response("c", 2.0, "length")]
    >>> best(said, None, 1)[0].text, best(said, 0.5, 8)[0].text, best(said, 1.5, 1)
    ('a', 'a', 'without a response that reaches --threshold')
    """
    found = ranked(responses)
    if not found:
        return NONE_ENDED
    if threshold is None:
        return _no_better(found) or found[:1]
    return [response for response in found[:keep] if response.score >= threshold] or NONE_REACHES


def pair(responses: list[Response], threshold: float | None) -> tuple[Response, Response] | str:
    """(the best response, the worst one), which a threshold lies between; or why there is none."""
    found = ranked(responses)
    if not found:
        return NONE_ENDED
    chosen, rejected = found[0], found[-1]
    if why := _no_better(found):
        return why
    if threshold is not None and chosen.score < threshold:
        return NONE_REACHES
    if threshold is not None and rejected.score >= threshold:
        return NONE_BELOW
    return chosen, rejected


def _no_better(found: list[Response]) -> str:
    """Why the best of these is better than none of the others; "" where it is."""
    if len(found) == 1:
        return ALONE
    return SAME if found[0].score == found[-1].score else ""


def rows_of(prompt: Prompt, responses: list[Response], config: BestOfConfig) -> list[dict] | str:
    """The rows that a prompt gives, or why it gives none."""

    def part(response: Response) -> str | list[dict]:
        is_text = isinstance(prompt.text, str)
        return response.text if is_text else [{"role": "assistant", "content": response.text}]

    told = {name: prompt.columns[name] for name in ARGUMENTS if name in prompt.columns}
    if not config.pairs:
        found = best(responses, config.threshold, config.best)
        return found if isinstance(found, str) else [
            {"prompt": prompt.text, "completion": part(one), "score": one.score} | told
            for one in found
        ]
    found = pair(responses, config.threshold)
    if isinstance(found, str):
        return found
    chosen, rejected = found
    return [{"prompt": prompt.text, "chosen": part(chosen), "rejected": part(rejected),
             "chosen_score": chosen.score, "rejected_score": rejected.score} | told]


# ------------------------------------------------------------------------------------ the responses


def responses_of(
    lm: CausalLM, tokenizer: Tokenizer, prompts: list[Prompt], reward: RewardSource,
    config: BestOfConfig, start: int = 0,
) -> Iterator[list[Response]]:
    """Yields the scored responses to each prompt, from number `start` on."""
    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_k, config.top_p,
                        config.min_p, stop_strings=config.stop)
    columns, samples = columns_of(prompts), config.samples
    abreast = max(1, config.batch_size // samples)  # prompts
    for at in range(start, len(prompts), abreast):
        some = [prompt for prompt in prompts[at : at + abreast] for _ in range(samples)]
        keys = streams.key(config.seed, "sample", at * samples + torch.arange(len(some)))
        batch, _ = sample_rollout(lm, some, keys, sampling, tokenizer, config.batch_size, columns)
        scores = as_scores(reward(batch), batch, some[0].where).sums.tolist()
        rows = zip(batch.completions, scores, batch.finish_reasons, strict=True)
        responses = [Response(*row) for row in rows]
        yield from (responses[i : i + samples] for i in range(0, len(some), samples))


def usable(
    tokenizer: Tokenizer, answers: Callable[[Prompt], Prompt] | None
) -> Callable[[Prompt], Prompt]:
    """The check that a prompt's text, which is all that is written of it, has its ids again.

    Args:
        answers: a further check.
    """

    def check(prompt: Prompt) -> Prompt:
        if not isinstance(prompt.text, str) and prompt.text[-1]["role"] == "assistant":
            do = "remove that turn: a completion is a turn of its own"
            raise UserError(prompt.where, "the last turn is the assistant's", do)
        if encoded_text(tokenizer, prompt) != prompt.ids:
            do = "give texts or messages, and no --rendered"
            raise UserError(prompt.where, "its ids are not those of its text", do)
        return prompt if answers is None else answers(prompt)

    return check


# ------------------------------------------------------------------------- what becomes of prompts


def finish(partial: Path, out: Path, config: BestOfConfig) -> None:
    """Writes the rows of all prompts, and tells what became of them.

    Raises:
        UserError: there are none.
    """
    why, left, scores, tops, count = Counter(), Counter(), [], [], 0
    written = out.with_name(f"{atomic.TEMPORARY}{out.name}")
    atomic.discard(written)
    for done in outcomes(partial):
        scores.append(done["mean"])
        tops.append(done["best"])
        left.update(done["left"])
        why.update([done["why"]] if done["why"] else [])
        for row in done["rows"]:
            atomic.append_line(written, json.dumps(row, ensure_ascii=False))
            count += 1
    print(f"{len(scores):,} prompts, {len(scores) * config.samples:,} responses: "
          f"mean score {fsum(scores) / len(scores):.4f}, of each prompt's best "
          f"{fsum(tops) / len(tops):.4f}")
    for reason, n in sorted(left.items()):
        print(f"never chosen: {n:,} responses {reason}")
    for reason, n in sorted(why.items()):
        print(f"no row: {n:,} prompts {reason}")
    if not count:
        atomic.discard(partial)
        raise UserError(out, "would have no row", "give more --samples, or another --threshold")
    if out.exists():
        raise UserError(out, "is there by now", "move it away; then the same command goes on")
    atomic.replace_file(written, out)
    atomic.discard(partial)
    print(f"{out}: {count:,} {'pairs' if config.pairs else 'rows'}")


def outcome(at: int, prompt: Prompt, responses: list[Response], config: BestOfConfig) -> dict:
    """What is kept of a prompt."""
    rows, scores = rows_of(prompt, responses, config), [one.score for one in responses]
    why, rows = (rows, []) if isinstance(rows, str) else ("", rows)
    left = Counter(one.why_not for one in responses if one.why_not)
    return {"at": at, "rows": rows, "why": why, "left": left,
            "mean": fsum(scores) / len(scores), "best": max(scores)}


class Start(NamedTuple):
    """What a command begins with, before the language model is loaded."""

    tokenizer: Tokenizer
    prompts: list[Prompt]
    reward: RewardSource
    facts: dict


def look(config: BestOfConfig, folder: Path, dtype: torch.dtype, device: str) -> Start:
    """Refuses what cannot work, the cheapest first, and loads what scores."""
    tokenizer = load_tokenizer(folder)
    specs = [parse_source(source) for source in config.reward]
    places = [place for spec in specs if (place := locate(spec, config.base)) is not None]
    scorers = [place for place in places if place.is_dir()]
    check_base(config, folder, *scorers)
    check_models(config, [folder], [], scorers, tokenizer)
    same = [place for place in scorers if not load.reencoded(place, tokenizer)]
    use = usable(tokenizer, load.check_answers(specs))
    fits = fits_scorers(config, scorers, tokenizer)
    room = prompt_room(config, [folder, *same])
    prompts, report = load_prompts(
        config.data, tokenizer, room, config.overlong, RowPolicy.of(config),
        lambda prompt: fits(use(prompt)), longer=longer_prompts(config, room),
    )
    print(report)
    data = Data(prompts[: config.limit], {}, [], {}, [])
    for line in pretrained.remarks([folder, *scorers], dtype):
        print(f"warning: {line}")
    ran: dict[str, str] = {}

    def load_model(place: Path) -> RewardModel:
        return pretrained.load_reward_model(place, dtype, device)

    reward = load.load_reward(config, tokenizer, load_model, config.micro_batch_tokens,
                              data.columns, ran=ran, base=config.base,
                              tried=load.trial(data.prompts, tokenizer))
    facts = facts_of(config, [Path(config.data), folder, *places], ran)
    return Start(tokenizer, data.prompts, reward, facts)


def main(argv: list[str] | None = None) -> int:
    config = flags.parse(BestOfConfig, argv, "minirlhf best-of")
    device, dtype = choose_device(config.device), choose_dtype(config.dtype)
    folder, out = folders.resolve(config.model, base=config.base), Path(config.out)
    start = look(config, folder, dtype, device)
    total, partial = len(start.prompts), out.with_name(f"{out.name}.partial")
    at = begin(partial, start.facts)
    if at:
        print(f"goes on after {at:,} of {total:,} prompts")
    lm = pretrained.load_pretrained(folder, dtype, device)
    left = responses_of(lm, start.tokenizer, start.prompts, start.reward, config, at)
    bar = tqdm(desc="best-of", total=total, initial=at, disable=not sys.stderr.isatty())
    try:
        with interrupt.listening(), bar:
            for responses in left:
                kept = outcome(at, start.prompts[at], responses, config)
                atomic.append_line(partial, json.dumps(kept))
                at += 1
                bar.update()
    except Stopped:
        print(f"stopped after {at:,} of {total:,} prompts: the same command goes on from there")
        return STOPPED
    finish(partial, out, config)
    return OK


if __name__ == "__main__":
    sys.exit(run(main))
