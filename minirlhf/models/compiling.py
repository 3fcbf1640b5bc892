"""`torch.compile` for the blocks of a decoder: one graph serves all blocks, in every size.
What decoding compiles is in `compiled_decoding.py`.

A graph must not depend on what came before. A resumed run meets other sizes first than a run that
was never stopped, and graphs for the sizes met so far would round otherwise. So every size is a
symbol from the first call on, no two sizes are one symbol because they were equal once, and nothing
is tuned by timing it.

A compiler loads what it compiled before. torch keeps that under a name in /tmp that anyone may take
first, and some of it is pickled. Here it lies where only the user can write. A linker writes a
kernel under its final name: one that is killed leaves half of it, which no run could load. So such
a cache is put aside, and made anew.
"""

import fcntl
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from minirlhf.errors import MACHINE, UserError, printable
from minirlhf.models.transformer import Block, CausalLM

GRAPHS = 64  # with fewer, whether a block is compiled would depend on what came before it


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/minirlhf/compiled, in which none but this user can write.

    Raises:
        UserError: others can, or it cannot be made.
    """
    do = "name another place in XDG_CACHE_HOME, or do not compile"
    try:
        place = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().resolve()
        folder = place / "minirlhf" / "compiled"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = [(each, each.stat()) for each in (folder, *folder.parents)]
    except (OSError, RuntimeError) as error:  # a full disk; a user without a home
        raise UserError("torch.compile", printable(error), do, MACHINE) from error
    for each, status in found:
        others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        # In a sticky folder, as /tmp, others cannot rename what is ours.
        loose = others and (each == folder or not status.st_mode & stat.S_ISVTX)
        if loose or status.st_uid not in (0, os.getuid()):
            raise UserError("torch.compile", f"others can write in {each}", do, MACHINE)
    return folder


def half_written(library: Path) -> bool:
    """Whether a shared library of Linux (ELF, 64 bits) is not whole: the table of its sections, of
    which the header tells place and size, is the last thing in it, and the header may be too."""
    with library.open("rb") as file:
        head = file.read(64)
    place, (size, count) = head[40:48], (head[58:60], head[60:62])
    place, size, count = (int.from_bytes(number, "little") for number in (place, size, count))
    whole = len(head) == 64 and head.startswith(b"\x7fELF")
    return not whole or library.stat().st_size < place + size * count


def is_being_written(folder: Path) -> bool:
    """Whether another process holds one of the compiler's locks."""
    for path in (folder / "locks").glob("*.lock"):
        with path.open("rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it is closed
            except OSError:
                return True
    return False


def put_aside(folder: Path, why: str) -> None:
    """Gives a cache another name, and tells why; the one that has that name goes."""
    aside = folder.with_name(f"{folder.name}-broken")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    told = f"note: {why}: what was compiled is in {aside} now, and is made anew"
    print(told, file=sys.stderr)
    cache_folder()


def mend_cache(folder: Path) -> None:
    """Puts a cache aside that holds half a kernel, unless one is being written just now."""
    if not sys.platform.startswith("linux"):
        return
    broken = next(filter(half_written, folder.rglob("*.so")), None)
    if broken is not None and not is_being_written(folder):
        put_aside(folder, f"a compile was killed while it wrote {broken.name}")


def causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextmanager
def failures_told() -> Iterator[None]:
    """Around what is compiled: whatever the compiler's own tools raise is one line."""
    try:
        yield
    except Exception as error:
        why = printable(str(error).strip().partition("\n")[0]) or type(error).__name__
        do = "install a C++ compiler (a GPU needs Triton too), or do not compile"
        raise UserError("torch.compile", f"fails here: {why}", do, MACHINE) from error


def try_compiler(folder: Path, device: torch.device) -> None:
    """Compiles a function and runs it; once more without its cache, if that could not be loaded.

    Raises:
        UserError: it fails.
    """
    def attempt() -> None:
        with failures_told():
            torch.compile(torch.exp, dynamic=True)(torch.zeros(3, device=device))

    try:
        attempt()
    except UserError as error:
        if not any(isinstance(cause, ImportError) for cause in causes(error)):
            raise
        put_aside(folder, error.what.removeprefix("fails here: "))
        attempt()


def ready_compiler(device: torch.device) -> None:
    """Sets torch's compiler up as the top of this file says, and tries it.

    Raises:
        UserError: torch.compile does not work on this machine, or its cache is not safe.
    """
    from torch._dynamo import config as graphs
    from torch._inductor import codecache
    from torch._inductor import config as kernels
    from torch.fx.experimental import _config as sizes

    graphs.recompile_limit, sizes.use_duck_shape = GRAPHS, False
    graphs.automatic_dynamic_local_pgo = False  # which would depend on runs before
    folder = cache_folder()
    mend_cache(folder)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    # Headers that are compiled once take most of a kernel's time, and their place is a constant.
    kernels.cpp_cache_precompile_headers = hasattr(codecache, "_HEADER_DIR")
    codecache._HEADER_DIR = str(folder / "precompiled_headers")
    codecache._HEADER_LOCK_DIR = str(folder / "precompiled_headers" / "locks")
    try_compiler(folder, device)


def compile_decoding(*models: nn.Module) -> None:
    """Has `decode_steps` compile its steps of every language model in these, when first made; see
    `compiled_decoding`. Raises as `ready_compiler`."""
    ready_compiler(next(models[0].parameters()).device)
    for model in models:
        for module in model.modules():
            if isinstance(module, CausalLM):
                module.compiles_decoding = True


def compile_blocks(*models: nn.Module) -> None:
    """Compiles the blocks of these models, in place; names and numbers of weights stay.

    Passes over whole rows are compiled, when they are first made, with and without a gradient; on
    a CUDA GPU decoding is too. Raises as `ready_compiler`.
    """
    device = next(models[0].parameters()).device
    ready_compiler(device)
    if device.type == "cuda":
        compile_decoding(*models)
    for model in models:
        for module in model.modules():
            if isinstance(module, Block):
                module.compile(dynamic=True)
