"""Scores of a service over HTTP: a strict client that never makes a score up.

A request is a POST in one of two forms:

    ids            {"model", "items": [{"id", "prompt", "completion", "finish_reason", "columns"}]}
                   -> {"scores": [{"id", "score"}]}, exactly these ids, in any order
    llama-factory  {"model", "messages": [text]} -> {"scores": [number]}, in the order of the texts

`id` is the key in the journal. Any other reply ends the run with exit code 5; keys of a reply
beside those above are ignored.
"""

import hashlib
import http.client
import io
import json
import math
import re
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import NamedTuple
from urllib.parse import urlsplit

import torch
from torch import Tensor

from minirlhf import interrupt
from minirlhf.errors import REWARD_SERVICE, UserError, printable
from minirlhf.files.reading import json_kind, strict_json
from minirlhf.rewards.journal import Journal
from minirlhf.rewards.source import LARGEST, Completions, RewardSource

EXPECTED = {
    "ids": '{"scores": [{"id": ..., "score": number}, ...]} with exactly the ids of the request',
    "llama-factory": '{"scores": [number, ...]} with one number for each text, in their order',
}
FORMS = tuple(EXPECTED)
BODY_CAP, SCORE_CAP = 1 << 20, 4 << 10  # bytes of a reply's body: in all, and more for each text
LONGEST_PAUSE = 10.0  # seconds between two attempts


class Service(NamedTuple):
    """Where a service is, and how patient its client is."""

    url: str
    form: str = "ids"
    timeout: float = 60.0  # seconds from the start of a request to the last byte of its reply
    connect_timeout: float = 5.0  # seconds
    retries: int = 4  # further attempts after a refused, slow or unfinished reply, or a 5xx
    batch_size: int = 64  # texts in one request
    token: str | None = None  # sent as `Authorization: Bearer TOKEN`
    backoff: float = 0.5  # seconds before the first retry; doubles with each


def service_reward(
    service: Service, decode: Callable[[Sequence[int]], str], journal: Journal
) -> RewardSource:
    """Scores of a service. A text that was scored before is not sent again.

    Args:
        decode: ids -> text with its special tokens, by the policy's tokenizer; for llama-factory.
    Raises:
        UserError: when called and the service fails (exit code 5).
    """

    def score(batch: Completions) -> Tensor:
        items = [request_item(service, batch, i, decode) for i in range(len(batch.completions))]
        keys = [key_of(service, item) for item in items]
        known = journal.scores
        missing = [(k, i) for k, i in dict(zip(keys, items, strict=True)).items() if k not in known]
        for start in range(0, len(missing), service.batch_size):
            journal.add(ask(service, dict(missing[start : start + service.batch_size])))
        return torch.tensor([known[key] for key in keys])

    return score


# ------------------------------------------------------------------------------ requests, replies


def request_item(
    service: Service, batch: Completions, i: int, decode: Callable[[Sequence[int]], str]
) -> dict | str:
    """Row i of the batch as a request holds it, without its id."""
    if service.form == "llama-factory":
        return decode(batch.prompt_ids[i] + batch.response_ids[i])
    return {
        "prompt": batch.prompts[i],
        "completion": batch.completions[i],
        "finish_reason": batch.finish_reasons[i],
        "columns": {name: values[i] for name, values in batch.columns.items()},
    }


def key_of(service: Service, item: dict | str) -> str:
    """sha256, hex, of what is asked and of whom."""
    asked = {"url": service.url, "form": service.form, "item": item}
    text = json.dumps(asked, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def ask(service: Service, items: dict[str, dict | str]) -> dict[str, float]:
    """Scores of some items, by their keys and in their order.

    Raises:
        UserError: anything but one finite number for each of them came (exit code 5).
    """
    request: dict = {"model": "model"}  # the name that LLaMA-Factory sends
    if service.form == "ids":
        request["items"] = [{"id": key} | item for key, item in items.items()]
    else:
        request["messages"] = list(items.values())
    body, reply = json.dumps(request, ensure_ascii=False, allow_nan=False).encode(), b""
    try:
        reply = post(service, body, BODY_CAP + SCORE_CAP * len(items))
        return scores_of(strict_json(reply.decode(), "reply"), service.form, list(items))
    except (UserError, ValueError) as error:  # UnicodeDecodeError is one
        what = printable(error, 240) + (f" in {_excerpt(reply)}" if reply else "")
        expected = f"expected {EXPECTED[service.form]}"
        raise UserError(service.url, what, expected, REWARD_SERVICE) from None


def scores_of(reply: object, form: str, keys: list[str]) -> dict[str, float]:
    """key -> score, in the order of the keys.

    Raises:
        ValueError: the reply is not of the form, or has anything but one score for each key.
    """
    if not isinstance(reply, dict):
        raise ValueError(f"the reply is {json_kind(reply)}")
    scores = reply.get("scores")
    if not isinstance(scores, list):
        raise ValueError(f'"scores" is {json_kind(scores) if "scores" in reply else "missing"}')
    if len(scores) != len(keys):
        raise ValueError(f"{len(scores)} scores for {len(keys)} texts")
    if form == "llama-factory":
        scores = [{"id": key, "score": s} for key, s in zip(keys, scores, strict=True)]
    found: dict[str, float] = {}
    for i, score in enumerate(scores):
        match score:
            case {"id": str(id), "score": int() | float() as value} if (
                abs(value) <= LARGEST and not isinstance(value, bool)
            ):
                found[id] = float(value)
            case _:
                raise ValueError(f"score {i} is {json.dumps(score)}")
    if found.keys() != set(keys):
        raise ValueError(f"{len(found.keys() & set(keys))} of {len(keys)} ids that were sent")
    return {key: found[key] for key in keys}


# ------------------------------------------------------------------------------------------- HTTP


def post(service: Service, body: bytes, most: int) -> bytes:
    """The body of a reply. No proxy is asked, no redirect followed, nothing compressed.

    Raises:
        ValueError: no reply of status 200 and at most `most` bytes came.
    """
    for attempt in range(1, service.retries + 2):
        with interrupt.outside():
            if attempt > 1:
                time.sleep(min(service.backoff * 2.0 ** (attempt - 2), LONGEST_PAUSE))
            try:
                status, data = _exchange(service, body, most)
            except (OSError, http.client.IncompleteRead) as error:
                failed = str(error) or type(error).__name__
                continue
            except (http.client.HTTPException, OverflowError) as error:  # of a chunk's size
                raise ValueError(f"no HTTP reply: {type(error).__name__} {error}") from None
        if status == 200:
            return data
        failed = f"answered {status}: {_excerpt(data)}"
        if status < 500:
            break
    raise ValueError(f"attempt {attempt} of {service.retries + 1}: {failed}")


def _excerpt(data: bytes) -> str:
    return repr(printable(data[:200].decode(errors="replace"), 120))


def _exchange(service: Service, body: bytes, most: int) -> tuple[int, bytes]:
    """Status and body of one reply; of an error's body only its start."""
    end, url = time.monotonic() + service.timeout, urlsplit(service.url)
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    patience = min(service.connect_timeout, service.timeout)
    headers = {"Content-Type": "application/json", "Connection": "close"}
    if service.token is not None:
        headers["Authorization"] = f"Bearer {service.token}"
    target = (url.path or "/") + (f"?{url.query}" if url.query else "")
    # Without a port http.client would look for one in the host, and find the last colon of IPv6.
    port = url.port or kind.default_port
    with closing(kind(url.hostname, port, timeout=patience)) as connection:
        connection.connect()
        connection.sock.settimeout(max(end - time.monotonic(), 1e-3))
        connection.request("POST", target, body, headers)
        # Thrice: with its headers and the sizes of its chunks.
        received = Received(connection.sock, end, 3 * most)
        response = http.client.HTTPResponse(received, method="POST")
        response.begin()
        if response.status != 200:
            return response.status, response.read(1000)
        if (coding := response.getheader("Content-Encoding", "identity")) != "identity":
            raise ValueError(f"a body that is {printable(coding, 40)}, not plain")
        for length in response.headers.get_all("Content-Length", ()):
            if re.fullmatch("[0-9]{1,18}", length) is None:
                raise ValueError(f"Content-Length is {printable(length, 40)}")
        announced = response.length or 0  # None where only the end of the connection tells
        data = response.read(most + 1) if announced <= most else b""
        if max(len(data), announced) > most:
            raise ValueError(f"a body of more than {most:,} bytes")
        if response.length:  # the connection ended before the length that was announced
            raise http.client.IncompleteRead(data, response.length)
        return 200, data


class Received(io.RawIOBase):
    """What a socket receives, as a file all of whose reads end by one instant and some length.

    A socket's own timeout is for each read: a peer that sends a byte a second would never end. And
    http.client takes a chunk of -1 bytes for all that comes.

    Args:
        end: by `time.monotonic`.
        most: bytes, whatever they are of: headers, chunk sizes, bodies.
    """

    def __init__(self, sock: socket.socket, end: float, most: float = math.inf):
        self.sock, self.end, self.most, self.size = sock, end, most, 0

    def makefile(self, _: str) -> io.BufferedReader:
        """What http.client asks a socket for."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self.sock.settimeout(left)
        size = self.sock.recv_into(buffer)
        self.size += size
        if self.size > self.most:
            raise http.client.HTTPException(f"more than {self.most:,} bytes")
        return size
