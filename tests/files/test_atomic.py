"""What a save does to the disk: in which order, and what is left where it fails."""

import errno
import hashlib
import json
import os
import threading

import numpy
import pytest
import torch
from safetensors.torch import load_file, save

from minirlhf.errors import MACHINE, NON_FINITE, UserError
from minirlhf.files import atomic


def folder_with(path, **files: str):
    path.mkdir()
    for name, text in files.items():
        (path / name).write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def operations(monkeypatch):
    """(operation, name) of every rename and fsync, in order."""
    seen = []
    open_, fsync, rename, replace = os.open, os.fsync, os.rename, os.replace
    names = {}

    def spy_open(path, *rest, **more):
        handle = open_(path, *rest, **more)
        names[handle] = os.path.basename(path)
        return handle

    def spy_fsync(handle):
        seen.append(("fsync", names[handle]))
        return fsync(handle)

    def spy_rename(a, b):
        seen.append(("rename", f"{a.name} -> {b.name}"))
        return rename(a, b)

    def spy_replace(a, b):
        seen.append(("replace", f"{a.name} -> {b.name}"))
        return replace(a, b)

    for name, spy in (("open", spy_open), ("fsync", spy_fsync), ("rename", spy_rename),
                      ("replace", spy_replace)):
        monkeypatch.setattr(os, name, spy)
    return seen


# ---- files ---------------------------------------------------------------------------------------


def test_write_text_is_utf8_and_synced(tmp_path, operations):
    atomic.write_text(tmp_path / "a", "ü\n")
    assert (tmp_path / "a").read_bytes() == b"\xc3\xbc\n"
    assert operations == [("fsync", "a")]


def test_write_json_is_strict_and_exact(tmp_path):
    atomic.write_json(tmp_path / "a", {"x": 0.1, "name": "ü"})
    assert json.loads((tmp_path / "a").read_text("utf-8")) == {"x": 0.1, "name": "ü"}
    assert "ü" in (tmp_path / "a").read_text("utf-8")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_tensors_that_are_not_finite_are_not_written(tmp_path, bad):
    good, spoiled = torch.zeros(3), torch.tensor([0.0, bad, 1.0, bad])
    with pytest.raises(UserError, match="'b' has 2 numbers of 4 that are not finite") as error:
        atomic.write_tensors(tmp_path / "t", {"a": good, "b": spoiled})
    assert error.value.code == NON_FINITE
    assert not (tmp_path / "t").exists()


def test_a_sum_beyond_float32_of_finite_numbers_is_written(tmp_path):
    atomic.write_tensors(tmp_path / "t", {"a": torch.full((2,), 3e38)})  # 6e38 is inf
    assert (tmp_path / "t").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_write_json_refuses_what_json_cannot_hold(tmp_path, bad):
    with pytest.raises(UserError, match=r"cannot be written .*not JSON compliant") as error:
        atomic.write_json(tmp_path / "a", {"x": bad})
    assert error.value.code == NON_FINITE
    assert not (tmp_path / "a").exists()


def every_type() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    out = {}
    for dtype, name in atomic.DTYPES.items():
        numbers = torch.randn(3, 5, generator=rng) * 3
        out[f"a.{name}"] = numbers.abs().to(dtype)
    return out


TENSORS = {
    "every type": every_type(),
    "names of other letters": {"ü": torch.ones(1), "b": torch.ones(2), "\u4e2d": torch.ones(3)},
    "no dimension, no element": {"a": torch.tensor(3.5), "b": torch.zeros(0, 4)},
    "none": {},
    "in another order": {"a": torch.arange(12.0).reshape(3, 4).T, "b": torch.arange(9)[::2]},
    "trained": {"a": torch.ones(2, requires_grad=True)},
}


@pytest.mark.parametrize("case", TENSORS)
def test_write_tensors_writes_the_bytes_of_safetensors_itself(tmp_path, operations, case):
    written = atomic.write_tensors(tmp_path / "t", TENSORS[case])
    assert operations == [("fsync", "t")]
    plain = {name: tensor.detach().contiguous() for name, tensor in TENSORS[case].items()}
    data = (tmp_path / "t").read_bytes()
    assert data == save(plain, {"format": "pt"})
    assert written == (len(data), hashlib.sha256(data).hexdigest())
    read = load_file(tmp_path / "t")
    assert read.keys() == plain.keys()
    assert all(torch.equal(read[name], plain[name]) for name in plain)


@pytest.mark.parametrize("small", [0, 16, 17, 1000])  # all in the thread; some; header not; none
def test_write_tensors_in_many_pieces_and_short_writes(tmp_path, monkeypatch, small):
    tensors = {"a": torch.arange(100), "b": torch.arange(7.0)}
    atomic.write_tensors(tmp_path / "whole", tensors)
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, data[:5]))
    monkeypatch.setattr(atomic, "PIECE", 16)
    monkeypatch.setattr(atomic, "BEHIND", 1)
    monkeypatch.setattr(atomic, "SMALL", small)
    written = atomic.write_tensors(tmp_path / "pieces", tensors)
    data = (tmp_path / "pieces").read_bytes()
    assert data == (tmp_path / "whole").read_bytes()
    assert written == (len(data), hashlib.sha256(data).hexdigest())


def test_write_tensors_writes_from_where_the_tensors_lie(tmp_path, monkeypatch):
    """A second copy of all weights would be what a full machine has no room for."""
    tensors = {"a": torch.arange(64), "b": torch.ones(8, 8)}
    real, from_memory = os.write, []

    def spy(handle, data):
        from_memory.append(numpy.frombuffer(data, "u1").ctypes.data)
        return real(handle, data)

    monkeypatch.setattr(os, "write", spy)
    atomic.write_tensors(tmp_path / "t", tensors)
    assert from_memory[1:] == [tensors["a"].data_ptr(), tensors["b"].data_ptr()]  # [0]: the header


def test_write_tensors_hashes_beside_the_writing(tmp_path, monkeypatch):
    hashing, before = set(), threading.active_count()

    class Spy:
        def update(self, data):
            hashing.add(threading.current_thread())

        def hexdigest(self):
            return "its"

    monkeypatch.setattr(atomic.hashlib, "sha256", Spy)
    monkeypatch.setattr(atomic, "SMALL", 0)
    written = atomic.write_tensors(tmp_path / "t", {"a": torch.ones(1)})
    assert written.sha256 == "its"
    assert len(hashing) == 1 and threading.current_thread() not in hashing
    assert threading.active_count() == before  # none is left behind, for one who forks next


def test_write_tensors_refuses_a_type_that_safetensors_has_not(tmp_path):
    with pytest.raises(ValueError, match=r"'a' is torch\.complex64, which safetensors cannot hold"):
        atomic.write_tensors(tmp_path / "t", {"a": torch.ones(1, dtype=torch.complex64)})
    assert not (tmp_path / "t").exists()


def test_write_tensors_into_no_folder_names_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: '.*/none/t'"):
        atomic.write_tensors(tmp_path / "none" / "t", {"a": torch.ones(1)})


def test_sha256_of_a_known_text(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")  # the example of FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert atomic.sha256(tmp_path / "a") == expected


@pytest.mark.parametrize("small", [6, 7])
def test_sha256_each_reads_side_by_side_what_is_not_small(tmp_path, monkeypatch, small):
    paths = [tmp_path / name for name in ("a", "b")]
    for path in paths:
        path.write_bytes(b"abc")
    threads, real = set(), atomic.sha256
    monkeypatch.setattr(atomic, "SMALL", small)
    monkeypatch.setattr(
        atomic, "sha256", lambda path: (threads.add(threading.current_thread()), real(path))[1]
    )
    assert atomic.sha256_each(paths) == [hashlib.sha256(b"abc").hexdigest()] * 2
    assert (threading.current_thread() in threads) == (small == 7)


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failed_fsync_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match=r"No space left on device: '.*/a'"):
        atomic.write_text(tmp_path / "a", "x")


@pytest.mark.parametrize("read", [atomic.sha256, atomic.fsync])
def test_a_failed_read_names_the_file(tmp_path, monkeypatch, read):
    (tmp_path / "a").write_bytes(b"x")
    monkeypatch.setattr(hashlib, "file_digest", full_disk)
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match=r"No space left on device: '.*/a'"):
        read(tmp_path / "a")


def test_check_space(tmp_path, monkeypatch):
    atomic.check_space(tmp_path, 1)
    usage = type("Usage", (), {"free": 999})
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda folder: usage)
    atomic.check_space(tmp_path, 999)
    with pytest.raises(UserError, match="999 bytes are free, 1,000 are needed: make room") as error:
        atomic.check_space(tmp_path, 1000)
    assert error.value.code == MACHINE


def test_replace_file_syncs_before_and_after(tmp_path, operations):
    (tmp_path / "new").write_text("new", encoding="utf-8")
    (tmp_path / "a").write_text("old", encoding="utf-8")
    atomic.replace_file(tmp_path / "new", tmp_path / "a")
    assert (tmp_path / "a").read_text("utf-8") == "new"
    parent = tmp_path.name
    assert operations == [("fsync", "new"), ("replace", "new -> a"), ("fsync", parent)]


# ---- folders -------------------------------------------------------------------------------------


def test_make_folder_syncs_each_name_before_the_next(tmp_path, operations):
    """The lowest folder that is there may be of a process that died before its sync."""
    atomic.make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    above = tmp_path.parent.name
    assert operations == [("fsync", above), ("fsync", tmp_path.name), ("fsync", "a")]
    del operations[:]
    atomic.make_folder(tmp_path / "a" / "b")
    assert operations == [("fsync", "a")]


def test_make_folder_leaves_alone_what_it_cannot_have_made(tmp_path, operations, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    atomic.make_folder(tmp_path)
    assert operations == []


def test_make_folder_does_not_replace_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    with pytest.raises(FileExistsError, match=r"File exists: '.*/a'"):
        atomic.make_folder(tmp_path / "a")


def test_commit_folder_puts_an_old_one_aside_and_removes_it_last(tmp_path, operations):
    folder_with(tmp_path / "x", a="old", b="only in the old")
    folder_with(tmp_path / ".trash-.old-x", c="of an earlier crash")
    atomic.commit_folder(folder_with(tmp_path / ".tmp-x", a="new"), tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["a"]
    assert operations == [
        ("fsync", ".tmp-x"), ("rename", "x -> .old-x"), ("fsync", tmp_path.name),
        ("rename", ".tmp-x -> x"), ("fsync", tmp_path.name),
        ("rename", ".old-x -> .trash-.old-x"),
    ]


def test_remove_folder_removes_a_link_and_not_what_it_points_to(tmp_path):
    folder_with(tmp_path / "x", a="1")
    folder_with(tmp_path / "elsewhere", b="2")
    (tmp_path / "x" / "link").symlink_to(tmp_path / "elsewhere")
    atomic.remove_folder(tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["elsewhere"]
    assert (tmp_path / "elsewhere" / "b").exists()


def test_discard_removes_what_it_can_and_never_raises(tmp_path, monkeypatch):
    atomic.discard(tmp_path / "none")
    atomic.discard(folder_with(tmp_path / "x", a="1"))
    assert not list(tmp_path.iterdir())
    folder_with(tmp_path / "y", a="1")
    monkeypatch.setattr(os, "unlink", full_disk)
    atomic.discard(tmp_path / "y")
    assert (tmp_path / "y" / "a").exists()


def test_sweep_removes_leftovers_and_nothing_else(tmp_path):
    for name in (".tmp-a", ".trash-b", "c", ".hidden"):
        folder_with(tmp_path / name, a="1")
    (tmp_path / ".tmp-file").write_text("", encoding="utf-8")
    atomic.sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".hidden", "c"]
    atomic.sweep(tmp_path / "none")


def test_sweep_ends_replacements(tmp_path, operations):
    """One that nothing took the place of gets its name back; else what is new is synced first."""
    for name in (".old-a", ".old-b", "b"):
        folder_with(tmp_path / name, text=name)
    atomic.sweep(tmp_path)
    found = {p.name: (p / "text").read_text("utf-8") for p in tmp_path.iterdir()}
    assert found == {"a": ".old-a", "b": "b"}
    assert operations == [
        ("rename", ".old-a -> a"), ("fsync", tmp_path.name), ("rename", ".old-b -> .trash-.old-b")
    ]


# ---- logs ----------------------------------------------------------------------------------------


def test_append_line_returns_the_length_in_bytes(tmp_path):
    path = tmp_path / "log"
    assert atomic.append_line(path, "ab") == 3
    assert atomic.append_line(path, "ü") == 6  # two bytes and the line end
    assert path.read_bytes() == b"ab\n\xc3\xbc\n"


def test_append_line_to_a_full_disk_names_the_file(monkeypatch):
    monkeypatch.setattr(atomic, "check_own", lambda path: None)  # a device stands for the disk
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        atomic.append_line(atomic.Path("/dev/full"), "x")


def test_truncate_cuts_back(tmp_path, operations):
    path = tmp_path / "log"
    path.write_bytes(b"ab\ncd\nhalf a li")
    atomic.truncate(path, 6)
    assert operations == [("fsync", "log"), ("fsync", tmp_path.name)]
    assert path.read_bytes() == b"ab\ncd\n"
    assert atomic.append_line(path, "e") == 8


def test_truncate_to_nothing_makes_the_file(tmp_path):
    atomic.truncate(tmp_path / "log", 0)
    assert (tmp_path / "log").read_bytes() == b""


@pytest.mark.parametrize("content", [b"ab\n", None])
def test_truncate_refuses_a_log_that_lost_lines(tmp_path, content):
    path, size = tmp_path / "log", len(content or b"")
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"log: has {size} bytes, the checkpoint knows of 6"):
        atomic.truncate(path, 6)
    assert path.exists() == (content is not None)
