"""Numbers by their keys, on disk before they are used, as the replies of reward services: each text
is paid for and scored once.

Replies are the only input of a run that cannot be computed again, because a service may answer
otherwise when it is asked twice. They are found by what was asked, not by when, so the file is not
truncated on resume, as the logs are: a repeated step asks for the same texts and finds them here.
An uninterrupted run looks here first, too; otherwise a text that comes twice would get two scores
there and one in the resumed run.
"""

import json
from pathlib import Path

from minirlhf import ranks
from minirlhf.errors import UserError
from minirlhf.files import atomic
from minirlhf.files.reading import strict_json


class Journal:
    """Scores by the key of what was asked, on disk before they are used.

    Args:
        path: `rewards.jsonl`, made with the first reply; None keeps the scores in memory.
        what: a score is, for messages.
    """

    def __init__(self, path: Path | None = None, what: str = "reply of a service"):
        self.path, self.what = path, what
        self._scores: dict[str, float] | None = None

    @property
    def scores(self) -> dict[str, float]:
        """key -> score; read at the first use, when the run's folder exists and is locked.

        Raises:
            UserError: a line is damaged, other than a last one that a kill left unfinished.
        """
        if self._scores is None:
            self._scores = ranks.from_first(
                lambda: {} if self.path is None else _read(self.path, self.what)
            )
        return self._scores

    def add(self, scores: dict[str, float]) -> None:
        known = self.scores
        if self.path is not None and scores:
            ranks.from_first(lambda: self._write(scores))
        known.update(scores)

    def _write(self, scores: dict[str, float]) -> None:
        new = not self.path.exists()
        lines = [json.dumps({"key": key, "score": score}) for key, score in scores.items()]
        atomic.append_line(self.path, "\n".join(lines))
        atomic.fsync(self.path)
        if new:
            atomic.fsync(self.path.parent)


def _read(path: Path, what: str) -> dict[str, float]:
    data = path.read_bytes() if path.exists() else b""
    whole = data.rfind(b"\n") + 1
    if whole < len(data):  # a kill inside the last append
        atomic.truncate(path, whole)
    scores: dict[str, float] = {}
    for number, line in enumerate(data[:whole].split(b"\n")[:-1], start=1):
        try:
            entry = strict_json(line.decode(), path, number)
        except (UserError, UnicodeDecodeError):
            entry = None
        match entry:
            case {"key": str(key), "score": float(score)} if len(entry) == 2 and key not in scores:
                scores[key] = score
            case _:
                told = f"is no {what}, or stands here twice"
                raise UserError(f"{path}:{number}", told, "put the file back as it was")
    return scores
