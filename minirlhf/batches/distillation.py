"""The pass of distillation: student and teacher read the same responses, the student's own.

Shapes: N response tokens of a micro-batch, row by row, D and D' hidden sizes.
"""

import torch
from torch import Tensor

from minirlhf.batches.rollouts import Rollout, lm_states
from minirlhf.models.alignment import check_known, unpack
from minirlhf.models.divergence import token_divergence
from minirlhf.models.parallel import over_ranks, passed
from minirlhf.models.transformer import CausalLM


@over_ranks
def divergence_pass(
    student: CausalLM, teacher: CausalLM, micro: Rollout, temperature: float, *gkd_betas: float
) -> Tensor:
    """One forward pass of each over the same micro-batch: (b, R, K) nats, how far the student's
    next-token distributions lie from the teacher's by K divergences; 0 outside the mask.

    Over all words, also where top-k and the like left few of them to sample from: no gradient
    passes through sampling, which only decides what both models read.

    Args:
        temperature: of both distributions.
        gkd_betas: as in `token_divergence`: 1 KL(student || teacher), 0 KL(teacher || student).
    Raises:
        UserError: a token was sampled that the teacher does not have.
    """
    check_known(micro.tokens, teacher.config.vocab_size, "the teacher")
    with torch.no_grad():
        theirs = passed(lm_states, teacher, micro)  # (N, D')
    ours = lm_states(student, micro)  # (N, D)
    each = [token_divergence(student, ours, teacher, theirs, beta, temperature)
            for beta in gkd_betas]
    return unpack(torch.stack(each, 1), micro.response_mask)
