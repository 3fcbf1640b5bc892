"""What a save does to the disk: in which order, and what is left where it fails."""

import errno
import json
import os

import pytest
import torch
from safetensors.torch import load_file

from minirlhf import fsio
from minirlhf.errors import MACHINE, NON_FINITE, UserError


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
                      ("replace", spy_replace)):  # fmt: skip
        monkeypatch.setattr(os, name, spy)
    return seen


# ---- files ---------------------------------------------------------------------------------------


def test_write_text_is_utf8_and_synced(tmp_path, operations):
    fsio.write_text(tmp_path / "a", "ü\n")
    assert (tmp_path / "a").read_bytes() == b"\xc3\xbc\n"
    assert operations == [("fsync", "a")]


def test_write_json_is_strict_and_exact(tmp_path):
    fsio.write_json(tmp_path / "a", {"x": 0.1, "name": "ü"})
    assert json.loads((tmp_path / "a").read_text("utf-8")) == {"x": 0.1, "name": "ü"}
    assert "ü" in (tmp_path / "a").read_text("utf-8")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_write_json_refuses_what_json_cannot_hold(tmp_path, bad):
    with pytest.raises(UserError, match=r"cannot be written .*not JSON compliant") as error:
        fsio.write_json(tmp_path / "a", {"x": bad})
    assert error.value.code == NON_FINITE
    assert not (tmp_path / "a").exists()


def test_write_tensors_round_trip(tmp_path, operations):
    tensors = {"a": torch.tensor([1.5, -0.0]), "b": torch.tensor(3)}
    fsio.write_tensors(tmp_path / "t", tensors)
    assert operations == [("fsync", "t")]
    read = load_file(tmp_path / "t")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_write_tensors_into_no_folder_is_the_machine_s_fault(tmp_path):
    with pytest.raises(UserError, match=r"t: cannot be written .*: disk full") as error:
        fsio.write_tensors(tmp_path / "none" / "t", {"a": torch.ones(1)})
    assert error.value.code == MACHINE


def test_sha256_of_a_known_text(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")  # the example of FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert fsio.sha256(tmp_path / "a") == expected


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failed_fsync_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match=r"No space left on device: '.*/a'"):
        fsio.write_text(tmp_path / "a", "x")


def test_check_space(tmp_path, monkeypatch):
    fsio.check_space(tmp_path, 1)
    usage = type("Usage", (), {"free": 999})
    monkeypatch.setattr(fsio.shutil, "disk_usage", lambda folder: usage)
    fsio.check_space(tmp_path, 999)
    with pytest.raises(UserError, match="999 bytes are free, 1,000 are needed: make room") as error:
        fsio.check_space(tmp_path, 1000)
    assert error.value.code == MACHINE


def test_replace_file_syncs_before_and_after(tmp_path, operations):
    (tmp_path / "new").write_text("new", encoding="utf-8")
    (tmp_path / "a").write_text("old", encoding="utf-8")
    fsio.replace_file(tmp_path / "new", tmp_path / "a")
    assert (tmp_path / "a").read_text("utf-8") == "new"
    parent = tmp_path.name
    assert operations == [("fsync", "new"), ("replace", "new -> a"), ("fsync", parent)]


# ---- folders -------------------------------------------------------------------------------------


def test_make_folder_syncs_each_name_it_adds(tmp_path, operations):
    fsio.make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert sorted(operations) == sorted([("fsync", tmp_path.name), ("fsync", "a")])
    fsio.make_folder(tmp_path / "a" / "b")
    assert len(operations) == 2


def test_commit_folder_is_one_rename_between_two_syncs(tmp_path, operations):
    fsio.commit_folder(folder_with(tmp_path / ".tmp-x", a="new"), tmp_path / "x")
    assert (tmp_path / "x" / "a").read_text("utf-8") == "new"
    parent = tmp_path.name
    assert operations == [("fsync", ".tmp-x"), ("rename", ".tmp-x -> x"), ("fsync", parent)]


def test_commit_folder_puts_an_old_one_aside_and_removes_it_last(tmp_path, operations):
    folder_with(tmp_path / "x", a="old", b="only in the old")
    folder_with(tmp_path / ".trash-x", c="of an earlier crash")
    fsio.commit_folder(folder_with(tmp_path / ".tmp-x", a="new"), tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["a"]
    assert operations == [
        ("fsync", ".tmp-x"), ("rename", "x -> .trash-x"), ("rename", ".tmp-x -> x"),
        ("fsync", tmp_path.name),
    ]  # fmt: skip


def test_remove_folder_takes_the_name_away_first(tmp_path, monkeypatch):
    folder_with(tmp_path / "x", a="1")
    monkeypatch.setattr(fsio.shutil, "rmtree", full_disk)
    with pytest.raises(OSError, match="No space left"):
        fsio.remove_folder(tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir()] == [".trash-x"]


def test_sweep_removes_leftovers_and_nothing_else(tmp_path):
    for name in (".tmp-a", ".trash-b", "c", ".hidden"):
        folder_with(tmp_path / name, a="1")
    (tmp_path / ".tmp-file").write_text("", encoding="utf-8")
    fsio.sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".hidden", "c"]
    fsio.sweep(tmp_path / "none")


# ---- logs ----------------------------------------------------------------------------------------


def test_append_line_returns_the_length_in_bytes(tmp_path):
    path = tmp_path / "log"
    assert fsio.append_line(path, "ab") == 3
    assert fsio.append_line(path, "ü") == 6  # two bytes and the line end
    assert path.read_bytes() == b"ab\n\xc3\xbc\n"


def test_append_line_to_a_full_disk_names_the_file():
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        fsio.append_line(fsio.Path("/dev/full"), "x")


def test_truncate_cuts_back(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"ab\ncd\nhalf a li")
    fsio.truncate(path, 6)
    assert path.read_bytes() == b"ab\ncd\n"
    assert fsio.append_line(path, "e") == 8


def test_truncate_to_nothing_makes_the_file(tmp_path):
    fsio.truncate(tmp_path / "log", 0)
    assert (tmp_path / "log").read_bytes() == b""


@pytest.mark.parametrize("content", [b"ab\n", None])
def test_truncate_refuses_a_log_that_lost_lines(tmp_path, content):
    path, size = tmp_path / "log", len(content or b"")
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"log: has {size} bytes, the checkpoint knows of 6"):
        fsio.truncate(path, 6)
    assert path.exists() == (content is not None)
