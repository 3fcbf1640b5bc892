"""`minirlhf serve`: the scores of the folder through HTTP, and what it refuses."""

import errno
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minirlhf.cli import main
from minirlhf.data.tokenizer import load_tokenizer
from minirlhf.errors import REWARD_SERVICE, UserError
from minirlhf.models.pretrained import load_reward_model
from minirlhf.rewards.load import load_reward
from minirlhf.setup.ppo_settings import PPOConfig
from minirlhf.tools.answers import answer_with
from minirlhf.tools.serve import BODY_CAP, SMALL, Server, Turns
from tests.rewards.test_model import (
    CHAT,
    MESSAGES,
    PROMPTS,
    REASONS,
    TEXTS,
    alone,
    load,
    sampled,
    set_template,
)
from tests.rewards.test_model import folder as folder  # a fixture
from tests.rewards.test_model import words as words

ROOT = Path(__file__).parents[2]


@contextmanager
def serving(folder, token: str | None = None, before: bool = False, answer=None):
    """The address of a server of the folder, or of one that answers in its own way."""
    model = load_reward_model(folder)
    model.unread = 0 if before else None
    answer = answer or answer_with(model, load_tokenizer(folder), 64)
    server = Server(("127.0.0.1", 0), answer, token)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.close()
        thread.join()


def source_of(address: str, tokenizer, path: str = "/score", **settings):
    config = PPOConfig(reward=(f"http://{address}{path}",), reward_retries=0, **settings)
    return load_reward(config, tokenizer, None, 64)


def ask(address: str, body: object, path: str = "/score", **headers: str) -> tuple[int, dict]:
    """Status and reply."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection(address, timeout=5)
    connection.request("POST", path, data, {"Content-Type": "application/json"} | headers)
    response = connection.getresponse()
    text = response.read()
    connection.close()
    return response.status, json.loads(text)


# ---- scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["ids", "llama-factory"])
def test_completions_scored_through_http_are_scored_as_by_the_folder(folder, form, capsys):
    tokenizer = load_tokenizer(folder)
    batch = sampled(tokenizer, PROMPTS, TEXTS, REASONS)
    expected = load(folder, tokenizer)(batch).total.tolist()
    path = "/score" if form == "ids" else "/v1/score/evaluation"
    with serving(folder) as address:
        source = source_of(address, tokenizer, path, reward_format=form, reward_batch_size=2)
        assert source(batch).total.tolist() == pytest.approx(expected, abs=1e-6)
    assert len(set(expected)) == 3
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(", 0.")[0] for line in lines] == [
        f"127.0.0.1 POST {path} HTTP/1.1: 200, 2 texts",
        f"127.0.0.1 POST {path} HTTP/1.1: 200, 1 texts",
    ]


@pytest.mark.parametrize("form", ["ids", "llama-factory"])
def test_a_model_that_is_read_before_eos_is_so_through_http(folder, form):
    tokenizer = load_tokenizer(folder)
    batch = sampled(tokenizer, ["ab"], ["cd"], ["eos"])
    with serving(folder, before=True) as address:
        (found,) = source_of(address, tokenizer, reward_format=form)(batch).total.tolist()
    assert found == pytest.approx(alone(folder, tokenizer.encode("abcd")), abs=1e-6)


def test_messages_are_rendered_by_the_models_own_template(words):
    own = load_tokenizer(words)
    item = {"id": 7, "prompt": MESSAGES, "completion": "good", "finish_reason": "stop"}
    ids = [*own.encode_chat(MESSAGES), *own.encode("good", bos=False), 0]
    with serving(words) as address:
        status, reply = ask(address, {"model": "any", "items": [item]})
    assert status == 200
    assert reply == {"scores": [{"id": 7, "score": pytest.approx(alone(words, ids), abs=1e-6)}]}


def test_messages_are_rendered_with_what_their_columns_tell(words, tmp_path):
    folder = shutil.copytree(words, tmp_path / "told")
    set_template(folder, "{{ tools[0].name }}{{ mood }}" + CHAT)
    columns = {"tools": '[{"name": "f"}]', "chat_template_kwargs": {"mood": "m"}, "answer": 4}
    own, item = load_tokenizer(folder), {"prompt": MESSAGES, "completion": "good"}
    head = own.encode_chat(MESSAGES, {"tools": [{"name": "f"}], "mood": "m"})
    items = [item | {"id": 1, "columns": columns},
             {"id": 2, "prompt": "p", "completion": "c", "columns": columns | {"tools": "axe"}}]
    rows = [[*head, *own.encode("good", bos=False), 0],
            [*own.encode("p"), *own.encode("c", bos=False), 0]]
    with serving(folder) as address:
        status, reply = ask(address, {"model": "any", "items": items})
        assert status == 200
        assert [one["score"] for one in reply["scores"]] == pytest.approx(
            [alone(folder, row) for row in rows], abs=1e-6)
        wrong = item | {"id": 1, "columns": {"tools": "axe"}}
        status, reply = ask(address, {"model": "any", "items": [wrong]})
    assert status == 400 and "items[0]: tools is 'axe': no JSON text" in json.dumps(reply)


# ---- what is refused -----------------------------------------------------------------------------

ITEM = {"id": "a", "prompt": "p", "completion": "c"}
OTHER = ITEM | {"id": "b"}


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"{", "body:1: not valid JSON"),
        (b"\xff", "codec can't decode"),
        (b'{"items": NaN}', "NaN is not JSON"),
        *[
            (body, f"body: is {json.dumps(body)}: either")
            for body in (
                [], {}, {"items": [ITEM], "messages": ["a"]}, {"items": {}}, {"items": []},
                {"messages": "a"}, {"messages": []}, {"messages": ["a", 2]},
            )
        ],
        *[
            ({"items": [ITEM, item]}, f"items[1]: is {json.dumps(item)}: {{")
            for item in (
                "a", ITEM, ITEM | {"id": None}, ITEM | {"id": True}, ITEM | {"id": 1.5},
                OTHER | {"prompt": 1}, OTHER | {"prompt": []}, OTHER | {"prompt": ["a"]},
                OTHER | {"prompt": [{"role": "user"}]}, {"id": 1, "prompt": "p"},
                OTHER | {"finish_reason": "x"}, OTHER | {"finish_reason": []},
            )
        ],
        ({"items": [ITEM | {"prompt": "p" * 63}]}, "items: text 0 has 65 tokens once it is re-enc"),
        ({"messages": ["a", ""]}, "messages: text 1 has 0 tokens: the reward model reads 1 to 64"),
        ({"messages": ["a" * 65]}, "messages: text 0 has 65 tokens: the reward model reads 1 to"),
    ],
)
def test_a_body_of_another_form_is_refused_with_a_reason(body, told, folder):
    with serving(folder) as address:
        status, reply = ask(address, body)
        assert status == 400 and told in reply["error"]
        assert ask(address, {"items": [ITEM]})[0] == 200  # and it goes on


def test_scores_that_are_not_finite_are_no_reply(folder):
    model = load_reward_model(folder)
    with torch.no_grad():
        model.score.weight.fill_(float("nan"))
    answer = answer_with(model, load_tokenizer(folder), 64)
    for body in ({"items": [ITEM]}, {"messages": ["a"]}):
        with pytest.raises(UserError, match="score 0: is nan: the weights of --model diverged"):
            answer(body)


def test_only_who_has_the_token_is_answered(folder, tmp_path):
    tokenizer = load_tokenizer(folder)
    batch = sampled(tokenizer, ["a"], ["b"], ["eos"])
    (tmp_path / "token").write_text("open sesame".replace(" ", "-") + "\n")
    with serving(folder, token="open-sesame") as address:
        for value in ("", "Bearer", "Bearer open-sesam", "Bearer open-sesame2", "open-sesame"):
            status, reply = ask(address, {"items": [ITEM]}, Authorization=value)
            assert status == 401 and "Bearer TOKEN" in reply["error"]
        assert ask(address, {"items": [ITEM]}, Authorization="Bearer open-sesame")[0] == 200
        source = source_of(address, tokenizer, reward_token_file=str(tmp_path / "token"))
        assert source(batch).total.shape == (1,)
        with pytest.raises(UserError, match="answered 401") as caught:
            source_of(address, tokenizer)(batch)
        assert caught.value.code == REWARD_SERVICE


def test_other_paths_methods_and_sizes_are_refused(folder, capsys):
    with serving(folder) as address:
        status, reply = ask(address, {"items": [ITEM]}, "/other")
        assert status == 404 and "/v1/score/evaluation" in reply["error"]
        assert ask(address, {"items": [ITEM]}, "/score?model=x")[0] == 200
        for length, wanted in (
            (str(BODY_CAP + 1), 413), ("9" * 5000, 413), ("-1", 411), ("x", 411), ("", 411),
        ):
            assert raw(address, f"POST /score HTTP/1.1\r\nContent-Length: {length}") == wanted
        assert raw(address, "POST /score HTTP/1.1\r\nX: y") == 411
        assert raw(address, "GET /score HTTP/1.1\r\nX: y") == 501
        assert raw(address, "POST /\x1b[31m HTTP/1.1\r\nContent-Length: 0") == 404
        told = ""
        while "\\x1b" not in told:  # a line follows its reply
            told += capsys.readouterr().err
    assert "\\x1b[31m HTTP/1.1: 404" in told and "\x1b" not in told


@pytest.mark.parametrize(
    ("headers", "wanted", "told"),
    [
        ({"Origin": "http://evil.example"}, 403, "web pages are not answered"),
        ({"Origin": "null"}, 403, "web pages are not answered"),
        # a page's own name, which it lets point to 127.0.0.1
        ({"Host": "evil.example"}, 403, "Host must be 127.0.0.1"),
        ({"Host": "127.0.0.1.evil.example:80"}, 403, "Host must be 127.0.0.1"),
        ({"Host": ""}, 403, "Host must be 127.0.0.1"),
        # what a page may send without asking first
        ({"Content-Type": "text/plain"}, 415, "application/json"),
        ({"Content-Type": ""}, 415, "application/json"),
        ({"Transfer-Encoding": "chunked"}, 411, "no Transfer-Encoding"),
        ({"Host": "LOCALHOST:8000"}, 200, ""),
        ({"Content-Type": "application/json; charset=utf-8"}, 200, ""),
    ],
)
def test_no_web_page_reaches_it(folder, headers, wanted, told):
    with serving(folder) as address:
        status, reply = ask(address, {"items": [ITEM]}, **headers)
    assert status == wanted and told in str(reply)


def test_a_client_that_does_not_read_its_reply_holds_nobody(folder):
    def answer(body: object, _) -> dict:
        return {"scores": [0.5] * (3_000_000 if body["items"] == "many" else 1)}

    with serving(folder, answer=answer) as address:
        host, port = address.split(":")
        with socket.create_connection((host, int(port)), 60) as silent:
            head = f"POST /score HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json"
            silent.sendall(f'{head}\r\nContent-Length: 17\r\n\r\n{{"items": "many"}}'.encode())
            silent.recv(1)  # its reply, of 15 MB, has begun
            for _ in range(3):
                assert ask(address, {"items": "one"}) == (200, {"scores": [0.5]})


def test_a_large_request_lets_others_in_between(folder):
    order, large, end = [], {"items": "x" * (SMALL + 1)}, time.monotonic() + 20

    def answer(body: object, pause) -> dict:
        for _ in range(3 if body == large else 1):
            order.append(len(body["items"]) > SMALL)
            if body == large:
                while len(server.scoring.waiting) < 2 and order.count(False) < 2:
                    assert time.monotonic() < end
                    time.sleep(0.001)  # until somebody waits
                pause()
        return {"scores": [1.0]}

    server = Server(("127.0.0.1", 0), answer)
    threads = [threading.Thread(target=server.serve_forever, args=(0.01,))]
    threads[0].start()
    address = f"127.0.0.1:{server.server_port}"
    with ThreadPoolExecutor() as pool:
        first = pool.submit(ask, address, large)
        while not order:
            time.sleep(0.001)
        for _ in range(2):
            assert ask(address, {"items": "small"})[0] == 200
        assert first.result()[0] == 200
    server.shutdown()
    server.close()
    threads[0].join()
    assert order == [True, False, True, False, True]


def test_turns_are_given_in_order_and_given_up_in_time():
    turns, order = Turns(), []

    def work(name: int) -> None:
        with turns:
            order.append(name)

    with turns, ThreadPoolExecutor() as pool:
        for name in range(4):
            pool.submit(work, name)
            while len(turns.waiting) < 2 + name:
                time.sleep(0.001)
        assert not turns.acquire(timeout=0.01)
        assert len(turns.waiting) == 5
        turns.release()
        while len(order) < 4:
            time.sleep(0.001)
        assert order == [0, 1, 2, 3] and turns.acquire(timeout=1)


def test_a_large_request_is_scored_in_slices(folder):
    model, pauses = load_reward_model(folder), []
    answer = answer_with(model, load_tokenizer(folder), 64)
    words = [f"a {'b ' * (i % 5)}" for i in range(130)]
    items = [{"id": i, "prompt": "a", "completion": text} for i, text in enumerate(words)]
    for body, name in (({"items": items}, "items"), ({"messages": words}, "messages")):
        whole = answer(body, lambda: pauses.append(1))["scores"]
        parts = [answer({name: body[name][i : i + 1]})["scores"][0] for i in range(130)]
        if name == "items":
            assert [row["id"] for row in whole] == list(range(130))
            whole, parts = ([row["score"] for row in rows] for rows in (whole, parts))
        torch.testing.assert_close(torch.tensor(whole), torch.tensor(parts), rtol=0, atol=1e-6)
    assert len(pauses) == 2 * 2  # 130 texts are 64, 64 and 2
    items[70] |= {"completion": "a " * 5000}
    with pytest.raises(UserError, match=r"^items from 64 on: text 6 has \d+ tokens"):
        answer({"items": items})


def test_bodies_that_wait_are_bounded(folder, monkeypatch):
    monkeypatch.setattr("minirlhf.tools.serve.HELD", 1000)
    entered, go = threading.Event(), threading.Event()

    def answer(*_: object) -> dict:
        entered.set()
        go.wait(10)
        return {"scores": [1.0]}

    with serving(folder, answer=answer) as address, ThreadPoolExecutor() as pool:
        first = pool.submit(ask, address, {"items": "x" * 600})
        assert entered.wait(10)
        status, reply = ask(address, {"items": "x" * 600})
        assert status == 503 and "1,000 bytes of other requests wait" in reply["error"]
        second = pool.submit(ask, address, {"items": "x" * 100})  # fits beside it
        go.set()
        assert first.result()[0] == second.result()[0] == 200
        assert ask(address, {"items": "x" * 600})[0] == 200  # what is answered is let go


def test_a_stop_waits_for_the_reply_in_the_making_and_for_no_other(folder, monkeypatch):
    monkeypatch.setattr("minirlhf.tools.serve.STOP_TIME", 0.5)
    entered, go = threading.Event(), threading.Event()

    def answer(*_: object) -> dict:
        entered.set()
        assert go.wait(20)
        return {"scores": [1.0]}

    for quick in (True, False):
        entered.clear()
        go.clear()
        server = Server(("127.0.0.1", 0), answer)
        loop = threading.Thread(target=server.serve_forever, args=(0.01,))
        loop.start()
        address = f"127.0.0.1:{server.server_port}"
        with ThreadPoolExecutor() as pool:
            made = pool.submit(ask, address, {"items": [ITEM]})
            assert entered.wait(10)
            waits = pool.submit(ask, address, {"items": [ITEM]})
            while server.held < 2 * len(json.dumps({"items": [ITEM]})):
                time.sleep(0.01)
            server.shutdown()
            loop.join()
            if quick:
                server.stopping = True
                go.set()
            assert server.close() is quick
            go.set()
            assert made.result() == (200, {"scores": [1.0]})
            status, reply = waits.result()
            assert status == 503 and "about to stop" in reply["error"]


def test_without_descriptors_it_waits_and_does_not_spin(folder, monkeypatch):
    server, slept = Server(("127.0.0.1", 0), lambda *_: {"scores": []}), []
    server.server_close()
    for number in (errno.EMFILE, errno.ENFILE, errno.ECONNABORTED):
        def accept(number=number):
            raise OSError(number, "no")

        monkeypatch.setattr(server, "socket", SimpleNamespace(accept=accept, close=lambda: None))
        monkeypatch.setattr("minirlhf.tools.serve.time.sleep", slept.append)
        with pytest.raises(OSError, match="no"):
            server.get_request()
    assert slept == [0.1, 0.1]


def raw(address: str, head: str) -> int:
    """Status of a request that is spelled by hand."""
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), 5) as sock:
        sock.sendall(f"{head}\r\n\r\n".encode("latin1"))
        with sock.makefile("rb") as file:
            return int(file.readline().split()[1])


@pytest.mark.parametrize(
    "sent", [b"", b"POST /score HTTP/1.1\r\nX", b"POST / HTTP/1.1\r\nContent-Length: 999\r\n\r\n"]
)
def test_a_request_that_does_not_end_is_given_up(sent, folder, monkeypatch, capsys):
    monkeypatch.setattr("minirlhf.tools.serve.REQUEST_TIME", 0.3)
    with serving(folder) as address:
        host, port = address.split(":")
        with socket.create_connection((host, int(port)), 5) as sock:
            sock.sendall(sent)
            assert ask(address, {"items": [ITEM]})[0] == 200  # others are not held up
            started = time.monotonic()
            with suppress(OSError):  # the server has left
                while time.monotonic() < started + 5:
                    sock.sendall(b"x")  # each byte in time, and never the last
                    time.sleep(0.02)
            assert time.monotonic() < started + 2
    assert "timed out" in capsys.readouterr().err


def test_a_client_that_leaves_is_one_line(folder, capsys):
    with serving(folder) as address:
        host, port = address.split(":")
        with socket.create_connection((host, int(port))) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # resets
            sock.sendall(b"POST /score HTTP/1.1\r\nContent-Length: 9\r\n\r\n{")
        assert ask(address, {"items": [ITEM]})[0] == 200  # others are not held up
    assert "Traceback" not in capsys.readouterr().err


def test_scoring_that_fails_is_told_to_the_client(folder, capsys):
    def fails(*_):
        raise MemoryError("no room\nat all")

    with serving(folder, answer=fails) as address:
        for _ in range(2):  # it goes on
            status, reply = ask(address, {"items": [ITEM]})
    assert status == 500 and reply["error"].startswith("scoring failed: MemoryError: no room")
    assert "Traceback" not in capsys.readouterr().err


# ---- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_the_command_listens_at_loopback_until_a_signal(number, folder):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "minirlhf", "serve", "--model", str(folder), "--port", "0"]
    process = subprocess.Popen(
        command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("listening at http://127.0.0.1:"), line + process.stderr.read()
        address = line.split("/")[2]
        assert ask(address, {"items": [ITEM]})[0] == 200
        process.send_signal(number)
        out, told = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    read = r'messages at the end of the rendered text, tail "\n" included; strings at their eos'
    assert process.returncode == 0 and out == f"scores read: {read}\n"
    assert told.count("\n") == 1 and "200, 1 texts" in told


def test_a_port_that_is_taken_is_refused(folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--model", str(folder), "--port", port]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: --host 127.0.0.1 --port {port}: Address already in use: give")
