"""Presets are config files: what they set gives way to files and flags, and has a source."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from minirlhf.errors import BAD_INPUT, UserError
from minirlhf.run.flags import parse
from minirlhf.run.settings import setting

OLD = """\
# the old tool

rate = 0.5     # old.py: lr
clip = 2.0     # old.py: clip
white = false  # sec. 3
kind = "b"     # eq. 1

# Not as there, on purpose:
# - its bug is not here
"""


@dataclass(frozen=True)
class Toy:
    """Tries."""

    PRESETS: ClassVar[Path]

    model: str = setting("", "a model", metavar="FOLDER", required=True)
    rate: float = setting(0.1, "step size", above=0)
    clip: float | None = setting(None, "clip", above=0)
    white: bool = setting(True, "whiten")
    kind: str = setting("a", "kind", choices=("a", "b"))
    steps: int = setting(7, "steps", at_least=1)


@pytest.fixture(autouse=True)
def presets(tmp_path, monkeypatch):
    monkeypatch.setattr(Toy, "PRESETS", tmp_path, raising=False)
    (tmp_path / "old-tool.toml").write_text(OLD, encoding="utf-8")
    (tmp_path / "bad.toml").write_text("rate = -1.0  # x\n", encoding="utf-8")


def read(*argv: str) -> Toy:
    return parse(Toy, list(argv), "minirlhf try")


def refused(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        read(*argv)
    assert caught.value.code == BAD_INPUT
    return str(caught.value)


def test_a_preset_beats_the_defaults_a_file_beats_it_and_flags_beat_both(tmp_path):
    old = Toy(model="m", rate=0.5, clip=2.0, white=False, kind="b", steps=7)
    argv = ["--model", "m", "--preset", "old-tool"]
    assert read(*argv) == old == read("--preset=old-tool", "--model", "m")
    file = tmp_path / "mine.toml"
    file.write_text('rate = 0.7\nkind = "a"\nsteps = 3\n', encoding="utf-8")
    argv += ["--config", str(file)]
    assert read(*argv) == Toy(model="m", rate=0.7, clip=2.0, white=False, kind="a", steps=3)
    got = read(*argv, "--rate", "0.9", "--clip", "none", "--white")
    assert got == Toy(model="m", rate=0.9, clip=None, white=True, kind="a", steps=3)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--preset", "old-tool"], "--model: required"),  # a preset does not give it
        (["--model", "m", "--preset", "oldtool"],
         "--preset: no preset 'oldtool': the nearest is old-tool; presets: bad, old-tool"),
        (["--explain-preset", "oldtool"], "--explain-preset: no preset"),
        (["--model", "m", "--preset", "bad", "--preset", "bad"], "--preset: given twice"),
        (["--model", "m", "--preset", "bad"],
         "--preset bad: rate: got -1.0, must be a finite number > 0"),
    ],
)
def test_a_preset_is_refused_by_its_name(words, told):
    assert refused(*words).startswith(told)


def test_without_presets_there_is_no_such_flag(monkeypatch):
    monkeypatch.delattr(Toy, "PRESETS")
    assert refused("--model", "m", "--preset", "old-tool").startswith("--preset: unknown flag")


def test_help_names_the_presets(capsys):
    with pytest.raises(SystemExit) as left:
        read("--help")
    assert left.value.code == 0
    assert "bad, old-tool" in " ".join(capsys.readouterr().out.split())


def test_explain_lists_settings_with_default_and_source_and_leaves(capsys):
    with pytest.raises(SystemExit) as left:
        read("--explain-preset", "old-tool")  # --model is not asked for
    assert left.value.code == 0
    assert (
        capsys.readouterr().out
        == """\
--preset old-tool: the old tool
  setting  value  default  source
  rate     0.5    0.1      old.py: lr
  clip     2      none     old.py: clip
  white    off    on       sec. 3
  kind     b      a        eq. 1
Not as there, on purpose:
  its bug is not here
"""
    )


def test_a_settings_file_that_takes_long_to_read_is_refused(tmp_path):
    config = tmp_path / "long.toml"
    config.write_text("rate = 1\n" + "a" + ".a" * 2048 + " = 1\n", encoding="utf-8")
    assert "long.toml:2: a line of more than 4,096 characters" in refused("--config", str(config))
    config.write_text("# twice a\n" * 7_000, encoding="utf-8")
    assert "long.toml: larger than 65,536 bytes" in refused("--config", str(config))
