#!/usr/bin/env python3
"""What a process of a run holds and sends, by formula and measured; and a plan for larger machines.

    python benchmarks/scale.py --out benchmarks/results/scale.json

Measured is an optimizer step of supervised fine-tuning of a random Llama of 22 million parameters
in float32, one micro-batch, by 1, 2 and 4 processes of this machine: the bytes of weights,
gradients and moments that each process holds, and the bytes that went through the loopback device,
by process; the least of three steps, since others may use it. The plan takes the same formulas to 7
and 70 billion parameters. P parameters, N ranks:

    held    ddp 16 P, fsdp 16 P / N: float32 weights, gradients and AdamW's two moments
    sent    ddp 8 P (N - 1) / N a step: the all-reduce of float32 gradients, by each rank
            fsdp (w + w + g) P (N - 1) / N a micro-batch: weights of w bytes are gathered in the
            forward pass and in the backward pass, float32 gradients are reduced and scattered,
            g = 4; gloo makes an all-reduce of that, g = 8
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

HERE, LOOPBACK = Path(__file__), Path("/sys/class/net/lo/statistics/tx_bytes")


class Shape(NamedTuple):
    """A Llama-like model."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    kv_width: int  # channels of all key heads together
    vocab: int
    tied: bool = False

    @property
    def parameters(self) -> int:
        """Of the matrices: query and output, key and value, the MLP's three, the embeddings."""
        D = self.hidden
        block = 2 * D * D + 2 * D * self.kv_width + 3 * D * self.intermediate
        return self.layers * block + (1 if self.tied else 2) * self.vocab * D


SMALL = Shape("22 million", 6, 512, 1536, 128, 4096)
QWEN7 = Shape("Qwen2.5-7B", 28, 3584, 18944, 512, 152064)
LLAMA70 = Shape("Llama-3.1-70B", 80, 8192, 28672, 1024, 128256)


class Cluster(NamedTuple):
    name: str
    ranks: int
    link: float  # bytes a second that a rank sends beside the others
    memory: float = 80e9
    flops: float = 400e12  # 40% of an H100's bfloat16 peak
    bandwidth: float = 3.35e12  # bytes a second of its memory


PLANS = (
    (QWEN7, Cluster("8 GPUs, NVLink", 8, 350e9)),
    (LLAMA70, Cluster("64 GPUs, 8 nodes of 400 Gbit/s a GPU", 64, 45e9)),
)
ROWS, PROMPT, RESPONSE = 512, 300, 700  # of a PPO iteration, one epoch over it


def held(shape: Shape, ranks: int, parallel: str) -> float:
    """Bytes of float32 weights, gradients and moments that a rank holds of what is trained."""
    return 16 * shape.parameters / (ranks if parallel == "fsdp" else 1)


def sent(shape: Shape, ranks: int, parallel: str, weight_bytes: int, gradient_bytes: int) -> float:
    """Bytes that a rank sends in an optimizer step of one micro-batch."""
    each = 8 if parallel == "ddp" else 2 * weight_bytes + gradient_bytes
    return each * shape.parameters * (ranks - 1) / ranks


def plan(shape: Shape, cluster: Cluster) -> dict:
    """A PPO iteration under fsdp in bfloat16: policy and critic with trunks of their own, reference
    and reward model frozen, activations recomputed."""
    P, N, D = shape.parameters, cluster.ranks, shape.hidden
    tokens = ROWS * (PROMPT + RESPONSE) / N  # a rank's
    cache = 4 * shape.layers * shape.kv_width * tokens  # keys and values, bfloat16
    whole = 2 * P  # the policy's weights while it samples, bfloat16
    block = 2 * 2 * P / shape.layers + 4 * shape.vocab * D  # two gathered blocks, the embeddings
    trained, frozen = 2 * held(shape, N, "fsdp"), 2 * 2 * P / N
    # computing a token takes 8 P operations with activations recomputed; sending takes as long at
    least = sent(shape, N, "fsdp", 2, 4) / cluster.link / (8 * P / cluster.flops)  # tokens
    activations = 2 * shape.layers * D * least + 34 * D * least
    update = 2 * 8 * P * tokens / cluster.flops
    passes = 4 * 2 * P * tokens / cluster.flops
    decode = RESPONSE * (whole + cache) / cluster.bandwidth
    return {
        "model": shape.name, "cluster": cluster.name, "parameters": P,
        "trained GB": trained / 1e9, "frozen GB": frozen / 1e9,
        "update GB": (trained + frozen + block + activations) / 1e9,
        "tokens a micro-batch and rank, at least": least,
        "sampling GB": (trained + frozen + whole + cache) / 1e9,
        "of these whole weights": whole / 1e9, "and cache": cache / 1e9,
        "update s": update, "measuring s": passes, "decoding s, at least": decode,
        "gathered layer by layer, s a token": whole / cluster.link,
        "fits": trained + frozen + whole + cache < cluster.memory,
    }


def child(parallel: str) -> None:
    """One rank: prints what it holds, and what went over the loopback device in a step."""
    import torch

    from minirlhf import ranks
    from minirlhf.data.examples import Text
    from minirlhf.models.config import ModelConfig
    from minirlhf.models.parallel import wrap
    from minirlhf.models.transformer import CausalLM, initialize
    from minirlhf.recipes.sft import sft
    from minirlhf.run import distributed, optim
    from minirlhf.run.checkpoint import TrainState
    from minirlhf.setup.sft_settings import SFTConfig

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    config = SFTConfig(model="m", data="d", out="o", steps=4, batch_size=8,
                       parallel=parallel if several else None)
    distributed.start(config)
    s = SMALL
    lm = CausalLM(ModelConfig("llama", s.vocab, s.hidden, s.intermediate, s.layers, 8,
                              s.kv_width // 64, 64, 256, tied_embeddings=s.tied))
    initialize(lm, torch.Generator().manual_seed(0))
    wrap(lm, config.parallel)
    state = TrainState(lm, optim.make_optimizer(lm, 1e-4))
    texts = [Text(list(range(i, i + 32)), 0, f"t:{i}", {}) for i in range(64)]
    before, moved, steps = 0, [], sft(state, texts, config)
    for _ in range(4):
        ranks.each(lambda: b"")  # all have come here
        before = int(LOOPBACK.read_text())
        next(steps)
        ranks.each(lambda: b"")
        moved.append(int(LOOPBACK.read_text()) - before)

    def local(tensor) -> int:
        return getattr(tensor, "to_local", lambda: tensor)().nbytes

    weights = sum(map(local, lm.parameters()))
    moments = sum(local(x) for of in state.optimizer.state.values() for x in of.values()
                  if x.dim())
    if ranks.is_first():  # gradients have the size of the weights; the recipe drops them
        print(json.dumps({"parameters": sum(p.numel() for p in lm.parameters()),
                          "held": 2 * weights + moments,
                          "sent": min(moved[1:]) / ranks.count()}))


def measure(parallel: str, count: int) -> dict:
    start = [sys.executable]
    if count > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    done = subprocess.run(
        [*start, str(HERE), "--child", parallel], stdout=subprocess.PIPE, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return json.loads(next(ln for ln in done.stdout.splitlines() if ln.startswith('{"')))


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--out")
    flags.add_argument("--child", help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.child:
        child(args.child)
        return
    rows = []
    print(f"{'ranks':<6}{'':<6}{'held MB':>9}{'measured':>10}{'sent MB':>9}{'measured':>10}")
    for parallel, count in (("ddp", 1), ("ddp", 2), ("fsdp", 2), ("ddp", 4), ("fsdp", 4)):
        found = measure(parallel, count)
        P = found["parameters"]
        told = held(SMALL, count, parallel) * P / SMALL.parameters, sent(
            SMALL, count, parallel, 4, 8)
        rows.append({"ranks": count, "parallel": parallel, "held": told[0], "sent": told[1],
                     "measured held": found["held"], "measured sent": found["sent"]})
        print(f"{count:<6}{parallel if count > 1 else '':<6}{told[0] / 1e6:>9.1f}"
              f"{found['held'] / 1e6:>10.1f}{told[1] / 1e6:>9.1f}{found['sent'] / 1e6:>10.1f}")
    plans = [plan(*each) for each in PLANS]
    for told in plans:
        print()
        for name, value in told.items():
            shown = f"{value:>14,.4g}" if isinstance(value, float) else f"{value!s:>14}"
            print(f"{name:<42}{shown}")
    if args.out:
        Path(args.out).write_text(json.dumps({"measured": rows, "plans": plans}, indent=1))


if __name__ == "__main__":
    main()
