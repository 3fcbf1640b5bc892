"""What --reward may say: spellings, names in logs, what is looked for, and the files of code."""

import pytest

from minirlhf.errors import UserError
from minirlhf.rewards.load import load_reward, read_token
from minirlhf.rewards.parse import Spec, locate, parse_source, part_names
from minirlhf.rewards.source import Completions
from minirlhf.setup.ppo_settings import PPOConfig

BATCH = Completions(["p", "q"], [[1], [1]], ["ab", "c"], [[2, 3], [4]], ["eos", "eos"], {})

AS_RE = "write it as Python's re does, in quotes for the shell"


@pytest.mark.parametrize(
    ("source", "spec"),
    [
        ("runs/reward/model", Spec(1.0, "runs/reward/model", "model")),
        ("owner/name", Spec(1.0, "owner/name", "model")),
        ("0.5*folder", Spec(0.5, "folder", "model")),
        ("-2*my.py:score", Spec(-2.0, "my.py:score", "function")),
        ("1e-3*my.py", Spec(1e-3, "my.py", "function")),
        (".5*http://h:1/p?q=1", Spec(0.5, "http://h:1/p?q=1", "service")),
        ("https://h", Spec(1.0, "https://h", "service")),
        ("0*a*b", Spec(0.0, "a*b", "model")),
        ("math", Spec(1.0, "math", "rule")),
        ("0.5*exact", Spec(0.5, "exact", "rule")),
        ("format:^a*b$", Spec(1.0, "format:^a*b$", "rule")),  # the star is the pattern's
        ("2*format:a*b:c", Spec(2.0, "format:a*b:c", "rule")),
        ("format:http://.*", Spec(1.0, "format:http://.*", "rule")),
        ("-1*length:040", Spec(-1.0, "length:040", "rule")),
        ("./math", Spec(1.0, "./math", "model")),
        ("math:1", Spec(1.0, "math:1", "model")),
        ("exact.py:f", Spec(1.0, "exact.py:f", "function")),
    ],
)
def test_parse_source_takes_a_source_apart(source, spec):
    assert parse_source(source) == spec


def test_parse_source_leaves_the_name_of_a_folder_that_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a*b").mkdir()
    assert parse_source("a*b") == Spec(1.0, "a*b", "model")


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ("format", "says too little: give format:REGEX"),
        ("format:", "says too little: give format:REGEX"),
        ("2*length", "says too little: give length:N"),
        ("format:(a", f"no regex: missing ), unterminated subpattern at position 0: {AS_RE}"),
        ("format:a{9999999999}", f"no regex: the repetition number is too large: {AS_RE}"),
        ("length:0", "'0' is no length: give length:N"),
        ("length:4.5", "'4.5' is no length: give length:N"),
        ("length:-4", "'-4' is no length: give length:N"),
    ],
)
def test_parse_source_refuses_a_rule_that_lacks_what_it_needs(rule, told):
    with pytest.raises(UserError) as caught:
        parse_source(rule)
    assert str(caught.value) == f"--reward {rule.removeprefix('2*')}: {told}"


@pytest.mark.parametrize("weight", ["", "x", "nan", "inf", "1e999", "0x1", "1_0", " 1", "1.5.5"])
def test_parse_source_refuses_a_weight_that_is_no_number(weight):
    with pytest.raises(UserError, match=r"the weight is .*: a finite number before the"):
        parse_source(f"{weight}*folder")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("ftp://h/p", "ftp:// is no scheme of a service: http://host:port/path, or https"),
        ("file:///etc/passwd", "file:// is no scheme of a service"),
        ("://h", ":// is no scheme"),
        ("http:///p", "names no host"),
        ("http://h:99999/p", "no URL: Port out of range"),
        ("http://h:x/p", "no URL: Port could not be cast"),
        ("http://rm..local/p", "no URL: "),
        (f"http://{64 * 'a'}/p", "no URL: "),
        ("http://h:0/p", "port 0"),
        ("http://[::1/p", "no URL: Invalid IPv6 URL"),
        ("http://me:secret@h/p", "a name or password inside"),
        ("http://h/p#part", "a fragment"),
        ("http://h/a b", "a character that no URL has"),
        ("http://h/ä", "a character that no URL has"),
    ],
)
def test_parse_source_refuses_a_url_of_no_service(url, told):
    with pytest.raises(UserError) as caught:
        parse_source(url)
    assert told in str(caught.value) and caught.value.where.startswith("--reward ")


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["runs/a/model"], ["a"]),  # every run calls it model
        (["runs/a", "f.py:score", "http://host:1/p"], ["a", "score", "host"]),
        (["x/a/model", "y/a/model", "b"], ["x/a", "y/a", "b"]),
        (["f.py:score", "g.py:score"], ["f.score", "g.score"]),
        (["d/f.py:s", "e/f.py:s"], ["d/f.py:s", "e/f.py:s"]),
        (["http://h:1/p", "http://h:2/p"], ["h:1", "h:2"]),
        (["http://h:1/p", "http://h:1/q", "a"], ["h:1/p", "h:1/q", "a"]),
        (["http://h/s?m=a", "http://h/s?m=b"], ["http://h/s?m=a", "http://h/s?m=b"]),
        (["math", "2*format:a"], ["math", "format"]),
        (["format:a", "format:b", "length:3"], ["format:a", "format:b", "length"]),
    ],
)
def test_part_names_are_as_short_as_they_stay_apart(sources, names):
    assert part_names([parse_source(source) for source in sources]) == names


@pytest.mark.parametrize(
    "sources",
    [("f.py:s", "0.5*f.py:s"), [f"{'x' * 120}/{name}" for name in ("a/b", "c/a/b", "d/a/b")]],
)
def test_part_names_refuses_the_same_source_twice_and_what_its_length_makes_equal(sources):
    with pytest.raises(UserError, match=r"--reward: .* stands twice: give each source once"):
        part_names([parse_source(source) for source in sources])


def test_locate_finds_files_and_folders(tmp_path):
    (tmp_path / "f.py").write_text("")
    assert locate(parse_source(f"2*{tmp_path}/f.py:g")) == tmp_path / "f.py"
    assert locate(parse_source(str(tmp_path))) == tmp_path
    assert locate(parse_source("http://h/p")) is None
    assert locate(parse_source("math")) is None


def test_two_files_of_the_same_name_and_two_functions_are_summed(tmp_path):
    code = """
from __future__ import annotations
from dataclasses import dataclass
@dataclass
class Length:
    text: str
def length(completions):
    return [float(len(Length(c).text)) for c in completions]
def one(completions):
    return [1.0 for _ in completions]
"""
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "f.py").write_text(code)
    a, b = (f"{tmp_path}/{name}/f.py" for name in "ab")
    config = PPOConfig(reward=(f"{a}:length", f"10*{a}:one", f"-0.5*{b}:length"))
    scores = load_reward(config, None, None, 64)(BATCH)
    assert scores.total.tolist() == [11.0, 10.5]  # 2 + 10 - 1; 1 + 10 - 0.5
    assert list(scores.parts) == [f"{a}:length", "one", f"{b}:length"]


def test_read_token_wants_one_visible_line(tmp_path):
    path = tmp_path / "token"
    path.write_text("abc.DEF-123\n")
    assert read_token(path) == "abc.DEF-123"
    for text in ("", "\n", "two words", "a\nb", "tökén", "a\x00"):
        path.write_text(text)
        with pytest.raises(UserError, match="holds no token: one line of visible ASCII"):
            read_token(path)
