"""An adapter's folder is a model wherever a model is asked for."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minirlhf import cli
from minirlhf.data.tokenizer import load_tokenizer, tokenizer_files
from minirlhf.errors import BAD_INPUT, OK
from minirlhf.files.folders import resolve
from minirlhf.models.heads import RewardModel, initialize_score
from minirlhf.models.lora import add_lora
from minirlhf.models.peft_files import save_adapter
from minirlhf.models.pretrained import load_pretrained, load_reward_model, save_pretrained
from minirlhf.run import flags
from minirlhf.setup.common import write_model
from minirlhf.streams import generator
from minirlhf.tools import serve
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


def test_serve_answers_with_an_adapter_as_with_what_it_merges_into(here, monkeypatch):
    class Asked(Exception):
        pass

    def told(_, answer, token):
        raise Asked(answer({"messages": ["so it was", "good"]}, lambda: None))

    monkeypatch.setattr(serve, "Server", told)
    replies = []
    for model in ("reward", "a/reward"):
        with pytest.raises(Asked) as asked:
            serve.main(["--model", model, "--port", "0"])
        replies.append(asked.value.args[0])
    assert replies[0] == replies[1] and len(set(replies[0]["scores"])) == 2


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


# ---- what a run leaves ---------------------------------------------------------------------------

ROW = torch.tensor([[5, 98, 0, 41, 7]])
LORA = ("--lora-rank", "2", "--learning-rate", "0.1")


@pytest.mark.parametrize("verb", ["sft", "dpo", "ppo", "grpo", "distill"])
def test_a_run_leaves_its_adapter_and_what_it_merges_into(verb, here, capsys):
    teacher = {"teacher": "policy"} if verb == "distill" else {}  # another one than the student
    assert cli.main([*words(verb, **teacher), *LORA]) == OK
    told = capsys.readouterr().out
    assert "adapter in out/adapter" in told and "in out/model" in told
    assert "PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('lm'), 'out/ad" in told
    left = {path.name for path in Path("out/adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json",
            "tokenizer_config.json", "generation_config.json"} <= left
    assert json.loads(Path("out/adapter/adapter_config.json").read_text())[
        "base_model_name_or_path"] == "lm"
    adapted, merged = load_pretrained("out/adapter"), load_pretrained("out/model")
    assert torch.equal(adapted.logits(adapted(ROW)), merged.logits(merged(ROW)))
    base = load_pretrained("lm")
    assert not torch.allclose(base.logits(base(ROW)), merged.logits(merged(ROW)), atol=1e-4)
    assert load_tokenizer("out/adapter").fingerprint == load_tokenizer("lm").fingerprint


@pytest.mark.parametrize("kind", [[], ["--normalize", "train"], ["--heads", "2"]])
def test_a_reward_run_leaves_its_adapter_and_what_it_merges_into(kind, here, capsys):
    assert cli.main([*words("reward"), *LORA, *kind]) == OK
    assert "adapter in out/adapter" in capsys.readouterr().out
    adapted, merged = load_reward_model("out/adapter"), load_reward_model("out/model")
    lengths = torch.tensor([5])
    scores = adapted(ROW, lengths), merged(ROW, lengths)
    torch.testing.assert_close(*scores, rtol=0, atol=1e-6)
    assert (adapted.unread, adapted.reward_mean) == (merged.unread, merged.reward_mean)
    assert Path("out/adapter/README.md").exists() == Path("out/model/README.md").exists()


@pytest.mark.parametrize("verb", ["sft", "reward", "ppo"])
def test_no_merge_leaves_the_adapter_alone(verb, here):
    assert cli.main([*words(verb), *LORA, "--no-merge"]) == OK
    assert Path("out/adapter").is_dir() and not Path("out/model").exists()


def test_an_adapter_that_is_trained_on_names_the_same_base(here):
    assert cli.main([*words("sft", model="a/policy"), *LORA]) == OK
    name = json.loads(Path("out/adapter/adapter_config.json").read_text())
    assert name["base_model_name_or_path"] == "lm"
    adapted, merged = load_pretrained("out/adapter"), load_pretrained("out/model")
    assert torch.equal(adapted.logits(adapted(ROW)), merged.logits(merged(ROW)))


def test_rslora_dora_and_targets_reach_the_adapter(here):
    kinds = ["--lora-targets", "q_proj", "*.down_proj", "--rslora", "--dora"]
    assert cli.main([*words("sft"), *LORA, *kinds]) == OK
    said = json.loads(Path("out/adapter/adapter_config.json").read_text())
    assert (said["use_rslora"], said["use_dora"]) == (True, True)
    assert said["target_modules"] == ["down_proj", "q_proj"]


@pytest.mark.parametrize(("verb", "rate"), [("sft", 2e-4), ("ppo", 3e-5), ("dpo", 1e-5)])
def test_the_rate_of_adapters_is_ten_times_the_default_unless_it_is_given(verb, rate):
    config = cli.VERBS[verb].config()
    assert flags.parse(config, words(verb, lora_rank=2)[1:], "x").learning_rate == rate
    given = words(verb, lora_rank=2, learning_rate=3e-6)[1:]
    assert flags.parse(config, given, "x").learning_rate == 3e-6
    assert flags.parse(config, words(verb)[1:], "x").learning_rate == pytest.approx(rate / 10)


def test_a_target_that_is_no_layer_is_refused(refused):  # noqa: F811
    line = refused(words("sft", lora_rank=2, lora_targets="c_attn"))
    assert line.startswith("--lora-targets: target 'c_attn' is no layer of this model: legal are")


@pytest.mark.parametrize("flag", [["--no-merge"], ["--dora"], ["--rslora"],
                                  ["--lora-targets", "mlp"]])
def test_settings_of_adapters_go_with_a_rank(flag, refused):  # noqa: F811
    assert refused([*words("sft"), *flag]).endswith(": goes with --lora-rank")


# ---- checkpoints ---------------------------------------------------------------------------------


def test_a_checkpoint_holds_what_is_trained_alone(here):
    assert cli.main([*words("ppo"), *LORA]) == OK
    for step in (0, 1):
        kept = load_file(f"out/checkpoints/step-{step:08d}/model.safetensors")
        assert kept and all(".lora_" in n or n.startswith("v_head.") for n in kept)


@pytest.mark.parametrize("bits", [(), ("--trunk-bits", "4")], ids=["plain", "packed"])
def test_a_checkpoint_over_another_base_is_refused(bits, here, capsys):
    argv = [*words("sft"), *LORA, *bits]
    assert cli.main(argv) == OK
    lm = load_pretrained("lm")
    lm.model.layers[0].mlp.up_proj.weight.data += 0.5
    save_pretrained(lm, "lm")
    capsys.readouterr()
    assert cli.main([*argv, "--resume"]) == BAD_INPUT
    line = capsys.readouterr().err
    assert "was saved over other frozen weights" in line and line.count("\n") == 1
