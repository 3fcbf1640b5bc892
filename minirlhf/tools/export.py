"""A checkpoint of a run as a folder that others read: `minirlhf export RUN --merge` or `--adapter`.

A run leaves its last model by itself; this is for one that has not ended, an earlier step, or with
`--best-policy` the policy that --keep-best kept. In a run's place may stand an adapter, of peft for
one, to be merged into its base. What is written is there whole, under its name, or not at all.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from minirlhf.batches.preferences import unread_end
from minirlhf.data.tokenizer import load_tokenizer
from minirlhf.errors import OK, UserError, run
from minirlhf.files import atomic, folders
from minirlhf.files.reading import read_json
from minirlhf.models import pretrained
from minirlhf.models.heads import RewardModel, ValueHeadModel
from minirlhf.models.lora import has_lora, merge_lora
from minirlhf.models.peft_files import load_adapter
from minirlhf.run import flags
from minirlhf.run.checkpoint import load_weights, newest_commit
from minirlhf.run.machine import choose_dtype
from minirlhf.run.settings import settings_of
from minirlhf.setup.common import base_name, use_of_adapter, write_adapter, write_model
from minirlhf.setup.distill_settings import DistillConfig
from minirlhf.setup.dpo_settings import DPOConfig
from minirlhf.setup.groups import TrainingSettings
from minirlhf.setup.grpo_settings import GRPOConfig
from minirlhf.setup.ppo_settings import PPOConfig
from minirlhf.setup.reward import load_start, write_reward_model
from minirlhf.setup.reward_settings import RewardConfig
from minirlhf.setup.roles import load_trained, with_adapters
from minirlhf.setup.sft_settings import SFTConfig
from minirlhf.tools.settings import ExportConfig

CONFIGS = {"sft": SFTConfig, "reward": RewardConfig, "dpo": DPOConfig, "ppo": PPOConfig,
           "grpo": GRPOConfig, "distill": DistillConfig}


def settings_in(place: Path, base: str | None) -> tuple[str, object]:
    """(recipe, config) of a run's last start; `base` in place of its own."""
    path = place / "run.json"
    if not path.is_file():
        raise UserError(place, "holds no run.json", "give the folder of a run")
    facts = read_json(path)
    recipe, values = (facts.get(n) if isinstance(facts, dict) else None
                      for n in ("recipe", "settings"))
    if recipe not in tuple(CONFIGS) or not isinstance(values, dict):
        raise UserError(path, "is not of a run", "give the folder of a run")
    known = settings_of(CONFIGS[recipe])
    given = {name: known[name].from_file(value) for name, value in values.items() if name in known}
    config = CONFIGS[recipe](**given | ({} if base is None else {"base": base}))
    if config.model is None:
        raise UserError(path, "is of a model that began with random weights",
                        "let the run end: its model is in the folder model")
    return recipe, config


def merge_adapter(asked: ExportConfig, place: Path) -> None:
    """Writes an adapter's folder as the model that it makes of its base."""
    if not asked.merge or asked.best_policy or asked.step is not None:
        raise UserError(place, "is an adapter", "give --merge alone")
    folder, out = folders.resolve(place, base=asked.base), new_folder(asked, place / "merged")
    tokenizer, dtype = load_tokenizer(folder), choose_dtype("auto")
    if pretrained.stored_head(folder) is None:
        write = partial(write_model, pretrained.load_pretrained(folder, dtype), tokenizer)
    else:
        write = partial(write_reward_model, pretrained.load_reward_model(folder, dtype), tokenizer)
    atomic.write_folder(write, out)
    print(f"model of {place} in {out}")


def export_best(asked: ExportConfig, place: Path) -> None:
    """Writes the best policy of a run, which lies in its best-adapter/ or best/."""
    _, config = settings_in(place, asked.base)
    kept = place / ("best-adapter" if config.lora_rank else "best")
    if not kept.is_dir():
        do = "--keep-best of ppo and grpo keeps one; of a checkpoint give the --step"
        raise UserError(place, f"has no {kept.name}", do)
    if asked.adapter and not config.lora_rank:
        raise UserError("--adapter", f"{place} trained all weights", "give --merge")
    out = new_folder(asked, place / f"{'adapter' if asked.adapter else 'model'}-best")
    folder, dtype = folders.resolve(kept, base=asked.base), choose_dtype(config.dtype)
    tokenizer = load_tokenizer(folder)
    if config.lora_rank:  # its trunk as it was trained on, in --trunk-bits
        base = pretrained.load_pretrained(folder.base, dtype, trunk_bits=config.trunk_bits)
        lm = load_adapter(base, folder)
        lm = lm if asked.adapter else merge_lora(lm)
    else:
        lm = pretrained.load_pretrained(folder, dtype)
    write = partial(write_adapter, config=config) if asked.adapter else write_model
    tell(asked, config, "the best policy", out, partial(write, lm, tokenizer))


def tell(
    asked: ExportConfig, config: TrainingSettings, what: str, out: Path,
    write: Callable[..., None],
) -> None:
    """Writes a folder, and says what it is and who reads it."""
    atomic.write_folder(lambda folder: write(folder=folder), out)
    print(f"{'adapter' if asked.adapter else 'model'} of {what} in {out}")
    for line in use_of_adapter(out, base_name(config)) if asked.adapter else []:
        print(f"  {line}")


def new_folder(asked: ExportConfig, otherwise: Path) -> Path:
    out = Path(asked.out or otherwise)
    if out.exists():
        raise UserError("--out", f"{out} exists", "give a new folder")
    return out


def main(argv: list[str] | None = None) -> int:
    asked = flags.parse(ExportConfig, argv, "minirlhf export")
    place = Path(asked.run)
    if (place / folders.ADAPTER).exists():
        merge_adapter(asked, place)
        return OK
    if asked.best_policy:
        export_best(asked, place)
        return OK
    recipe, config = settings_in(place, asked.base)
    if asked.adapter and not config.lora_rank:
        raise UserError("--adapter", f"{place} trained all weights", "give --merge")
    name = None if asked.step is None else f"step-{asked.step:08d}"
    commit, _ = newest_commit(place / "checkpoints", name)
    if commit is None:
        raise UserError(place, "holds no checkpoint", "begin the run first")
    kind = "adapter" if asked.adapter else "model"
    out = new_folder(asked, place / f"{kind}-{commit.name}")
    folder, dtype = folders.resolve(config.model, base=config.base), choose_dtype(config.dtype)
    tokenizer = load_tokenizer(folder)
    if recipe == "reward":
        model = load_start(config, unread_end(pretrained.read_config(folder), tokenizer), dtype)
        if config.lora_rank and not has_lora(model):
            with_adapters(config, model)
    else:
        model = load_trained(config, folder, dtype)
    whole, own_critic = model, recipe == "ppo" and config.critic is not None
    if recipe == "ppo":
        whole = ValueHeadModel(model)
        whole.v_head.requires_grad_(not own_critic)
    load_weights(whole, commit, all_of_it=not own_critic)
    if config.lora_rank and asked.merge:
        merge_lora(model)
    if isinstance(model, RewardModel):
        write = partial(
            write_reward_model, base=base_name(config), dropout=config.lora_dropout
        )
    else:
        write = partial(write_adapter, config=config) if asked.adapter else write_model
    tell(asked, config, commit.name, out, partial(write, model, tokenizer))
    return OK


if __name__ == "__main__":
    sys.exit(run(main))
