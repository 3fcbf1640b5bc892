"""A device that this machine lacks: its tensors say that they are there, and hold their data here.

Within `Elsewhere("mps")` or `Elsewhere("cuda")` tensors can be made on, or moved to, that device.
Each operation on them is computed by the CPU, and refused where the device would refuse it, or
where it does not belong into this package:
- a tensor of the CPU beside one of the device, but for a scalar, and but for copies. torch itself
  takes an index from the CPU, at the price of a copy each time;
- float64 on an Apple GPU, and operations that torch's table lists no kernel for there;
- a generator of the CPU that is to draw on the device.
Counted is what makes the host wait for a GPU: each number or tensor that is read from it, and each
result whose size depends on numbers.

To torch's C++ the tensors are on its meta device, since the others need a driver to be named.
"""

import re
from functools import cache
from pathlib import Path

import torch
import torchgen
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

META, CPU = torch.device("meta"), torch.device("cpu")
SIZES = {"nonzero", "masked_select", "_unique2", "unique_consecutive", "equal", "is_nonzero"}


def tensors_in(values) -> list[Tensor]:
    found = []
    for x in values:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, list | tuple):
            found += tensors_in(x)
    return found


def over(function, x):
    """The function's results of all that is in lists."""
    return type(x)(over(function, y) for y in x) if isinstance(x, list | tuple) else function(x)


@cache
def kernels_of_mps() -> set[str]:
    """Names of the operations that torch computes on an Apple GPU, from the table it is built of:
    those with a kernel for it, and those made of others on any device."""
    table = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    found, delegates = set(), {}
    for block in table.read_text(encoding="utf-8").split("\n- func: ")[1:]:
        name = block.partition("(")[0]
        dispatch = re.findall(r"^    ([\w, ]+):", block, re.M)
        keys = {key.strip() for line in dispatch for key in line.split(",")}
        if not keys or "MPS" in keys or any(key.startswith("Composite") for key in keys):
            found.add(name)
        if delegate := re.search(r"structured_delegate: (\S+)", block):
            delegates[name] = delegate[1]
            found.discard(name)
    return found | {name for name, other in delegates.items() if other in found}


class There(Tensor):
    """A tensor of the device; `raw` holds its data."""

    place = torch.device("mps", 0)
    device, is_meta = property(lambda self: There.place), False

    def __new__(cls, raw: Tensor):
        return Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(),
            dtype=raw.dtype, device=META,
        )

    def __init__(self, raw: Tensor):
        self.raw = raw

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        raise AssertionError(f"{op} of a tensor that is elsewhere, outside `Elsewhere`")

    def __tensor_flatten__(self):  # by which torch knows that it wraps another
        return ["raw"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, *_):
        return cls(inner["raw"])

    def __repr__(self):
        return f"There({self.raw})"


class _Names(TorchFunctionMode):
    """What Python names the device is, to torch's C++, its meta device."""

    def __init__(self, of: "Elsewhere"):
        super().__init__()
        self.of = of

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, of = kwargs or {}, self.of
        first = args[0] if args else None
        if function is torch.device:
            return function(*args, **kwargs)
        if function is torch._C._nn._parse_to:  # of `Module.to`
            device, *more = function(*args, **kwargs)
            return of.place if isinstance(first, There) else device, *more
        if isinstance(first, There):
            if function is Tensor.tolist:
                of.reads.append("tolist")
                return first.raw.tolist()
            if function in (Tensor.numpy, Tensor.__array__):
                raise TypeError("can't convert a tensor of this device to numpy: copy it first")
            if function is Tensor.data.__set__:
                first.raw = args[1].raw
        named = [x for x in (*args, *kwargs.values()) if isinstance(x, str | torch.device)]
        before, of.real_meta = of.real_meta, of.real_meta or any(str(x) == "meta" for x in named)
        try:
            there = {of.place.type, str(of.place)}
            args = [META if isinstance(x, str | torch.device) and str(x) in there else x
                    for x in args]
            kwargs = {k: META if isinstance(x, str | torch.device) and str(x) in there else x
                      for k, x in kwargs.items()}
            if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is META:
                made = function(*args, **(kwargs | {"device": None}))
                return made.to(META)  # which makes none there without data
            return function(*args, **kwargs)
        finally:
            of.real_meta = before


class Elsewhere(TorchDispatchMode):
    """The device; see the top. `reads` has the name of each operation for which the host waited,
    `uploads` counts copies to the device."""

    def __init__(self, name: str):
        super().__init__()
        self.place, self.float64 = torch.device(name, 0), name != "mps"
        self.reads: list[str] = []
        self.uploads, self.real_meta = 0, False
        self.names = _Names(self)

    def __enter__(self):
        There.place = self.place
        # One thread: torch starts others only for devices that it knows of.
        self.threads = torch.autograd.set_multithreading_enabled(False)
        super().__enter__()
        self.names.__enter__()
        return self

    def __exit__(self, *error):
        self.names.__exit__(*error)
        super().__exit__(*error)
        self.threads.__exit__(*error)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tensors_in((*args, *kwargs.values()))
        there = [x for x in leaves if isinstance(x, There)]
        target, name = kwargs.get("device"), op.overloadpacket.__name__
        if target is None:
            stays = bool(there)
        else:
            named = target.type == self.place.type  # in a backward pass, past `_Names`
            stays = named or (target.type == "meta" and not self.real_meta)
        if not there and not stays:
            return op(*args, **kwargs)
        if any(x.is_meta for x in leaves) and not any(x.dim() for x in there):
            # Shapes of a model without weights, and a scalar that torch made beside them
            return op(*over(lambda x: getattr(x, "raw", x), args), **kwargs)
        self._check(op, name, args, kwargs, leaves)
        self._count(name, args, kwargs, stays)

        def here(x):
            if isinstance(x, There):
                return x.raw
            return CPU if isinstance(x, torch.device) and stays else x

        out = op(*over(here, args), **{k: over(here, x) for k, x in kwargs.items()})
        if name == "copy_" and not isinstance(args[0], There):
            return args[0]
        if not stays:
            return out
        known = {id(x.raw): x for x in there}

        def back(x):
            if not isinstance(x, Tensor):
                return x
            if x.dtype == torch.float64 and not self.float64:
                raise TypeError(f"{op}: float64, which {self.place} does not have")
            if id(x) not in known:
                return There(x)
            assert known[id(x)].shape == x.shape, f"{op} changes a shape in place"
            return known[id(x)]

        return over(back, out)

    def _check(self, op, name, args, kwargs, leaves) -> None:
        if self.place.type == "mps":
            full = f"{name}.{op._overloadname}".removesuffix(".default")
            if full not in kernels_of_mps():
                raise NotImplementedError(f"{full} has no kernel for {self.place}")
        if any(isinstance(x, torch.Generator) for x in (*args, *kwargs.values())):
            raise RuntimeError(f"{op}: a generator of the CPU for a tensor on {self.place}")
        if name in ("copy_", "_to_copy"):
            return
        strangers = [x for x in leaves if not isinstance(x, There)]
        changed = name.endswith("_") and any(x is args[0] for x in strangers)
        if changed or any(x.dim() for x in strangers):
            shapes = [f"{tuple(x.shape)} {getattr(x, 'device', CPU)}" for x in leaves]
            raise RuntimeError(f"{op}: tensors of two devices: {', '.join(shapes)}")

    def _count(self, name: str, args, kwargs, stays: bool) -> None:
        if name in ("copy_", "_to_copy"):
            comes = isinstance(args[name == "copy_"], There)
            goes = isinstance(args[0], There) if name == "copy_" else stays
            self.uploads += goes and not comes
            if comes and not goes:
                self.reads.append(name)
        elif name == "_local_scalar_dense" or name in SIZES:
            self.reads.append(name)
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            if any(x is not None and x.dtype == torch.bool for x in args[1]):
                self.reads.append(f"{name} by a mask")
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.reads.append(name)
