"""Commands whose data has malformed rows: what they say, what they write, and that they go on."""

import json
import re
import shutil
from pathlib import Path

import pytest

from minirlhf import cli
from minirlhf.files import atomic
from minirlhf.files.sieve import RowPolicy
from minirlhf.setup.sft import raw_texts
from tests import bad_inputs
from tests.bad_inputs import PAIR, PROMPT, TEXT, json_lines, named, words, write
from tests.test_bad_data import LINES, ROWS
from tests.tiny_folders import read_lines

world, refused = bad_inputs.world, bad_inputs.refused
RECIPES = {"sft": TEXT, "new": TEXT, "reward": PAIR, "dpo": PAIR, "ppo": PROMPT, "grpo": PROMPT,
           "distill": PROMPT}
SKIP = {"bad_rows": "skip"}
WAY_OUT = "--bad-rows skip leaves such rows out"


@pytest.fixture
def run(world, tmp_path, monkeypatch, capfd):
    """run(argv) -> (exit code, stdout, stderr) in a folder with links to all of the world."""
    for path in world.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)

    def command(argv: list[str]) -> tuple[int, str, str]:
        capfd.readouterr()
        code = cli.main(argv)
        return code, *capfd.readouterr()

    return command


def listed(name: str) -> list[dict]:
    return read_lines(Path(name))


def dirty(good: dict, name: str = "d.jsonl") -> str:
    """Rows 1, 3 and 5 are good; 2 is no JSON, 4 is of another kind, 6 fits in no model."""
    long = {key: text + "x" * 44 for key, text in good.items()}
    return write(name, json_lines(good) + "{\x1b\n" + json_lines(good, {"x": 1}, good, long))


# ---- every malformed row of the tables -----------------------------------------------------------

CHECK = {"new": "sft"}
MALFORMED = [("sft", TEXT, line, told) for line, told in LINES]
MALFORMED += [
    (CHECK.get(verb, verb), first, second, told)
    for verb, first, second, told in ROWS
    if verb in RECIPES and "max_length is" not in told
]


@pytest.mark.parametrize(("recipe", "first", "second", "told"), named(MALFORMED))
def test_a_malformed_row_is_left_out_where_that_is_asked_for(recipe, first, second, told, run):
    second = json.dumps(second) if isinstance(second, dict) else second
    second = second if isinstance(second, bytes) else second.encode()
    start = json_lines(first).encode()
    data = write("d.jsonl", start + second + b"\n" + start)
    code, out, err = run(
        ["check", data, "--model", "lm", "--recipe", recipe, "--bad-rows", "skip",
         "--max-new-tokens", "4"]
    )
    assert (code, err) == (0, "")
    (counted,) = (line for line in out.splitlines() if line.startswith("  rejected: "))
    assert counted.startswith(f"  rejected: 1 (first: d.jsonl:2: {told}"[:200])
    assert out.endswith("ok: 2 of 3 rows can be used\n")


def test_the_tables_hold_enough_malformed_rows():
    assert len(MALFORMED) > 95


# ---- runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", RECIPES)
def test_a_run_lists_what_it_leaves_out_once_and_the_same_after_resume(verb, run):
    data = dirty(RECIPES[verb])
    argv = words(verb, data=data, overlong="drop", **SKIP)
    argv += [] if RECIPES[verb] is PROMPT else ["--max-length", "40"]
    code, out, _ = run(argv)
    assert code == 0
    assert "6 rows · kept 3" in out
    assert "rejected: 2 (first: d.jsonl:2: not valid JSON at column 2: " in out
    assert re.search(r"dropped:  1 \(longer than max_length\)", out)
    rejected, dropped = listed("out/rejected.jsonl"), listed("out/dropped.jsonl")
    assert [(row["where"], row["raw"]) for row in rejected] == [
        ("d.jsonl:2", "{\\x1b"), ("d.jsonl:4", '{"x": 1}'),
    ]
    assert rejected[0]["reason"].startswith("not valid JSON at column 2")
    assert "is missing: needs a string; keys present: x" in rejected[1]["reason"]
    assert dropped == [{"where": "d.jsonl:6", "reason": "longer than max_length"}]
    assert 6 == 3 + len(rejected) + len(dropped)
    before = {path: path.read_bytes() for path in Path("out").glob("*.jsonl")}
    assert run([*argv, "--resume"])[0] == 0
    assert {path: path.read_bytes() for path in Path("out").glob("*.jsonl")} == before


def test_a_run_without_such_rows_lists_nothing(run):
    assert run(words("sft"))[0] == 0
    assert not list(Path("out").glob("[rd]*.jsonl"))


def test_held_out_rows_are_listed_too(run):
    held_out = write("e.jsonl", json_lines(TEXT) + "{\n")
    assert run(words("sft", data=dirty(TEXT), eval_data=held_out, max_length=40, **SKIP))[0] == 0
    assert [row["where"] for row in listed("out/rejected.jsonl")] == [
        "d.jsonl:2", "d.jsonl:4", "e.jsonl:2",
    ]


def test_a_start_cut_short_before_its_lists_is_made_good_by_resume(run, monkeypatch):
    argv = words("sft", data=dirty(TEXT), max_length=40, **SKIP)
    replace = atomic.replace_file

    def dies(temporary: Path, final: Path) -> None:
        if final.name == "rejected.jsonl":
            raise KeyboardInterrupt
        replace(temporary, final)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "replace_file", dies)
        assert run(argv)[0] == 130
    assert not Path("out/rejected.jsonl").exists()
    assert Path("out/.tmp-rejected.jsonl").exists()
    assert run([*argv, "--resume"])[0] == 0
    assert len(listed("out/rejected.jsonl")) == 2 and len(listed("out/dropped.jsonl")) == 1
    assert not list(Path("out").glob(".tmp-*"))


def test_a_tokenizer_is_trained_on_the_rows_that_are_left(run):
    data = write("d.jsonl", json_lines(TEXT) + "{\n" + json_lines({"text": 3}, {"text": "b"}))
    assert list(raw_texts(data, RowPolicy(bad_rows="skip"))) == [TEXT["text"], "b"]


def test_a_pair_of_nothing_but_eos_is_a_malformed_row(run, monkeypatch):
    # A model that is read before eos loses it: of a whole text [0] nothing is left then.
    shutil.copytree("lm", "early")
    values = json.loads(Path("early/config.json").read_text("utf-8"))
    Path("early/config.json").write_text(json.dumps(values | {"read_before_eos": True}))
    rows = [{"chosen_ids": [1, 0], "rejected_ids": [2]}, {"chosen_ids": [0], "rejected_ids": [3]}]
    argv = words("reward", model="early", data=write("d.jsonl", json_lines(*rows)))
    code, _, err = run(argv)
    told = f"error: d.jsonl:2: a text of nothing but eos: remove the row; {WAY_OUT}\n"
    assert (code, err) == (2, told)
    assert run([*argv, "--bad-rows", "skip"])[0] == 0
    assert [row["where"] for row in listed("out/rejected.jsonl")] == ["d.jsonl:2"]


@pytest.mark.parametrize("verb", RECIPES)
def test_fix_text_lets_a_run_begin(verb, run):
    good = RECIPES[verb]
    column = list(good)[-1]
    half = json.dumps(good | {column: good[column] + "@"}).replace("@", "\\ud83d")
    argv = words(verb, data=write("d.jsonl", json_lines(good) + half + "\n"))
    code, _, err = run(argv)
    what = "half of a surrogate pair (\\ud83d) in a string"
    assert (code, err) == (2, f"error: d.jsonl:2: {what}: --fix-text mends it; {WAY_OUT}\n")
    code, out, _ = run([*argv, "--fix-text"])
    assert code == 0 and "note:     1 halves of surrogate pairs became U+FFFD" in out


def test_a_reward_model_learns_from_an_empty_prompt_where_that_is_allowed(run):
    argv = words("reward", data=write("d.jsonl", json_lines(PAIR, PAIR | {"prompt": ""})))
    code, _, err = run(argv)
    assert code == 2 and err.startswith("error: d.jsonl:2: prompt is empty: remove the row")
    assert run([*argv, "--allow-empty-prompt"])[0] == 0


def test_a_run_goes_on_with_changed_data_where_that_is_allowed(run):
    data = dirty(TEXT)
    argv = words("sft", data=data, max_length=40, steps=2, **SKIP)
    assert run(argv)[0] == 0 and len(listed("out/rejected.jsonl")) == 2
    left = {path.name: path.read_bytes() for path in Path("out").glob("*.jsonl")}
    write(data, json_lines(TEXT, TEXT))
    code, _, err = run([*argv, "--resume"])
    told = "error: d.jsonl: has changed since the run began: give another --out, or --allow-data-ch"
    assert code == 2 and err.startswith(told)
    assert {path.name: path.read_bytes() for path in Path("out").glob("*.jsonl")} == left
    code, out, _ = run([*argv, "--resume", "--allow-data-change"])
    assert code == 0
    assert re.search("^changed: d.jsonl: sha256 was [0-9a-f]{12}, is [0-9a-f]{12}$", out, re.M)
    # the lists are of the data as it is now
    assert listed("out/rejected.jsonl") == listed("out/dropped.jsonl") == []
    assert run([*argv, "--resume"])[0] == 0


# ---- refusals ------------------------------------------------------------------------------------

REFUSED = [  # verb, rows, flags, what is told
    ("sft", [TEXT, "{", TEXT], {"max_drop": 0.3, **SKIP},
     "d.jsonl: 1 of 3 rows are left out, max_drop is 0.3: rejected: 1 (first: d.jsonl:2: not "),
    ("reward", [PAIR, PAIR | {"rejected": PAIR["chosen"]}], {"max_drop": 0.4},
     "d.jsonl: 1 of 2 rows are left out, max_drop is 0.4: dropped: 1 (chosen equals rejected); "
     "mend the rows, or raise max_drop"),
    ("ppo", [PROMPT, {"prompt": "a" * 45}], {"max_drop": 0, "overlong": "drop"},
     "d.jsonl: 1 of 2 rows are left out, max_drop is 0: dropped: 1 (longer than max_length)"),
    ("ppo", ["{", {"x": 1}], SKIP,
     "d.jsonl: no row left of 2: rejected: 2 (first: d.jsonl:1: not valid JSON"),
    ("new", ["{", {"x": 1}], SKIP, "d.jsonl: no row left of 2: rejected: 2 (first: d.jsonl:1: not"),
    ("ppo", [PROMPT, {"prompt": ""}], {"allow_empty_prompt": ()},
     "d.jsonl:2: a text without any token: the tokenizer puts no beginning-of-text there: remove"),
    ("sample", [PROMPT, "{"], {"max_drop": 0.3, **SKIP},
     "d.jsonl: 1 of 2 rows are left out, max_drop is 0.3: rejected: 1 (first: d.jsonl:2: not "),
    ("score", ["{", {"x": 1}], SKIP,
     "d.jsonl: no row left of 2: rejected: 2 (first: d.jsonl:1: not valid JSON"),
]


@pytest.mark.parametrize(("verb", "rows", "flags", "told"), named(REFUSED))
def test_too_little_left_or_a_bad_flag_is_refused(verb, rows, flags, told, refused):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    assert refused(words(verb, data=write("d.jsonl", text), **flags)).startswith(told)


# ---- check ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [["--model", "lm"], []])
def test_check_shows_rejected_rows_and_writes_nothing(model, run):
    lines = ["{\x1b"] * 21 + ['{"x": 1}'] * 4
    data = write("d.jsonl", json_lines(TEXT) + "".join(f"{line}\n" for line in lines))
    before = sorted(Path().iterdir())
    code, out, err = run(["check", data, *model, "--recipe", "sft", "--bad-rows", "skip"])
    assert (code, err) == (0, "") and sorted(Path().iterdir()) == before
    shown = out.splitlines()
    at = shown.index("  rejected rows")
    assert shown[at + 1].startswith("  d.jsonl:2: not valid JSON at column 2: ")
    assert shown[at + 1].endswith(": {\\x1b")
    assert shown[at + 20].startswith("  d.jsonl:21: ") and shown[at + 21] == "  and 5 more"
    assert shown[-1] == "ok: 1 of 26 rows can be used"


def test_check_lists_all_rows_that_are_left_out_as_json(run):
    data = dirty(PAIR)
    argv = ["check", data, "--model", "lm", "--bad-rows", "skip", "--max-length", "40",
            "--json", "facts.json"]
    assert run(argv)[0] == 0
    (facts,) = json.loads(Path("facts.json").read_text("utf-8"))["files"]
    assert [row["where"] for row in facts["rejected_rows"]] == ["d.jsonl:2", "d.jsonl:4"]
    assert [row["where"] for row in facts["dropped_rows"]] == ["d.jsonl:6"]
    assert facts["rows"] == facts["kept"] + 2 + 1 == 6


@pytest.mark.parametrize("model", [["--model", "lm"], []])
def test_check_refuses_what_a_recipe_with_this_max_drop_would(model, run):
    data = write("d.jsonl", json_lines(PAIR, {"x": 1}, {"x": 2}, PAIR))
    argv = ["check", data, *model, "--bad-rows", "skip", "--max-drop", "0.4"]
    code, out, err = run(argv)
    assert code == 2 and err.startswith("error: d.jsonl: 2 of 4 rows are left out, max_drop is 0.4")
    assert "rejected: 2 (first: d.jsonl:2: " in out  # the facts come first
    assert run([*argv[:-1], "0.5"])[0] == 0


def test_check_finds_the_recipe_behind_malformed_rows(run):
    data = write("d.jsonl", "{\n" + json_lines({"x": 1}, PAIR, PAIR))
    code, out, _ = run(["check", data, "--bad-rows", "skip"])
    assert code == 0 and "  for:      reward" in out
    code, _, err = run(["check", write("e.jsonl", '{\n{"x": 1}\n'), "--bad-rows", "skip"])
    assert code == 2
    assert err.startswith("error: e.jsonl: no row left of 2: rejected: 2 (first: e.jsonl:1: not va")


@pytest.mark.parametrize(
    ("rows", "model"),
    [
        ([{"prompt": ""}], []),
        ([PAIR | {"prompt": ""}], []),
        ([PAIR | {"prompt": ""}], ["--model", "lm"]),
        ([{"prompt_ids": [], "chosen_ids": [5], "rejected_ids": [6]}], []),
        ([{"prompt": "", "completion": "a"}], ["--model", "lm"]),
    ],
)
def test_check_reads_empty_prompts_where_they_are_allowed(rows, model, run):
    argv = ["check", write("d.jsonl", json_lines(*rows)), *model]
    code, _, err = run(argv)
    assert code == 2 and re.search(r"d\.jsonl:1: prompt(_ids)? is empty", err)
    code, out, err = run([*argv, "--allow-empty-prompt"])
    assert (code, err) == (0, "") and "ok: 1 of 1 rows can be used" in out


def test_check_reads_what_sample_wrote(run):
    row = {"prompt": "a", "response": "", "finish_reason": "eos", "tokens": 1}
    argv = ["check", write("s.jsonl", json_lines(row, row | {"response": "b"}))]
    for more in ([], ["--model", "lm"]):
        code, out, err = run([*argv, *more])
        assert (code, err) == (0, "") and "ok: 2 of 2 rows can be used" in out


def test_check_tells_without_a_model_what_is_odd_about_rows(run):
    rows = [
        PAIR | {"margin": 1.0, "chosen_probability": 0.25},
        PAIR | {"prompt": "\ud83d", "chosen_probability": 0.5},
    ]
    argv = ["check", write("d.jsonl", json_lines(*rows)), "--fix-text"]
    for model in ([], ["--model", "lm"]):
        code, out, err = run([*argv, *model])
        assert code == 0, err
        for told in (
            "1 halves of surrogate pairs became U+FFFD",
            "margin missing in 1 rows: they count as 0",
            "chosen_probability below 1/2 in 1 rows: rejected leads",
            "rejected, margin, chosen_probability)",
        ):
            assert told in out, told
