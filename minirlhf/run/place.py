"""Where the folder of a run may be."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from minirlhf.errors import UserError, printable
from minirlhf.run.settings import settings_of


def place_of(out: str) -> Path:
    """The folder's path, without .. where that would name a folder that is not there."""
    folder = Path(out)
    try:
        resolved = folder.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle; a name that is too long
        raise UserError("--out", printable(error), "give another --out") from None
    return resolved if ".." in folder.parts else folder


def check_place(
    folder: Path, config: object, inputs: Mapping[str, Iterable[str | Path]]
) -> None:
    """Refuses a place where no folder can be made, or that a model is read from.

    Args:
        config: of the recipe.
        inputs: setting -> the files and folders that it names.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(folder, "is not a folder", "give another --out")
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir():
        raise UserError(folder, f"{above.name} is a file", "give another --out")
    for flag, place in _model_folders(config, inputs):  # what is read there would change
        if inside(folder, Path(place)):
            what = f"is {flag} {place} or lies in it"
            raise UserError(folder, what, "give another --out")


def _model_folders(
    config: object, inputs: Mapping[str, Iterable[str | Path]]
) -> Iterator[tuple[str, str | Path]]:
    """What the run may read models from, with the flags that name it."""
    for name, item in settings_of(type(config)).items():
        if item.metavar == "FOLDER" and (place := getattr(config, name)):
            yield item.flag, place
        elif item.metavar == "SOURCE":
            yield from ((item.flag, place) for place in inputs.get(name, ()))


def inside(folder: Path, other: Path) -> bool:
    """Whether a folder is another one that exists, or lies below it."""
    return other.is_dir() and folder.resolve().is_relative_to(other.resolve())
