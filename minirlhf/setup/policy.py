"""What PPO and GRPO do alike before their loops: they look at models and prompts and refuse what
cannot work, then load rewards and what evaluates the policy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from minirlhf.batches.rollouts import RolloutBuffer
from minirlhf.data.ending import tail_of
from minirlhf.data.examples import Prompt, encoded_text
from minirlhf.data.parts import Useless
from minirlhf.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_files
from minirlhf.equations.scores import EndRule, end_rule
from minirlhf.errors import UserError
from minirlhf.evaluation.policy import PolicyEvaluation, evaluate_policy
from minirlhf.evaluation.samples import sample_table
from minirlhf.files.folders import resolve
from minirlhf.models import pretrained
from minirlhf.models.heads import RewardModel, reads_whole
from minirlhf.models.int8 import Int8LM
from minirlhf.models.sampling import Sampling
from minirlhf.models.transformer import CausalLM
from minirlhf.rewards import load, parse
from minirlhf.rewards.model import scores_read
from minirlhf.rewards.parse import Spec
from minirlhf.rewards.source import RewardSource
from minirlhf.run.folder import Run
from minirlhf.setup.common import check_base
from minirlhf.setup.groups import TrainingSettings
from minirlhf.setup.policy_data import Data, prompt_room, read_prompts
from minirlhf.setup.policy_settings import (
    EndSettings,
    PolicyInputSettings,
    RolloutSettings,
    SamplerSettings,
)
from minirlhf.setup.roles import load_scorer, one_trunk, share_weights, shares_trunk
from minirlhf.setup.training import TrainingRun, check_tokenizer

# ---------------------------------------------------------------------- looking, before any loading


def check_models(
    config: PolicyInputSettings, lms: Sequence[Path], critics: Sequence[Path],
    scorers: Sequence[Path], tokenizer: Tokenizer,
) -> None:
    """What can be known of the models before any weight is read.

    Args:
        lms: the policy, and its reference where it has one.
        critics, scorers: reward models, none or one of the first.
    """
    for lm in lms:
        pretrained.without_weights(lm)
    for flag, folders in ("--ref", lms[1:]), ("--critic", critics):
        for folder in folders:
            check_tokenizer(f"{flag} {folder}", folder, tokenizer)
    check_ends(config, tokenizer)
    for reward_model in (*critics, *scorers):
        pretrained.without_weights(reward_model, reward=True)


def check_ends(config: RolloutSettings, tokenizer: Tokenizer) -> None:
    """Refuses a policy whose responses could never end."""
    tokenizer.check_stops(config.stop)
    if not tokenizer.eos_ids and not config.stop:
        what = "names no eos token, so that no response could end"
        do = "set eos_token in tokenizer_config.json, or give --stop"
        raise UserError(tokenizer.folder, what, do)


def fits_scorers(
    config: PolicyInputSettings, scorers: Sequence[Path], policy: Tokenizer
) -> Callable[[Prompt], Prompt]:
    """What gives back a prompt that reward models have room for, with its response and what stands
    behind it.

    How many tokens a response has once it is re-encoded is not known before it is sampled: room is
    asked for as many as the policy may sample, and for the tail of the template where messages are
    read to the end of their text.

    Args:
        policy: its tokenizer; a reward model with another one re-encodes texts.
    Raises:
        UserError: strings are rendered already, and a reward model has another tokenizer.
    """
    readers = []
    for folder in scorers:
        tokenizer, model = load_tokenizer(folder), pretrained.read_config(folder)
        again = tokenizer.fingerprint != policy.fingerprint
        if config.rendered and again:
            what = f"the names of tokens are the policy's, --reward {folder} has another tokenizer"
            raise UserError("--rendered", what, "give prompts as messages, which it renders itself")
        whole = reads_whole(model.source, folder / "config.json")
        tail = len(tokenizer.encode_marked(tail_of(tokenizer))) if whole else 0
        readers.append((folder, tokenizer if again else None, model.longest_row, tail))

    def fits(prompt: Prompt) -> Prompt:
        new = config.max_new_tokens
        for folder, own, most, tail in readers:
            try:
                length = len(encoded_text(own, prompt) if own else prompt.ids)
            except UserError as error:  # its template refuses the prompt
                raise UserError(prompt.where, str(error)) from None
            behind = 0 if isinstance(prompt.text, str) else tail
            if length + new + behind <= most:
                continue
            if config.overlong == "drop":
                raise Useless(f"--reward {folder} has no room for it and its response")
            what = f"{length} tokens as --reward {folder} reads them, {new} new"
            what += f" and {behind} behind these" if behind else ""
            do = f"it reads {most}: lower --max-new-tokens, or leave such prompts out by "
            do += "--overlong drop or a lower --max-prompt-length"
            raise UserError(prompt.where, what, do)
        return prompt

    return fits


class Start(NamedTuple):
    """All that a run starts from: found, checked and, of its data, read. No weight is loaded."""

    folder: Path  # of the policy
    ref_folder: Path | None  # the policy's where no --ref is given; None: there is no reference
    critic: list[Path]  # none or one
    scorers: list[Path]  # the reward models of --reward
    specs: list[Spec]  # of --reward
    tokenizer: Tokenizer
    data: Data
    inputs: dict[str, list]  # setting -> files and folders that it names

    @property
    def lms(self) -> list[Path]:
        """Of the policy, and of its reference where it has one."""
        return [self.folder, *([] if self.ref_folder is None else [self.ref_folder])]


def look(config: PolicyInputSettings, critic: str | None = None, refers: bool = True) -> Start:
    """What a run starts from; refuses all that can be refused before anything is loaded, the
    cheapest first.

    Args:
        critic: the reward model that a critic starts from.
        refers: whether the run has a reference.
    """
    base = config.base
    folder = resolve(config.model, base=base)
    ref_folder = (resolve(config.ref, base=base) if config.ref else folder) if refers else None
    tokenizer = load_tokenizer(folder)
    critics = [] if critic is None else [resolve(critic, base=base)]
    specs = [parse.parse_source(source) for source in config.reward]
    places = [parse.locate(spec, base) for spec in specs]
    scorers = [place for place in places if place is not None and place.is_dir()]
    refs = [ref_folder] if refers else []
    check_base(config, folder, *refs, *critics, *scorers)
    check_models(config, (folder, *refs), critics, scorers, tokenizer)
    same = [place for place in scorers if not load.reencoded(place, tokenizer)]
    room = prompt_room(config, (folder, *refs, *critics, *same))
    fits, answers = fits_scorers(config, scorers, tokenizer), load.check_answers(specs)
    finish = fits if answers is None else lambda prompt: fits(answers(prompt))
    data = read_prompts(config, tokenizer, room, finish)
    inputs = {**data.files, "reward": [place for place in places if place], "ref": refs,
              "model": tokenizer_files(folder)}
    return Start(folder, ref_folder, critics, scorers, specs, tokenizer, data, inputs)


def own_trunks(
    config: TrainingSettings, start: Start, scorers: Sequence[Path]
) -> list[Path]:
    """Those of these reward models that do not lie over the policy's weights."""
    policy = start.folder
    return [each for each in scorers if not one_trunk(config, policy, each, reward=True)]


def own_frozen(config: TrainingSettings, start: Start) -> list[Path]:
    """The frozen models of a run that do not lie over the policy's weights."""
    ref, policy = start.ref_folder, start.folder
    apart = ref is not None and not one_trunk(config, policy, ref)
    return [*own_trunks(config, start, start.scorers), *([ref] if apart else [])]


# ----------------------------------------------------------------------------------------- loading


def offload_frozen(
    config: PolicyInputSettings, policy: nn.Module, frozen: list[tuple[nn.Module, Path]]
) -> None:
    """With --offload-frozen, frees these models, loaded from these folders, until they are used;
    one that lies over the policy's weights takes no memory of its own.

    Args:
        config: has PolicyTrainingSettings too.
    """
    for model, folder in frozen:
        if config.offload_frozen and not share_weights(model, policy):
            pretrained.offload(model, folder)


class Rewards(NamedTuple):
    source: RewardSource
    models: list[tuple[RewardModel, Path]]  # that it reads, with their folders
    facts: dict[str, str]  # what is told of them


def load_rewards(
    config: PolicyInputSettings, r: Run, start: Start, policy: Callable[[], CausalLM],
    tokenizer: Tokenizer, data: Data, dtype: torch.dtype, device: str,
) -> Rewards:
    """All that --reward names; what its functions ran becomes an input of the run.

    Args:
        config: has PolicyTrainingSettings too.
        policy: gives the policy. It is asked for where a reward model lies over its weights: what
            can be refused of a function is refused before any weight is read.
        tokenizer, data: of a dry run its own.
    """
    models: list[tuple[RewardModel, Path]] = []

    def load_model(folder: Path) -> RewardModel:
        shares = shares_trunk(config, start.folder, folder, reward=True)
        of_policy = policy() if shares else None
        model = load_scorer(config, of_policy, start.folder, folder, dtype, device)
        models.append((model, folder))
        return model

    source = load.load_reward(
        config, tokenizer, load_model, config.micro_batch_tokens, data.columns,
        r.folder / "rewards.jsonl", r.sums, config.base, load.trial(data.prompts, tokenizer),
    )
    r.inputs["reward"] += r.sums.keys() - set(map(str, r.inputs["reward"]))
    prompts = [prompt.text for prompt in data.every_prompt]
    facts = load.facts(start.specs, tokenizer, prompts, config.base)
    for model, place in models:
        key = "scores read" if len(models) == 1 else f"scores read by {place.name}"
        facts[key] = scores_read(model, load_tokenizer(place))
    return Rewards(source, models, facts)


@dataclass
class PolicyRun(TrainingRun[Prompt]):
    """A run that learns from what its policy writes, ready to begin; its rows are prompts."""

    lm: CausalLM  # the policy
    reward: RewardSource
    ref: CausalLM | None  # None where there is none
    measure: Callable[[RolloutBuffer], None]  # fills log-probs, as training does it

    @property
    def rows_at_once(self) -> int:
        """No more than in a training step, so that no evaluation takes more memory than one."""
        return min(self.config.rollout_batch_size, self.config.rollout_rows)

    def evaluate(self, prompts: list[Prompt], baseline: list[float] | None) -> PolicyEvaluation:
        """Answers held-out prompts; see `evaluate_policy`."""
        config = self.config
        return evaluate_policy(
            self.lm, prompts, self.reward, self.measure, self.tokenizer, sampling_of(config),
            config.seed, self.rows_at_once, config.micro_batch_size, config.micro_batch_tokens,
            baseline,
        )

    def sample_table(self) -> list[dict]:
        """Responses to the first prompts of the data."""
        config = self.config
        return sample_table(self.lm, self.state.step, self.rows, self.reward, self.tokenizer,
                            sampling_of(config), config.sample_prompts, self.rows_at_once,
                            config.seed)

    def export_best(self) -> None:
        """Writes the policy to best/, its adapters to best-adapter/."""
        self.export(self.lm, "best-adapter", "best")


def sampling_of(config: RolloutSettings) -> Sampling:
    """How responses are drawn."""
    return Sampling(
        config.max_new_tokens, config.temperature, config.top_k, config.top_p, config.min_p,
        stop_strings=config.stop, min_new_tokens=config.min_new_tokens,
    )


def sampler_of(lm: CausalLM, config: SamplerSettings) -> CausalLM:
    """What responses are drawn from: the policy, or its copy in bytes."""
    return Int8LM(lm) if config.rollout_bits else lm


def check_sampler(config: SamplerSettings, device: str) -> None:
    if config.rollout_bits and torch.device(device).type != "cpu":
        what = f"is {config.rollout_bits}, and the device is {device}"
        raise UserError("--rollout-bits", what, "int8 is for sampling on a CPU: leave it out")


def rule_for_truncated(config: EndSettings) -> EndRule:
    """What becomes of the score of a response that the length limit ended."""
    return end_rule(config.missing_eos, config.missing_eos_penalty, config.max_new_tokens,
                    config.missing_eos_buffer)
