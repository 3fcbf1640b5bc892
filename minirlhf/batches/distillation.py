"""The pass of distillation: student and teacher read the same responses, the student's own.

Shapes: N response tokens of a micro-batch, row by row, D and D' hidden sizes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf.batches.rollouts import Rollout, lm_states
from minirlhf.models.alignment import check_known
from minirlhf.models.divergence import token_divergence
from minirlhf.models.transformer import CausalLM


class BothStates(NamedTuple):
    """What two models have read before each response token."""

    student: Tensor  # (N, D), with its gradient
    teacher: Tensor  # (N, D')


def both_states(student: CausalLM, teacher: CausalLM, micro: Rollout) -> BothStates:
    """One forward pass of each over the same micro-batch.

    Raises:
        UserError: a token was sampled that the teacher does not have.
    """
    check_known(micro.tokens, teacher.config.vocab_size, "the teacher")
    with torch.no_grad():
        theirs = lm_states(teacher, micro)
    return BothStates(lm_states(student, micro), theirs)


def divergence_of(
    student: CausalLM, teacher: CausalLM, states: BothStates, gkd_beta: float, temperature: float
) -> Tensor:
    """(N,) nats: how far the student's next-token distributions lie from the teacher's.

    Over all words, also where top-k and the like left few of them to sample from: no gradient
    passes through sampling, which only decides what both models read.

    Args:
        gkd_beta: as in `token_divergence`: 1 KL(student || teacher), 0 KL(teacher || student).
        temperature: of both distributions.
    """
    return token_divergence(student, states.student, teacher, states.teacher, gkd_beta, temperature)
