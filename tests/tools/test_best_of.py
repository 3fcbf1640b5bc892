"""`minirlhf best-of`: which responses are written, that it goes on, and that recipes read them."""

import json
from pathlib import Path

import pytest

from minirlhf.cli import main
from minirlhf.data.tokenizer import load_tokenizer
from minirlhf.models.heads import RewardModel, initialize_score
from minirlhf.models.pretrained import load_pretrained
from minirlhf.setup.reward import write_reward_model
from minirlhf.streams import generator
from minirlhf.tools.best_of import Response, best, pair, ranked
from minirlhf.tools.sampling_settings import BestOfConfig
from tests import pages
from tests.tiny_folders import read_lines
from tests.tools.conftest import PROMPTS, lines_of, write_lines

A, B, C = Response("a", 1.0, "eos"), Response("b", 0.0, "stop"), Response("c", 2.0, "eos")
CUT, EMPTY = Response("d", 9.0, "length"), Response(" ", 9.0, "eos")
REWARD = """
def letters(completions):
    return [float(len(text)) for text in completions]

def same(completions):
    return [1.0] * len(completions)

def stops(completions):
    import os, signal
    from pathlib import Path
    if len(completions) == 2:  # on which it is tried
        return letters(completions)
    calls = Path("calls")
    calls.write_text(calls.read_text() + "." if calls.exists() else ".")
    if len(calls.read_text()) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return letters(completions)
"""

# ---- the choice ----------------------------------------------------------------------------------


def test_ranked_leaves_out_what_has_no_end_or_text_and_what_stands_twice():
    assert ranked([A, B, CUT, EMPTY, C]) == [C, A, B]
    again = Response("a", 5.0, "eos")
    assert ranked([A, again]) == [A]  # the first drawn, as a rule would score both alike
    assert ranked([B, Response("e", 0.0, "eos")])[0] == B
    assert [one.why_not for one in (A, CUT, EMPTY)] == [
        "", "cut by --max-new-tokens", "without a text",
    ]


@pytest.mark.parametrize(
    ("responses", "threshold", "keep", "found"),
    [
        ([A, B, C], None, 1, [C]),
        ([A, B, CUT], None, 1, [A]),
        ([A, B, C], 1.0, 8, [C, A]),  # those that reach it
        ([A, B, C], 1.0, 1, [C]),
        ([A, B, C], 2.5, 8, "without a response that reaches --threshold"),
        ([CUT, EMPTY], None, 1, "without a response that has a text and an end"),
        ([A], None, 1, "with one response alone that could be chosen"),  # better than none
        ([A], 1.0, 1, [A]),
        ([A, Response("e", 1.0, "eos")], None, 1, "whose responses all score the same"),
        ([A, Response("e", 1.0, "eos")], 0.5, 2, [A, Response("e", 1.0, "eos")]),
    ],
)
def test_best(responses, threshold, keep, found):
    assert best(responses, threshold, keep) == found


@pytest.mark.parametrize(
    ("responses", "threshold", "found"),
    [
        ([A, B, C], None, (C, B)),
        ([A, B, C], 0.5, (C, B)),
        ([A, B, C], 2.0, (C, B)),
        ([A, B, C], 2.5, "without a response that reaches --threshold"),
        ([A, B, C], 0.0, "without a response below --threshold"),
        ([A, CUT], None, "with one response alone that could be chosen"),
        ([A, Response("e", 1.0, "eos")], None, "whose responses all score the same"),
        ([CUT], None, "without a response that has a text and an end"),
    ],
)
def test_pair(responses, threshold, found):
    assert pair(responses, threshold) == found


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch):
    (tmp_path / "reward.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    return tmp_path


DRAW = ["--samples", 4, "--max-new-tokens", 12, "--stop", "e", "i"]  # so that most have an end


def words_of(files: dict, out: str, *more, reward: str = "reward.py:letters", data="PROMPTS"):
    words = ["best-of", "--model", files["LM"], "--data", files.get(data, data), "--out", out]
    return list(map(str, [*words, "--reward", reward, *DRAW, *more]))


def drawn(files: dict, capsys, data: str = "PROMPTS") -> list[list[dict]]:
    """The responses to each prompt, as `minirlhf sample` draws them."""
    rows = lines_of(capsys, "sample", "--model", files["LM"], "--data", files[data], *DRAW)
    return [rows[i : i + 4] for i in range(0, len(rows), 4)]


def ended(rows: list[dict]) -> list[str]:
    """Texts that may be chosen, the longest first."""
    texts = [row["response"] for row in rows if row["finish_reason"] != "length"]
    return sorted((text for text in dict.fromkeys(texts) if text.strip()), key=lambda t: -len(t))


def test_the_best_of_what_sample_draws_is_written(files, capsys, home):
    assert main(words_of(files, "b.jsonl")) == 0
    shown = capsys.readouterr().out
    groups = [(p, ended(rows)) for p, rows in zip(PROMPTS, drawn(files, capsys), strict=True)]
    expected = [
        {"prompt": prompt, "completion": texts[0], "score": float(len(texts[0]))}
        for prompt, texts in groups if texts and len(texts[0]) > len(texts[-1])
    ]
    assert read_lines(home / "b.jsonl") == expected and 2 <= len(expected)
    assert f"b.jsonl: {len(expected)} rows\n" in shown
    assert "6 prompts, 24 responses: mean score " in shown
    assert sorted(p.name for p in home.iterdir()) == ["b.jsonl", "reward.py"]
    assert main(words_of(files, "b.jsonl")) == 2  # it is there already
    # another batch changes nothing
    assert main(words_of(files, "c.jsonl", "--batch-size", 1)) == 0
    assert (home / "c.jsonl").read_bytes() == (home / "b.jsonl").read_bytes()


def test_pairs_and_thresholds(files, capsys, home):
    groups = [(p, ended(rows)) for p, rows in zip(PROMPTS, drawn(files, capsys), strict=True)]
    assert main(words_of(files, "p.jsonl", "--pairs", "--limit", 4)) == 0
    expected = [
        {"prompt": prompt, "chosen": texts[0], "rejected": texts[-1],
         "chosen_score": float(len(texts[0])), "rejected_score": float(len(texts[-1]))}
        for prompt, texts in groups[:4] if texts and len(texts[0]) > len(texts[-1])
    ]
    found = read_lines(home / "p.jsonl")
    assert [row["chosen"] for row in found] == [row["chosen"] for row in expected]
    for row, right in zip(found, expected, strict=True):  # of equal worst ones any
        assert len(row["rejected"]) == len(right["rejected"])
    assert main(words_of(files, "t.jsonl", "--threshold", 3, "--best", 9)) == 0
    assert [row["completion"] for row in read_lines(home / "t.jsonl")] == [
        text for _, texts in groups for text in texts if len(text) >= 3
    ]
    main(["check", "t.jsonl"])
    assert "for:      sft" in capsys.readouterr().out
    main(["check", "p.jsonl"])
    assert "for:      reward" in capsys.readouterr().out


def test_messages_are_answered_with_messages_that_recipes_read(files, capsys, home):
    turns = [{"role": "user", "content": "a film"}]
    row = {"prompt": turns, "answer": 3, "chat_template_kwargs": {"a": 1}}
    data = write_lines(home / "d.jsonl", *[row] * 3)
    rules = ("reward.py:count", "format:[a-d]")
    (home / "reward.py").write_text(
        "def count(completions):\n    return [len(c[0]['content']) for c in completions]\n"
    )
    words = words_of(files, "b.jsonl", "--pairs", data=data, reward=rules[0])
    at = words.index(rules[0])
    assert main([*words[: at + 1], f"0.5*{rules[1]}", *words[at + 1 :]]) == 0
    for row in read_lines(home / "b.jsonl"):
        assert row["prompt"] == turns and row["chat_template_kwargs"] == {"a": 1}
        (chosen,), (rejected,) = row["chosen"], row["rejected"]
        assert chosen["role"] == rejected["role"] == "assistant"
        # the sum: a letter 1, and 0.5 where one of a to d is there
        for turn, score in ((chosen, "chosen_score"), (rejected, "rejected_score")):
            half = 0.5 * bool(set("abcd") & set(turn["content"]))
            assert row[score] == len(turn["content"]) + half
    out = home / "run"
    argv = ["reward", "--model", files["LM"], "--data", "b.jsonl", "--out", out, "--steps", "1",
            "--batch-size", "1"]
    assert main(list(map(str, argv))) == 0


def test_a_stopped_command_goes_on_where_it_stood(files, capsys, home):
    assert main(words_of(files, "b.jsonl")) == 0
    words = words_of(files, "s.jsonl", "--batch-size", 8, reward="reward.py:stops")
    assert main(words) == 75
    # 8 responses are two prompts; the second batch was scored, and thrown away
    assert "stopped after 2 of 6 prompts: the same command goes on" in capsys.readouterr().out
    partial = home / "s.jsonl.partial"
    assert not (home / "s.jsonl").exists() and len(read_lines(partial)) == 3
    before = partial.read_bytes()
    assert main([*words, "--seed", "1"]) == 2
    told = "is what another command, or this one with other inputs, began to write"
    assert told in capsys.readouterr().err
    assert partial.read_bytes() == before
    partial.write_bytes(before + b'{"at": 2, "ro')  # a kill inside the append
    assert main(words) == 0
    assert "goes on after 2 of 6 prompts" in capsys.readouterr().out
    assert (home / "s.jsonl").read_bytes() == (home / "b.jsonl").read_bytes()
    assert not partial.exists()


def test_other_inputs_or_a_damaged_file_are_no_place_to_go_on(files, capsys, home):
    data = write_lines(home / "d.jsonl", *({"prompt": prompt} for prompt in PROMPTS))
    words = words_of(files, "s.jsonl", "--batch-size", 4, reward="reward.py:stops", data=data)
    assert main(words) == 75
    partial = home / "s.jsonl.partial"
    before = partial.read_bytes()
    write_lines(home / "d.jsonl", {"prompt": "other"}, *({"prompt": p} for p in PROMPTS[1:]))
    assert main(words) == 2 and "with other inputs" in capsys.readouterr().err
    write_lines(home / "d.jsonl", *({"prompt": prompt} for prompt in PROMPTS))
    lines = before.splitlines(keepends=True)
    partial.write_bytes(b"".join([lines[0], lines[1], lines[1]]))
    assert main(words) == 2
    assert "s.jsonl.partial:3: is not in order: remove the file" in capsys.readouterr().err
    for damage in (b"[]\n", b"\xff\n", b"{\n"):
        partial.write_bytes(lines[0] + damage)
        assert main(words) == 2 and "s.jsonl.partial:2: " in capsys.readouterr().err
    partial.write_bytes(lines[0][:20])  # a kill inside the first append: nothing was done
    assert main(words) == 0


@pytest.mark.parametrize(
    "change",
    [("--seed", 1), ("--samples", 7), ("--max-new-tokens", 5), ("--stop", "a"), ("--limit", 2),
     ("--temperature", 0.2), ("--top-k", 3), ("--top-p", 0.3), ("--min-p", 0.9), ("--chat",)],
)
def test_settings_change_what_is_written(change, files, capsys, home):
    (home / "reward.py").write_text(
        "def f(completions):\n    return [len(str(c)) for c in completions]"
    )
    words = words_of(files, "b.jsonl", "--threshold", 0, reward="reward.py:f")
    assert main(words) == 0
    words[words.index("b.jsonl")] = "c.jsonl"
    if change[0] in words:
        at = words.index(change[0])
        del words[at : at + (3 if change[0] == "--stop" else 2)]
    assert main([*words, *map(str, change)]) == 0
    assert (home / "b.jsonl").read_bytes() != (home / "c.jsonl").read_bytes()


def test_one_greedy_response_is_scored_too(files, capsys, home):
    argv = words_of(files, "b.jsonl", "--threshold", 0, "--temperature", 0)
    argv[argv.index("--samples") + 1] = "1"
    assert main(argv) == 0
    shown = capsys.readouterr().out
    argv = ["sample", "--model", files["LM"], "--data", files["PROMPTS"], *DRAW[2:]]
    greedy = lines_of(capsys, *argv, "--temperature", 0)
    mean = sum(len(row["response"]) for row in greedy) / len(PROMPTS)
    assert f"6 prompts, 6 responses: mean score {mean:.4f}, " in shown


def test_no_row_at_all_is_an_error_and_leaves_nothing(files, capsys, home):
    assert main(words_of(files, "b.jsonl", reward="reward.py:same")) == 2
    shown = capsys.readouterr()
    assert "b.jsonl: would have no row: give more --samples" in shown.err
    assert "prompts whose responses all score the same" in shown.out
    assert [p.name for p in home.iterdir()] == ["reward.py"]


def test_a_reward_model_chooses_too(files, capsys, home):
    assert main(words_of(files, "b.jsonl", "--pairs", reward=files["RM"])) == 0
    pairs = read_lines(home / "b.jsonl")
    assert len(pairs) > 0 and all(row["chosen_score"] > row["rejected_score"] for row in pairs)
    capsys.readouterr()
    assert main(words_of(files, "c.jsonl", "--pairs", reward=f"-1*{files['RM']}")) == 0
    turned = {row["prompt"]: row for row in read_lines(home / "c.jsonl")}
    for row in pairs:  # the worst by one is the best by the other
        other = turned[row["prompt"]]
        assert (other["chosen"], other["chosen_score"]) == (row["rejected"], -row["rejected_score"])


def test_what_cannot_be_written_again_is_refused(files, capsys, home):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for row, told in (
        ({"prompt": turns}, "d.jsonl:1: the last turn is the assistant's: remove that turn"),
        ({"prompt_ids": [0, 6, 7]}, "d.jsonl:1: its ids are not those of its text: give texts"),
    ):
        data = write_lines(home / "d.jsonl", row)
        assert main(words_of(files, "b.jsonl", data=data)) == 2
        assert told in capsys.readouterr().err
    assert main(words_of(files, "b.jsonl", reward="math")) == 2
    assert "prompts.jsonl:1: no column answer, which --reward math" in capsys.readouterr().err
    assert not Path("b.jsonl.partial").exists()


def test_a_file_that_came_meanwhile_is_not_replaced(files, capsys, home):
    source = REWARD + "\ndef writes(completions):\n    from pathlib import Path\n"
    source += "    if len(completions) > 2:  # on two it is tried\n"
    source += "        Path('b.jsonl').write_text('mine')\n    return letters(completions)\n"
    (home / "reward.py").write_text(source)
    words = words_of(files, "b.jsonl", reward="reward.py:writes")
    assert main(words) == 2
    assert "b.jsonl: is there by now: move it away" in capsys.readouterr().err
    assert (home / "b.jsonl").read_text() == "mine"
    (home / "b.jsonl").unlink()
    assert main(words) == 0 and json.loads((home / "b.jsonl").read_text().splitlines()[0])


def test_iterative_dpo_is_three_commands_of_a_page(home):
    pages.make_world(home)
    tokenizer = load_tokenizer(pages.MODEL)
    judge = initialize_score(RewardModel(load_pretrained(pages.MODEL)), generator(0, "judge"))
    write_reward_model(judge, tokenizer, home / "runs/reward/model")
    commands = [words[1:] for words in pages.commands("minirlhf/rewards/README.md")
                if {"pairs-1.jsonl", "pairs-2.jsonl"} & {*words}]
    assert [words[0] for words in commands] == ["best-of", "dpo", "best-of"]
    assert [main(words) for words in commands] == [0, 0, 0]
    first, second = (read_lines(home / f"pairs-{i}.jsonl") for i in (1, 2))
    assert first and second and first != second


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"best": 2}, "best: goes with --threshold"),
        ({"samples": 1}, "samples 1: nothing to compare; give --threshold, and no --pairs"),
        ({"temperature": 0.0}, "--samples 8 with temperature 0: they would all be one"),
        ({"best": 2, "threshold": 1.0, "pairs": True}, "best: a prompt gives one pair"),
        ({"out": "no/where"}, "--out: no is no folder"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, told, home):
    assert BestOfConfig(**{"out": "o"} | settings).check() == [told]
