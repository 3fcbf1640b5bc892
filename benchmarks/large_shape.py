#!/usr/bin/env python3
"""One step of PPO with four roles on one trunk of 4 bits, in the shape of Qwen2.5-1.5B.

    OMP_NUM_THREADS=1 python benchmarks/large_shape.py --tokenizer real/SmolLM2-135M-Instruct \
        --folder scratch --out benchmarks/results/large_shape.json

It writes random weights of that shape (bfloat16, 3.1 GB) and an adapter with a score head into
--folder. Policy, reference, reward model and critic then learn from 4 responses of 16 tokens,
adapters of rank 16 on one packed trunk: first as `--dry-run`, then as a run. Peaks are the largest
resident memory of each process in all; pages of the mapped file of weights are among them.
"""

import argparse
import json
import shutil
from pathlib import Path

import hardware
import torch
from trunk_bits import run

from minirlhf import RewardModel, save_pretrained
from minirlhf.models.families import config_from_hf
from minirlhf.models.heads import initialize_score
from minirlhf.models.lora import add_lora
from minirlhf.models.peft_files import save_adapter
from minirlhf.models.transformer import CausalLM, shapes_only

SHAPE = {  # https://huggingface.co/Qwen/Qwen2.5-1.5B/blob/main/config.json
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 151_936,
    "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True, "hidden_act": "silu",
    "eos_token_id": 0,
}
FLAGS = "--lora-rank 16 --trunk-bits 4 --dtype bfloat16 --steps 1 --batch-size 4 " \
    "--micro-batch-size 2 --mini-batches 2 --epochs 1 --max-new-tokens 16 --sample-every 0 " \
    "--no-merge"


def write_models(folder: Path, tokenizer: Path) -> None:
    """base/, random weights; reward/, an adapter on it with a score head."""
    with shapes_only():
        lm = CausalLM(config_from_hf(SHAPE))
    lm.to(torch.bfloat16)
    draw = torch.Generator().manual_seed(0)
    lm.load_state_dict(
        {name: torch.ones(t.shape, dtype=t.dtype) if "norm" in name
         else torch.zeros(t.shape, dtype=t.dtype) if name.endswith("bias")
         else torch.empty(t.shape, dtype=t.dtype).normal_(0, 0.02, generator=draw)
         for name, t in lm.state_dict().items()}, assign=True)
    save_pretrained(lm, folder / "base")
    model = initialize_score(RewardModel(lm), torch.Generator().manual_seed(0))
    save_adapter(add_lora(model, 16, 32.0), folder / "reward", str(folder / "base"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        for place in ("base", "reward"):
            shutil.copy(tokenizer / name, folder / place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("tokenizer", "folder", "out"):
        parser.add_argument(f"--{name}", required=True, type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if not (args.folder / "reward" / "adapter_config.json").exists():
        write_models(args.folder, args.tokenizer)
    rows = (json.dumps({"prompt": f"Film {n} is"}) for n in range(4))
    (args.folder / "prompts.jsonl").write_text("".join(f"{row}\n" for row in rows), "utf-8")
    base, reward, out = (str(args.folder / name) for name in ("base", "reward", "run"))
    words = ["-m", "minirlhf", "ppo", "--model", base, "--reward", reward, "--critic", reward,
             "--data", str(args.folder / "prompts.jsonl"), "--out", out, *FLAGS.split()]
    found = {}
    for name, more in ("dry run", ["--dry-run"]), ("run", []):
        peak, cpu = run([*words, *more])
        found[name] = {"peak_bytes": peak, "cpu_seconds": cpu}
        print(f"{name:<8} {peak / 1e9:.2f} GB, {cpu:.0f} CPU seconds")
    line = json.loads(Path(out, "metrics.jsonl").read_text("utf-8").splitlines()[0])
    print(f"KL at the first step {line['objective/kl']:g} nats, "
          f"{line['clock']['time/step']:.0f} s a step")
    found |= {"metrics": line, "machine": hardware.describe()}
    args.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
