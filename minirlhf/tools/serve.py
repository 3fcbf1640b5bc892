"""A reward model as a service: `minirlhf serve --model REWARD_FOLDER`, for `--reward http://…`.

POST /score takes the two forms of `minirlhf.rewards.service`, told apart by their keys:

    {"items": [{"id", "prompt", "completion", "finish_reason"}]} -> {"scores": [{"id", "score"}]}
    {"messages": [text]}                                         -> {"scores": [number]}

An item's prompt is a string or a list of messages, which the model's own chat template renders. A
text of the second form is whole: names of special tokens in it are these tokens, so who writes the
text can forge them. A refusal is {"error": text} with a status of 4xx.
"""

import hmac
import io
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from minirlhf.data.tokenizer import Tokenizer, load_tokenizer
from minirlhf.errors import OK, UserError, printable, run
from minirlhf.files import folders
from minirlhf.files.reading import json_kind, strict_json
from minirlhf.models import pretrained
from minirlhf.models.heads import RewardModel
from minirlhf.rewards.model import model_reward
from minirlhf.rewards.parse import read_token
from minirlhf.rewards.service import Timed
from minirlhf.rewards.source import Completions
from minirlhf.run import flags
from minirlhf.run.machine import choose_device, choose_dtype
from minirlhf.tools.settings import ServeConfig

PATHS = ("/", "/score", "/v1/score/evaluation")  # the last is LLaMA-Factory's
BODY_CAP = 16 << 20  # bytes
REQUEST_TIME = 30.0  # seconds within which a whole request must have come
REASONS = ("eos", "stop", "length")
LOOPBACK = ("127.0.0.1", "localhost")

Answer = Callable[[object], dict]


# ---------------------------------------------------------------------------------------- scoring


def _is_prompt(value: object) -> bool:
    if isinstance(value, str):
        return True
    return isinstance(value, list) and value != [] and all(
        isinstance(turn, dict) and all(isinstance(turn.get(k), str) for k in ("role", "content"))
        for turn in value
    )


ITEM = {  # key -> (whether a value is legal, which values are)
    "id": (lambda value: type(value) in (str, int), "text or a whole number"),
    "prompt": (_is_prompt, 'text, or a list of {"role": text, "content": text}'),
    "completion": (lambda value: isinstance(value, str), "text"),
    "finish_reason": (lambda value: value in REASONS, ", ".join(REASONS)),
}


def _check(is_legal: bool, where: str, value: object, legal: str) -> None:
    if not is_legal:
        got = repr(printable(value, 80)) if isinstance(value, str) else json_kind(value)
        raise UserError(where, f"is {got}", legal)


def items_of(items: list) -> dict[str | int, dict]:
    """The items of a request by their ids.

    Raises:
        UserError: an item is not of the form.
    """
    found: dict[str | int, dict] = {}
    for i, item in enumerate(items):
        _check(isinstance(item, dict), f"items[{i}]", item, "an object")
        item = {"finish_reason": "eos"} | item
        for key, (is_legal, legal) in ITEM.items():
            _check(is_legal(item.get(key)), f"items[{i}]: {key}", item.get(key), legal)
        _check(item["id"] not in found, f"items[{i}]: id", item["id"], "another one for each item")
        found[item["id"]] = item
    return found


def answer_with(model: RewardModel, tokenizer: Tokenizer, micro_batch_tokens: int) -> Answer:
    """Reply to a request's body, of either form.

    Raises:
        UserError: when called: the body is of neither form, a text is too long, or a score is not
            finite.
    """
    by_text = model_reward(model, tokenizer, micro_batch_tokens, own_tokenizer=True, name="items")
    by_ids = model_reward(model, tokenizer, micro_batch_tokens, name="messages")

    def answer(body: object) -> dict:
        form = [key for key in ("items", "messages") if isinstance(body, dict) and key in body]
        if len(form) != 1:
            raise UserError("body", f"is {json_kind(body)} with neither or both forms",
                            'an object with either "items" or "messages"')
        rows = body[form[0]]
        _check(isinstance(rows, list) and rows != [], form[0], rows, "a list of at least one")
        no_ids: list[list[int]] = [[] for _ in rows]
        if form == ["items"]:
            items = items_of(rows)
            prompts, texts, reasons = (
                [item[key] for item in items.values()]
                for key in ("prompt", "completion", "finish_reason")
            )
            scores = by_text(Completions(prompts, no_ids, texts, no_ids, reasons, {})).tolist()
        else:
            for i, text in enumerate(rows):
                _check(isinstance(text, str), f"messages[{i}]", text, "text")
            ids, whole = [tokenizer.encode_marked(text) for text in rows], ["length"] * len(rows)
            scores = by_ids(Completions(rows, no_ids, rows, ids, whole, {})).tolist()
        for i, score in enumerate(scores):
            if not math.isfinite(score):
                raise UserError(f"score {i}", f"is {score}", "the weights of --model diverged")
        if form == ["items"]:
            scores = [{"id": id, "score": s} for id, s in zip(items, scores, strict=True)]
        return {"scores": scores}

    return answer


# ------------------------------------------------------------------------------------------- HTTP


class Server(ThreadingHTTPServer):
    """Threads read requests and write replies; one at a time scores.

    Args:
        address: host and port.
        answer: body -> reply.
        token: what a request's Authorization must hold; None: nothing is asked.
    """

    daemon_threads = True  # a client that is silent does not hold the process

    def __init__(self, address: tuple[str, int], answer: Answer, token: str | None = None):
        self.answer, self.token, self.scoring = answer, token, threading.Lock()
        super().__init__(address, Handler)

    def close(self) -> None:
        """Closes the port after the reply that is being computed."""
        with self.scoring:
            self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Server
    server_version, sys_version = "minirlhf", ""

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BufferedReader(Timed(self.connection, time.monotonic() + REQUEST_TIME))

    def handle(self) -> None:
        try:
            super().handle()
        except OSError as error:  # the client has left
            self.log_message("%s", error)

    def do_POST(self) -> None:
        started, texts = time.perf_counter(), 0
        status, reply = self._refusal()
        if not status:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            try:
                body = strict_json(data.decode(), "body")
                with self.server.scoring:
                    reply = self.server.answer(body)
                    status, texts = 200, len(reply["scores"])
                    self._send(status, reply)
            except (UserError, UnicodeDecodeError) as error:
                status, reply = 400, printable(error, 500)
            except (RuntimeError, MemoryError) as error:  # out of memory, most often
                status, reply = 500, f"scoring failed: {type(error).__name__}: {error}"
                self.log_message("%s", reply)
        if status != 200:
            self._send(status, {"error": printable(reply, 500)})
        self.log_message("%d, %d texts, %.3f s", status, texts, time.perf_counter() - started)

    def _refusal(self) -> tuple[int, str]:
        """(status, reason) of a request that is not scored; (0, "") of one that may be."""
        length, token = self.headers.get("Content-Length", ""), self.server.token
        if not (length.isascii() and length.isdigit()):
            return 411, "give a Content-Length"
        if len(length) > 12 or int(length) > BODY_CAP:
            return 413, f"at most {BODY_CAP:,} bytes"
        given = self.headers.get("Authorization", "").encode()
        # compared in a time that does not tell how much of a guess is right
        if token is not None and not hmac.compare_digest(given, f"Bearer {token}".encode()):
            refusal = 401, "give the token: Authorization: Bearer TOKEN"
        elif self.path.partition("?")[0] not in PATHS:
            refusal = 404, f"no such path; there are {', '.join(PATHS)}"
        else:
            return 0, ""
        left = int(length)  # a close with a body unread resets, and the reply may be lost
        while left and (piece := self.rfile.read(min(left, 1 << 16))):
            left -= len(piece)
        return refusal

    def _send(self, status: int, reply: dict) -> None:
        data = json.dumps(reply, allow_nan=False).encode()
        self.connection.settimeout(REQUEST_TIME)  # reading has shortened it
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_request(self, *_: object) -> None:
        """Nothing here: `do_POST` writes one line when it has answered."""

    def log_message(self, format: str, *values: object) -> None:
        line = f"{self.client_address[0]} {getattr(self, 'requestline', '')}: {format % values}"
        print(printable(line, 300), file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    config = flags.parse(ServeConfig, argv, "minirlhf serve")
    device, dtype = choose_device(config.device), choose_dtype(config.dtype)
    # The same flag as `make_deterministic` sets, without the compiler that it imports.
    torch.set_deterministic_debug_mode("error" if device == "cpu" else "default")
    token = None if config.token_file is None else read_token(config.token_file)
    folder = folders.resolve(config.model)
    tokenizer = load_tokenizer(folder)
    for line in pretrained.rounded([folder], dtype):
        print(f"warning: {line}", file=sys.stderr)
    model = pretrained.load_reward_model(folder, dtype, device)
    answer = answer_with(model, tokenizer, config.micro_batch_tokens)
    try:
        server = Server((config.host, config.port), answer, token)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"--host {config.host} --port {config.port}", reason,
                        "give another address, or a free port") from None
    for number in (signal.SIGINT, signal.SIGTERM):
        # shutdown waits for the loop below, which this thread is in
        signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
    print(f"listening at http://{config.host}:{server.server_port}/score", flush=True)
    if token is None and config.host not in LOOPBACK:
        print("note: no --token-file, and others than this machine may ask", flush=True)
    server.serve_forever(poll_interval=0.1)
    server.close()
    return OK


if __name__ == "__main__":
    sys.exit(run(main))
