"""A reward service that misbehaves: right rewards or exit code 5, and never a number made up."""

import hashlib
import http.client
import itertools
import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager

import pytest

from minirlhf.errors import REWARD_SERVICE, UserError
from minirlhf.rewards.journal import Journal
from minirlhf.rewards.service import EXPECTED, Service, key_of, service_reward
from minirlhf.rewards.source import Completions

BATCH = Completions(
    prompts=["ab", [{"role": "user", "content": "c"}], "d"],
    prompt_ids=[[1, 2], [3], [4]],
    completions=["x", "yzé", ""],
    response_ids=[[5, 0], [6, 7, 8], [0]],
    finish_reasons=["eos", "length", "stop"],
    columns={"answer": [7, None, 9]},
)
RIGHT = [1.5, 3.5, 0.5]  # length + 0.5


def decode(ids: list[int]) -> str:
    return " ".join(map(str, ids))


# ---- a server that does as it is told ------------------------------------------------------------


class Request:
    """One that has come in; its bytes have been read."""

    def __init__(self, sock: socket.socket):
        self.sock, self.headers = sock, {}
        with sock.makefile("rb") as file:
            self.line = file.readline().decode("latin1").strip()
            while line := file.readline().decode("latin1").strip():
                name, _, value = line.partition(": ")
                self.headers[name.lower()] = value
            text = file.read(int(self.headers.get("content-length", 0))).decode()
        self.body = json.loads(text) if text else None

    def reply(self, body: object, status: str = "200 OK", headers: tuple[str, ...] = ()) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = [f"HTTP/1.1 {status}", f"Content-Length: {len(data)}", *headers, "", ""]
        self.raw("\r\n".join(head).encode() + data)

    def raw(self, data: bytes) -> None:
        self.sock.sendall(data)

    @property
    def scores(self) -> list[dict]:
        """What a good service says."""
        items = self.body["items"]
        return [{"id": item["id"], "score": len(item["completion"]) + 0.5} for item in items]

    def good(self) -> None:
        self.reply({"scores": self.scores})


class Stub:
    """Answers each connection by the next of some functions, the last one again and again."""

    def __init__(self, *answers: Callable[[Request], None]):
        self.answers, self.requests = answers, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/score"
        self.threads = [threading.Thread(target=self._accept)]
        self.threads[0].start()

    def _accept(self) -> None:
        for number in itertools.count():
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._answer, args=(sock, number))
            self.threads.append(thread)
            thread.start()

    def _answer(self, sock: socket.socket, number: int) -> None:
        with sock:
            sock.settimeout(5)
            try:
                request = Request(sock)
                self.requests.append(request)
                self.answers[min(number, len(self.answers) - 1)](request)
            except OSError:
                pass  # the client has left

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for thread in self.threads:
            thread.join()


@contextmanager
def stub(*answers: Callable[[Request], None]):
    server = Stub(*answers)
    try:
        yield server
    finally:
        server.close()


@pytest.mark.parametrize(("url", "port"), [("http://[::1]/p", 80), ("http://[::1]:9/p", 9)])
def test_an_address_of_ipv6_is_no_port(url, port, monkeypatch):
    class Recorded(http.client.HTTPConnection):
        def connect(self):
            asked.append((self.host, self.port))
            raise ConnectionRefusedError

    asked: list[tuple] = []
    monkeypatch.setattr(http.client, "HTTPConnection", Recorded)
    with pytest.raises(UserError):
        scores(service(url, retries=0))
    assert asked == [("::1", port)]


def service(url: str, **changes) -> Service:
    """An impatient client."""
    given = {"timeout": 0.4, "connect_timeout": 0.4, "retries": 2, "backoff": 0.001} | changes
    return Service(url, **given)


def scores(service: Service, batch: Completions = BATCH, journal: Journal | None = None):
    return service_reward(service, decode, journal or Journal())(batch).tolist()


# ---- what is asked -------------------------------------------------------------------------------


def test_ids_form_sends_every_item_with_its_id_and_takes_any_order():
    with stub(lambda r: r.reply({"scores": r.scores[::-1], "model": "mine"})) as server:
        assert scores(service(server.url, token="secret")) == RIGHT
    (request,) = server.requests
    assert request.line == "POST /score HTTP/1.1"
    assert request.headers["authorization"] == "Bearer secret"
    assert request.headers["accept-encoding"] == "identity"
    assert request.headers["content-type"] == "application/json"
    assert request.body["model"] == "model" and request.body.keys() == {"model", "items"}
    items = request.body["items"]
    assert len({item.pop("id") for item in items}) == 3
    columns = BATCH.prompts, BATCH.completions, BATCH.finish_reasons, [7, None, 9]
    assert items == [
        {"prompt": p, "completion": c, "finish_reason": f, "columns": {"answer": a}}
        for p, c, f, a in zip(*columns, strict=True)
    ]


def test_llama_factory_form_sends_whole_texts_and_takes_their_order():
    with stub(lambda r: r.reply({"scores": [1, 2.5, -3], "id": "x", "object": "y"})) as server:
        assert scores(service(server.url, form="llama-factory")) == [1.0, 2.5, -3.0]
    (request,) = server.requests
    assert request.body == {"model": "model", "messages": ["1 2 5 0", "3 6 7 8", "4 0"]}
    assert "authorization" not in request.headers


def test_target_keeps_path_and_query():
    with stub(Request.good) as server:
        assert scores(service(server.url.replace("/score", "/a/b?model=x%20y"))) == RIGHT
        assert scores(service(server.url.removesuffix("/score"))) == RIGHT
    assert [request.line.split()[1] for request in server.requests] == ["/a/b?model=x%20y", "/"]


def test_requests_have_at_most_so_many_texts_and_none_twice():
    texts = ["a", "bb", "a", "ccc", "bb"]
    batch = Completions(["p"] * 5, [[1]] * 5, texts, [[2]] * 5, ["eos"] * 5, {})
    with stub(Request.good) as server:
        source = service_reward(service(server.url, batch_size=2), decode, Journal())
        assert source(batch).tolist() == [1.5, 2.5, 1.5, 3.5, 2.5]
        sent = [[item["completion"] for item in r.body["items"]] for r in server.requests]
        assert sent == [["a", "bb"], ["ccc"]]
        more = batch._replace(completions=["ccc", "dddd", "a", "a", "a"])
        assert source(more).tolist() == [3.5, 4.5, 1.5, 1.5, 1.5]
    assert [item["completion"] for item in server.requests[-1].body["items"]] == ["dddd"]


def test_proxies_of_the_environment_are_ignored(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with stub(Request.good) as server:
        assert scores(service(server.url)) == RIGHT


def test_key_is_of_all_that_is_asked_and_of_whom():
    here = service("http://h/p")
    item = {"prompt": "a", "completion": "b", "finish_reason": "eos", "columns": {}}
    text = (
        '{"form":"ids","item":{"columns":{},"completion":"b","finish_reason":"eos","prompt":"a"},'
        '"url":"http://h/p"}'
    )
    assert key_of(here, item) == hashlib.sha256(text.encode()).hexdigest()
    others = [(here, item | {name: "other"}) for name in item]
    others += [(service("http://h/q"), item), (service("http://h/p", form="llama-factory"), item)]
    assert len({key_of(here, item), *(key_of(*other) for other in others)}) == 7
    patient = service("http://h/p", timeout=9, token="t", batch_size=1)
    assert key_of(patient, item) == key_of(here, item)


def test_replies_are_in_the_journal_before_they_are_used(tmp_path):
    path = tmp_path / "rewards.jsonl"
    with stub(Request.good) as server:
        here = service(server.url)
        assert scores(here, journal=Journal(path)) == RIGHT
        item = {"prompt": "ab", "completion": "x", "finish_reason": "eos", "columns": {"answer": 7}}
        first, *rest = path.read_text().splitlines()
        assert json.loads(first) == {"key": key_of(here, item), "score": 1.5} and len(rest) == 2
        # another process finds them; a new text alone is asked for
        assert scores(here, journal=Journal(path)) == RIGHT
        assert len(server.requests) == 1
        more = BATCH._replace(completions=["x", "new", ""])
        assert scores(here, more, Journal(path)) == [1.5, 3.5, 0.5]
        assert [i["completion"] for i in server.requests[1].body["items"]] == ["new"]
    assert len(path.read_text().splitlines()) == 4


# ---- misbehaviours -------------------------------------------------------------------------------


def change(function: Callable[[list], object]) -> Callable[[Request], None]:
    """Replies with what the function makes of the right scores."""
    return lambda request: request.reply({"scores": function(request.scores)})


def score_is(text: str) -> Callable[[Request], None]:
    """The second score spelled so."""

    def answer(request: Request) -> None:
        right = json.dumps({"scores": request.scores})
        request.reply(right.replace("3.5", text).encode())

    return answer


def silent(request: Request) -> None:
    request.sock.recv(1)  # until the client leaves


def drip(head: bytes) -> Callable[[Request], None]:
    """A byte every 50 ms, without end."""

    def answer(request: Request) -> None:
        request.raw(head)
        while True:
            time.sleep(0.05)
            request.raw(b"1")

    return answer


def endless(request: Request) -> None:
    request.raw(b"HTTP/1.1 200 OK\r\n\r\n[")
    while True:
        request.raw(b" " * (1 << 20))


def endless_chunks(request: Request) -> None:
    request.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        request.raw(b"100000\r\n" + b" " * (1 << 20) + b"\r\n")


def after(head: bytes, more: bytes = b"") -> Callable[[Request], None]:
    """Some bytes, then others without end."""

    def answer(request: Request) -> None:
        request.raw(head)
        while more:
            request.raw(more)

    return answer


def reset(request: Request) -> None:
    """The connection is reset in the middle of the body."""
    request.raw(HEAD + b'Content-Length: 99\r\n\r\n{"scores": [')
    request.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def no_length(value: str) -> Callable[[Request], None]:
    """Right scores, and a Content-Length that is no length."""

    def answer(request: Request) -> None:
        body = json.dumps({"scores": request.scores}).encode()
        request.raw(HEAD + f"Content-Length: {value}\r\n\r\n".encode() + body)

    return answer


def going_on(request: Request) -> None:
    while True:
        request.raw(b"HTTP/1.1 100 Continue\r\n\r\n")
        time.sleep(0.01)


def chunked(request: Request) -> None:
    data = json.dumps({"scores": request.scores}).encode()
    request.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for byte in data:
        request.raw(b"1\r\n" + bytes([byte]) + b"\r\n")
    request.raw(b"0\r\n\r\n")


def raw(data: bytes) -> Callable[[Request], None]:
    return lambda request: request.raw(data)


def answers(status: str, body: object = b"no", *headers: str) -> Callable[[Request], None]:
    return lambda request: request.reply(body, status, headers)


def cut_short(request: Request) -> None:
    request.raw(b'HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{"scores": [')


def nothing(request: Request) -> None:
    pass


HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
MILLION = b"1" * (1 << 20)
TOO_LONG = "a body of more than 1,060,864 bytes"  # 2^20 + 3 * 2^12, for three texts
TOO_MUCH = "more than 3,182,592 bytes"  # thrice that, in all
GOOD = Request.good
MOVED = "Location: http://127.0.0.1:9/elsewhere"
MISBEHAVIOURS = {  # name: (answers, what is told or None where the rewards are right, requests)
    # silent, refused, flapping
    "silent": ((silent,), "attempt 3 of 3: timed out", 3),
    "silent once": ((silent, GOOD), None, 2),
    "closes without a word": ((nothing,), "Remote end closed connection without response", 3),
    "closes once": ((nothing, GOOD), None, 2),
    "500": ((answers("500 Oops"),), "attempt 3 of 3: answered 500: 'no'", 3),
    "503 twice": ((answers("503 Busy"), answers("503 Busy"), GOOD), None, 3),
    "502 with a page": ((answers("502 Bad", b"<html>\n\x1b[31m"),), r"'<html>\\n\\x1b", 3),
    # refused for good
    "400": ((answers("400 Bad"),), "attempt 1 of 3: answered 400: 'no': expected", 1),
    "401": ((answers("401 Unauthorized"),), "answered 401", 1),
    "404": ((answers("404 Not Found"), GOOD), "answered 404", 1),
    "429": ((answers("429 Slow down"),), "answered 429", 1),
    "redirect": ((answers("302 Found", b"", MOVED),), "answered 302", 1),
    "permanent redirect": ((answers("308 Moved", b"", MOVED),), "answered 308", 1),
    "no content": ((answers("204 No Content", b""),), "answered 204", 1),
    "accepted": ((answers("202 Accepted"),), "answered 202", 1),
    # no JSON, or not the schema
    "a page": ((answers("200 OK", b"<html></html>"),), "not valid JSON", 1),
    "empty": ((answers("200 OK", b""),), "not valid JSON", 1),
    "half of it": ((answers("200 OK", b'{"scores": ['),), "not valid JSON", 1),
    "not UTF-8": ((answers("200 OK", b'{"scores": "\xff"}'),), "codec can't decode", 1),
    "a list": ((answers("200 OK", [1, 2, 3]),), "the reply is a list", 1),
    "no scores": ((answers("200 OK", {"rewards": [1, 2, 3]}),), '"scores" is missing', 1),
    "scores null": ((answers("200 OK", {"scores": None}),), '"scores" is null', 1),
    "scores an object": ((answers("200 OK", {"scores": {"0": 1}}),), '"scores" is an object', 1),
    "numbers alone": ((answers("200 OK", {"scores": [1, 2, 3]}),), "score 0 is 1 in", 1),
    "scores twice": ((answers("200 OK", b'{"scores": [], "scores": []}'),), "stands twice", 1),
    "too deep": ((answers("200 OK", b"[" * 5000),), "nested deeper than 64 levels", 1),
    # how many, and which
    "one too few": ((change(lambda s: s[1:]),), "2 scores for 3 texts", 1),
    "one too many": ((change(lambda s: [*s, {"id": "new", "score": 1}]),), "4 scores for 3", 1),
    "one for all": ((change(lambda s: s[:1]),), "1 scores for 3 texts", 1),
    "none": ((change(lambda s: []),), "0 scores for 3 texts", 1),
    "shuffled": ((change(lambda s: [s[1], s[2], s[0]]),), None, 1),
    "repeated": ((change(lambda s: [s[0], s[1], s[1]]),), "2 of 3 ids that were sent", 1),
    "ids as numbers": ((change(lambda s: [{"id": i, "score": 1} for i in (0, 1, 2)]),), "is {", 1),
    # what a score may be
    "null": ((score_is("null"),), '"score": null}', 1),
    "a string": ((score_is('"3.5"'),), '"score": "3.5"}', 1),
    "true": ((score_is("true"),), '"score": true}', 1),
    "a list as a score": ((score_is("[3.5]"),), '"score": [3.5]}', 1),
    "NaN": ((score_is("NaN"),), "NaN is not JSON", 1),
    "-Infinity": ((score_is("-Infinity"),), "-Infinity is not JSON", 1),
    "1e400": ((score_is("1e400"),), "number 1e400 is not finite", 1),
    "beyond float32": ((score_is("1e39"),), '"score": 1e+39}', 1),
    "an integer of 5,000 digits": ((score_is("9" * 5000),), "", 1),
    "a huge integer": ((score_is("9" * 400),), '"score": 999', 1),
    "an integer": ((score_is("7"),), [1.5, 7.0, 0.5], 1),
    # endless, slow, compressed, no HTTP
    "endless": ((endless,), TOO_LONG, 1),
    "endless chunks": ((endless_chunks,), TOO_LONG, 1),
    "announces 1 TB": ((raw(HEAD + b"Content-Length: 1000000000000\r\n\r\n[1]"),), "a body of", 1),
    "drips its body": ((drip(HEAD + b"Content-Length: 99999\r\n\r\n"),), "timed out", 3),
    "drips its header": ((drip(HEAD + b"X: "),), "timed out", 3),
    "drips its status": ((drip(b"HTTP/1."),), "timed out", 3),
    "goes on and on": ((going_on,), "timed out", 3),
    "cut short": ((cut_short,), "IncompleteRead", 3),
    "cut short once": ((cut_short, GOOD), None, 2),
    "chunks of a byte": ((chunked,), None, 1),
    "a chunk of -1 bytes, endless": ((after(CHUNKED + b"-1\r\n", MILLION),), TOO_MUCH, 1),
    "a chunk of -5 bytes": ((raw(CHUNKED + b"-5\r\n" + MILLION),), "read length must be", 1),
    "a chunk of -2^72 bytes": ((raw(CHUNKED + b"-" + b"f" * 18 + b"\r\n[1]"),), "Overflow", 1),
    "a chunk of 2^72 bytes, endless": (
        (after(CHUNKED + b"f" * 18 + b"\r\n", MILLION),), TOO_LONG, 1),
    "a chunk of 2^72 bytes": ((raw(CHUNKED + b"f" * 18 + b"\r\n[1]"),), "IncompleteRead", 3),
    "a chunk of no size": ((raw(CHUNKED + b"many\r\n[1]\r\n0\r\n\r\n"),), "IncompleteRead", 3),
    "a chunk without an end": ((raw(CHUNKED + b"3\r\n[1]"),), "IncompleteRead", 3),
    "a chunk's size, endless": ((after(CHUNKED, MILLION),), "LineTooLong", 1),
    "a trailer, endless": ((after(CHUNKED + b"0\r\n", b"X: " + b"1" * 60000 + b"\r\n"),),
                          TOO_MUCH, 1),
    "an error's chunk of -1 bytes, endless": (
        (after(CHUNKED.replace(b"200", b"500") + b"-1\r\n", MILLION),), TOO_MUCH, 1),
    "a status line, endless": ((after(b"HTTP/1.1 200 ", MILLION),), "no HTTP reply", 1),
    "zeros, endless": ((after(b"", b"\0" * (1 << 20)),), "no HTTP reply", 1),
    "a length of -1": ((no_length("-1"),), "Content-Length is -1", 1),
    "a length of 1_0": ((no_length("1_0"),), "Content-Length is 1_0", 1),
    "a length that is none": ((no_length("all"),), "Content-Length is all", 1),
    "a length that is too short": ((no_length("20"),), "not valid JSON", 1),
    "a length beyond any integer's digits": ((no_length("9" * 5000),), "Content-Length is 9", 1),
    "reset": ((reset,), "Connection reset by peer", 3),
    "reset once": ((reset, GOOD), None, 2),
    "gzip": ((answers("200 OK", b"\x1f\x8b", "Content-Encoding: gzip"),), "that is gzip, not", 1),
    "no HTTP": ((raw(b"SSH-2.0-OpenSSH_9.6\r\n"),), "no HTTP reply: BadStatusLine SSH-2.0", 1),
    "a long header": ((raw(HEAD + b"X: " + b"a" * 70000 + b"\r\n\r\n"),), "no HTTP reply", 1),
    "many headers": ((raw(HEAD + b"X: a\r\n" * 200 + b"\r\n"),), "no HTTP reply: HTTPExc", 1),
}


@pytest.mark.parametrize("name", MISBEHAVIOURS)
def test_a_misbehaving_service_gives_right_rewards_or_exit_code_5(name, tmp_path):
    replies, told, asked = MISBEHAVIOURS[name]
    journal = Journal(tmp_path / "rewards.jsonl")
    started = time.monotonic()
    with stub(*replies) as server:
        patient = service(server.url, timeout=5.0) if "endless" in name else service(server.url)
        if told is None or isinstance(told, list):
            assert scores(patient, journal=journal) == (told or RIGHT)
        else:
            with pytest.raises(UserError) as caught:
                scores(patient, journal=journal)
            error = caught.value
            assert error.code == REWARD_SERVICE
            assert error.where == server.url and told in str(error)
            assert str(error).endswith(f"expected {EXPECTED['ids']}")
            assert str(error).isprintable() and len(str(error)) < 700
            assert journal.scores == {} and not journal.path.exists()  # nothing was made up
        assert len(server.requests) == asked
    assert time.monotonic() - started < 5


def test_a_service_that_is_not_there_is_tried_again():
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/"
    with pytest.raises(UserError, match=r"attempt 3 of 3: .*Connection refused") as caught:
        scores(service(url))
    assert caught.value.code == REWARD_SERVICE


def test_a_service_without_tls_is_no_https():
    with stub(nothing) as server, pytest.raises(UserError, match=r"^https://") as caught:
        scores(service(server.url.replace("http:", "https:"), retries=0))
    assert caught.value.code == REWARD_SERVICE


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        ([1.0, 2.0], "2 scores for 3 texts"), ([1.0, 2.0, 3.0, 4.0], "4 scores for 3 texts"),
        ([1.0, None, 2.0], '"score": null}'), ([1.0, [2.0], 2.0], '"score": [2.0]}'),
    ],
)
def test_llama_factory_form_wants_one_number_for_each_text(reply, told):
    with stub(lambda r: r.reply({"scores": reply})) as server, pytest.raises(UserError) as caught:
        scores(service(server.url, form="llama-factory"))
    assert told in str(caught.value) and caught.value.code == REWARD_SERVICE
    assert str(caught.value).endswith(EXPECTED["llama-factory"])


def test_pauses_double_from_attempt_to_attempt(monkeypatch):
    slept = []
    monkeypatch.setattr("minirlhf.rewards.service.time.sleep", slept.append)
    with stub(answers("500 Oops")) as server, pytest.raises(UserError):
        scores(service(server.url, retries=7, backoff=0.5))
    assert slept == [0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0]
