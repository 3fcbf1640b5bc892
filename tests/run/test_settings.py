"""Settings: flags, files, types, ranges, and that a fault is told by its place and its remedy."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest

from minirlhf.errors import BAD_INPUT, UserError
from minirlhf.run.flags import parse
from minirlhf.run.settings import as_dict, nearest, override, setting, settings_of, validate


@dataclass
class Config:
    """Tries settings."""

    model: str = setting(help="folder of the policy", metavar="FOLDER")
    steps: int = setting(10, "optimizer steps, 100% of them", at_least=1)
    learning_rate: float = setting(1e-3, "step size", above=0, at_most=1)
    clip: float | None = setting(0.2, "clip range, or none", above=0, below=1)
    offset: float = setting(0.0, "added to every score")
    seed: int | None = None
    note: str | None = setting(None, "a line for the log")
    dtype: str = setting("auto", "kind of number", choices=("auto", "float32"))
    whiten: bool = setting(True, "whiten the advantages")
    eval_data: tuple[str, ...] = setting((), "held-out files", metavar="FILE")

    def check(self) -> list[str]:
        return [f"steps {self.steps} is 13: choose another"] if self.steps == 13 else []


def read(*argv: str, config_class: type = Config):
    return parse(config_class, list(argv), "minirlhf try")


# What is refused on the command line and in files: tests/test_bad_settings.py, by whole commands.
def refused(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        read(*argv)
    assert caught.value.code == BAD_INPUT
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a file in an empty working folder, so that messages hold its bare name."""
    monkeypatch.chdir(tmp_path)

    def write_(name: str, text: str | bytes) -> str:
        (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
        return name

    return write_


# ---- flags ---------------------------------------------------------------------------------------


def test_parse_gives_defaults_for_what_is_not_given():
    assert read("--model", "m") == Config(model="m")


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--steps", "7"], "steps", 7),
        (["--steps=+1_000"], "steps", 1000),
        (["--steps", "1"], "steps", 1),
        (["--seed", "-3"], "seed", -3),
        (["--seed", "9223372036854775807"], "seed", 2**63 - 1),
        (["--seed", "none"], "seed", None),
        (["--learning-rate", "1e-5"], "learning_rate", 1e-5),
        (["--learning_rate", "1e-5"], "learning_rate", 1e-5),
        (["--learning_rate=1"], "learning_rate", 1.0),
        (["--clip", "None"], "clip", None),
        (["--clip", "5E-1"], "clip", 0.5),
        (["--note", "a b=c --d_e"], "note", "a b=c --d_e"),
        (["--note=--d_e=f"], "note", "--d_e=f"),
        (["--note", "- a"], "note", "- a"),
        (["--note="], "note", ""),
        (["--dtype", "float32"], "dtype", "float32"),
        (["--whiten"], "whiten", True),
        (["--no-whiten"], "whiten", False),
        (["--no_whiten"], "whiten", False),
        (["--eval-data", "a", "b", "--eval_data=c"], "eval_data", ("a", "b", "c")),
        (["--eval-data", "-"], "eval_data", ("-",)),
    ],
)
def test_parse_reads_a_flag(words, name, value):
    got = getattr(read("--model", "m", *words), name)
    assert got == value
    assert type(got) is type(value)


def test_parse_without_argv_reads_the_process_command_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["minirlhf", "--model", "m", "--steps", "2"])
    assert parse(Config, None, "minirlhf try") == Config(model="m", steps=2)


def test_parse_tells_all_problems_in_one_line(write):
    file = write("c.json", '{"steps": 0, "wihten": true}')
    assert refused("--config", file, "--clip", "2") == (
        "c.json: wihten: unknown setting: the nearest is whiten; "
        "--model: required, but not given; "
        "c.json: steps: got 0, must be a whole number >= 1; "
        "--clip: got 2.0, must be a finite number > 0 and < 1 or none"
    )


def test_parse_caps_the_problems_at_twenty():
    message = refused(*(f"--x{i}" for i in range(23)))
    assert message.count("unknown flag") == 20
    assert message.endswith("; and 3 more")


def test_help_shows_settings_in_order_with_range_and_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as left:
        read("--help")
    assert left.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    facts = [
        "usage: minirlhf try --model FOLDER [settings] Tries settings.",
        "--config FILE settings from a .toml, .json or .yaml file, or a run's run.json; flags beat",
        "--model FOLDER folder of the policy [required]",
        "--steps INT optimizer steps, 100% of them [>= 1; default: 10]",
        "--learning-rate FLOAT step size [> 0 and <= 1; default: 0.001]",
        "--clip FLOAT clip range, or none [> 0 and < 1; default: 0.2]",
        "--seed INT [default: none]",
        "--dtype {auto,float32} kind of number [default: auto]",
        "--whiten, --no-whiten whiten the advantages [default: on]",
        "--eval-data FILE [FILE ...] held-out files [default: none]",
    ]
    places = [shown.index(fact) for fact in facts]
    assert places == sorted(places)


@dataclass(frozen=True)
class Sizes:
    """Sizes: how much at once."""

    rows: int = setting(4, "rows at once", at_least=1)
    note: str | None = setting(None, "a line", choices=("a", "b"))

    def check(self) -> list[str]:
        return ["rows 13: choose another"] if self.rows == 13 else []


@dataclass(frozen=True)
class Steps:
    """Steps. How many."""

    steps: int | None = setting(None, "steps of the run", at_least=1, resume="free")


@dataclass(frozen=True)
class Grouped(Sizes, Steps):
    """Tries groups."""

    SHOWN_FIRST: ClassVar = ("rows", "name")

    name: str = setting("x", "its name")
    steps: int = override(7, at_least=3)
    rows: int = override(help="rows of a step")


def test_override_changes_what_it_names_and_leaves_the_rest():
    found = settings_of(Grouped)
    assert list(found) == ["rows", "note", "steps", "name"]  # as the bases stand, its own last
    rows, steps = found["rows"], found["steps"]
    assert (rows.default, rows.help, rows.limits) == (4, "rows of a step", {">=": 1})
    assert (steps.default, steps.help, steps.limits) == (7, "steps of the run", {">=": 3})
    assert (steps.optional, steps.resume, rows.resume) == (False, "free", "ask")
    assert [item.group for item in found.values()] == ["Sizes", "Sizes", "Steps", ""]
    assert settings_of(Steps)["steps"].default is None
    assert Grouped(rows=5) == Grouped(rows=5, steps=7, name="x", note=None)


def test_override_of_nothing_is_a_mistake():
    with pytest.raises((TypeError, RuntimeError), match=r"inherits no setting|__set_name__"):

        @dataclass(frozen=True)
        class Lonely(Steps):
            stpes: int = override(3)


def test_setting_knows_four_rules_of_resuming():
    with pytest.raises(ValueError, match="resume is 'never': one of free, ask, start, fixed"):
        setting(1, resume="never")


def test_a_group_checks_itself_in_every_config_that_has_it():
    with pytest.raises(UserError, match=r"^rows 13: choose another$"):
        validate(Grouped(rows=13))


@pytest.mark.parametrize(
    ("word", "shown", "hidden"),
    [("--help", ["Sizes:", "--rows", "--name", "2 more settings: minirlhf try --help-all"],
      ["Steps:", "--steps", "--note"]),
     ("--help-all", ["Sizes:", "--rows", "--note", "Steps:", "--steps", "--name"], ["more"])],
)
def test_help_shows_the_first_settings_and_help_all_every_one(word, shown, hidden, capsys):
    with pytest.raises(SystemExit):
        read(word, config_class=Grouped)
    out = capsys.readouterr().out
    assert "Tries groups." in out
    places = [out.index(text) for text in shown]
    assert places == sorted(places) and not [text for text in hidden if text in out]


# ---- files ---------------------------------------------------------------------------------------

TOML = """
model = "m"
learning-rate = 1   # a whole number may stand for a float
clip = "none"
whiten = false
eval_data = ["a", "b"]
"""


def test_parse_reads_toml_and_json_alike(write):
    want = Config(model="m", learning_rate=1.0, clip=None, whiten=False, eval_data=("a", "b"))
    table = {"model": "m", "learning_rate": 1, "clip": None, "whiten": False}
    as_json = json.dumps(table | {"eval-data": ["a", "b"]})
    for file in (write("c.toml", TOML), write("c.json", as_json)):
        got = read("--config", file)
        assert got == want
        assert type(got.learning_rate) is float


@pytest.mark.parametrize(
    ("name", "text"), [("c.toml", 'eval_data = "a b"'), ("c.json", '{"eval-data": "a b"}')]
)
def test_parse_reads_one_text_as_a_list_of_it(write, name, text):
    got = read("--model", "m", "--config", write(name, text))
    assert got == Config(model="m", eval_data=("a b",))


def test_parse_reads_a_file_with_a_byte_order_mark(write):
    assert read("--config", write("c.json", b'\xef\xbb\xbf{"model": "m"}')) == Config(model="m")


def test_parse_flags_beat_the_file_which_beats_the_defaults(write):
    file = write("c.toml", 'model = "m"\nsteps = 3\nseed = 5\neval_data = ["a"]\n')
    got = read("--steps", "4", "--config", file, "--eval-data", "b")
    assert got == Config(model="m", steps=4, seed=5, eval_data=("b",))


def test_as_dict_is_a_config_file_of_the_same_config(write):
    config = Config(model="m", clip=None, eval_data=("a", "b"), whiten=False, learning_rate=1e-7)
    shown = as_dict(config)
    assert list(shown)[:2] == ["model", "steps"]
    assert shown["eval_data"] == ["a", "b"]
    assert read("--config", write("c.json", json.dumps(shown))) == config


# ---- configs made in code ------------------------------------------------------------------------


def test_validate_accepts_legal_fields_and_a_whole_number_for_a_float():
    assert validate(Config(model="m", learning_rate=1, clip=None, seed=-(2**62))) is None


def test_validate_names_the_field():
    with pytest.raises(UserError, match=r"^steps: got 0, must be a whole number >= 1$"):
        validate(Config(model="m", steps=0))
    both = r"^steps: got '3', must be .*; eval_data: got \['a'\], must be a tuple of text$"
    with pytest.raises(UserError, match=both):
        validate(Config(model="m", steps="3", eval_data=["a"]))


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["a", "-0.5*b"], ("a", "-0.5*b")),
        (["a", "-", "b"], ("a", "-", "b")),
        (["-0.5*b", "a", "-.5*c"], ("-0.5*b", "a", "-.5*c")),
        (["a", "--eval-data", "-1*b", "c"], ("a", "-1*b", "c")),
        (["a", "--steps", "-3"], "must be a whole number"),
        (["a", "-steps"], "unexpected argument '-steps'"),
    ],
)
def test_values_of_a_tuple_may_begin_with_a_minus_and_a_number(words, found):
    argv = ["--model", "m", "--eval-data", *words]
    if isinstance(found, tuple):
        assert read(*argv).eval_data == found
    else:
        assert found in refused(*argv)


def test_validate_refuses_a_text_for_a_tuple():
    with pytest.raises(UserError, match=r"^eval_data: got 'a', must be a tuple of text$"):
        validate(Config(model="m", eval_data="a"))


def test_validate_adds_what_the_config_itself_finds():
    with pytest.raises(UserError, match=r"^steps 13 is 13: choose another$"):
        validate(Config(model="m", steps=13))
    assert refused("--model", "m", "--steps", "13") == "steps 13 is 13: choose another"


def test_validate_asks_check_only_when_every_field_is_legal():
    @dataclass
    class Halves:
        rows: int = setting(4, at_least=1)
        parts: int = setting(2, at_least=1)

        def check(self) -> list[str]:
            return [f"rows {self.rows} in {self.parts} parts"] if self.rows % self.parts else []

    with pytest.raises(UserError, match=r"^parts: got 0, must be a whole number >= 1$"):
        validate(Halves(parts=0))  # check would divide by zero


def test_setting_refuses_a_type_that_no_flag_can_have():
    @dataclass
    class Odd:
        raw: bytes = setting(b"")

    with pytest.raises(TypeError, match="a setting cannot be <class"):
        read(config_class=Odd)


def test_setting_is_keyword_only_so_required_ones_may_stand_anywhere():
    @dataclass
    class Late:
        steps: int = setting(1)
        model: str = setting()

    assert read("--model", "m", config_class=Late) == Late(model="m")
    with pytest.raises(TypeError, match="positional"):
        Late(1, "m")


VERBS = ["sft", "ppo", "check", "sample", "score", "export", "best-of"]


@pytest.mark.parametrize(
    ("word", "names", "right"),
    [
        ("stpes", ["model", "steps"], "steps"),
        ("--modle", ["--help", "--model"], "--model"),
        ("SFT", VERBS, "sft"),
        ("pop", VERBS, "ppo"),
        ("exprot", VERBS, "export"),
        ("bestof", VERBS, "best-of"),
        ("--temp", ["--steps", "--temperature"], "--temperature"),  # begins so
        ("rate", ["steps", "learning_rate"], "learning_rate"),  # a part of it
    ],
)
def test_nearest_names_what_is_near(word, names, right):
    assert nearest(word, names, "none") == f"the nearest is {right}"


@pytest.mark.parametrize(
    ("word", "names"),
    [
        ("qqq", ["model"]),
        ("chat", VERBS),  # c and h of check: 2 * 2 of 4 + 5 letters are 0.44
        ("train", VERBS),
        ("generate", VERBS),
        ("eval", VERBS),
        ("--trl", ["--help"]),  # dashes are no letters
        ("---", ["--help"]),
        ("a", ["model", "a_b"]),
    ],
)
def test_nearest_names_nothing_that_is_far(word, names):
    assert nearest(word, names, "see --help") == "see --help"


@pytest.mark.parametrize(
    ("word", "right"), [("lr", "learning_rate"), ("--bs", "batch_size"), ("LR", "learning_rate")]
)
def test_nearest_knows_initials(word, right):
    names = ["steps", "learning_rate", "batch_size", "lora_rank"]
    assert nearest(word, names, "none") == f"the nearest is {right}"
