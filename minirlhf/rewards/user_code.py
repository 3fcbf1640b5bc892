"""A user's file is run, and may import what lies beside it: what was hashed is what runs.

Modules are compiled from the bytes whose sha256 is kept, never from a __pycache__ beside them.
"""

import hashlib
import os
import sys
from functools import partial
from importlib.machinery import (
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    SourceFileLoader,
)
from importlib.util import module_from_spec, spec_from_file_location
from itertools import count
from pathlib import Path
from types import ModuleType

import minirlhf
from minirlhf.errors import UserError

OURS = Path(minirlhf.__file__).parent
_folders: list[Path] = []  # of the files that were run
_modules: dict[Path, str] = {}  # file of each module that was imported from there -> sha256
_named: dict[str, Path] = {}  # module -> file of those that were run by their own names


class _Source(SourceFileLoader):
    def __init__(self, sums: dict[Path, str], name: str, path: str):
        super().__init__(name, path)
        self.sums = sums

    def get_code(self, fullname: str) -> object:
        data = self.get_data(self.path)
        self.sums[Path(self.path).resolve()] = hashlib.sha256(data).hexdigest()
        return self.source_to_code(data, self.path)


def run_file(file: str) -> tuple[ModuleType, dict[str, str]]:
    """Runs a file as a module.

    Returns:
        The module; file -> sha256 of it and of all that it imported from its folder, and below.
    """
    path, place, own = Path(file).resolve(), os.path.abspath(file), {}
    name = _free_name(path)
    spec = spec_from_file_location(name, place, loader=_Source(own, name, place))
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    spec.loader.exec_module(module)
    return module, {str(Path(file)): own[path]} | modules_of(file)


def _free_name(path: Path) -> str:
    """The file's own, by which processes that a function starts find it again; another one where a
    module has it."""
    if path.stem.isidentifier() and path.stem not in sys.modules:
        _named[path.stem] = path
        return path.stem
    return next(n for i in count() if (n := f"user_reward_{i}") not in sys.modules)


def modules_of(file: str) -> dict[str, str]:
    """File -> sha256 of each module that was imported from a file's folder, up to now."""
    folder = Path(file).resolve().parent
    return {str(Path(file).parent / path.relative_to(folder)): sha256
            for path, sha256 in sorted(_modules.items()) if path.is_relative_to(folder)}


def open_folder(file: str) -> None:
    """Lets modules be imported from a file's folder, before others, as Python does for a script.

    Raises:
        UserError: a module of another user's folder, which was imported, has the name of one here.
    """
    folder = Path(file).resolve().parent
    if folder in _folders:
        return
    for path in _modules:
        home = next(parent for parent in path.parents if parent in _folders)
        top = path.relative_to(home).parts[0]
        if home != folder and (folder / top).exists():
            raise UserError(folder / top, f"has the name of {home / top}, which runs already",
                            "rename one of them")
    for name in [n for n, path in _named.items() if path.parent != folder]:
        if any((folder / there).exists() for there in (name, f"{name}.py")):
            sys.modules.pop(name, None)  # what is run there means its own
            del _named[name]
    if not _folders:
        sys.path_hooks.insert(0, _finder)
    _folders.append(folder)
    sys.path.insert(0, str(folder))
    for place in [p for p in sys.path_importer_cache if _is_users(Path(p))]:
        del sys.path_importer_cache[place]


def _finder(place: str) -> FileFinder:
    if not _is_users(Path(place)):
        raise ImportError(place)  # the next hook may know it
    return FileFinder(place, (partial(_Source, _modules), SOURCE_SUFFIXES),
                      (ExtensionFileLoader, EXTENSION_SUFFIXES))


def _is_users(place: Path) -> bool:
    """Whether a folder lies in one of `_folders`, and belongs to no environment."""
    place = place.resolve()
    for folder in filter(place.is_relative_to, _folders):
        installed = {"site-packages", "dist-packages"}.intersection(place.relative_to(folder).parts)
        return not installed and not place.is_relative_to(OURS)
    return False
