"""Scores of a service over HTTP: a strict client, whose replies are kept in a journal.

A request is a POST of one of two forms:

    ids            {"model", "items": [{"id", "prompt", "completion", "finish_reason", "columns"}]}
                   -> {"scores": [{"id", "score"}]}, exactly these ids, in any order
    llama-factory  {"model", "messages": [text]} -> {"scores": [number]}, in the order of the texts

`id` is the journal's key. Whatever else a service answers ends the run with exit code 5; no score
is ever made up for one that did not come. Other keys of a reply are ignored.
"""

import hashlib
import http.client
import io
import json
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import torch
from torch import Tensor

from minirlhf import interrupt
from minirlhf.errors import REWARD_SERVICE, UserError, printable
from minirlhf.files import atomic
from minirlhf.files.reading import json_kind, strict_json
from minirlhf.rewards.source import LARGEST, Completions, RewardSource

EXPECTED = {
    "ids": '{"scores": [{"id": ..., "score": number}, ...]} with exactly the ids of the request',
    "llama-factory": '{"scores": [number, ...]} with one number for each text, in their order',
}
FORMS = tuple(EXPECTED)
REPLY_CAP = 16 << 20  # bytes
LONGEST_PAUSE = 10.0  # seconds between two attempts


class Service(NamedTuple):
    """Where a service is, and how patient its client."""

    url: str
    form: str = "ids"
    timeout: float = 60.0  # seconds from a request's start to the last byte of its reply
    connect_timeout: float = 5.0  # seconds
    retries: int = 4  # attempts after the first one; where refused, too slow, cut short, or 5xx
    batch_size: int = 64  # texts in one request
    token: str | None = None  # sent as `Authorization: Bearer TOKEN`
    backoff: float = 0.5  # seconds before the first retry; doubled before each next


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
            atomic.append_line(self.path, "\n".join(lines))
            atomic.fsync(self.path)
            if new:
                atomic.fsync(self.path.parent)
        known.update(scores)


def service_reward(
    service: Service, decode: Callable[[Sequence[int]], str], journal: Journal
) -> RewardSource:
    """Scores of a service. A text that was scored before is never sent again.

    Args:
        decode: ids -> text with its special tokens, of the policy; for the form of LLaMA-Factory.
        journal: where replies are kept.
    Raises:
        UserError: when it is called and the service fails (exit code 5).
    """

    def score(batch: Completions) -> Tensor:
        items = [request_item(service, batch, i, decode) for i in range(len(batch.completions))]
        keys = [key_of(service, item) for item in items]
        known = journal.scores
        missing = [(k, i) for k, i in dict(zip(keys, items, strict=True)).items() if k not in known]
        for start in range(0, len(missing), service.batch_size):
            part = dict(missing[start : start + service.batch_size])
            journal.add(ask(service, part))
        return torch.tensor([known[key] for key in keys])

    return score


# ------------------------------------------------------------------------------- what is exchanged


def request_item(
    service: Service, batch: Completions, i: int, decode: Callable[[Sequence[int]], str]
) -> dict | str:
    """What the service is told of row i, without its id."""
    if service.form == "llama-factory":
        return decode(batch.prompt_ids[i] + batch.response_ids[i])
    return {
        "prompt": batch.prompts[i],
        "completion": batch.completions[i],
        "finish_reason": batch.finish_reasons[i],
        "columns": {name: values[i] for name, values in batch.columns.items()},
    }


def key_of(service: Service, item: dict | str) -> str:
    """sha256, hex, of what is asked and whom."""
    asked = {"url": service.url, "form": service.form, "item": item}
    text = json.dumps(asked, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def ask(service: Service, items: dict[str, dict | str]) -> dict[str, float]:
    """Scores of some items by their keys.

    Raises:
        UserError: anything but one finite number for each of them (exit code 5).
    """
    if service.form == "ids":
        body: dict = {"model": "model"}  # the name that LLaMA-Factory sends
        body["items"] = [{"id": key} | item for key, item in items.items()]
    else:
        body = {"model": "model", "messages": list(items.values())}
    reply = post(service, json.dumps(body, ensure_ascii=False, allow_nan=False).encode())
    try:
        scores = _scores_of(strict_json(reply.decode(), "reply"))
        if service.form == "ids":
            return _by_id(scores, items)
        if len(scores) != len(items):
            raise ValueError(f"{len(scores)} scores for {len(items)} texts")
        numbers = [_number(score, f"score {i}") for i, score in enumerate(scores)]
        return dict(zip(items, numbers, strict=True))
    except (UserError, ValueError) as error:  # UnicodeDecodeError is one
        excerpt = printable(reply[:200].decode(errors="replace"), 120)
        raise _failure(service, f"{printable(error, 200)} in {excerpt!r}") from None


def _scores_of(reply: object) -> list:
    if not isinstance(reply, dict):
        raise ValueError(f"the reply is {json_kind(reply)}")
    if not isinstance(reply.get("scores"), list):
        got = json_kind(reply["scores"]) if "scores" in reply else "missing"
        raise ValueError(f'"scores" is {got}')
    return reply["scores"]


def _by_id(scores: list, items: dict[str, dict | str]) -> dict[str, float]:
    """The scores under their ids, in the order of the items."""
    found: dict[str, float] = {}
    for i, score in enumerate(scores):
        if not isinstance(score, dict) or not {"id", "score"} <= score.keys():
            raise ValueError(f"score {i} has no id or no score")
        id = score["id"]
        if not isinstance(id, str) or id not in items:
            raise ValueError(f"score {i} has an id that was not sent")
        if id in found:
            raise ValueError(f"score {i} has the id of another one")
        found[id] = _number(score["score"], f"score {i}")
    if len(found) != len(items):
        raise ValueError(f"{len(found)} scores for {len(items)} items")
    return {id: found[id] for id in items}


def _number(value: object, what: str) -> float:
    if type(value) not in (int, float) or not abs(value) <= LARGEST:
        shown = "a number beyond float32" if type(value) in (int, float) else json_kind(value)
        raise ValueError(f"{what} is {shown}")
    return float(value)


# -------------------------------------------------------------------------------------------- HTTP


def post(service: Service, body: bytes) -> bytes:
    """The reply's body. No proxy is asked, no redirect followed, nothing compressed.

    Raises:
        UserError: no reply of status 200 and at most 16 MiB came (exit code 5).
    """
    for attempt in range(service.retries + 1):
        with interrupt.outside():
            if attempt:
                time.sleep(min(service.backoff * 2.0 ** (attempt - 1), LONGEST_PAUSE))
            try:
                status, data = _exchange(service, body)
            except (OSError, http.client.IncompleteRead) as error:
                failed = str(error) or type(error).__name__
                continue
            except http.client.HTTPException as error:
                what = f"no HTTP reply: {type(error).__name__} {printable(error, 120)}"
                raise _failure(service, what) from None
        if status == 200:
            return data
        failed = f"answered {status}: {printable(data.decode(errors='replace'), 120)!r}"
        if status < 500:
            raise _failure(service, failed)
    times = f" ({service.retries + 1} attempts)" if service.retries else ""
    raise _failure(service, failed + times)


def _failure(service: Service, what: str) -> UserError:
    return UserError(service.url, what, f"expected {EXPECTED[service.form]}", REWARD_SERVICE)


def _exchange(service: Service, body: bytes) -> tuple[int, bytes]:
    """Status and body of one reply; of an error's body only its start."""
    end = time.monotonic() + service.timeout
    parts = urlsplit(service.url)
    kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    patience = min(service.connect_timeout, service.timeout)
    kind = kinds[parts.scheme]
    # Without a port http.client would look for one in the host, which a colon of IPv6 is not.
    connection = kind(parts.hostname, parts.port or kind.default_port, timeout=patience)
    try:
        connection.connect()
        connection.sock.settimeout(_left(end))
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if service.token is not None:
            headers["Authorization"] = f"Bearer {service.token}"
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("POST", target, body, headers)
        with http.client.HTTPResponse(_Timed(connection.sock, end), method="POST") as response:
            response.begin()
            if response.status != 200:
                return response.status, response.read(1000)
            if (coding := response.getheader("Content-Encoding", "identity")) != "identity":
                raise _failure(service, f"a body that is {printable(coding, 40)}, not plain")
            announced = response.length or 0  # None where only the end tells
            data = response.read(REPLY_CAP + 1) if announced <= REPLY_CAP else b""
            if max(len(data), announced) > REPLY_CAP:
                raise _failure(service, f"a body of more than {REPLY_CAP:,} bytes")
            if response.length:  # the connection ended before the length that was announced
                raise http.client.IncompleteRead(data, response.length)
            return 200, data
    finally:
        connection.close()


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


class _Timed(io.RawIOBase):
    """A socket as a file, all of whose reads end by one instant.

    A socket's own timeout is for each read: a service that sends a byte a second would never end.
    """

    def __init__(self, sock: socket.socket, end: float):
        self.sock, self.end = sock, end

    def makefile(self, _: str) -> io.BufferedReader:
        """What http.client asks a socket for."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        self.sock.settimeout(_left(self.end))
        return self.sock.recv_into(buffer)




def _read(path: Path) -> dict[str, float]:
    data = path.read_bytes() if path.exists() else b""
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        atomic.truncate(path, whole)
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
