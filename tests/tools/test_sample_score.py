"""What `minirlhf sample` and `minirlhf score` have in common: the rows they read and refuse."""

import json
import shutil

import pytest

from minirlhf.cli import main
from minirlhf.data.examples import load_prompts, load_texts
from minirlhf.data.tokenizer import load_tokenizer
from minirlhf.errors import UserError
from tests.tiny_folders import change_json
from tests.tools.conftest import KINDS, command_of, lines_of, peer_score, write_lines


@pytest.mark.parametrize(
    ("verb", "model", "data", "more"),
    [("score", "RM", "TEXTS", []), ("sample", "LM", "PROMPTS", ["--max-new-tokens", "2"])],
)
def test_weights_that_are_rounded_are_told(verb, model, data, more, files, capsys):
    words = [verb, "--model", files[model], "--data", files[data], *more]
    warning = f"warning: {files[model]}: weights are rounded to bfloat16"
    for dtype, told in (("bfloat16", True), ("float32", False)):
        assert main([*words, "--dtype", dtype]) == 0
        assert (warning in capsys.readouterr().err) == told


def test_ids_that_sample_wrote_are_read_by_their_own_tokenizer_only(files, capsys, tmp_path):
    row = {"prompt": "a film", "response": "so", "finish_reason": "eos", "input_ids": [300, 5],
           "prompt_length": 1, "tokenizer": "another"}
    path = write_lines(tmp_path / "s.jsonl", row)
    sample = ("sample", "--model", files["LM"], "--max-new-tokens", "4")
    for words in (("score", "--model", files["RM"]), sample):
        assert main([*words, "--data", str(path)]) == 2
        told = "s.jsonl:1: holds ids of another tokenizer: leave out its input_ids and prompt_leng"
        assert told in capsys.readouterr().err


def test_a_prompt_of_ids_ends_where_its_answer_begins(files, tmp_path):
    rows = [{"input_ids": [5, 6, 7], "prompt_length": 2}, {"input_ids": [8, 9]}]
    tokenizer = load_tokenizer(files["LM"])
    prompts, _ = load_prompts(write_lines(tmp_path / "p.jsonl", *rows), tokenizer, 9, "error")
    assert [prompt.ids for prompt in prompts] == [[5, 6], [8, 9]]
    for wrong in (0, 4, "2"):
        path = write_lines(tmp_path / "q.jsonl", rows[0] | {"prompt_length": wrong})
        with pytest.raises(UserError, match=r"prompt_length is .*: needs an integer from 1 to 3"):
            load_prompts(path, tokenizer, 9, "error")


def test_a_language_model_scores_nothing(files, capsys):
    assert main(["score", "--model", files["LM"], "--data", files["TEXTS"]]) == 2
    assert "has no 'score.weight': not a reward model" in capsys.readouterr().err


def test_what_sample_wrote_is_scored_with_what_its_template_was_told(files, capsys, tmp_path):
    folders, template = {}, "{{ tools | tojson }}{{ mood }}{% for m in messages %}{{ m.content }}"
    for name in ("LM", "RM"):
        folders[name] = shutil.copytree(files[name], tmp_path / name)
        change_json(folders[name] / "tokenizer_config.json",
                    chat_template=template + "<|endoftext|>{% endfor %}")
    told = {"tools": '[{"name": "f"}]', "chat_template_kwargs": {"mood": "bad"}}
    path = write_lines(tmp_path / "p.jsonl", {"prompt": [{"role": "user", "content": "so"}]} | told)
    (row,) = lines_of(capsys, *command_of("sample", folders, path),
                      "--template-kwargs", "mood=good", "more=[1]")
    said = ["sample", "--model", folders["LM"], "--prompt", "so", "--max-new-tokens", "4"]
    (spoken,) = lines_of(capsys, *said, "--chat", "--template-kwargs", "mood=bad", "tool=f")
    assert spoken["chat_template_kwargs"] == {"mood": "bad", "tool": "f"}
    assert main([*map(str, said), "--template-kwargs", "mood=bad", "--raw"]) == 2
    assert "no chat template renders --prompt: leave --raw out" in capsys.readouterr().err
    told["chat_template_kwargs"] = {"mood": "bad", "more": [1]}
    assert {name: row[name] for name in told} == told and "input_ids" not in row
    path = write_lines(tmp_path / "s.jsonl", row)
    tokenizer = load_tokenizer(folders["RM"])
    (text,), _ = load_texts(path, tokenizer, None, "error")
    head = tokenizer.decode(text.ids[: text.prompt_length], skip_special=False)
    assert head == '[{"name": "f"}]badso<|endoftext|>'
    (scored,) = lines_of(capsys, *command_of("score", folders, path))
    assert scored["score"] == pytest.approx(peer_score(str(folders["RM"]), text.ids), abs=1e-5)


def test_check_tells_rows_with_other_tools_apart(files, tmp_path, capsys):
    row = {"prompt": [{"role": "user", "content": "so"}]}
    path = write_lines(tmp_path / "p.jsonl", row, row | {"tools": [{}]}, row | {"tools": [{}]})
    words = ["check", path, "--recipe", "ppo", "--max-new-tokens", "4", "--model", files["LM"]]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "tools not read: the chat template does not look at it" in shown
    assert f"warning: 1 row: the same row as one before (first: {path}:3)" in shown


@pytest.mark.parametrize("kind", KINDS)
def test_malformed_rows_are_left_out_and_told_where_asked_for(kind, files, capsys, tmp_path):
    row = KINDS[kind]
    path = write_lines(tmp_path / "d.jsonl", "{,", row, {"x": 1}, row)  # the second tells the kind
    command = command_of(kind, files, path)
    assert main(command) == 2
    assert "d.jsonl:1: not valid JSON at column 2" in capsys.readouterr().err
    assert main([*command, "--bad-rows", "skip"]) == 0
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 2
    assert f"rejected: 2 (first: {path}:1: not valid JSON at column 2" in shown.err
    assert "4 rows · kept 2" in shown.err


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_not_left_out_beyond_max_drop(kind, files, capsys, tmp_path):
    path = write_lines(tmp_path / "d.jsonl", "{,", KINDS[kind], KINDS[kind], KINDS[kind])
    command = [*command_of(kind, files, path), "--bad-rows", "skip", "--max-drop"]
    assert main([*command, "0.25"]) == 0
    capsys.readouterr()
    assert main([*command, "0.2"]) == 2
    shown = capsys.readouterr()
    assert "1 of 4 rows are left out, max_drop is 0.2" in shown.err and shown.out == ""


@pytest.mark.parametrize("kind", KINDS)
def test_halves_of_surrogate_pairs_are_mended_where_asked_for(kind, files, capsys, tmp_path):
    broken = json.dumps(KINDS[kind]).replace("film", r"film\ud800")
    whole = json.dumps(KINDS[kind]).replace("film", r"film\ufffd")
    command = command_of(kind, files, write_lines(tmp_path / "d.jsonl", broken))
    assert main(command) == 2
    assert "half of a surrogate pair" in capsys.readouterr().err
    mended = lines_of(capsys, *command, "--fix-text")
    write_lines(tmp_path / "d.jsonl", whole)
    assert lines_of(capsys, *command) == mended
