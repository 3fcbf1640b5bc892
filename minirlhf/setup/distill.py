"""What a run of distillation looks at, refuses and loads: prompts, student and teacher."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from minirlhf.data.batching import total_steps
from minirlhf.data.examples import Prompt
from minirlhf.data.split import NOT_READ
from minirlhf.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_files
from minirlhf.errors import UserError
from minirlhf.files.folders import resolve
from minirlhf.models import parallel, pretrained
from minirlhf.models.compiling import compile_blocks
from minirlhf.models.transformer import CausalLM
from minirlhf.run.dry_run import DryRun
from minirlhf.run.machine import make_deterministic
from minirlhf.setup import longest, memory
from minirlhf.setup.common import check_base
from minirlhf.setup.distill_settings import DistillConfig
from minirlhf.setup.policy import check_ends
from minirlhf.setup.policy_data import prompt_room, read_prompts
from minirlhf.setup.roles import load_trained
from minirlhf.setup.training import Rows, TrainingRun, check_tokenizer, open_run, ready


@dataclass
class DistillRun(TrainingRun[Prompt]):
    """A run that is ready to begin; its rows are prompts."""

    teacher: CausalLM


def check_teacher(
    config: DistillConfig, student: Path, teacher: Path, tokenizer: Tokenizer
) -> None:
    """Refuses a teacher that is the student, or reads other ids."""
    where = f"--teacher {config.teacher}"
    pretrained.without_weights(teacher)
    check_tokenizer(where, teacher, tokenizer, "the student")
    if teacher.resolve() == student.resolve():
        raise UserError(where, "is the student: nothing would be learned", "give another model")


def load_run(config: DistillConfig) -> DistillRun:
    """Refuses all that can be refused, the cheapest first, then loads the models."""
    r, device, dtype = open_run(config, "distill")
    folder, teacher_folder = (
        resolve(name, base=config.base) for name in (config.model, config.teacher))
    check_base(config, folder, teacher_folder)
    pretrained.without_weights(folder)
    tokenizer = load_tokenizer(folder)
    check_teacher(config, folder, teacher_folder, tokenizer)
    check_ends(config, tokenizer)
    r.inputs |= {"model": tokenizer_files(folder), "teacher": [teacher_folder]}
    room = prompt_room(config, (folder, teacher_folder))
    data = read_prompts(config, tokenizer, room, others=NOT_READ)
    if isinstance(r, DryRun):
        steps = total_steps(len(data.prompts), config.batch_size, config.epochs, config.steps)
        config, tokenizer, data = longest.of_prompts(
            r, replace(config, steps=steps), tokenizer, data
        )
    make_deterministic(device)
    shapes = pretrained.read_config(folder), pretrained.read_config(teacher_folder)
    estimate = memory.of_distill(config, *shapes, data.longest_prompt, dtype)
    folders = folder, teacher_folder
    facts = run_facts(config) | memory.announce(config, estimate, folders, dtype, device)
    student = load_trained(config, folder, dtype)
    rows = Rows(data.prompts, data.sets, data.reports, [])
    run = ready(config, r, student, tokenizer, rows, "prompts", facts, device)
    return DistillRun(**vars(run), teacher=load_teacher(config, teacher_folder, device, dtype))


def load_teacher(
    config: DistillConfig, folder: Path, device: str, dtype: torch.dtype
) -> CausalLM:
    """The model to learn from, frozen."""
    teacher = pretrained.load_pretrained(folder, dtype, device).requires_grad_(False)
    if config.compile:
        compile_blocks(teacher)
    parallel.wrap_frozen(teacher, config.parallel, config.offload_params)
    return teacher


def run_facts(config: DistillConfig) -> dict[str, object]:
    """What is about to happen, before it costs anything."""
    names = {1: "KL(student || teacher)", 0: "KL(teacher || student)"}
    mixed = f"generalised JSD, beta {config.gkd_beta:g}"
    return {
        "rows in a forward pass": f"at most {config.micro_batch_size}, "
        f"{config.micro_batch_tokens:,} tokens",
        "loss": names.get(config.gkd_beta, mixed) + ", the mean over response tokens",
        "teacher": config.teacher,
    }
