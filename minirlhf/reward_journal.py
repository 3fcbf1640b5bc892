"""What reward services replied, kept so that a run can be resumed."""

import json
from pathlib import Path

from minirlhf import fsio
from minirlhf.errors import UserError, printable
from minirlhf.rows import strict_json


class Journal:
    """Replies of services in `rewards.jsonl`, on the disk before they are used.

    They are the only input of a run that cannot be computed again: a service may answer otherwise
    when it is asked twice, and has been paid. Entries are found by what was asked, not by when. So
    the file needs no cut back when a run is resumed, as the logs do: what a lost step had asked is
    asked for again by the same step, and found. An uninterrupted run looks here first too, or it
    would give a text that comes twice two scores, and the resumed run one.

    Args:
        path: the file; None keeps them in memory, for one's own loop.
    """

    def __init__(self, path: Path | None = None):
        self.path = path
        self._scores: dict[str, float] | None = None

    @property
    def scores(self) -> dict[str, float]:
        """key -> score; read at first use, when the run's folder is there and locked.

        Raises:
            UserError: a line is damaged, other than a last one that was cut short by a kill.
        """
        if self._scores is None:
            self._scores = {} if self.path is None else _read(self.path)
        return self._scores

    def add(self, scores: dict[str, float]) -> None:
        known = self.scores
        if self.path is not None and scores:
            new = not self.path.exists()
            lines = [json.dumps({"key": key, "score": score}) for key, score in scores.items()]
            fsio.append_line(self.path, "\n".join(lines))
            fsio.fsync(self.path)
            if new:
                fsio.fsync(self.path.parent)
        known.update(scores)


def _read(path: Path) -> dict[str, float]:
    data = path.read_bytes() if path.exists() else b""
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        fsio.truncate(path, whole)
    scores: dict[str, float] = {}
    for number, line in enumerate(data[:whole].split(b"\n")[:-1], start=1):
        try:
            entry = strict_json(line.decode(), path, number)
            if not isinstance(entry, dict) or entry.keys() != {"key", "score"}:
                raise ValueError("is no reply of a service")
            if not isinstance(entry["key"], str) or entry["key"] in scores:
                raise ValueError("has a key that is no text, or stands here twice")
            if type(entry["score"]) is not float:
                raise ValueError("has a score that is no number")
            scores[entry["key"]] = entry["score"]
        except (UserError, ValueError) as error:
            what = error.what if isinstance(error, UserError) else printable(error)
            raise UserError(f"{path}:{number}", what, "put the file back as it was") from None
    return scores
