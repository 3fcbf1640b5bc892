"""Reductions over the True cells of a mask.

What lies under a False mask has no influence, NaN and infinity included, neither on the result nor
on the gradient, and an empty mask gives 0. Multiplying by the mask would do neither: 0 · NaN is
NaN. Results are float32 at least.
"""

import torch
from torch import Tensor

_EPS = 1e-8  # under the root, added to the variance


def masked_sum(x: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Sum of x where mask is True; 0 where nothing is.

    Args:
        x: any shape.
        mask: bool, the shape of x; True = counts.
        dim: dimensions to sum over; all of them if None.
    Raises:
        ValueError: shapes differ, or mask is not bool.

    >>> from torch import nan, tensor
    >>> masked_sum(tensor([1.0, 2.0, nan]), tensor([True, True, False]))
    tensor(3.)
    """
    check_same_shape(x=x, mask=mask)
    check_mask(mask=mask)
    return torch.where(mask, upcast(x), 0).sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Mean of x where mask is True; 0 where nothing is. Arguments as in `masked_sum`.

    >>> from torch import nan, tensor
    >>> masked_mean(tensor([[1.0, 2.0], [5.0, nan]]), tensor([[True, True], [True, False]]), dim=1)
    tensor([1.5000, 5.0000])
    """
    total = masked_sum(x, mask, dim)
    return total / mask.sum(dim).clamp(min=1)


def masked_standardize(x: Tensor, mask: Tensor) -> Tensor:
    """The True cells together get mean 0 and standard deviation 1: advantage whitening.

        (x - mean) / sqrt(var + 1e-8),   var the population variance of the True cells

    Args:
        x: any shape.
        mask: bool, the shape of x; True = counts.
    Returns:
        The shape of x; exact 0 outside the mask, and everywhere if the True cells are all equal
        (a single one is).
    Raises:
        ValueError: shapes differ, or mask is not bool.

    >>> from torch import nan, tensor
    >>> masked_standardize(tensor([1.0, 3.0, nan]), tensor([True, True, False]))
    tensor([-1.,  1.,  0.])
    """
    standardized, _ = _standardize(x, mask)
    return standardized.new_zeros(mask.shape).masked_scatter(mask, standardized)


def masked_rescale(x: Tensor, mask: Tensor) -> Tensor:
    """The True cells together get standard deviation 1 and keep their mean: reward whitening.

        (x - mean) / sqrt(var + 1e-8) + mean,   var the population variance of the True cells

    Arguments and errors as in `masked_standardize`.
    Returns:
        The shape of x; exact 0 outside the mask; True cells that are all equal stay as they are.

    >>> from torch import nan, tensor
    >>> masked_rescale(tensor([6.0, 10.0, nan]), tensor([True, True, False]))
    tensor([7., 9., 0.])
    """
    standardized, mean = _standardize(x, mask)
    return standardized.new_zeros(mask.shape).masked_scatter(mask, standardized + mean)


def _standardize(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The K True cells (K,) standardized, and the mean that was taken off."""
    check_same_shape(x=x, mask=mask)
    check_mask(mask=mask)
    x = upcast(x).masked_select(mask)
    shifted = x - x[:1]  # so that equal numbers are exact zeros: their mean is rounded, 0 is not
    centred = shifted - shifted.mean()
    return centred / (centred.square().mean() + _EPS).sqrt(), x[:1] + shifted.mean()


# ---- shared by the math modules ----


def check_same_shape(**tensors: Tensor) -> None:
    """Refuses a tensor whose shape is not that of the first: broadcasting is silent and wrong."""
    (first, reference), *others = tensors.items()
    for name, x in others:
        if x.shape != reference.shape:
            got = f"{name} is {tuple(x.shape)}, {first} is {tuple(reference.shape)}"
            raise ValueError(f"{got}: {_how_to_reshape(name, x, reference)}")


def _how_to_reshape(name: str, x: Tensor, reference: Tensor) -> str:
    rows = x.ndim >= 1 and reference.ndim >= 1 and x.shape[0] == reference.shape[0]
    if rows and x.ndim == 1 and reference.ndim == 2:
        width = reference.shape[1]
        return f"expand per-sequence {name} with [:, None].expand(-1, {width})"
    if rows and x.ndim == 2 and x.shape[1] == 1:
        if reference.ndim == 1:
            return f"drop the last dimension of {name} with .squeeze(1)"
        return f"expand per-sequence {name} with .expand(-1, {reference.shape[1]})"
    return f"give {name} the shape of the other; nothing is broadcast here"


def check_vector(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.ndim != 1:
            raise ValueError(f"{name} is {tuple(x.shape)}: one number a row is needed, (N,)")


def check_matrix(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.ndim != 2:
            raise ValueError(f"{name} is {tuple(x.shape)}: rows and tokens are needed, (B, R)")


def check_mask(**masks: Tensor) -> None:
    for name, mask in masks.items():
        if mask.dtype != torch.bool:
            do = f"bool is needed, True = counts; use {name}.bool()"
            raise ValueError(f"{name} is {mask.dtype}: {do}")


def upcast(x: Tensor) -> Tensor:
    """float32 at least: half precision cannot hold a sum of many tokens, integers have no mean."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def grad_where_finite(x: Tensor, outcome: Tensor) -> Tensor:
    """x, but a constant in the cells where what comes of it is not finite.

    Such a cell under a False mask is sent the gradient 0, and 0 · NaN on the way back to x would be
    NaN. Under a True mask nothing is hidden: the loss itself is not finite.
    """
    return torch.where(torch.isfinite(outcome), x, x.detach())
