"""An adapter's folder is a model wherever a model is asked for."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from minirlhf import cli
from minirlhf.data.tokenizer import load_tokenizer, tokenizer_files
from minirlhf.errors import OK
from minirlhf.files.folders import resolve
from minirlhf.models.heads import RewardModel, initialize_score
from minirlhf.models.lora import add_lora
from minirlhf.models.peft_files import save_adapter
from minirlhf.models.pretrained import load_pretrained, load_reward_model, save_pretrained
from minirlhf.setup.common import write_model
from minirlhf.streams import generator
from tests.bad_inputs import make_world, refused, words, world  # noqa: F401
from tests.models.test_peft_files import shake
from tests.tiny_folders import timeless


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with adapters of lm: a policy's and a reward model's, and both merged."""
    make_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    save_adapter(shake(add_lora(load_pretrained("lm"), 2, 4.0)), "a/policy", "lm")
    reward = RewardModel(load_pretrained("lm"), unread=1)
    shake(add_lora(initialize_score(reward, generator(0, "score")), 2, 4.0))
    save_adapter(reward, "a/reward", "../../lm", pad_token_id=1)
    tokenizer = load_tokenizer("lm")
    write_model(load_pretrained("a/policy"), tokenizer, tmp_path / "policy")
    save_pretrained(load_reward_model("a/reward"), "reward", pad_token_id=1)
    tokenizer.save("reward")
    return tmp_path


ROLES = [
    words("sample", model="policy"),
    words("score", model="reward"),
    words("sft", model="policy"),
    words("reward", model="policy"),
    words("reward", model="reward"),
    words("dpo", ref="policy"),
    words("distill", teacher="policy"),
    words("ppo", model="policy"),
    words("ppo", ref="policy", reward="reward", critic="reward"),
    [*words("ppo", ref="policy", reward="reward"), "--offload-frozen"],
    words("grpo", model="policy", reward=("reward", "reward.py:length")),
    ["best-of", "--model", "policy", "--reward", "reward", "--data", "prompts.jsonl", "--out",
     "out.jsonl", "--samples", "4", "--max-new-tokens", "8", "--stop", *map(chr, range(33, 127))],
]


@pytest.mark.parametrize("argv", ROLES, ids=lambda argv: " ".join(argv)[:60])
def test_a_command_does_the_same_with_an_adapter_as_with_what_it_merges_into(argv, here):
    left = []
    for kind in ("", "a/"):
        given = [f"{kind}{word}" if word in ("policy", "reward") and word != argv[0] else word
                 for word in argv]
        assert cli.main([argv[0], *given[1:]]) == OK
        out = next(Path().glob("out*"))
        left.append(timeless(out) if out.is_dir() else out.read_text())
        out.rename(f"was-{kind.strip('/')}")
    assert left[0] == left[1]


def test_check_tells_of_an_adapter_as_of_a_model(here, capsys):
    told = []
    for model in ("lm", "a/policy"):
        assert cli.main(["check", "--model", model, "--data", "texts.jsonl"]) == OK
        told.append(capsys.readouterr().out.splitlines())
    assert (told[0][0], told[1][0]) == ("lm", "a/policy, an adapter of lm")
    assert told[0][1:] == told[1][1:]


def test_a_base_is_given_where_it_has_moved(here):
    Path("lm").rename("moved")
    argv = words("sample", model="a/policy")
    assert cli.main(argv) != OK
    assert cli.main([*argv, "--base", "moved"]) == OK
    ppo = words("ppo", model="moved", reward="a/reward", critic="a/reward", base="moved")
    shutil.rmtree("out", ignore_errors=True)
    Path("out").unlink(missing_ok=True)
    assert cli.main(ppo) == OK


@pytest.mark.parametrize("verb", ["sample", "score", "sft", "reward", "dpo", "ppo", "distill"])
def test_a_base_without_an_adapter_is_refused(verb, refused):  # noqa: F811
    line = refused(words(verb, base="lm"))
    assert line == "--base: is given, but no model here is an adapter: leave it out"


def test_the_tokenizer_is_the_adapters_own_or_its_bases(here):
    base, adapter = load_tokenizer("lm"), resolve("a/policy")
    assert load_tokenizer(adapter).fingerprint == base.fingerprint
    assert tokenizer_files(adapter) == tokenizer_files(Path("lm"))
    base.save(adapter)
    values = json.loads((adapter / "tokenizer_config.json").read_text())
    values["chat_template"] = "{{ messages[0].content }}"
    (adapter / "tokenizer_config.json").write_text(json.dumps(values))
    own = load_tokenizer("a/policy")
    assert own.chat_template == "{{ messages[0].content }}" and own.eos_ids == base.eos_ids
    assert tokenizer_files(adapter) == [
        *(f"a/policy/{name}.json" for name in ("tokenizer", "tokenizer_config",
                                               "special_tokens_map")), "lm/config.json"]
    (adapter / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert load_tokenizer("a/policy").eos_ids == (0, 7)  # beside its eos_token


def test_dtype_of_a_merged_adapter(here):
    assert load_pretrained("a/policy", torch.bfloat16).unembedding.dtype == torch.bfloat16
