"""The README's examples run as they stand, and what it says of the files is true."""

import json
import re
from pathlib import Path

import pytest
import torch

from minirlhf import streams
from minirlhf.data.tokenizer import load_tokenizer, train_tokenizer
from minirlhf.models.pretrained import save_pretrained
from minirlhf.models.transformer import CausalLM, ModelConfig, initialize
from minirlhf.run.settings import validate
from minirlhf.setup.ppo_settings import PPOConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
MODEL = "real/SmolLM2-135M-Instruct"


def make_model(folder: Path) -> None:
    """A tiny model under the name of the real one."""
    tokenizer = train_tokenizer(["a film that works", "the plot is thin"] * 4, 280, folder)
    source = {"model_type": "llama", "vocab_size": tokenizer.vocab_size, "hidden_size": 16,
              "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
              "eos_token_id": tokenizer.eos_ids[0], "tie_word_embeddings": True}
    config = ModelConfig(
        family="llama", vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=32,
        num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, max_positions=128, source=source,
    )
    save_pretrained(initialize(CausalLM(config), streams.generator(0, "readme")), folder)


@pytest.fixture
def in_a_small_world(tmp_path, monkeypatch):
    """Where the README's paths lead to a tiny model and three prompts."""
    make_model(tmp_path / MODEL)
    lines = [json.dumps({"prompt": text}) for text in ("a film", "the plot", "a plot that")]
    (tmp_path / "real" / "movie_prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled()
    yield tmp_path
    torch.use_deterministic_algorithms(before)


def run_code(code: str, names: dict) -> dict:
    exec(compile(code, "README.md", "exec"), names)
    return names


def shorter(code: str, steps: int) -> str:
    """The loop, which would take a minute, with fewer steps and a checkpoint each second one."""
    assert "steps=50" in code and "step.number % 20" in code
    return code.replace("steps=50", f"steps={steps}").replace("number % 20", "number % 2")


def test_readme_loop_runs_as_it_stands_and_goes_on_from_its_checkpoint(in_a_small_world, capsys):
    code = CODE[0]
    run_code(shorter(code, 3), {})
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("1 ") and first.endswith(" 0.0")  # KL at step 0 is exactly 0
    assert second.startswith("2 ") and third.startswith("3 ")
    aligned = in_a_small_world / "aligned"
    before = (aligned / "model.safetensors").read_bytes()
    run_code(shorter(code, 3), {})
    assert capsys.readouterr().out.splitlines() == [third]
    assert (aligned / "model.safetensors").read_bytes() == before
    assert load_tokenizer(aligned).fingerprint == load_tokenizer(MODEL).fingerprint


def test_readme_update_moves_the_policy_and_starts_at_ratio_one(in_a_small_world):
    names = run_code(shorter(CODE[0], 1), {})
    run_code(CODE[1], names)
    before = names["policy"].lm.model.embed_tokens.weight.clone()
    stats = names["update"]([[5, 6], [7]], [[8, 9, 10], [11]], [1.0, -1.0], iteration=0)
    assert stats.first_ratio_gap == 0 and stats.grad_norm > 0
    assert not torch.equal(names["policy"].lm.model.embed_tokens.weight, before)


def test_readme_loss_is_the_one_that_is_learned_from(in_a_small_world):
    names = run_code(shorter(CODE[0], 1), {})
    run_code(CODE[1], names)
    run_code(CODE[2], names)
    rollout = [[5, 6], [7]], [[8, 9, 10], [11]], [1.0, -1.0]
    settings = {"clip_low": 0.0, "clip_high": 0.0, "learning_rate": 1e-2}
    names["config"] = PPOConfig(**settings)
    for group in names["optimizer"].param_groups:
        group["lr"] = 1e-2
    clipped = names["update"](*rollout, iteration=0)
    names["config"] = names["Reinforce"](**settings)
    free = names["update"](*rollout, iteration=1)
    assert clipped.clipfrac > 0 and free.clipfrac == 0
    # At ratio 1 both losses have one gradient, that of -A log pi: one step from the same weights
    policy, ends = names["policy"], []
    start = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    for config in (PPOConfig, names["Reinforce"]):
        policy.load_state_dict(start)
        names["config"] = config(epochs=1)
        names["optimizer"] = torch.optim.SGD(policy.parameters(), lr=0.1)
        names["update"](*rollout, iteration=0)
        ends.append(policy.lm.model.embed_tokens.weight.clone())
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-6)
    assert not torch.equal(ends[0], start["lm.model.embed_tokens.weight"])
    assert validate(names["config"]) is None  # its settings are checked as PPOConfig's are


@pytest.mark.parametrize("file", ["README.md", "benchmarks/README.md"])
def test_shell_commands_can_be_pasted_into_zsh(file):
    """There a # begins no comment, and a * that is not quoted must match a file."""
    text = (ROOT / file).read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    assert blocks
    for bare in (re.sub(r"'[^']*'|\"[^\"]*\"", "", block) for block in blocks):
        assert "#" not in bare and "*" not in bare and "[" not in bare
    assert not re.search(r"`[^`\n]* [0-9.]+\*[^`\n]*`", text)  # within a line
