"""The demo's model in one step of each algorithm, and the same records as runs leave them."""

import json
from dataclasses import replace
from functools import cache

import pytest

from minirlhf.run.settings import as_dict
from minirlhf.tools.explain import tiny
from minirlhf.tools.explain.command import page_of
from minirlhf.tools.explain.record import Record
from minirlhf.tools.explain.settings import ExplainConfig
from tests.tiny_folders import write_lines

SAMPLES = {"ppo": 0, "grpo": 5, "reward": 1, "dpo": 2}


@cache
def record_of(algorithm: str) -> Record:
    return tiny.record(ExplainConfig(what=(algorithm,), sample=SAMPLES[algorithm]))


def told(record: Record, algorithm: str, **settings) -> str:
    config = ExplainConfig(**{"what": (algorithm,), "rows": None} | settings)
    return "\n".join(page_of(record, config).lines)


def write_run(folder, algorithm: str, step: int | None = None, **settings) -> str:
    """A run's folder with the rows of `record_of`, of one step and the one before it."""
    record = record_of(algorithm)
    config = replace(record.config, model=str(folder / "lm"), reward=("length:2",), **settings) \
        if algorithm in ("ppo", "grpo") else replace(record.config, model="m", **settings)
    folder.mkdir()
    facts = {"recipe": algorithm, "settings": as_dict(config)}
    (folder / "run.json").write_text(json.dumps(facts))
    kind = {"kind": "rollout"} if algorithm in ("ppo", "grpo") else {"set": "eval_"}
    last = record.config.steps
    rows = [{"step": n} | kind | {k: v for k, v in row.items() if k not in ("step", "logprobs")}
            for n in (last - 1, last) for row in record.rows]
    write_lines(folder / "samples.jsonl", rows)
    return str(folder)


@pytest.fixture(scope="session", autouse=True)
def records():
    """algorithm -> its record, made when it is asked for first; of a model that has read little."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "STEPS", 6)
        yield record_of
        tiny.world.cache_clear()
