"""Peer: TRL's SFT, reward, DPO or GRPO trainer, without gradient checkpointing; all weights are
trained, or peft's adapters.

Prints one JSON line: seconds and tokens of each step after the first.
"""

import argparse
import json
import os
import tempfile
import time

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

flags = argparse.ArgumentParser()
flags.add_argument("--recipe", choices=("sft", "reward", "dpo", "grpo"), required=True)
flags.add_argument("--model", required=True)
flags.add_argument("--rows", required=True, help="JSON lines, of columns that the trainer reads")
flags.add_argument("--steps", type=int, default=6)
flags.add_argument("--batch-size", type=int, default=16)
flags.add_argument("--samples", type=int, default=4, help="grpo: of a prompt")
flags.add_argument("--new-tokens", type=int, default=64, help="grpo: of each sample")
flags.add_argument("--dtype", default="float32")
flags.add_argument("--lora-rank", type=int, default=0, help="adapters of peft on all linear layers")
args = flags.parse_args()
tokenizer = AutoTokenizer.from_pretrained(args.model)
tokenizer.pad_token = "<|endoftext|>"
kind = AutoModelForCausalLM
if args.recipe == "reward":
    kind = AutoModelForSequenceClassification
more = {"num_labels": 1} if args.recipe == "reward" else {}
model = kind.from_pretrained(args.model, dtype=torch.float32, **more)
model.config.pad_token_id = tokenizer.pad_token_id
with open(args.rows, encoding="utf-8") as file:
    rows = [json.loads(line) for line in file]
seconds, tokens = [], []


class Clock(TrainerCallback):
    def on_step_begin(self, *_, **__):
        self.started = time.perf_counter()

    def on_step_end(self, *_, **__):
        seconds.append(time.perf_counter() - self.started)


def counting(trainer: type) -> type:
    """The trainer, counting the real tokens of the batches that it is handed."""

    class Counting(trainer):
        def training_step(self, model, inputs, *rest, **named):
            if args.recipe == "grpo":
                tokens.append(args.batch_size * args.samples * args.new_tokens)
            else:
                tokens.append(int(inputs["attention_mask"].sum()))
            return super().training_step(model, inputs, *rest, **named)

    return Counting


def brevity(completions, **columns):
    """Of conversations."""
    return [-len(turns[0]["content"]) / 100 for turns in completions]


shared = {
    "output_dir": tempfile.mkdtemp(), "max_steps": args.steps, "report_to": [],
    "per_device_train_batch_size": args.batch_size, "save_strategy": "no", "use_cpu": True,
    "bf16": args.dtype == "bfloat16", "learning_rate": 1e-6, "logging_steps": 1000,
    "disable_tqdm": True, "gradient_checkpointing": False,
}
if args.lora_rank:
    from peft import LoraConfig

    heads = {"modules_to_save": ["score"]} if args.recipe == "reward" else {}
    adapters = LoraConfig(
        r=args.lora_rank, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear",
        task_type="SEQ_CLS" if args.recipe == "reward" else "CAUSAL_LM", **heads,
    )
given = {"processing_class": tokenizer, "train_dataset": Dataset.from_list(rows),
         "callbacks": [Clock()]} | ({"peft_config": adapters} if args.lora_rank else {})
match args.recipe:
    case "sft":
        trainer = counting(SFTTrainer)(
            model=model, args=SFTConfig(max_length=128, **shared), **given)
    case "reward":
        trainer = counting(RewardTrainer)(
            model=model, args=RewardConfig(max_length=128, **shared), **given)
    case "dpo":
        trainer = counting(DPOTrainer)(
            model=model, args=DPOConfig(max_length=128, **shared), **given)
    case "grpo":
        shared["per_device_train_batch_size"] *= args.samples
        config = GRPOConfig(
            num_generations=args.samples, max_completion_length=args.new_tokens, beta=0.04,
            generation_kwargs={"min_new_tokens": args.new_tokens}, **shared,
        )
        trainer = counting(GRPOTrainer)(model=model, args=config, reward_funcs=brevity, **given)
trainer.train()
with open("/proc/self/status", encoding="utf-8") as file:  # ru_maxrss would know the parent's too
    peak = next(int(ln.split()[1]) for ln in file if ln.startswith("VmHWM")) * 1024
print(json.dumps({"seconds": seconds[1:], "tokens": tokens[1:], "peak_bytes": peak}))
