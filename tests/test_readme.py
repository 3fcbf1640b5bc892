"""The README's example runs as it stands, and what it says of the files is true."""

import json
import re
from pathlib import Path

from minirlhf import streams
from minirlhf.pretrained import save_pretrained
from minirlhf.tokenizer import train_tokenizer
from minirlhf.transformer import CausalLM, ModelConfig, initialize

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def make_model(folder: Path) -> None:
    """A tiny model under the name of the real one."""
    tokenizer = train_tokenizer(["a film that works", "the plot is thin"] * 4, 280, folder)
    source = {"model_type": "llama", "vocab_size": tokenizer.vocab_size, "hidden_size": 16,
              "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
              "eos_token_id": tokenizer.eos_ids[0], "tie_word_embeddings": True}  # fmt: skip
    config = ModelConfig(
        family="llama", vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=32,
        num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, max_positions=128, source=source,
    )  # fmt: skip
    save_pretrained(initialize(CausalLM(config), streams.generator(0, "readme")), folder)


def test_readme_loop_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert "steps=50" in code
    code = code.replace("steps=50", "steps=2")  # it would take a minute
    code = code.replace("step.number % 20", "step.number % 2")
    make_model(tmp_path / "real" / "SmolLM2-135M-Instruct")
    lines = [json.dumps({"prompt": text}) for text in ("a film", "the plot", "a plot that")]
    (tmp_path / "real" / "movie_prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("1 ") and first.endswith(" 0.0")  # KL at step 0 is exactly 0
    assert second.startswith("2 ")
    assert (tmp_path / "aligned" / "model.safetensors").exists()
    assert any((tmp_path / "checkpoints").iterdir())


def test_readme_names_every_module_once_with_its_lines():
    told = dict(re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", README, re.MULTILINE))
    package = ROOT / "minirlhf"
    there = {
        str(p.relative_to(package)): str(len(p.read_text(encoding="utf-8").splitlines()))
        for p in package.rglob("*.py")
        if p.name not in ("__init__.py", "__main__.py")
    }
    assert told == there
