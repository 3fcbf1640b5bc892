"""A disk that forgets what was not synced: watches the file operations of a save, replays them.

Two halves. `Watched` stands in for `os` inside fsio and tells each change of the disk before it is
made, so that a test can record it, die there or fail it. `Disk` plays a record and knows what a
power loss may leave of it:

- a file's data: what was synced, and of the rest what ends at any 4 KiB boundary, with or without
  the length already grown (then zeros follow);
- a folder's names: what was synced, and of the changes since then (a creation, a removal, a rename)
  any subset. Real file systems keep an order; nothing here relies on one.
"""

import itertools
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from minirlhf.files import atomic

PAGE = 4096
Tree = bytes | tuple[tuple[str, "Tree"], ...]  # a file's data, or a folder's names in order


class Operation(NamedTuple):
    """One change of the disk: os.`kind`(path, …)."""

    kind: str
    path: Path
    data: bytes = b""  # of a write
    target: Path | None = None  # of a rename
    size: int = 0  # of a truncation; of an open, whether it empties the file


class Watched:
    """`os`, whose changes of the disk are told to `before` first. Syncs are told and not done.

    Every other name is os's own: a change that goes by one of these is missed here, and found by
    `Disk`, which then differs from the real one.
    """

    def __init__(self, before: Callable[[Operation], None]):
        self.before, self.paths = before, {}

    def __getattr__(self, name: str) -> object:
        return getattr(os, name)

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            self.before(Operation("open", path, size=bool(flags & os.O_TRUNC)))
        handle = os.open(path, flags, mode)
        self.paths[handle] = path
        return handle

    def write(self, handle: int, data: bytes | memoryview) -> int:
        self.before(Operation("write", self.paths[handle], bytes(data)))
        return os.write(handle, data)

    def ftruncate(self, handle: int, size: int) -> None:
        self.before(Operation("truncate", self.paths[handle], size=size))
        os.ftruncate(handle, size)

    def fsync(self, handle: int) -> None:
        self.before(Operation("fsync", self.paths[handle]))

    def rename(self, path: Path, target: Path) -> None:
        self.before(Operation("rename", path, target=target))
        os.rename(path, target)

    def replace(self, path: Path, target: Path) -> None:
        self.before(Operation("rename", path, target=target))
        os.replace(path, target)

    def mkdir(self, path: Path) -> None:
        self.before(Operation("mkdir", path))
        os.mkdir(path)

    def unlink(self, path: Path) -> None:
        self.before(Operation("unlink", path))
        os.unlink(path)

    def rmdir(self, path: Path) -> None:
        self.before(Operation("rmdir", path))
        os.rmdir(path)


@contextmanager
def watching(before: Callable[[Operation], None]) -> Iterator[None]:
    """Inside, each change that fsio makes is told to `before` first, which may raise or die."""
    atomic.os = Watched(before)
    try:
        yield
    finally:
        atomic.os = os


def record(act: Callable[[], object]) -> list[Operation]:
    """The changes that `act` makes."""
    seen: list[Operation] = []
    with watching(seen.append):
        act()
    return seen


def read_tree(path: Path) -> Tree:
    if path.is_dir():
        return tuple((inside.name, read_tree(inside)) for inside in sorted(path.iterdir()))
    return path.read_bytes()


def write_tree(path: Path | str, tree: Tree) -> None:
    if isinstance(tree, bytes):
        with open(path, "wb") as file:
            file.write(tree)
        return
    os.mkdir(path)
    for name, inside in tree:
        write_tree(f"{path}/{name}", inside)


def put_back(path: Path, tree: Tree) -> None:
    """The tree and nothing else."""
    shutil.rmtree(path, ignore_errors=True)
    write_tree(path, tree)


# ---- the disk ------------------------------------------------------------------------------------


class File:
    def __init__(self, data: bytes):
        self.data = self.synced = data

    @property
    def pending(self) -> int:
        return int(self.data != self.synced)

    def sync(self) -> None:
        self.synced = self.data

    def now(self) -> Tree:
        return self.data

    def after_crash(self) -> list[Tree]:
        """The data that may be there: the synced, or the new up to a page's end."""
        if not self.pending:
            return [self.synced]
        start = len(self.synced) if self.data.startswith(self.synced) else 0
        first = start // PAGE * PAGE + PAGE
        ends = [start, *range(first, len(self.data), PAGE), len(self.data)]
        short = [self.data[:end] for end in ends]
        holes = [data + bytes(len(self.data) - len(data)) for data in short]
        return list(dict.fromkeys([self.synced, *short, *holes]))


class Folder:
    def __init__(self, names: dict[str, "File | Folder"]):
        self.names, self.synced = names, dict(names)
        self.changes: list[dict[str, File | Folder | None]] = []  # since the sync; None: gone

    @property
    def pending(self) -> int:
        inside = {id(node): node for node in (*self.names.values(), *self.synced.values())}
        for change in self.changes:
            inside |= {id(node): node for node in change.values() if node is not None}
        return len(self.changes) + sum(node.pending for node in inside.values())

    def change(self, names: "dict[str, File | Folder | None]") -> None:
        self.changes.append(names)
        self.names = self._with(self.names, [names])

    def sync(self) -> None:
        self.synced, self.changes = dict(self.names), []

    def now(self) -> Tree:
        return tuple((name, node.now()) for name, node in sorted(self.names.items()))

    @staticmethod
    def _with(names: dict, changes: list[dict]) -> dict:
        for change in changes:
            names = {name: node for name, node in (names | change).items() if node is not None}
        return names

    def after_crash(self) -> list[Tree]:
        """Every folder that may be there."""
        found: dict[Tree, None] = {}
        for kept in itertools.product((False, True), repeat=len(self.changes)):
            names = self._with(self.synced, list(itertools.compress(self.changes, kept)))
            inside = [[(n, tree) for tree in names[n].after_crash()] for n in sorted(names)]
            found |= dict.fromkeys(itertools.product(*inside))
        return list(found)

    def some_crash(self, rng: random.Random) -> Tree:
        """One of these, drawn."""
        kept = [rng.random() < 0.5 for _ in self.changes]
        names = self._with(self.synced, list(itertools.compress(self.changes, kept)))
        return tuple((name, _some(names[name], rng)) for name in sorted(names))


def _some(node: File | Folder, rng: random.Random) -> Tree:
    return node.some_crash(rng) if isinstance(node, Folder) else rng.choice(node.after_crash())


def _node(tree: Tree) -> File | Folder:
    if isinstance(tree, bytes):
        return File(tree)
    return Folder({name: _node(inside) for name, inside in tree})


class Disk:
    """What is in `root`, all of it synced, and what operations make of that."""

    def __init__(self, root: Path):
        self.root, self.top = root, _node(read_tree(root))

    def now(self) -> Tree:
        """What a process sees, and what a kill leaves."""
        return self.top.now()

    def _find(self, path: Path) -> File | Folder:
        node = self.top
        for name in path.relative_to(self.root).parts:
            node = node.names[name]
        return node

    def play(self, operation: Operation) -> None:
        kind, path, data, target, size = operation
        if kind == "fsync" and path == self.root.parent:
            return  # the root's own name is taken for granted
        if kind in ("write", "truncate", "fsync"):
            node = self._find(path)
            if kind == "fsync":
                node.sync()
            else:
                node.data = node.data + data if kind == "write" else node.data[:size]
            return
        above = self._find(path.parent)
        if kind == "open":
            file = above.names.get(path.name)
            if file is None:
                above.change({path.name: File(b"")})
            elif size:
                file.data = b""
        elif kind == "mkdir":
            above.change({path.name: Folder({})})
        elif kind == "rename":
            assert target.parent == path.parent, "only renames inside one folder are atomic here"
            above.change({path.name: None, target.name: above.names[path.name]})
        else:
            assert kind in ("unlink", "rmdir"), kind
            above.change({path.name: None})

    def after_power_loss(self, rng: random.Random, enumerable: int = 12, drawn: int = 64) -> list:
        """Every tree that a power loss now may leave; `drawn` of them where too much is pending."""
        if self.top.pending <= enumerable:
            return self.top.after_crash()
        return list(dict.fromkeys(self.top.some_crash(rng) for _ in range(drawn)))
