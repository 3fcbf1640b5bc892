"""A table of samples: the same prompts with the same random keys while the policy learns."""

import torch

from minirlhf import streams
from minirlhf.batches.collect import columns_of, sample
from minirlhf.data.examples import Prompt
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.errors import printable
from minirlhf.models.sampling import Sampling
from minirlhf.models.transformer import CausalLM
from minirlhf.rewards.source import RewardSource, as_scores
from minirlhf.run.checkpoint import TrainState
from minirlhf.run.folder import Run
from minirlhf.run.terminal import columns, fit


def sample_table(
    lm: CausalLM, step: int, prompts: list[Prompt], reward: RewardSource, tokenizer: Tokenizer,
    sampling: Sampling, count: int, rows_at_once: int, seed: int,
) -> list[dict]:
    """Responses to the first `count` prompts; at every call only the policy `lm` differs."""
    fixed = prompts[:count]
    keys = streams.key(seed, "sample table", torch.arange(len(fixed)))
    completions, _ = sample(
        lm, fixed, keys, sampling, tokenizer, rows_at_once, columns_of(prompts)
    )
    where = f"samples at step {step}"
    scores = as_scores(reward(completions), completions, where).sums.tolist()
    return [
        {"step": step, "kind": "sample", "prompt": prompt, "response": text,
         "finish_reason": reason, "score": value}
        for prompt, text, reason, value in zip(
            completions.prompts, completions.completions, completions.finish_reasons, scores,
            strict=True)
    ]


def show_samples(r: Run, state: TrainState, rows: list[dict], number: str = "score") -> None:
    """The table on the console, each response behind its number, and in samples.jsonl."""
    lines, room = [f"  samples at step {state.step}"], columns()
    for row in rows:
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        shown = f"{printable(prompt, 60)} | {printable(row['response'], 160)}"
        line = f"  {row[number]:>8.3f}  {shown}"
        lines.append(fit(line, room).rstrip() if room else line)
    r.display.samples(state.step, lines, rows)
    r.write_samples(state, rows)
