"""What `--compile` must keep: the numbers, the weights' names, and exact resume.

A first graph takes a minute to make, so all but the refusal is behind the marker `slow`.
"""

import fcntl
import os
import shutil
import stat
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from minirlhf.errors import MACHINE, OK, UserError
from minirlhf.models.cache import KVCache
from minirlhf.models.compiling import (
    cache_folder,
    compile_blocks,
    mend_cache,
    try_compiler,
)
from minirlhf.models.config import ModelConfig
from minirlhf.models.transformer import CausalLM, initialize
from tests.kill_harness import (
    RECIPES,
    command,
    environment,
    log_of,
    make_world,
    remains,
    run_command_line,
    wrong_with,
)

COMPILER = any(map(shutil.which, ("c++", "g++", "clang++")))


def slow(test):
    return pytest.mark.slow(pytest.mark.skipif(not COMPILER, reason="no C++ compiler")(test))


# While it compiles, torch warns of what it does itself.
pytestmark = pytest.mark.filterwarnings("ignore")
CONFIG = ModelConfig("llama", 60, 32, 48, 3, 4, 2, 8, 64)
CONFIGS = {
    "llama": CONFIG,
    "gpt2": replace(
        CONFIG, family="gpt2", norm="layer", activation="gelu_tanh", gated_mlp=False,
        positions="learned", num_kv_heads=4, qkv_bias=True, out_bias=True, mlp_bias=True,
    ),
}
# Rows and tokens of passes: padded or not, one row, one token, rows as many as tokens
SIZES = {"a": (4, 16, None), "b": (3, 9, (9, 4, 1)), "c": (1, 7, None), "d": (2, 2, (2, 1))}


def test_what_was_compiled_is_kept_where_only_this_user_can_write(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = cache_folder()
    assert folder == (tmp_path / "cache" / "minirlhf" / "compiled").resolve()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert cache_folder() == folder  # and again


@pytest.mark.parametrize("loose", ["cache", "cache/minirlhf", "cache/minirlhf/compiled"])
@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_place_in_which_others_can_write_is_refused(tmp_path, monkeypatch, loose, mode):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cache_folder()
    (tmp_path / loose).chmod(mode)
    with pytest.raises(UserError, match=f"write in {tmp_path / loose}: name") as error:
        cache_folder()
    assert error.value.code == MACHINE
    (tmp_path / loose).chmod(mode | stat.S_ISVTX)
    if loose == "cache/minirlhf/compiled":  # what lies in it others could still make
        with pytest.raises(UserError, match="others can write"):
            cache_folder()
    else:
        cache_folder()


def test_a_place_that_cannot_be_made_is_refused(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"torch\.compile: .*cache") as error:
        cache_folder()
    assert error.value.code == MACHINE


# The header of an ELF file, 64 bytes: its table of 2 sections of 64 bytes begins at byte 164.
HEADER = b"\x7fELF\x02\x01\x01".ljust(40, b"\0") + (164).to_bytes(8, "little")
HEADER = HEADER.ljust(58, b"\0") + bytes([64, 0, 2, 0, 1, 0])
KERNEL = HEADER + b"x" * 100 + b"s" * 128


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache with one kernel."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = cache_folder()
    (folder / "ab").mkdir()
    (folder / "ab" / "kernel.main.so").write_bytes(KERNEL)
    return folder


@pytest.mark.parametrize("cut", [
    lambda whole: b"", lambda whole: whole[:30], lambda whole: whole[:100],
    lambda whole: whole[:-1], lambda whole: bytes(64) + whole[64:],
], ids=["nothing", "half a header", "a header", "all but a byte", "the header last"])
def test_a_cache_with_half_a_kernel_is_put_aside(cut, cache, capsys):
    kernel = cache / "ab" / "kernel.main.so"
    mend_cache(cache)
    assert kernel.exists() and capsys.readouterr().err == ""
    for _ in range(2):  # the second takes the place of the first
        kernel.parent.mkdir(exist_ok=True)
        kernel.write_bytes(cut(KERNEL))
        mend_cache(cache)
        aside = cache.with_name("compiled-broken")
        told = "note: a compile was killed while it wrote kernel.main.so: what was compiled is in "
        assert capsys.readouterr().err == f"{told}{aside} now, and is made anew\n"
        assert list(cache.iterdir()) == [] and (aside / "ab" / "kernel.main.so").exists()
        assert cache.stat().st_mode & 0o777 == 0o700


def test_a_kernel_that_another_process_writes_is_left_alone(cache, capsys):
    kernel, lock = cache / "ab" / "kernel.main.so", cache / "locks" / "kernel.lock"
    os.truncate(kernel, 100)
    lock.parent.mkdir()
    with lock.open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        mend_cache(cache)
        assert kernel.exists()
    mend_cache(cache)
    assert not kernel.exists()


def test_a_kernel_that_cannot_be_loaded_is_compiled_again_once(cache, monkeypatch, capsys):
    failures = []

    def compiled(function, **settings):
        def run(x):
            if failures.pop():
                try:
                    raise ImportError("x.so: file too short")
                except ImportError as error:
                    raise RuntimeError(f"InductorError: {error}") from error
        return run

    monkeypatch.setattr(torch, "compile", compiled)
    failures[:] = [False, True]
    try_compiler(cache, torch.device("cpu"))
    assert "note: InductorError: x.so: file too short: what was com" in capsys.readouterr().err
    assert list(cache.iterdir()) == [] and failures == []
    failures[:] = [False, True, True]
    with pytest.raises(UserError, match=r"fails here: InductorError: x\.so: file too short: ins"):
        try_compiler(cache, torch.device("cpu"))


def make_lm(config: ModelConfig) -> CausalLM:
    return initialize(CausalLM(config), torch.Generator().manual_seed(0))


def passes(lm: CausalLM, size: str) -> list[torch.Tensor]:
    """Hidden states and gradients of one pass, and the states of one without a gradient."""
    rows, width, lengths = SIZES[size]
    ids = torch.randint(60, (rows, width), generator=torch.Generator().manual_seed(ord(size)))
    lengths = None if lengths is None else torch.tensor(lengths)
    lm.zero_grad()
    hidden = lm(ids, lengths=lengths)
    hidden.square().sum().backward()
    with torch.no_grad():
        again = lm(ids, lengths=lengths)
    return [hidden.detach(), again, *(p.grad for p in lm.parameters() if p.grad is not None)]


def test_a_machine_without_a_compiler_is_refused(monkeypatch):
    def missing(*args, **settings):
        raise RuntimeError("no compiler\nand much more")

    monkeypatch.setattr(torch, "compile", missing)
    with pytest.raises(UserError, match="fails here: no compiler: install") as error:
        compile_blocks(make_lm(CONFIG))
    assert error.value.code == MACHINE


CASES = [("llama", False), ("llama", True), ("gpt2", False)]


@slow
@pytest.mark.parametrize(("family", "checkpointing"), CASES)
def test_compiled_blocks_compute_the_same(family, checkpointing):
    plain, compiled = (make_lm(CONFIGS[family]).double() for _ in range(2))
    plain.model.checkpointing = compiled.model.checkpointing = checkpointing
    names = list(compiled.state_dict())
    compile_blocks(compiled)
    assert list(compiled.state_dict()) == names
    for size in SIZES:
        for one, other in zip(passes(compiled, size), passes(plain, size), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-8)


def test_whole_rows_are_compiled_and_decoding_is_not(monkeypatch):
    class Compiled(Exception):
        pass

    def compiled(*args, **named):
        raise Compiled

    def fake(function, **settings):
        asked.append(settings)
        return function if function is torch.exp else compiled  # it tries the compiler first

    asked: list[dict] = []
    monkeypatch.setattr(torch, "compile", fake)
    lm, ids = make_lm(CONFIG), torch.tensor([[1, 2, 3], [4, 5, 6]])
    compile_blocks(lm)
    assert asked == [{"dynamic": True}] * (1 + CONFIG.num_layers)
    with torch.no_grad():
        with pytest.raises(Compiled):
            lm(ids)
        cache = KVCache(CONFIG, 2, 8, lm.unembedding)
        lm(ids, cache)
        cache.hold(torch.tensor([3, 3]))
        lm(torch.tensor([[7], [8]]), cache)


HISTORY = """
import hashlib, sys
sys.path[:0] = {path!r}
from tests.models.test_compiling import CONFIG, compile_blocks, make_lm, passes
lm = make_lm(CONFIG)
compile_blocks(lm)
for size in {sizes!r}:
    bits = b"".join(x.numpy().tobytes() for x in passes(lm, size))
    print(size, hashlib.sha256(bits).hexdigest())
"""


@slow
def test_a_size_gives_the_same_bits_whatever_sizes_came_before(tmp_path):
    told, (shared, cache) = [], (tmp_path / "tmp", tmp_path / "cache")
    shared.mkdir()
    env = environment() | {"TMPDIR": str(shared), "XDG_CACHE_HOME": str(cache)}
    for sizes in ("abcd", "dcba", "b"):
        code = HISTORY.format(path=sys.path, sizes=sizes)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        told.append(dict(line.split() for line in done.stdout.splitlines()))
    assert told[0] == told[1] and len(set(told[0].values())) == 4
    assert told[2]["b"] == told[0]["b"]
    # Nothing is left where others could put their own in its place.
    assert not any(path.is_file() for path in shared.rglob("*"))
    assert any(path.suffix == ".so" for path in (cache / "minirlhf").rglob("*"))


@slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_compiled_run_goes_on_to_the_same_bytes_from_any_instant(recipe, tmp_path):
    world, whole, resumed = make_world(tmp_path / "world"), tmp_path / "a", tmp_path / "b"
    assert run_command_line(command(recipe, world, whole, compile=True, keep=3)) == OK
    expected = remains(whole)
    # Killed while it compiles: step 0 is committed before that begins, and it takes seconds.
    argv = command(recipe, world, tmp_path / "killed", compile=True)
    with log_of(argv).open("ab") as log:
        run = [sys.executable, "-m", "minirlhf", *argv]
        process = subprocess.Popen(run, stdout=log, stderr=log, env=environment())
    while process.poll() is None and not any((tmp_path / "killed").glob("checkpoints/step-*")):
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -9, log_of(argv).read_text("utf-8")
    assert run_command_line([*argv, "--resume"]) == OK, log_of(argv).read_text("utf-8")
    assert wrong_with(tmp_path / "killed", expected) == []
    # What a run that was killed in its second step leaves
    shutil.copytree(whole, resumed)
    for path in (*sorted((resumed / "checkpoints").iterdir())[1:], resumed / "model"):
        shutil.rmtree(path)
    again = command(recipe, world, resumed, compile=True, keep=3)
    assert run_command_line([*again, "--resume"]) == OK
    assert wrong_with(resumed, expected) == []
    plain = tmp_path / "c"
    assert run_command_line(command(recipe, world, plain, keep=3)) == OK
    assert remains(plain) != expected  # it was compiled
