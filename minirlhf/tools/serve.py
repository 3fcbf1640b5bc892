"""A reward model as a service: `minirlhf serve --model REWARD_FOLDER`, for `--reward http://…`.

POST /score takes either form of `minirlhf.rewards.service`:

    {"items": [{"id", "prompt", "completion", "finish_reason"}]} -> {"scores": [{"id", "score"}]}
    {"messages": [text]}                                         -> {"scores": [number]}

An item's prompt is a string or a list of messages, which the model's own chat template renders. A
text of the second form is whole: a special token's name in it becomes that token, so whoever writes
the text can forge one. A dialogue of the template that ends with its eos gets what the template
writes behind it. A refusal is {"error": text} with a status of 4xx.
"""

import errno
import hmac
import io
import json
import os
import signal
import sys
import threading
import time
from collections import deque
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from minirlhf.data.tokenizer import load_tokenizer
from minirlhf.errors import OK, UserError, printable, run
from minirlhf.files import folders
from minirlhf.files.reading import strict_json
from minirlhf.models import pretrained
from minirlhf.rewards.load import read_token
from minirlhf.rewards.model import scores_read
from minirlhf.rewards.service import Received
from minirlhf.run import flags
from minirlhf.run.machine import choose_device, choose_dtype
from minirlhf.setup.common import check_base
from minirlhf.tools.answers import Answer, answer_with
from minirlhf.tools.settings import ServeConfig

PATHS = ("/", "/score", "/v1/score/evaluation")  # the last is LLaMA-Factory's
BODY_CAP, HELD = 16 << 20, 64 << 20  # bytes of a body, and of all that wait
SMALL = 256 << 10  # bytes of a body that is scored in one turn
REQUEST_TIME = 30.0  # seconds within which a whole request must have come
STOP_TIME = 1.0  # seconds that a signal waits for the reply in the making
LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")


# ------------------------------------------------------------------------------------------- HTTP


class Turns:
    """A lock that is given in the order in which it was asked for, so that a pause is one."""

    def __init__(self):
        self.guard, self.waiting = threading.Lock(), deque[threading.Lock]()

    def acquire(self, timeout: float = -1) -> bool:
        mine = threading.Lock()
        mine.acquire()
        with self.guard:
            self.waiting.append(mine)
            if len(self.waiting) == 1:
                return True
        if mine.acquire(timeout=timeout):
            return True
        with self.guard:
            if mine.acquire(blocking=False):  # in the last moment
                return True
            self.waiting.remove(mine)
        return False

    def release(self, *_: object) -> None:
        with self.guard:
            self.waiting.popleft()
            if self.waiting:
                self.waiting[0].release()

    __enter__, __exit__ = acquire, release


class Stopping(Exception):
    """The server is about to stop."""


class Server(ThreadingHTTPServer):
    """Threads read requests and write replies; one at a time scores, in turns. One alone of those
    that pause is in memory as a whole.

    Args:
        address: host and port.
        answer: body, and what it calls to pause -> reply.
        token: what a request's Authorization must hold; None: nothing is asked.
    """

    daemon_threads = True  # a client that is silent does not hold the process
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], answer: Answer, token: str | None = None):
        self.answer, self.token = answer, token
        self.scoring, self.large, self.counting = Turns(), Turns(), threading.Lock()
        self.stopping, self.held, self.replying = False, 0, 0
        super().__init__(address, Handler)

    def get_request(self) -> tuple:
        """Waits where there are no more descriptors: the next attempt would fail at once, too."""
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(0.1)
            raise

    def hold(self, size: int) -> bool:
        """Counts bytes of bodies that are held; False where that would be too many."""
        with self.counting:
            fits = self.held + size <= HELD
            self.held += size if fits else 0
            return fits

    def release(self, size: int) -> None:
        with self.counting:
            self.held -= size

    def score(self, data: bytearray) -> dict:
        """The reply to a request's body. A small one has one turn, a large one one for each slice.

        Raises:
            UserError: the body is not of the form.
            Stopping: before it had all its turns.
        """
        small = len(data) <= SMALL

        def pause() -> None:
            if small:
                return
            self.scoring.release()
            self.scoring.acquire()
            if self.stopping:
                raise Stopping

        with nullcontext() if small else self.large, self.scoring:
            if self.stopping:
                raise Stopping
            reply = self.answer(strict_json(data.decode(), "body"), pause)
            with self.counting:
                self.replying += 1
            return reply

    def close(self) -> bool:
        """Closes the port after the reply that is being made, if that does not take long; whether
        nobody is at work any more. Whoever waits is told to go elsewhere."""
        self.stopping, until = True, time.monotonic() + STOP_TIME
        idle = self.scoring.acquire(timeout=STOP_TIME)
        while idle and self.replying and time.monotonic() < until:
            time.sleep(0.01)
        self.server_close()
        return idle and not self.replying


class Handler(BaseHTTPRequestHandler):
    server: Server
    server_version, sys_version = "minirlhf", ""

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BufferedReader(Received(self.connection, time.monotonic() + REQUEST_TIME))

    def handle(self) -> None:
        try:
            super().handle()
        except OSError as error:  # the client has left
            self.log_message("%s", error)

    def do_POST(self) -> None:
        started, texts = time.perf_counter(), 0
        status, reply = self._refusal()
        if not status:
            status, reply = self._answered()
            texts = len(reply["scores"]) if status == 200 else 0
        try:
            self._send(status, reply if status == 200 else {"error": printable(reply, 500)})
        finally:
            if status == 200:
                with self.server.counting:
                    self.server.replying -= 1
        self.log_message("%d, %d texts, %.3f s", status, texts, time.perf_counter() - started)

    def _answered(self) -> tuple[int, dict | str]:
        """(status, reply or reason). The reply is sent when the next one is at work."""
        data, server = bytearray(), self.server
        try:
            left = int(self.headers["Content-Length"])
            while left and (piece := self.rfile.read(min(left, 1 << 16))):
                left -= len(piece)
                if server.hold(len(piece)):
                    data += piece
                else:
                    self._skip(left)
                    return 503, f"not now: {HELD:,} bytes of other requests wait"
            return 200, server.score(data)
        except Stopping:
            return 503, "not now: it is about to stop"
        except (UserError, UnicodeDecodeError) as error:
            return 400, printable(error, 500)
        except (RuntimeError, MemoryError) as error:  # out of memory, most often
            reason = f"scoring failed: {type(error).__name__}: {error}"
            self.log_message("%s", reason)
            return 500, reason
        finally:
            server.release(len(data))

    def _refusal(self) -> tuple[int, str]:
        """(status, reason) of a request that is not scored; (0, "") of one that may be."""
        length, token = self.headers.get("Content-Length", ""), self.server.token
        if not (length.isascii() and length.isdigit()) or "Transfer-Encoding" in self.headers:
            return 411, "give a Content-Length, and no Transfer-Encoding"
        if len(length) > 12 or int(length) > BODY_CAP:
            return 413, f"at most {BODY_CAP:,} bytes"
        given = self.headers.get("Authorization", "").encode()
        # compared in a time that does not tell how much of a guess is right
        if token is not None and not hmac.compare_digest(given, f"Bearer {token}".encode()):
            refusal = 401, "give the token: Authorization: Bearer TOKEN"
        elif self.path.partition("?")[0] not in PATHS:
            refusal = 404, f"no such path; there are {', '.join(PATHS)}"
        elif reason := self._of_a_page():
            refusal = 403, reason
        elif self.headers.get_content_type() != "application/json":
            refusal = 415, "give Content-Type: application/json"
        else:
            return 0, ""
        self._skip(int(length))
        return refusal

    def _of_a_page(self) -> str:
        """Why a request may come from a web page that is open on this machine; "" of others.

        A page may send to this address, or to a name of its own that it lets point here.
        """
        host = self.headers.get("Host", "").lower()
        name, _, port = host.rpartition(":")
        name = name if port.isdigit() else host
        bound = self.server.server_address[0]
        if "Origin" in self.headers:
            return "web pages are not answered"
        if bound in LOOPBACK and name not in LOOPBACK:
            return f"Host must be {bound}, as long as it listens there"
        return ""

    def _skip(self, left: int) -> None:
        """Reads the rest of a body: a close with some unread resets, and the reply may be lost."""
        while left and (piece := self.rfile.read(min(left, 1 << 16))):
            left -= len(piece)

    def _send(self, status: int, reply: dict) -> None:
        data = json.dumps(reply, allow_nan=False).encode()
        self.connection.settimeout(REQUEST_TIME)  # reading has shortened it
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_request(self, *_: object) -> None:
        """Writes nothing: `do_POST` writes one line when it has answered."""

    def log_message(self, format: str, *values: object) -> None:
        line = f"{self.client_address[0]} {getattr(self, 'requestline', '')}: {format % values}"
        print(printable(line, 300), file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Answers until a signal, which ends the process."""
    config = flags.parse(ServeConfig, argv, "minirlhf serve")
    device, dtype = choose_device(config.device), choose_dtype(config.dtype)
    # The same flag as `make_deterministic` sets, without the compiler that it imports.
    torch.set_deterministic_debug_mode("error" if device == "cpu" else "default")
    token = None if config.token_file is None else read_token(config.token_file)
    folder = folders.resolve(config.model, base=config.base)
    check_base(config, folder)
    tokenizer = load_tokenizer(folder)
    for line in pretrained.remarks([folder], dtype):
        print(f"warning: {line}", file=sys.stderr)
    model = pretrained.load_reward_model(folder, dtype, device)
    answer = answer_with(model, tokenizer, config.micro_batch_tokens)
    try:
        server = Server((config.host, config.port), answer, token)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"--host {config.host} --port {config.port}", reason,
                        "give another address, or a free port") from None
    signals = []

    def stop(number: int, _: object) -> None:
        signals.append(number)
        if len(signals) > 1:
            os._exit(OK)
        # shutdown waits for the loop below, which this thread is in
        threading.Thread(target=server.shutdown).start()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    print(f"listening at http://{config.host}:{server.server_port}/score")
    print(f"scores read: {scores_read(model, tokenizer)}", flush=True)
    if token is None and config.host not in LOOPBACK:
        print("note: no --token-file, and others than this machine may ask", flush=True)
    server.serve_forever(poll_interval=0.1)
    server.close()
    sys.stdout.flush()
    os._exit(OK)  # the interpreter would wait for threads that score, and end those that reply late


if __name__ == "__main__":
    sys.exit(run(main))
