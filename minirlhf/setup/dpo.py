"""What a run of DPO or its family reads, refuses and loads: preferences, policy and reference."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from minirlhf import console
from minirlhf.batches.kept import KeptReference
from minirlhf.batches.preferences import kind_of, micro_batches, row_lengths
from minirlhf.batches.responses import (
    Example,
    KTOObjective,
    Objective,
    PairLoss,
    PairObjective,
    Reference,
    batches_of,
    mismatched,
    ref_logprobs,
    with_answers,
)
from minirlhf.data.batching import total_steps, training_batches
from minirlhf.data.examples import Pair
from minirlhf.data.rankings import load_preferences
from minirlhf.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_files
from minirlhf.data.unpaired import Unpaired, load_unpaired
from minirlhf.equations.dpo import (
    dpo_loss,
    hinge_dpo_loss,
    ipo_loss,
    orpo_loss,
    robust_dpo_loss,
    simpo_loss,
)
from minirlhf.errors import UserError
from minirlhf.files import folders
from minirlhf.files.sieve import Report, RowPolicy
from minirlhf.models import parallel, pretrained
from minirlhf.models.compiling import compile_blocks
from minirlhf.models.config import ModelConfig
from minirlhf.run.dry_run import DryRun
from minirlhf.run.machine import make_deterministic
from minirlhf.setup import longest, memory
from minirlhf.setup.common import check_base
from minirlhf.setup.dpo_settings import NO_REFERENCE, OF_MEANS, DPOConfig, beta_of, sft_coef_of
from minirlhf.setup.roles import load_reference, load_trained, one_trunk, trunk_facts
from minirlhf.setup.training import (
    TrainingRun,
    check_tokenizer,
    open_run,
    read_rows,
    ready,
)

UNREAD = "margin and chosen_probability: not read, the loss of a policy knows none"


def pair_loss_of(config: DPOConfig) -> PairLoss:
    """The loss of --loss with its numbers."""
    beta, smoothing = beta_of(config), config.label_smoothing
    match config.loss:
        case "sigmoid":
            return partial(dpo_loss, beta=beta, label_smoothing=smoothing)
        case "robust":
            return partial(robust_dpo_loss, beta=beta, label_smoothing=smoothing)
        case "ipo":
            return partial(ipo_loss, beta=beta)
        case "hinge":
            return partial(hinge_dpo_loss, beta=beta)
        case "simpo":
            return lambda chosen, rejected, *_: simpo_loss(
                chosen, rejected, beta, config.simpo_gamma
            )
    return lambda chosen, rejected, *_: orpo_loss(chosen, rejected)


def objective_of(config: DPOConfig) -> Objective:
    """What is minimised: of ORPO beta is the weight of its loss, of the others a part of it."""
    if config.loss == "kto":
        weights = config.desirable_weight, config.undesirable_weight
        return KTOObjective(beta_of(config), *weights, sft_coef_of(config))
    weight = beta_of(config) if config.loss == "orpo" else 1.0
    of_means = config.loss in OF_MEANS
    return PairObjective(pair_loss_of(config), of_means, weight, sft_coef_of(config))


@dataclass
class DPORun(TrainingRun[Example]):
    """A run that is ready to begin; its rows are pairs, ranked lists or single responses."""

    load_ref: Callable[[], Reference] | None  # None where the loss has no reference
    ref: Reference | None = None  # once it is prepared

    def prepare_reference(self) -> None:
        """Loads the reference, or computes all that the run will ask it for, and lets it go.

        What the run's folder has of it already is not computed again.

        Raises:
            Stopped: at a signal; what is computed is kept.
        """
        if self.load_ref is None or not self.config.cache_ref:
            self.ref = self.load_ref and self.load_ref()
            return
        config, r, loaded, seconds = self.config, self.run, None, []
        sums = [r.record.inputs[file] for file in r.record.named_by.get("ref", ())]
        identity = " ".join([*sums, config.dtype, str(config.compile)])
        self.ref = kept = KeptReference(r.folder / "reference.jsonl", identity)
        of_steps, held_out = self.asked()
        groups = of_steps + held_out
        counts = [len(micro_batches(group, config.micro_batch_tokens)) for group in groups]
        batches = (batch.texts for group in groups
                   for _, batch in batches_of(group, config.micro_batch_tokens))
        bars, hidden = console.bar_kind(), not console.has_bars()
        with bars(total=sum(counts), desc="reference", disable=hidden) as bar:
            for texts in kept.missing(batches):
                if loaded is None:
                    r.say(f"reference: {sum(counts):,} micro-batches are passed before step "
                          f"{self.state.step + 1}, known ones left out")
                    loaded = self.load_ref()
                started = time.perf_counter()
                kept.add(texts, loaded)
                seconds.append(time.perf_counter() - started)
                bar.update()
        if isinstance(r, DryRun):
            a_step = sum(counts[: len(of_steps)]) / self.steps  # passes
            sets = r.evaluations / longest.evaluations(r.steps, config.eval_every)
            passes = r.work * a_step + sets * sum(counts[len(of_steps) :])
            r.once_seconds = passes * sum(seconds) / len(seconds)

    def asked(self) -> tuple[list[list[Example]], list[list[Example]]]:
        """What the reference will be asked for: examples of each step from here on, and held-out
        ones; of KTO each with its mismatched ones."""
        config, rows, lengths = self.config, self.rows, row_lengths(self.rows)
        batches = training_batches(lengths, config.batch_size, config.seed, self.state.step)
        batches = islice(batches, self.steps - self.state.step)
        of_steps = [[rows[i] for i in batch.tolist()] for batch in batches]
        held_out = list(self.sets.values())
        if config.loss == "kto":
            most = int(lengths.max())
            of_steps = [g for group in of_steps for g in (mismatched(group, most), group)]
            held_out = [g for group in held_out for g in
                        (mismatched(group, int(row_lengths(group).max())), group)]
        return of_steps, held_out


def check_reference(config: DPOConfig, model: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The reference's config, of the policy's where none is named; refuses one that does not read
    what the policy does."""
    if config.ref is None:
        return model
    folder = folders.resolve(config.ref, base=config.base)
    pretrained.without_weights(folder)
    check_tokenizer(f"--ref {config.ref}", folder, tokenizer)
    ref = pretrained.read_config(folder)
    if ref.vocab_size < tokenizer.vocab_size:
        what = f"has {ref.vocab_size:,} tokens, the tokenizer {tokenizer.vocab_size:,}"
        raise UserError(f"--ref {config.ref}", what, "give a model that reads the same ids")
    return ref


def check_batches(config: DPOConfig, rows: list[Example]) -> None:
    """Refuses a single response at an epoch's end, which KTO would compare with itself."""
    steps = total_steps(len(rows), config.batch_size, config.epochs, config.steps)
    whole, left = divmod(len(rows), config.batch_size)
    if config.loss == "kto" and left == 1 and steps > whole:
        what = f"is {config.batch_size}: of {len(rows):,} responses one is left for a step"
        raise UserError("--batch-size", what, "kto compares it with others: use another")


def told_balance(config: DPOConfig, rows: list[Unpaired]) -> str:
    """How much the two kinds of responses weigh in all."""
    liked = sum(row.desirable for row in rows)
    weights = liked * config.desirable_weight, (len(rows) - liked) * config.undesirable_weight
    share = f" = {weights[0] / weights[1]:.2f}" if weights[1] else ""
    return f"{weights[0]:,g} : {weights[1]:,g}{share}, weighted; 1 to 1.33 is usual"


def load_run(config: DPOConfig) -> DPORun:
    """Refuses all that can be refused, the cheapest first, then loads the models."""
    r, device, dtype = open_run(config, "dpo")
    folder = folders.resolve(config.model, base=config.base)
    pretrained.without_weights(folder)
    tokenizer, model_config = load_tokenizer(folder), pretrained.read_config(folder)
    ref_config = check_reference(config, model_config, tokenizer)
    ref_folder = folder
    if config.ref is not None:
        ref_folder = folders.resolve(config.ref, base=config.base)
    check_base(config, folder, ref_folder)
    needs_ref = config.loss not in NO_REFERENCE
    r.inputs["model"] = tokenizer_files(folder)
    if needs_ref:
        r.inputs["ref"] = [ref_folder]

    def read(file: str) -> tuple[list[Example], Report]:
        load = load_unpaired if config.loss == "kto" else load_preferences
        examples, report = load(file, tokenizer, config.max_length, config.overlong,
                                RowPolicy.of(config), with_answers)
        if any(isinstance(e, Pair) and (e.margin, e.chosen_probability) != (0.0, 1.0)
               for e in examples):
            report.notes.append(UNREAD)
        return examples, report

    most = min(model_config.longest_row, ref_config.longest_row)
    config, rows = read_rows(r, config, read, longest.of_preferences, most)
    if not config.dry_run:
        check_batches(config, rows.train)
    make_deterministic(device)
    own = not needs_ref or one_trunk(config, folder, ref_folder)
    estimate = memory.of_dpo(config, model_config, None if own else ref_config, rows.tokens, dtype)
    facts = trunk_facts(config, folder, ref_folder if needs_ref else None)
    facts |= memory.announce(config, estimate, (folder, ref_folder), dtype, device)
    facts = {"loss": f"{config.loss}, beta {beta_of(config):g}",
             "reference": (config.ref or "the policy at step 0") if needs_ref else "none"} | facts
    if config.loss == "kto":
        facts = {"liked : others": told_balance(config, rows.train)} | facts
    lm = load_trained(config, folder, dtype)
    run = ready(config, r, lm, tokenizer, rows, kind_of(rows.train), facts, device)
    load_ref = partial(reference_of, run, folder, ref_folder, dtype, device) if needs_ref else None
    return DPORun(**vars(run), load_ref=load_ref)


def reference_of(
    run: TrainingRun[Example], start: Path, folder: Path, dtype: torch.dtype, device: str
) -> Reference:
    """The reference's log-probs, computed each time that they are asked for."""
    ref = load_reference(run.config, run.state.model, start, folder, dtype, device)
    if run.config.compile:
        compile_blocks(ref)
    parallel.wrap_frozen(ref, run.config.parallel, run.config.offload_params)
    return partial(ref_logprobs, ref)
