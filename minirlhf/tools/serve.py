"""A reward model as a service: `minirlhf serve --model REWARD_FOLDER`, for `--reward http://…`.

POST /score takes the two forms of `minirlhf.rewards.service`, told apart by their keys:

    {"items": [{"id", "prompt", "completion", "finish_reason"}]} -> {"scores": [{"id", "score"}]}
    {"messages": [text]}                                         -> {"scores": [number]}

An item's prompt is a string or a list of messages, which the model's own chat template renders. A
text of the second form is whole: names of special tokens in it are these tokens, so who writes the
text can forge them. A refusal is {"error": text} with a status of 4xx.
"""

import hmac
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from minirlhf.data.encoding import strip_eos
from minirlhf.data.tokenizer import Tokenizer, load_tokenizer
from minirlhf.errors import OK, UserError, printable, run
from minirlhf.files import folders
from minirlhf.files.reading import json_kind, strict_json
from minirlhf.models import pretrained
from minirlhf.models.heads import RewardModel
from minirlhf.rewards.model import model_reward, score_texts
from minirlhf.rewards.parse import read_token
from minirlhf.rewards.source import Completions
from minirlhf.run import settings
from minirlhf.run.machine import choose_device, choose_dtype
from minirlhf.run.settings import setting

PATHS = ("/", "/score", "/v1/score/evaluation")  # the last is LLaMA-Factory's
BODY_CAP = 16 << 20  # bytes
SILENCE = 30.0  # seconds that a client may be silent
REASONS = ("eos", "stop", "length")
LOOPBACK = ("127.0.0.1", "localhost")

Answer = Callable[[object], dict]


@dataclass(frozen=True)
class ServeConfig:
    model: str = setting(help="reward model", metavar="FOLDER")
    host: str = setting("127.0.0.1", "address to listen at")
    port: int = setting(8000, "port to listen at; 0: any free one", at_least=0, at_most=65535)
    token_file: str | None = setting(
        None, "holds the bearer token that requests must have; none: no one is asked",
        metavar="FILE",
    )
    micro_batch_tokens: int = setting(4096, "most tokens in one forward pass", at_least=1)
    dtype: str = setting(
        "auto", "of weights and compute; auto: float32", choices=("auto", "float32", "bfloat16")
    )
    device: str = setting("auto", "cpu, cuda or cuda:N; auto: the first CUDA GPU, else the CPU")


# ----------------------------------------------------------------------------------------- scoring


def completions_of(items: object) -> tuple[list, Completions]:
    """(ids, texts) of the items of a request.

    Raises:
        UserError: an item is not of the form.
    """
    if not isinstance(items, list) or not items:
        raise UserError("items", f"is {json_kind(items)}", "a list of at least one object")
    ids, prompts, texts, reasons = {}, [], [], []
    for i, item in enumerate(items):
        where = f"items[{i}]"
        if not isinstance(item, dict):
            raise UserError(where, f"is {json_kind(item)}", "an object")
        id, prompt, text = item.get("id"), item.get("prompt"), item.get("completion")
        if type(id) not in (str, int) or id in ids:
            raise UserError(f"{where}: id", f"is {printable(repr(id), 80)}",
                            "text or a whole number, another one for each item")
        if not _is_prompt(prompt):
            raise UserError(f"{where}: prompt", f"is {json_kind(prompt)}",
                            'text, or a list of {"role": text, "content": text}')
        if not isinstance(text, str):
            raise UserError(f"{where}: completion", f"is {json_kind(text)}", "text")
        reason = item.get("finish_reason", "eos")
        if reason not in REASONS:
            raise UserError(f"{where}: finish_reason", f"is {printable(repr(reason), 80)}",
                            ", ".join(REASONS))
        ids[id] = None  # in their order, and found at once
        prompts.append(prompt)
        texts.append(text)
        reasons.append(reason)
    nothing: list[list[int]] = [[] for _ in ids]
    return list(ids), Completions(prompts, nothing, texts, nothing, reasons, {})


def _is_prompt(prompt: object) -> bool:
    if isinstance(prompt, str):
        return True
    return isinstance(prompt, list) and bool(prompt) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in prompt
    )


def answer_with(model: RewardModel, tokenizer: Tokenizer, micro_batch_tokens: int) -> Answer:
    """Reply to a request's body, of either form.

    Raises:
        UserError: when it is called and the body is of neither, or a text is too long.
    """
    source = model_reward(model, tokenizer, micro_batch_tokens, own_tokenizer=True, name="items")

    def whole(text: object, i: int) -> list[int]:
        if not isinstance(text, str):
            raise UserError(f"messages[{i}]", f"is {json_kind(text)}", "text")
        ids = tokenizer.encode_marked(text)
        if model.read_before_eos:
            ids = strip_eos(ids, tokenizer.eos_ids)
        if not 0 < len(ids) <= model.config.longest_row:
            legal = f"the model reads 1 to {model.config.longest_row}"
            raise UserError(f"messages[{i}]", f"has {len(ids)} tokens", legal)
        return ids

    def answer(body: object) -> dict:
        if not isinstance(body, dict) or ("items" in body) == ("messages" in body):
            raise UserError("body", f"is {json_kind(body)} with neither or both forms",
                            'an object with either "items" or "messages"')
        if "items" in body:
            ids, batch = completions_of(body["items"])
            scores = _finite(source(batch).tolist())
            pairs = zip(ids, scores, strict=True)
            return {"scores": [{"id": id, "score": score} for id, score in pairs]}
        texts = body["messages"]
        if not isinstance(texts, list) or not texts:
            raise UserError("messages", f"is {json_kind(texts)}", "a list of at least one text")
        rows = [whole(text, i) for i, text in enumerate(texts)]
        return {"scores": _finite(score_texts(model, rows, micro_batch_tokens).tolist())}

    return answer


def _finite(scores: list[float]) -> list[float]:
    for i, score in enumerate(scores):
        if not math.isfinite(score):
            raise UserError(f"score {i}", f"is {score}", "the weights of --model diverged")
    return scores


# -------------------------------------------------------------------------------------------- HTTP


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

    def admits(self, authorization: str) -> bool:
        """Compares in a time that does not tell how much of a guess is right."""
        wanted = f"Bearer {self.token}".encode()
        return self.token is None or hmac.compare_digest(authorization.encode(), wanted)

    def handle_error(self, request: object, client_address: tuple) -> None:
        """One line where a client has left; else it is our bug, told in full."""
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handle_error(request, client_address)
            return
        print(f"{client_address[0]}: {printable(error)}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Closes the port once the request that is being answered is."""
        with self.scoring:
            self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = SILENCE
    server_version, sys_version = "minirlhf", ""

    def do_POST(self) -> None:
        started, texts = time.perf_counter(), 0
        status, reply = self._refusal()
        if not status:
            try:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                body = strict_json(data.decode(), "body")
                with self.server.scoring:
                    reply = self.server.answer(body)
                    status, texts = 200, len(reply["scores"])
                    self._send(status, reply)
            except (UserError, UnicodeDecodeError) as error:
                status, reply = 400, {"error": printable(error, 500)}
            except (RuntimeError, MemoryError) as error:  # out of memory, most often
                what = f"scoring failed: {type(error).__name__}: {printable(error, 300)}"
                status, reply = 500, {"error": what}
                print(what, file=sys.stderr, flush=True)
        if status != 200:
            self._send(status, reply)
        self.log_message("%d, %d texts, %.3f s", status, texts, time.perf_counter() - started)

    def _refusal(self) -> tuple[int, dict]:
        """(status, reply) of a request whose body is not read; (0, {}) where it is."""
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            return 411, {"error": "give a Content-Length"}
        if len(length) > 12 or int(length) > BODY_CAP:
            return 413, {"error": f"at most {BODY_CAP:,} bytes"}
        if not self.server.admits(self.headers.get("Authorization", "")):
            status, error = 401, "give the token: Authorization: Bearer TOKEN"
        elif self.path.partition("?")[0] not in PATHS:
            status, error = 404, f"no such path; there are {', '.join(PATHS)}"
        else:
            return 0, {}
        left = int(length)  # who closes with a body unread resets, and the reply may be lost
        while left and (piece := self.rfile.read(min(left, 1 << 16))):
            left -= len(piece)
        return status, {"error": error}

    def _send(self, status: int, reply: dict) -> None:
        data = json.dumps(reply, allow_nan=False).encode()
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
    config = settings.parse(
        ServeConfig, argv, "minirlhf serve", "Answer requests for scores with a reward model."
    )
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
