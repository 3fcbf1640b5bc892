"""A run's folder in the place of a model's: what the run made is read."""

import shutil
from pathlib import Path

import pytest

from minirlhf.cli import main
from minirlhf.files.folders import model_of_run, resolve
from minirlhf.setup.common import base_name
from minirlhf.setup.groups import ModelSettings
from tests.tiny_folders import change_json
from tests.tools.conftest import lines_of


@pytest.fixture
def run_of(files, tmp_path):
    """A run's folder around one of the models, by its name."""

    def made(name: str) -> Path:
        shutil.copytree(files[name], tmp_path / name / "model")
        (tmp_path / name / "run.json").write_text("{}")
        return tmp_path / name

    return made


def test_a_run_stands_for_its_model(files, run_of, capsys):
    lm, rm = run_of("LM"), run_of("RM")
    pairs = [("LM", lm, ["sample", "--prompt", "so", "--max-new-tokens", 3]),
             ("RM", rm, ["score", "--data", files["TEXTS"]])]
    for name, folder, words in pairs:
        rows = lines_of(capsys, *words, "--model", files[name])
        assert main(list(map(str, [*words, "--model", folder]))) == 0
        shown = capsys.readouterr()
        assert len(shown.out.splitlines()) == len(rows)
        told = f"note: {folder} is a run: model/ of it is read\n"
        assert shown.err.count("is a run") == 1 and told in shown.err
    words = ["best-of", "--data", files["PROMPTS"], "--samples", 2, "--max-new-tokens", 3]
    words += ["--model", lm, "--reward", rm, "--out", lm.parent / "best.jsonl"]
    main(list(map(str, words)))  # so short a response is never chosen
    assert "6 prompts, 12 responses: mean score" in capsys.readouterr().out


def test_a_model_that_lies_beside_a_run_json_is_itself(files, tmp_path):
    shutil.copytree(files["LM"], tmp_path / "lm")
    (tmp_path / "lm" / "run.json").write_text("{}")
    (tmp_path / "lm" / "model").mkdir()
    assert model_of_run(tmp_path / "lm") == tmp_path / "lm"


def test_an_adapter_stands_for_a_run_that_made_nothing_else(files, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "run.json").write_text("{}")
    change_json(tmp_path / "adapter" / "adapter_config.json", peft_type="LORA",
                base_model_name_or_path=files["LM"])
    assert resolve(tmp_path) == tmp_path / "adapter"
    assert str(resolve(tmp_path).base) == files["LM"]


def test_an_adapter_names_the_model_of_the_run_that_is_its_base(files, run_of, tmp_path):
    """Others know of no runs."""
    folder = run_of("LM")
    assert base_name(ModelSettings(model=str(folder))) == str(folder / "model")
    assert base_name(ModelSettings(model=files["LM"])) == files["LM"]
    adapter = tmp_path / "a"
    adapter.mkdir()
    for named, base in ((str(folder), None), ("gone", str(folder))):
        change_json(adapter / "adapter_config.json", peft_type="LORA",
                    base_model_name_or_path=named)
        found = resolve(adapter, base=base)
        assert (found.base, found.base_name) == (folder / "model", str(folder / "model"))
