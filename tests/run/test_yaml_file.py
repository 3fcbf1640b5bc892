"""Settings in YAML: the values of TOML and JSON, and nothing that grows, runs or stands twice."""

import sys

import pytest

from minirlhf.errors import UserError
from minirlhf.run.config_file import read_settings
from minirlhf.run.flags import parse
from minirlhf.run.yaml_file import read_yaml
from minirlhf.setup.sft_settings import SFTConfig

RIGHT = """\
# a run
model: lm
data: "texts.jsonl"
out: out
learning-rate: 1e-5   # PyYAML takes it for a text
weight_decay: 0.5
steps: 10
merge: true
eval_data: [a.jsonl, 'b=c.jsonl']
max_grad_norm: null
"""


def test_yaml_gives_the_values_of_toml(tmp_path):
    (tmp_path / "c.yaml").write_text(RIGHT)
    config = parse(SFTConfig, ["--config", str(tmp_path / "c.yaml"), "--steps", "11"], "sft")
    assert (config.model, config.data, config.out) == ("lm", "texts.jsonl", "out")
    assert (config.learning_rate, config.weight_decay, config.steps) == (1e-5, 0.5, 11)
    assert config.merge and config.eval_data == ("a.jsonl", "b=c.jsonl")
    assert config.max_grad_norm is None


LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (LAUGHS, "c.yml:1: an anchor or an alias: write the value out"),
        ("a: 1\nb: *a", "c.yml:2: an anchor or an alias"),
        ("steps: !!python/object/apply:os.system ['true']", "c.yml:1: a tag, tag:yaml.org,2002:"),
        ("steps: 1\nsteps: 2", "c.yml:2: 'steps' stands twice, or is no name"),
        ("? [steps]\n: 1", "c.yml:1: "),
        ("- steps", "c.yml:1: no settings: one a line, as in steps: 10"),
        ("", "c.yml: no settings"),
        ("steps: [", "c.yml:1: not valid YAML: expected the node content"),
        ("steps: 1\n---\nsteps: 2", "c.yml:2: not valid YAML: but found another document"),
        ("out: 2024-99-99", "c.yml: not valid YAML: month must be in 1..12"),
        ("a: " + "{a: " * 20 + "1" + "}" * 20, "c.yml:1: nested deeper than 16"),
    ],
)
def test_yaml_refuses_what_is_no_plain_value(text, told):
    with pytest.raises(UserError) as caught:
        read_yaml(text, "c.yml")
    assert str(caught.value).startswith(told)


def test_a_setting_in_yaml_is_checked_as_any_other(tmp_path):
    (tmp_path / "c.yaml").write_text("stepz: 1\ntrain: {steps: 1}\n")
    from minirlhf.run.settings import settings_of

    _, _, problems = read_settings(settings_of(SFTConfig), str(tmp_path / "c.yaml"))
    assert [what for _, what in problems] == [
        "unknown setting: the nearest is steps",
        "is a table: settings stand at the top of the file, in no section",
    ]


def test_without_pyyaml_it_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(UserError, match=r"^c\.yaml: a YAML file needs PyYAML: pip install pyyaml"):
        read_yaml("steps: 1", "c.yaml")
