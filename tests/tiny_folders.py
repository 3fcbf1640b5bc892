"""Tiny models and rows in folders, what a run leaves in its own, and a run that is rebuilt."""

import json
from pathlib import Path

import torch

from minirlhf.models.families import config_from_hf
from minirlhf.models.heads import RewardModel, initialize_score
from minirlhf.models.pretrained import save_pretrained
from minirlhf.models.transformer import CausalLM, initialize
from minirlhf.run.checkpoint import TrainState, load_checkpoint, save_checkpoint
from minirlhf.run.meters import Step


def random_lm(shape: dict, seed: int = 0, **changes) -> CausalLM:
    lm = CausalLM(config_from_hf({**shape, **changes}))
    return initialize(lm, torch.Generator().manual_seed(seed))


def save_lm(folder: Path, shape: dict, seed: int = 0, **changes) -> None:
    save_pretrained(random_lm(shape, seed, **changes), folder)


def save_scorer(folder: Path, shape: dict, seed: int = 0, head_seed: int = 1, **changes) -> None:
    scorer = RewardModel(random_lm(shape, seed, **changes))
    initialize_score(scorer, torch.Generator().manual_seed(head_seed))
    save_pretrained(scorer, folder, pad_token_id=1)


def write_lines(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def change_json(path: Path, **changes) -> None:
    """Some keys of a JSON file, which may not be there yet."""
    values = json.loads(path.read_text("utf-8")) if path.exists() else {}
    path.write_text(json.dumps(values | changes), encoding="utf-8")


def timeless(out: Path) -> list[dict]:
    """The metrics that a run logged, without its clock."""
    lines = read_lines(out / "metrics.jsonl")
    return [{name: x for name, x in line.items() if name != "clock"} for line in lines]


def leftovers(out: Path) -> list[str]:
    return [p.name for p in out.rglob("*") if p.name.startswith((".tmp", ".trash"))]


def rebuilt_at_each_step(fresh, steps_of, folder) -> tuple[list[Step], TrainState]:
    """Steps of a run whose generator is dropped at each yield, and whose state is then saved and
    loaded into a fresh one; the state at the end."""
    state, steps = fresh(), []
    while step := next(steps_of(state), None):
        steps.append(step)
        commit = save_checkpoint(state, folder)
        state = fresh()
        for parameter in filter(lambda p: p.requires_grad, state.model.parameters()):
            parameter.data.fill_(9.0)  # nothing but the checkpoint may matter
        load_checkpoint(state, commit)
    return steps, state
