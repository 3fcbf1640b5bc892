"""`minirlhf chat`: what is said, kept, commanded and refused."""

import json
from pathlib import Path

import pytest
import torch

from minirlhf.data.tokenizer import load_tokenizer
from minirlhf.errors import UserError
from minirlhf.models.pretrained import load_pretrained
from minirlhf.models.sampling import Sampling
from minirlhf.tools.chat import answer as answer_module
from minirlhf.tools.chat import keyboard
from minirlhf.tools.chat.answer import Speaker
from tests.tools.chat.conftest import END

KEYS, GREEDY = torch.tensor([1]), ["--temperature", 0]


def speaker_of(folder: str, **sampling) -> Speaker:
    sampling = Sampling(**{"max_new_tokens": 20, "temperature": 0, **sampling})
    tokenizer = load_tokenizer(folder)
    return Speaker("m", Path(folder), load_pretrained(folder), tokenizer, sampling, True, {})


@pytest.mark.parametrize(("text", "parts"), [
    ("good film", None), ("奖🎬", ["奖", "🎬"]), ("aé🚀", ["a", "é", "🚀"]),
])
def test_an_answer_comes_piece_by_piece_and_characters_whole(text, parts, says):
    """UTF-8 writes é in 2 bytes, 奖 in 3 and an emoji in 4, each of them a token here."""
    speaker = speaker_of(says(text))
    heard = speaker.hear("so")
    found = list(speaker.speak(heard, KEYS))
    assert "".join(found) == text
    assert len(found) > 1 if parts is None else found == parts
    assert heard.reason == "eos" and heard.ids[-1] == 0


def test_the_history_is_rendered_by_the_template(says):
    speaker = speaker_of(says("good film"), max_new_tokens=5)
    speaker.system = "we"
    for text in ("a", "b"):
        heard = speaker.hear(text)
        list(speaker.speak(heard, KEYS))
        speaker.keep(heard)
    rendered = f"system> we{END}user> a{END}assistant> {speaker.said[0].text}{END}user> b{END}"
    assert heard.prompt_ids == speaker.tokenizer.encode_marked(rendered)
    assert [turn["role"] for turn in speaker.turns] == 2 * ["user", "assistant"]
    speaker.reset()
    rendered = f"system> we{END}user> c{END}"
    assert speaker.hear("c").prompt_ids == speaker.tokenizer.encode_marked(rendered)


def test_what_may_become_a_stop_string_waits(says):
    speaker = speaker_of(says("so bad"), stop_strings=(" bad", "oz"))
    heard = speaker.hear("a")
    # "o" may begin "oz" and " b" begin " bad": "o" is shown once the blank follows it
    assert "".join(speaker.speak(heard, KEYS)) == "so" and heard.reason == "stop"
    speaker.keep(heard)
    assert speaker.said[0].text == "so"
    speaker = speaker_of(says("so bad"), stop_strings=("badly",))  # begun, and not ended
    assert "".join(speaker.speak(speaker.hear("a"), KEYS)) == "so bad"


def test_lines_that_are_piped_in_are_answered_one_by_one(says, talk, tmp_path):
    folder, out = says("good film"), tmp_path / "talk.jsonl"
    said = talk(f"a\n\n  \nb\n/save {out}\n/quit\nc\n", folder, *GREEDY)
    assert said == f"good film\ngood film\n(saved in {out})\n"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "good film"},
             {"role": "user", "content": "b"}, {"role": "assistant", "content": "good film"}]
    row = json.loads(out.read_text())
    assert row == {"messages": turns, "model": Path(folder).name}
    told = talk(f"a\n/save {out}\n/save\n", folder, *GREEDY)
    assert f"error: /save {out}: File exists\n" in told
    assert "error: /save: give a new file, as in /save talk.jsonl\n" in told
    assert talk("/save x\n", folder) == "error: /save: nothing was said yet\n"


def test_hostile_text_does_nothing_to_the_terminal(says, talk):
    assert talk("a\n", says("so\x1b[2J"), *GREEDY) == "so\\x1b[2J\n"
    said = talk("a\n", says("so\x1b[2J"), *GREEDY, "--heat", "logprob")
    assert "\x1b" not in said and "\\x1b:" in said


def test_commands(says, talk):
    folder = says("good film")
    said = talk("/help\n/system be\na\n/reset\n/system\n/temperature 0.5\n/temperature hot\n"
                "/temperature 1e-9\n/temprature 1\n/xyz\n", folder, *GREEDY).splitlines()
    assert [line.split()[0] for line in said[:6]] == [
        "/reset", "/system", "/temperature", "/save", "/help", "/quit"]
    assert said[6:] == [
        "(the system turn is set)", "good film", "(begun anew)", "(no system turn)",
        "(temperature 0.5)", "error: /temperature hot: 0, or a number from 0.0001 on",
        "error: /temperature 1e-9: 0, or a number from 0.0001 on",
        "error: /temprature: no such command: the nearest is /temperature; a message that begins "
        "with / has a blank before it",
        "error: /xyz: no such command: /help lists them; a message that begins with / has a blank "
        "before it"]


def test_a_model_without_template_completes_texts_and_remembers_nothing(files, talk, tmp_path):
    out = tmp_path / "t.jsonl"
    words = [files["LM"], *GREEDY, "--max-new-tokens", 4]
    said = talk(f"a film\na film\n/system x\n/save {out}\n", *words).splitlines()
    assert said[0] == said[2] and said[1] == "(cut after 4 tokens: --max-new-tokens)"
    assert "error: /system: a model without chat template has no system turn" in said
    told = "no chat template: each line is a text to complete, by itself (--chat: turns by a plain"
    assert talk.told.count(told) == 1
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [list(row) for row in rows] == 2 * [["prompt", "completion", "model"]]
    assert talk("a film\n", *words, "--chat") != said[0] and told not in talk.told
    assert talk("a film\n", files["TALKER"], *words[1:], "--raw").splitlines()[0] == said[0]


def test_a_full_context_is_told_and_nothing_is_dropped(says, talk):
    # "user> aaaa" and eos; the model reads 48 tokens, the cycle "s", "o", eos ends each answer
    folder = says("so")
    said = talk(60 * "z" + "\n" + "z\n", folder, *GREEDY).splitlines()
    assert said[0].startswith("error: context full: the conversation has ")
    assert said[0].endswith(" reads 48: give a shorter one") and said[1:] == ["so"]
    speaker = speaker_of(folder)
    sizes = []
    with pytest.raises(UserError, match=r"m reads 48: /reset begins anew"):
        while True:
            heard = speaker.hear("zzzz")
            sizes.append(len(heard.prompt_ids))
            assert heard.limit == min(20, 48 - sizes[-1] + 1)
            list(speaker.speak(heard, KEYS))
            speaker.keep(heard)
    assert len(sizes) > 1 and sizes[1] > sizes[0]


def test_an_answer_that_fills_the_context_says_so(files, talk):
    for folder, told in (("LM", "full)"), ("TALKER", "full: /reset begins anew)")):
        said = talk("a film\n", files[folder], "--max-new-tokens", 200, *GREEDY).splitlines()
        assert said[-1] == f"(cut: the context of 48 tokens is {told}"


def test_two_models_answer_one_below_the_other_in_a_pipe(says, talk):
    said = talk("a\n/temperature 0\na\n", says("so"), says("bad"), *GREEDY)
    assert said == "says0:\nso\nsays1:\nbad\n(temperature 0)\nsays0:\nso\nsays1:\nbad\n"


def test_answers_are_scored(says, files, talk):
    said = talk("a\n", says("so"), *GREEDY, "--reward", "length:3").splitlines()
    assert said[0] == "so" and said[1].startswith("score ")
    said = talk("a\n", says("so"), *GREEDY, "--reward", files["RM"], "2*length:3").splitlines()
    assert " (" in said[1] and "length " in said[1]


def interrupted(real, after: int):
    """`decode_steps` during which Ctrl-C is pressed after so many tokens."""

    def steps(*given):
        for at, step in enumerate(real(*given)):
            if at == after:
                raise KeyboardInterrupt
            yield step

    return steps


@pytest.mark.parametrize(("after", "lines"), [
    (0, ["", "(stopped before the first token: the message is taken back)"]),
    (2, ["so", "(stopped)"]),
])
def test_ctrl_c_stops_an_answer(after, lines, says, talk, monkeypatch, tmp_path):
    real, out, folder = answer_module.decode_steps, tmp_path / "t.jsonl", says("so bad")
    monkeypatch.setattr(answer_module, "decode_steps", interrupted(real, after))
    said = talk(f"a\n/save {out}\n", folder, *GREEDY).splitlines()
    assert said[:2] == lines
    kept = json.loads(out.read_text())["messages"] if out.exists() else []
    assert [turn["content"] for turn in kept] == ([] if after == 0 else ["a", "so"])


def test_ctrl_c_while_an_answer_is_scored_keeps_it(says, talk, tmp_path):
    file = tmp_path / "slow.py"
    file.write_text("def score(completions):\n    raise KeyboardInterrupt\n")
    said = talk("a\nb\n", says("so"), *GREEDY, "--reward", f"{file}:score")
    assert said == 2 * "so\n(stopped: no numbers)\n"


def test_ctrl_c_twice_at_an_empty_line_leaves(monkeypatch, capsys):
    keys = iter(["C", "line", "C", "Ca", "C", "C", "never"])

    def ask() -> str:
        key = next(keys)
        if key.startswith("C"):
            raise KeyboardInterrupt(key[1:])
        return key

    monkeypatch.setattr(keyboard, "ask", ask)
    assert list(keyboard.lines(True)) == ["line"] and next(keys) == "never"
    assert capsys.readouterr().out.count("(Ctrl-C once more, or Ctrl-D, leaves)") == 3


def test_lines_that_are_no_utf_8_are_left_out(says, talk):
    said = talk("a\udcff\nb\n", says("so"), *GREEDY)
    assert said == "error: message: is not UTF-8: it is left out\nso\n"


REFUSED = [
    (["LM", "RM", "LM"], "model: give one or two"),
    ([], "--model: required"),
    (["RM"], "is a reward model, not a language model"),
    (["LM", "--heat", "value"], "has no value head: give the folder of a PPO run"),
    (["LM", "--heat", "kl"], "lm names no model that it is compared with: give --ref FOLDER"),
    (["LM", "--heat", "reward"], "--heat reward: needs a reward: give --reward SOURCE"),
    (["LM", "--heat", "warm"], "must be one of reward, value, kl, advantage, logprob or none"),
    (["LM", "--reward", "math"], "--reward math: compares with an answer, and a chat has none"),
    (["LM", "--system", "x"], "--system: a model without chat template has no system turn"),
    (["TALKER", "--raw", "--chat"], "raw and chat: give one of them"),
    (["TALKER", "--temperature", "1e-9"], "--temperature 1e-09: 0, or at least 0.0001"),
]


@pytest.mark.parametrize(("words", "told"), REFUSED, ids=[told for _, told in REFUSED])
def test_what_cannot_work_is_refused_in_a_line(words, told, files, talk):
    talk("", *(files.get(word, word) for word in words), code=2)
    assert told in talk.told and talk.told.count("\n") == 1
