"""PPO runs that are scored by a service: failures, signals and kills lose no step and no reply."""

import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from minirlhf import cli, interrupt
from minirlhf.errors import REWARD_SERVICE, Stopped
from minirlhf.rewards.journal import Journal
from minirlhf.rewards.service import service_reward
from minirlhf.rewards.source import Completions
from tests.kill_harness import (
    Kill,
    Server,
    command,
    log_of,
    out_of,
    remains,
    wrong_with,
)
from tests.rewards.test_service import Request, answers, decode, service, silent, stub
from tests.run import test_resume

folder, world = test_resume.folder, test_resume.world

PATIENCE = ["--reward-timeout", "2", "--reward-connect-timeout", "2", "--reward-retries", "0"]


def scored_by(world: Path, out: Path, url: str, *more: str, **settings) -> list[str]:
    """A run of 3 steps of 4 rows, with tables of samples at steps 0, 2 and 3."""
    slow = {"mini_batches": 1, "early_stop_kl": "none"}  # so that texts stay as they are for a step
    argv = command("ppo", world, out, top_p=1.0, seed=0, **slow, **settings)
    argv[argv.index("--reward") + 1] = url
    for flag in ("--eval-data", "--eval-every", "--keep-best"):  # each would ask for more
        at = argv.index(flag)
        del argv[at : at + (1 if flag == "--keep-best" else 2)]
    return [*argv, *PATIENCE, *more]


class Moody:
    """A service whose n-th reply is random: to ask again is to be told something else."""

    def __init__(self):
        self.asked = 0

    def __call__(self, request: Request) -> None:
        rng = random.Random(self.asked)
        self.asked += 1
        request.reply({"scores": [s | {"score": rng.uniform(-1, 1)} for s in request.scores]})


def fails_at(number: int) -> tuple[Callable, list]:
    """A service that says 500 to the n-th request, from 1 on, and to those after it; and a list
    that mends it once it holds something."""
    moody, mended = Moody(), []
    broken = answers("500 Oops", b"<out of\nmemory>")
    return lambda r: (moody if moody.asked < number - 1 or mended else broken)(r), mended


def test_a_run_is_scored_by_a_service_and_logs_its_part(world, tmp_path, capsys):
    with stub(Request.good) as server:
        argv = scored_by(world, tmp_path / "run", server.url, "--reward-batch-size", "3")
        assert cli.main(argv) == 0
    assert f"  reward: {server.url}\n" in capsys.readouterr().out
    assert b'"rewards/127.0.0.1/mean": ' in remains(tmp_path / "run")["metrics.jsonl"]
    sizes = [len(request.body["items"]) for request in server.requests]
    assert max(sizes) == 3
    assert len((tmp_path / "run" / "rewards.jsonl").read_text().splitlines()) == sum(sizes)
    assert server.requests[0].body["items"][0]["columns"].keys() == {"bonus"}


# Requests in order: table at 0, step 1, step 2, table at 2, step 3. The table at 3 has the texts of
# that at 2, which are known.
@pytest.mark.parametrize(("number", "saved"), [(1, 0), (2, 0), (3, 1), (4, 2), (5, 2)])
def test_a_run_whose_service_fails_is_saved_and_goes_on_to_the_same_bytes(
    number, saved, world, tmp_path, capsys
):
    with stub(Moody()) as server:
        whole = scored_by(world, tmp_path / "whole", server.url, save_every=100)
        assert cli.main(whole) == 0
        assert len(server.requests) == 5
        answer, mended = fails_at(number)
        server.answers = (answer,)
        argv = scored_by(world, tmp_path / "run", server.url, save_every=100)
        capsys.readouterr()
        assert cli.main(argv) == REWARD_SERVICE
        told = capsys.readouterr().err
        assert told.startswith(
            f"error: {server.url}: attempt 1 of 1: answered 500: '<out of\\\\nmemory>': expected "
        )
        assert told.endswith(
            f"step {saved} is saved, --resume goes on at step {saved + 1}\n"
        ) and told.count("\n") == 1
        commits = sorted((tmp_path / "run" / "checkpoints").iterdir())
        assert commits[-1].name == f"step-{saved:08d}"
        mended.append(True)
        assert cli.main([*argv, "--resume"]) == 0
    assert wrong_with(tmp_path / "run", remains(tmp_path / "whole")) == []
    journals = [(tmp_path / name / "rewards.jsonl").read_bytes() for name in ("whole", "run")]
    assert journals[0] == journals[1]


def test_a_run_killed_after_a_reply_goes_on_to_the_same_bytes(world, folder):
    """The journal holds a reply before it is used: nothing is asked for again."""
    with Server() as forks, stub(Moody()) as server:
        whole = scored_by(world, folder / "whole", server.url)
        ended = forks.run(whole)
        assert ended.code == 0, log_of(whole).read_text("utf-8")
        # for each reply the journal is opened to append, and again for its fsync
        opened = [i for i, e in enumerate(ended.files, 1) if e.startswith("open /rewards.jsonl")]
        fsyncs = opened[1::2]
        assert len(fsyncs) == len(server.requests) == 5
        for number in (0, 2, 3):
            at = fsyncs[number]
            server.requests.clear()
            server.answers = (Moody(),)
            argv = scored_by(world, folder / f"killed-{number}", server.url)
            assert forks.run(argv, Kill("file", at)).code == -9
            assert len(server.requests) == number + 1
            with (out_of(argv) / "rewards.jsonl").open("ab") as journal:
                journal.write(b'{"key": "0')  # and a kill inside the next append
            assert forks.run([*argv, "--resume"]).code == 0, log_of(argv).read_text("utf-8")
            assert len(server.requests) == 5
            assert wrong_with(out_of(argv), remains(out_of(whole))) == []
            left = [(out_of(words) / "rewards.jsonl").read_bytes() for words in (whole, argv)]
            assert left[0] == left[1]


def test_resume_may_change_how_patient_the_client_is_but_not_the_service(world, tmp_path, capsys):
    with stub(Request.good) as server:
        argv = scored_by(world, tmp_path / "run", server.url)
        assert cli.main(argv) == 0
        again = ["3" if word == "2" and argv[i - 1] == "--reward-timeout" else word
                 for i, word in enumerate(argv)]
        assert cli.main([*again, "--resume"]) == 0
        assert "changed: reward_timeout was 2.0, is 3.0" in capsys.readouterr().out
        other = [word.replace("/score", "/other") for word in argv]
        assert cli.main([*other, "--resume"]) == 2
    assert "reward was " in capsys.readouterr().err


def test_a_damaged_journal_ends_the_resumed_run(world, tmp_path, capsys):
    with stub(Request.good) as server:
        argv = scored_by(world, tmp_path / "run", server.url, steps=3)
        assert cli.main(argv) == 0
        for commit in sorted((tmp_path / "run" / "checkpoints").iterdir())[1:]:
            (commit / "state.json").unlink()
        journal = tmp_path / "run" / "rewards.jsonl"
        journal.write_bytes(journal.read_bytes().replace(b'"score"', b'"scare"', 1))
        assert cli.main([*argv, "--resume"]) == 2
    assert "rewards.jsonl:1: is no reply of a service" in capsys.readouterr().err


def test_a_token_is_sent_from_its_file(world, tmp_path):
    (tmp_path / "token").write_text("abc123\n")
    with stub(Request.good) as server:
        out = tmp_path / "run"
        argv = scored_by(world, out, server.url, "--reward-token-file", str(tmp_path / "token"))
        assert cli.main([*argv, "--resume"]) == 0
    assert {request.headers["authorization"] for request in server.requests} == {"Bearer abc123"}
    assert "abc123" not in (out / "run.json").read_text()


def test_a_signal_does_not_wait_for_the_service(capfd):
    batch = Completions(["p"], [[1]], ["c"], [[2]], ["eos"], {})
    with stub(silent) as server:
        source = service_reward(service(server.url, timeout=60.0), decode, Journal())
        timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM))
        with interrupt.listening(), pytest.raises(Stopped):
            timer.start()
            source(batch)
        timer.join()
