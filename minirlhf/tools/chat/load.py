"""What a chat begins with: its models, and what measures their answers."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from minirlhf.data.arguments import given_arguments
from minirlhf.data.tokenizer import Tokenizer, load_tokenizer
from minirlhf.errors import UserError, printable
from minirlhf.files import folders
from minirlhf.files.reading import read_json
from minirlhf.models import pretrained
from minirlhf.models.heads import RewardModel, ValueHeadModel
from minirlhf.models.stored_heads import VALUE_HEAD
from minirlhf.rewards.load import REFERENCES, load_reward
from minirlhf.rewards.parse import locate, parse_source
from minirlhf.rewards.source import RewardSource
from minirlhf.run.checkpoint import NUMBERS, load_weights, newest_commit
from minirlhf.run.machine import choose_dtype
from minirlhf.run.settings import validate
from minirlhf.setup.policy import Start
from minirlhf.setup.ppo import load_policy
from minirlhf.setup.ppo_settings import PPOConfig
from minirlhf.setup.training import check_tokenizer
from minirlhf.tools.chat.answer import Speaker
from minirlhf.tools.chat.heat import Gauge
from minirlhf.tools.export import settings_in
from minirlhf.tools.sample import sampling_of
from minirlhf.tools.sampling_settings import ChatConfig

NEEDS = {  # beside the model
    "reward": {"reward"}, "value": {"critic"}, "kl": {"ref"}, "logprob": set(),
    "advantage": {"reward", "critic", "ref"},
}


class Run:
    """The run that a folder is, or whose model it is.

    Attributes:
        values: its settings, by run.json; empty where no run is known.
    """

    def __init__(self, place: str):
        folder = Path(place)
        inner = (folder.parent,) if folder.name in ("model", "adapter") else ()
        found = (f for f in (folder, *inner) if (f / folders.RUN).is_file()
                 and not (f / "config.json").exists())
        self.folder = next(found, None)
        facts = {} if self.folder is None else read_json(self.folder / folders.RUN)
        values = facts.get("settings", {}) if isinstance(facts, dict) else None
        if not isinstance(values, dict):
            raise UserError(self.folder / folders.RUN, "is not of a run", "give a model's folder")
        self.recipe, self.values = facts.get("recipe"), values

    def near(self, name: object) -> str | None:
        """A folder that run.json names, seen from the working folder or from one around the run;
        a name that is in neither stays as it is."""
        if not isinstance(name, str):
            return None
        around = self.folder.resolve().parents
        places = [Path(name), *(place / name for place in around)]
        return next((str(place) for place in places if os.path.isdir(place)), name)

    def ppo(self, base: str | None) -> PPOConfig:
        """Its settings, of a run of PPO; its folders as they are found from here."""
        _, config = settings_in(self.folder, base)
        found = {n: self.near(getattr(config, n)) for n in ("model", "ref", "critic", "base")}
        config = replace(config, gradient_checkpointing=False, **found)
        validate(config)
        return config

    def start(self) -> str | None:
        """The model that its policy is compared with."""
        return self.near(self.values.get("ref") or self.values.get("model"))

    def rewards(self) -> tuple[str, ...]:
        """What scored its responses, where that is reward models and nothing else: code is run only
        where it is asked for."""
        named = self.values.get("reward")
        specs = [parse_source(str(one)) for one in named] if isinstance(named, list) else []
        if any(spec.kind != "model" for spec in specs):
            return ()
        weights = ("" if spec.weight == 1 else f"{spec.weight}*" for spec in specs)
        return tuple(w + self.near(spec.place) for w, spec in zip(weights, specs, strict=True))


class Loader:
    """Loads what a chat asks for; a reward model that several need, once."""

    def __init__(self, config: ChatConfig, dtype: torch.dtype, device: str):
        self.config, self.dtype, self.device = config, dtype, device
        self.scorer: Callable[[Path], RewardModel] = cache(
            lambda folder: pretrained.load_reward_model(folder, dtype, device))

    def look(self, place: str) -> tuple[Run, Path, Tokenizer]:
        """A model's folder, read as far as it costs nothing."""
        config, run = self.config, Run(place)
        needs = NEEDS.get(config.heat, set())
        folder = folders.resolve(place, base=config.base)
        pretrained.without_weights(folder)
        has_head = run.recipe == "ppo" or pretrained.stored_head(folder) == VALUE_HEAD
        if "critic" in needs and not has_head:
            do = "give the folder of a PPO run, whose checkpoints hold it; or --heat reward or kl"
            raise UserError(f"--heat {config.heat}", f"{place} has no value head", do)
        if "ref" in needs and not self.reference(run, folder):
            what = f"{place} names no model that it is compared with"
            raise UserError(f"--heat {config.heat}", what, "give --ref FOLDER")
        if "reward" in needs and not (config.reward or run.rewards()):
            raise UserError(f"--heat {config.heat}", "needs a reward", "give --reward SOURCE")
        for source in config.reward:
            spec = parse_source(source)
            if spec.kind == "rule" and spec.place in REFERENCES:
                do = "give a reward model or a function"
                raise UserError(f"--reward {spec.place}", "compares with an answer, and a chat has "
                                "none", do)
            locate(spec, config.base)
        return run, folder, load_tokenizer(folder)

    def reference(self, run: Run, folder: Path) -> str | Path | None:
        if self.config.ref is not None:
            return self.config.ref
        if run.folder is not None and (start := run.start()):
            return start
        return folder.base if isinstance(folder, folders.AdapterFolder) else None

    def speaker(
        self, name: str, run: Run, folder: Path, tokenizer: Tokenizer
    ) -> tuple[Speaker, Gauge | None, RewardSource | None]:
        """The model, what measures each of its tokens and what scores its answers."""
        config, policy = self.config, None
        is_chat = (tokenizer.has_template or config.chat) and not config.raw
        sampling, _ = sampling_of(config, folder, is_chat)
        needs = NEEDS.get(config.heat, set())
        if "critic" in needs:
            policy = self.policy(run, folder, tokenizer).eval().requires_grad_(False)
        lm = policy.lm if policy else pretrained.load_pretrained(folder, self.dtype, self.device)
        speaker = Speaker(name, folder, lm, tokenizer, sampling, is_chat,
                          given_arguments(config.template_kwargs), config.system or "")
        reward = self.reward(config.reward or (run.rewards() if "reward" in needs else ()),
                             tokenizer)
        if config.heat is None:
            return speaker, None, reward
        ref = None
        if "ref" in needs:
            place = folders.resolve(self.reference(run, folder), base=config.base)
            check_tokenizer(f"--ref {place}", place, tokenizer)
            ref = pretrained.load_pretrained(place, self.dtype, self.device)
        return speaker, Gauge(config.heat, lm, tokenizer, self.settings(run), policy, ref,
                              reward), reward

    def settings(self, run: Run) -> PPOConfig:
        """Of the run, with the KL coefficient that it had adapted; of any other model the defaults
        of PPO."""
        if run.recipe == "ppo":
            config = run.ppo(self.config.base)
            if config.kl_target is None or self.config.heat != "advantage":
                return config
            state = read_json(self.commit(run) / NUMBERS)
            coef = state.get("kl_coef") if isinstance(state, dict) else None
            config = replace(config, kl_coef=coef)
            validate(config)
            return config
        temperature = run.values.get("temperature", 1.0) if run.recipe == "grpo" else 1.0
        config = PPOConfig(model="-", data="-", out="-", reward=("-",), temperature=temperature)
        validate(config)
        return config

    def policy(self, run: Run, folder: Path, tokenizer: Tokenizer) -> ValueHeadModel:
        """The policy with its critic: of the run's newest checkpoint, or of a folder that has a
        value head beside its language model."""
        if run.recipe != "ppo":
            policy = ValueHeadModel(pretrained.load_pretrained(folder, self.dtype, self.device))
            pretrained.load_value_head(policy, folder)
            return policy
        config, commit = run.ppo(self.config.base), self.commit(run)
        critic = [] if config.critic is None else [folders.resolve(config.critic, base=config.base)]
        start = Start(folders.resolve(config.model, base=config.base), None, critic, [], [],
                      tokenizer, None, {})
        policy = load_policy(config, start, choose_dtype(config.dtype), self.device)
        load_weights(policy, commit)
        return policy.to(self.dtype)

    def commit(self, run: Run) -> Path:
        """The run's newest checkpoint."""
        commit, _ = newest_commit(run.folder / "checkpoints")
        if commit is None:
            raise UserError(run.folder, "holds no checkpoint, and its critic is nowhere else",
                            "give --heat reward, kl or logprob")
        return commit

    def reward(self, sources: tuple[str, ...], tokenizer: Tokenizer) -> RewardSource | None:
        if not sources:
            return None
        return load_reward(replace(self.config, reward=sources), tokenizer, self.scorer,
                           self.config.micro_batch_tokens, base=self.config.base)


def names_of(places: tuple[str, ...]) -> list[str]:
    """What the models are called: as few of the last parts of their folders as tell them apart.

    >>> names_of(("runs/sft/model", "runs/ppo")), names_of(("a/ppo", "b/ppo"))
    (['sft', 'ppo'], ['a/ppo', 'b/ppo'])
    """
    parts = [Path(place).parts for place in places]
    own = [one[:-1] if one[-1:] == ("model",) and len(one) > 1 else one for one in parts]
    sizes = range(1, max(map(len, own)) + 1)
    choices = (["/".join(one[-size:]) for one in own] for size in sizes)
    names = next((names for names in choices if len({*names}) == len(names)), places)
    return [printable(name, 80) for name in names]
