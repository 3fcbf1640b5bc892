"""`minirlhf report`: a page of runs in any state, self-contained, hostile text shown as text."""

import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from minirlhf import cli
from minirlhf.errors import BAD_INPUT, OK
from minirlhf.evaluation.alarms import DPO_RULES, RULES
from minirlhf.evaluation.report import page as page_module
from minirlhf.evaluation.report import texts
from minirlhf.evaluation.report.curves import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    picture,
    thinned,
)
from minirlhf.evaluation.report.markup import shown
from minirlhf.evaluation.report.page import FILE, page
from minirlhf.evaluation.report.record import Series, read_run
from minirlhf.run.language import translations
from tests.kill_harness import command, make_world

NAN = float("nan")


def write_run(folder: Path, recipe: str = "ppo", lines=(), samples=(), **settings: object) -> Path:
    """A run's folder with these rows, or texts of lines, in its logs."""
    folder.mkdir(parents=True)
    settings = {"model": "lm", "learning_rate": 1e-5, "out": str(folder), **settings}
    facts = {"recipe": recipe, "settings": settings, "command": f"minirlhf {recipe} --out x"}
    (folder / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    for name, rows in (("metrics.jsonl", lines), ("samples.jsonl", samples)):
        texts = (row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
        (folder / name).write_text("".join(texts), encoding="utf-8")
    return folder


def kl_lines(*values: float) -> list[dict]:
    return [{"step": k, "objective/kl": value} for k, value in enumerate(values, 1)]


class Page(HTMLParser):
    """What a browser would see: tags that are all closed, their attributes, and the text."""

    VOID = ("meta", "br")

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data


def read(*folders: Path, language: str = "en") -> Page:
    return Page(page([read_run(folder) for folder in folders], language))


# ---- the page ------------------------------------------------------------------------------------


def test_page_asks_for_nothing_and_runs_nothing(tmp_path):
    html = page([read_run(write_run(tmp_path / "r", lines=kl_lines(1.0, 2.0)))])
    seen = Page(html)
    assert html.startswith("<!doctype html>") and ("meta", "charset", "utf-8") in seen.attributes
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert ("meta", "content", policy) in seen.attributes
    assert ("html", "lang", "en") in seen.attributes
    known = {"html", "head", "meta", "title", "style", "body", "header", "main", "footer",
             "section", "h1", "h2", "h3", "p", "b", "div", "span", "dl", "dt", "dd", "ul", "li",
             "figure", "figcaption", "svg", "path", "text", "polyline", "details", "summary",
             "table", "thead", "tbody", "tr", "th", "td", "pre", "code", "br"}
    assert set(seen.tags) <= known
    names = {name for _, name, _ in seen.attributes}
    assert not names & {"href", "src", "srcset", "action", "background"}
    assert not [name for name in names if name.startswith("on")]
    assert "url(" not in html and "@import" not in html and "http" not in html.replace(
        "http-equiv", "")


def test_a_curve_has_its_unit_its_last_value_and_its_meaning(tmp_path):
    text = read(write_run(tmp_path / "r", lines=kl_lines(1.0, 2.5))).text
    assert "objective/kl2.5nats a response" in text
    assert ("Sum over tokens, mean over rows over responses: log-ratio of policy to reference "
            "(k1): unbiased, a batch may be below 0.") in text
    assert "The glossary does not know" not in text


def test_a_command_writes_the_page_into_the_run_and_again(tmp_path, capsys):
    run = write_run(tmp_path / "r", lines=kl_lines(1.0))
    for _ in range(2):
        assert cli.main(["report", str(run)]) == OK
        assert capsys.readouterr().out == f"report in {run / FILE}\n"
    assert Page((run / FILE).read_text("utf-8")).tags.count("polyline") == 1
    assert sorted(p.name for p in run.iterdir()) == [
        "metrics.jsonl", FILE, "run.json", "samples.jsonl"]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("nowhere", "nowhere: no such folder: give what --out named"),
        (".", ".: is not the folder of a run: no run.json: give what --out named"),
        ("a a --out x.html", "a: stands twice: give each run once"),
        ("a b", "--out: of several runs, name the file"),
        ("a --out no/x.html", "--out: no is no folder"),
        ("a --out notes.md", "notes.md: is there already, and is no report: give another --out"),
        ("a --png b", "--png: b is there already: give another"),
        ("broken", "broken/run.json: is not what a run has written: give what --out named"),
        ("a --lang fr", "--lang: got 'fr', must be one of en, zh"),
    ],
)
def test_command_refuses(words, error, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write_run(Path(name))
    write_run(Path("broken"), recipe="dance")
    Path("notes.md").write_text("mine", encoding="utf-8")
    assert cli.main(["report", *words.split()]) == BAD_INPUT
    assert capsys.readouterr().err == f"error: {error}\n"
    assert Path("notes.md").read_text("utf-8") == "mine"


@pytest.mark.parametrize("facts", ["[]", '{"recipe": {}}', '{"recipe": "ppo"}', "half {", '"ppo"'])
def test_what_no_run_has_written_is_refused(facts, tmp_path, capsys):
    (tmp_path / "run.json").write_text(facts, encoding="utf-8")
    assert cli.main(["report", str(tmp_path)]) == BAD_INPUT
    assert "is not what a run has written" in capsys.readouterr().err


def test_nine_runs_are_too_many_colours(tmp_path, capsys):
    folders = [str(write_run(tmp_path / str(k))) for k in range(9)]
    assert cli.main(["report", *folders, "--out", str(tmp_path / "x.html")]) == BAD_INPUT
    assert capsys.readouterr().err == "error: report: 9 runs: give at most 8: one colour each\n"


def test_the_page_says_how_to_repeat_a_run(tmp_path):
    run = write_run(tmp_path / "my run")
    text = read(run).text
    assert f"To repeat it with the same settingsminirlhf rerun '{run}'" in text
    assert "It was started byminirlhf ppo --out x" in text


# ---- curves --------------------------------------------------------------------------------------


def points(drawn: str) -> list[list[tuple[float, ...]]]:
    lines = ET.fromstring(drawn).iter("polyline")
    return [[tuple(map(float, p.split(","))) for p in line.get("points").split()] for line in lines]


def test_polyline_of_three_points_by_hand():
    # Steps 0, 5, 10 on an axis from 0 to 10 (48 to 348), values 0, 1, 2 on one from 0 to 2, which
    # the picture has upside down (146 to 10): the middle is (198, 78).
    assert (LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM) == (48, 348, 10, 146)
    assert points(picture([Series([0, 5, 10], [0, 1, 2])])) == [[(48, 146), (198, 78), (348, 10)]]


def test_gaps_are_left_open_and_counted(tmp_path):
    lines = [*kl_lines(1.0, 2.0), '{"step": 3, "objective/kl": NaN}\n',
             '{"step": 4, "objective/kl": 1e999}\n']
    lines += [{"step": 5, "objective/kl": 2.0}, {"step": 6, "objective/kl": None}]
    run = read_run(write_run(tmp_path / "r", lines=lines))
    series = run.series["objective/kl"]
    assert series.gaps == 2 and series.last == 2.0 and run.step == 6 and run.broken == 0
    assert thinned(series) == [[(1, 1), (2, 2)], [(5, 2)]]
    first, alone = points(picture([series]))
    assert len(first) == 2 and alone[0] == alone[1]  # a dot
    assert "2 values are not finite: gaps in the curve." in Page(page([run])).text


def test_a_metric_without_a_finite_value_is_told_not_drawn(tmp_path):
    seen = read(write_run(tmp_path / "r", lines=['{"step": 1, "objective/kl": NaN}\n']))
    assert "No value is finite." in seen.text and "polyline" not in seen.tags


def test_thinning_keeps_the_lowest_and_highest_of_each_bucket():
    # 9 values, 4 buckets: 3 a bucket. (5 3 4) (1 1 1) (0 9 2) keep 5 3, 1, 0 9.
    series = Series(list(range(9)), [5, 3, 4, 1, 1, 1, 0, 9, 2])
    assert thinned(series, 4) == [[(0, 5), (1, 3), (3, 1), (5, 1), (6, 0), (7, 9)]]
    series.values[4] = NAN  # ends its bucket's piece
    assert thinned(series, 4) == [[(0, 5), (1, 3), (3, 1), (5, 1)], [(6, 0), (7, 9)]]
    assert len(thinned(Series(list(range(8)), [0.0] * 8), 4)[0]) == 8  # two a bucket: all


@pytest.mark.parametrize("values", [[0.0], [5e-324, 1e-310], [1e299, -1e299], [1.0, 1 + 2e-16],
                                    [1e15, 1e15 + 1], [-3.0, -3.0]])
def test_axes_have_room_for_any_numbers(values):
    drawn = points(picture([Series(list(range(len(values))), values)]))
    assert all(LEFT <= x <= WIDTH - RIGHT and TOP <= y <= HEIGHT - BOTTOM
               for line in drawn for x, y in line)


def test_a_long_log_stays_small_and_keeps_its_spike(tmp_path):
    run = write_run(tmp_path / "r")
    names = [f"objective/{letter}{k}" for letter in "abc" for k in range(4)]
    with (run / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(1, 6001):
            row = {name: step * 0.123456789 % 7 for name in names} | {"objective/kl": step % 7}
            file.write(json.dumps({"step": step} | row) + "\n")
        file.write(json.dumps({"step": 6001, "objective/kl": 100.0}) + "\n")
    html = page([read_run(run)])
    assert len(html) < 400_000
    assert f",{TOP}.0" in html  # the spike is at the top of its axis
    assert "Of 6,001 values, the lowest and the highest of each of 300 stretches are" in html


# ---- runs in any state ---------------------------------------------------------------------------


def test_runs_in_any_state_have_a_page(tmp_path):
    empty = write_run(tmp_path / "empty")
    assert "no step is logged yet" in read(empty).text
    assert "There is nothing to draw yet." in read(empty).text
    killed = write_run(tmp_path / "killed", lines=[*kl_lines(1.0, 2.0), '{"step": 3, "objec'])
    text = read(killed).text
    assert "not finished: step 2 is the last one that is logged" in text
    assert "1 lines of the logs could not be read" in text
    (killed / "metrics.jsonl").write_bytes(b"\xff\xfe\n[1]\n{}\n" + b'{"step": 1, "loss": "x"}\n')
    assert read_run(killed).broken == 3
    for name in ("metrics.jsonl", "samples.jsonl"):
        (killed / name).unlink()
    (killed / "model").mkdir()
    assert "finished, and no step is logged" in read(killed).text
    longer = write_run(tmp_path / "longer", lines=kl_lines(1.0, 2.0), steps=3)  # than before
    (longer / "model").mkdir()
    assert "not finished: step 2 is" in read(longer).text
    copied = write_run(tmp_path / "copied", lines=kl_lines(1.0, 2.0), steps=2)
    assert "step 2 is logged, its last one, and no model is there" in read(copied).text


def test_alarms_are_told_with_their_numbers_from_the_newest_checkpoint(tmp_path):
    run = write_run(tmp_path / "r", lines=kl_lines(1.0))
    for step, health in ((3, {}), (20, {
        "policy/clipfrac_avg": [0.4], "told clipped_policy": [7, 0.4, 5],
        "health/eos_rate": [0.1], "told endless_responses": [2],  # of an older version
    })):
        commit = run / "checkpoints" / f"step-{step:08}"
        commit.mkdir(parents=True)
        state = {"step": step, "health": health}
        (commit / "state.json").write_text(json.dumps(state), encoding="utf-8")
    text = read(run).text
    first, second = text.index("endless_responses, step 2"), text.index("clipped_policy, step 7")
    assert first < second
    assert "policy/clipfrac_avg is 0.40 on average over 5 steps: updates run into the clip" in text
    (commit / "state.json").write_text('{"step": 20, "health": {"told x": "y"}}', encoding="utf-8")
    assert "Unknown: there is no checkpoint" in read(run).text
    (commit / "state.json").write_text('{"step": 20, "health": {}}', encoding="utf-8")
    assert "None up to step 20." in read(run).text


def test_a_run_without_checkpoints_tells_the_alarms_of_its_log(tmp_path):
    clip = [{"step": k, "policy/clipfrac_avg": 0.4} for k in range(1, 7)]
    evaluation = {"step": 0, "eval/eos_rate": 1.0}  # before any training
    text = read(write_run(tmp_path / "each", lines=[evaluation, *clip])).text
    assert "clipped_policy, step 5" in text and "0.40 on average over 5 steps" in text
    few = write_run(tmp_path / "few", lines=clip[1::2])  # each line the mean of two steps
    assert "Unknown: there is no checkpoint" in read(few).text
    far = write_run(tmp_path / "far", lines=[*clip, {"step": 10**18, "policy/clipfrac_avg": 0.4}])
    assert "Unknown: there is no checkpoint" in read(far).text
    well = write_run(tmp_path / "well", lines=clip[:4])
    assert "None up to step 4." in read(well).text


def test_several_runs_share_their_axes_and_tell_what_differs(tmp_path):
    a = write_run(tmp_path / "a", lines=kl_lines(1.0, 2.0), seed=0, kl_coef=0.1, ref=None)
    b = write_run(tmp_path / "b", lines=kl_lines(3.0), seed=1, kl_coef=0.1, ref=None)
    c = write_run(tmp_path / "c", "grpo", lines=[{"step": 1, "reward": 1.0}], seed=1, resample=2)
    seen = read(a, b)
    differ = seen.text.partition("What differs")[2].partition("Warnings")[0]
    assert differ == "abseed01"  # a table of one row: neither kl_coef nor out
    lines = [v for tag, name, v in seen.attributes if tag == "polyline" and name == "class"]
    assert lines == ["run0", "run1 dot"]
    differ = read(a, c).text.partition("What differs")[2].partition("Warnings")[0]
    assert differ == "acseed01Settings of some of the recipes (3)ackl_coef0.1–refnone–resample–2"


# ---- texts ---------------------------------------------------------------------------------------

HOSTILE = ('</script><script>alert(1)</script><img src=x onerror=a()>"\']]>\x00\x1b[31m\u202e'
           "\ud800&amp;<!--")


def test_hostile_text_is_shown_as_text(tmp_path):
    row = {"step": 0, "kind": "sample", "prompt": HOSTILE, "response": HOSTILE, "score": 1.0,
           "finish_reason": HOSTILE}
    run = write_run(tmp_path / "r", lines=[{"step": 1, HOSTILE: 1.0}], samples=[row],
                    **{HOSTILE: HOSTILE})
    facts = json.loads((run / "run.json").read_text("utf-8"))
    facts |= {"command": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    (run / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    html = page([read_run(run, HOSTILE)])
    seen = Page(html)
    assert not {"script", "img"} & set(seen.tags) and html.encode()
    assert not [name for _, name, _ in seen.attributes if name.startswith("on")]
    spelled = HOSTILE.replace("\x00", "\\x00").replace("\x1b", "\\x1b").replace(
        "\u202e", "\\u202e").replace("\ud800", "\\ud800")
    assert seen.text.count(spelled) >= 4
    assert not set("\x00\x1b\u202e") & set(html)


def test_shown_keeps_letters_of_all_alphabets_and_counts_what_it_cuts():
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467"  # joined by zero-width joiners
    assert shown(f"奖励 {family}\n\t") == f"奖励 {family}\n\t"
    assert shown("a" * 5000, 100) == "a" * 100 + '<span class="cut">… (4,900 characters cut)</span>'


def test_texts_before_and_after_stand_by_their_prompt(tmp_path):
    chat = [{"role": "user", "content": "Hi"}]
    rows = [
        {"step": step, "kind": "sample", "prompt": prompt, "response": f"r{step}", "score": score}
        for step, score in ((0, -1.5), (10, 0.0), (20, 2.25)) for prompt in ("P", chat)
    ]
    text = read(write_run(tmp_path / "r", samples=rows)).text
    assert "Pstep 0 score -1.5r0step 20 score 2.25r20" in text and "r10" not in text
    assert "user: Histep 0 score -1.5r0step 20 score 2.25r20" in text


def test_pairs_of_the_last_evaluation_stand_side_by_side(tmp_path):
    rows = [{"step": step, "set": "eval_", "prompt": "P", "chosen": f"good{step}",
             "rejected": "bad", "chosen_score": 1.5, "rejected_score": -2.0} for step in (5, 9, 9)]
    card = {"sets": {"eval": {"accuracy": 0.75, "accuracy_95": [0.5, 0.875], "pairs": 12}}}
    run = write_run(tmp_path / "r", "reward", samples=rows)
    (run / "card.json").write_text(json.dumps(card), encoding="utf-8")
    text = read(run).text
    assert text.count("Pchosen score 1.5good9rejected score -2bad") == 2 and "good5" not in text
    assert "eval0.750.5 – 0.875–12––" in text


def test_only_the_ends_of_huge_samples_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("minirlhf.evaluation.report.record.PART", 500)
    rows = [{"step": k, "kind": "rollout", "prompt": "P", "response": "r" * 50, "score": k}
            for k in range(100)]
    run = read_run(write_run(tmp_path / "r", samples=rows))
    steps = [row["step"] for row in run.samples]
    size = (run.folder / "samples.jsonl").stat().st_size
    assert steps[0] == 0 and steps[-1] == 99 and len(steps) < 12 and run.broken == 0
    assert run.unread == size - 1000
    assert f"The middle of samples.jsonl, {size - 1000:,} bytes, was passed over." in page([run])


# ---- a real run ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A tiny run of PPO with its rollouts."""
    world, out = make_world(tmp_path_factory.mktemp("world")), tmp_path_factory.mktemp("o") / "run"
    words = command("ppo", world, out, sample_every=1, save_rollouts=True)
    assert cli.main(words) == OK
    (out / "words.json").write_text(json.dumps(words), encoding="utf-8")
    return out


def test_a_resumed_run_makes_its_report_again(real, tmp_path, capsys):
    copy = shutil.copytree(real, tmp_path / "run")
    shutil.rmtree(copy / "model")
    shutil.rmtree(copy / "checkpoints" / "step-00000003")
    (copy / FILE).write_text("old", encoding="utf-8")
    words = [str(copy) if word == str(real) else word
             for word in json.loads((real / "words.json").read_text("utf-8"))]
    assert cli.main([*words, "--resume"]) == OK
    assert f"report in {copy / FILE}" in capsys.readouterr().out
    assert "finished at step 3" in Page((copy / FILE).read_text("utf-8")).text


def test_a_run_ends_with_its_report(real):
    seen = Page((real / FILE).read_text("utf-8"))
    assert "finished at step 3" in seen.text and seen.tags.count("polyline") > 50
    assert seen.text.count("score") >= 8
    for name in ("objective/kl", "Responses", "Tokens", "advantage", "minirlhf"):
        assert name in seen.text


def test_heat_has_each_token_once_with_its_number(real):
    row = next(r for r in read_run(real).samples if r.get("kind") == "rollout" and r["step"] == 3)
    tokenizer = texts.tokenizer_of(read_run(real))
    row = row | {"advantages": [0.5 - k for k in range(len(row["response_ids"]))]}
    heats = [Page(f"<div>{html}</div>") for html in texts._heats(row, tokenizer, "en")]
    assert len(heats) == 4 and "KL" in heats[1].text
    titles = [v for _, name, v in heats[0].attributes if name == "title"]
    numbers = [float(number) for title in titles for number in title.split(", ")]
    assert numbers == row["advantages"]
    shades = [v for tag, name, v in heats[0].attributes
              if tag == "span" and name == "class" and v[0] in "pn"]
    assert shades[:2] == ["n8", "p8"]  # the legend
    largest = len(numbers) - 1.5
    assert shades[2] == f"p{round(8 * 0.5 / largest)}" or round(8 * 0.5 / largest) == 0


def test_rows_without_a_token_s_numbers_have_no_heat():
    row = {"response_ids": [1, 2], "advantages": [0.5], "rewards": [1.0, None],
           "old_logprobs": [-1.0, -2.0], "ref_logprobs": [-1.5, -2.5]}
    (kl,) = texts.quantities(row)
    assert kl.name == "KL" and kl.values == [0.5, 0.5]
    assert texts.quantities(row | {"response_ids": "x"}) == []
    assert list(texts._heats(row | {"prompt_ids": [-1]}, None, "en")) == []


def test_a_report_that_fails_is_a_warning_and_the_run_is_whole(monkeypatch):
    said = []

    class Done:
        folder, config = Path("nowhere"), type("Config", (), {"dry_run": False})

        display = type("Display", (), {"note": said.append})

        def write_file(self, name, text):
            raise AssertionError("there is nothing to write")

    page_module.write_report(Done())
    (line,) = said
    assert line.startswith("warning: report.html could not be written: UserError: nowhere: no such")


def test_png_has_a_file_a_metric(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    lines = [{"step": 1, "objective/kl": 1.0, "../$x": 2.0, "clock": {"elapsed": 1.0}}]
    run = write_run(tmp_path / "r", lines=lines)
    assert cli.main(["report", str(run), "--png", str(tmp_path / "png")]) == OK
    assert sorted(p.name for p in (tmp_path / "png").iterdir()) == [
        "elapsed.png", "objective_kl.png", "x.png"]
    assert capsys.readouterr().out.endswith(f"3 curves in {tmp_path / 'png'}\n")


def test_png_without_matplotlib_is_one_line(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "r")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["report", str(run), "--png", str(tmp_path / "png")]) == BAD_INPUT
    assert capsys.readouterr().err == (
        "error: --png: needs matplotlib: pip install 'minirlhf[plot]'\n")
    assert not (run / FILE).exists()


# ---- Chinese -------------------------------------------------------------------------------------


def test_each_sentence_of_alarms_is_translated():
    known = translations("zh")
    for rule in (*RULES, *DPO_RULES):
        assert rule.seen in known and rule.advice in known


def test_a_page_is_told_in_chinese_whole(real, tmp_path, monkeypatch):
    """The page asks the table for each sentence, and a missing one is a KeyError."""
    copy = shutil.copytree(real, tmp_path / "run")
    with (copy / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "objective/kl": NaN}\nhalf')
    other = write_run(tmp_path / "b", "reward", lines=[{"step": 1, "loss": NAN, "new": 1}])
    (other / "card.json").write_text('{"sets": {"eval": {"accuracy": 1}}}', encoding="utf-8")
    third = write_run(tmp_path / "c")
    seen = read(copy, other, third, language="zh")
    assert ("html", "lang", "zh-CN") in seen.attributes
    for word in ("优势", "曲线", "警报", "策略", "参考模型", "第 3 步", "奈特", "准确率"):
        assert word in seen.text


def test_every_sentence_that_the_page_tells_is_translated():
    """Also those that no test brings about: literals given to `tell`, read from the source."""
    import ast

    known, told = translations("zh"), set()
    folder = Path(page_module.__file__).parent
    for path in (*folder.glob("*.py"), *Path(cli.__file__).parent.glob("tools/*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            name = getattr(getattr(node, "func", None), "id", "")
            if isinstance(node, ast.Call) and name == "tell":
                told |= {n.value for n in ast.walk(node.args[0])
                         if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    assert len(told) > 20 and told <= set(known)
    assert set(texts.MEANINGS) | set(texts.MEANINGS.values()) | set(page_module.WORTH) <= set(known)
    states = ["finished, and no step is logged", "no step is logged yet",
              "finished at step {step:,}",
              "step {step:,} is logged, its last one, and no model is there",
              "not finished: step {step:,} is the last one that is logged"]
    assert set(states) <= set(known)


def test_help_of_report_does_not_wait_for_torch():
    code = "import sys, minirlhf.tools.report.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
