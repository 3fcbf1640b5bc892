"""A model of which each process holds a part: FSDP2, torch's `fully_shard`.

Of every parameter, its gradient and its moments each rank holds 1/N. Just before a block of the
transformer is passed its parameters are gathered, and given back behind it; in the backward pass
once more. What is in no block (embeddings, the last norm, heads) is there during the whole pass.
Zhao et al. 2023 (arXiv:2304.11277); ZeRO, Rajbhandari et al. 2020 (arXiv:1910.02054), stage 3.

Gathering is what all ranks do together, and a pass over rows is a root's forward: see `Passes`. Not
so decoding, whose steps differ in number from rank to rank: there `whole` gathers all weights once.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from minirlhf import ranks, shards
from minirlhf.models.transformer import Block

T = TypeVar("T")


class Sharded:
    """A model whose parameters are cut among the ranks, in place; its buffers stay whole.

    A model in half precision that is trained gets float32 masters, as `optim.MasterAdamW` makes
    them on one process: its shards are these, passes gather them in half precision, and gradients
    are summed in float32.

    Args:
        root: a `Passes` of the model.
        offload: keep the shards in the CPU's memory, and gather from there.
    """

    def __init__(self, model: nn.Module, root: nn.Module, offload: bool = False):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

        self.model, self.plain = model, _without_weights(model)
        halves = _widen(model)
        kind = torch.device(ranks.device()).type
        how = {"mesh": init_device_mesh(kind, (ranks.count(),)), "reshard_after_forward": True}
        if halves:
            dtype = next(iter(halves.values()))
            how["mp_policy"] = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        if offload:
            how["offload_policy"] = CPUOffloadPolicy()
        for block in [module for module in model.modules() if isinstance(module, Block)]:
            fully_shard(block, **how)
        self.root = fully_shard(root, **how)
        for name, parameter in model.named_parameters():
            if name in halves:
                parameter.of_passes = halves[name]

    def __call__(self, function: Callable[..., T], *args: object, **kwargs: object) -> T:
        return self.root(partial(_without_views, function), *args, **kwargs)

    def sync(self, now: bool) -> None:
        """Gradients are summed in every backward pass: added up on each rank they would be whole,
        and nothing of them sharded."""

    @contextmanager
    def whole(self, on_first: bool = False) -> Iterator[dict[nn.Module, nn.Module]]:
        """All weights on all ranks for a while: each module of the model -> one like it that no
        hook of FSDP belongs to. It may be copied, merged and called; what it learns is lost.

        Args:
            on_first: on rank 0 alone, and on its CPU, to be written; others get shapes.
        """
        pairs = list(zip(self.model.modules(), self.plain.modules(), strict=True))
        gather = shards.for_file if on_first else shards.whole
        try:
            for module, plain in pairs:
                for name, part in module.named_parameters(recurse=False):
                    full = gather(part.detach().to(shards.stored_dtype(part)))
                    if full.shape == part.shape:
                        setattr(plain, name, nn.Parameter(full, part.requires_grad))
            yield dict(pairs)
        finally:
            for module, plain in pairs:
                for name, part in module.named_parameters(recurse=False):
                    setattr(plain, name, _shape_of(part))


def _without_views(function: Callable[..., T], *args: object, **kwargs: object) -> T:
    """What a pass returns; FSDP's hooks are on these tensors, and it warns of views of others."""
    out = function(*args, **kwargs)
    if isinstance(out, Tensor):
        return out.clone()
    return type(out)(*(x.clone() if isinstance(x, Tensor) else x for x in out))


def _shape_of(parameter: nn.Parameter) -> nn.Parameter:
    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    return nn.Parameter(empty, parameter.requires_grad)


def _without_weights(model: nn.Module) -> nn.Module:
    """Another tree of the same modules, over the same buffers."""
    weights = {id(p): _shape_of(p) for p in model.parameters()}
    return copy.deepcopy(model, weights | {id(b): b for b in model.buffers()})


def _widen(model: nn.Module) -> dict[str, torch.dtype]:
    """Makes float32 of what is trained in half precision: name -> dtype before."""
    halves = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            halves[name] = parameter.dtype
            parameter.data = parameter.data.float()
    return halves
