"""Peer: TRL's RewardTrainer, full fine-tuning. Prints one JSON line: seconds and tokens of each
step after the first."""

import argparse
import json
import os
import tempfile
import time

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import RewardConfig, RewardTrainer

flags = argparse.ArgumentParser()
flags.add_argument("--model", required=True)
flags.add_argument("--pairs", required=True, help="JSON lines of chosen and rejected")
flags.add_argument("--steps", type=int, default=6)
flags.add_argument("--batch-size", type=int, default=16)
flags.add_argument("--dtype", default="float32")
args = flags.parse_args()
tokenizer = AutoTokenizer.from_pretrained(args.model)
tokenizer.pad_token = "<|endoftext|>"
model = AutoModelForSequenceClassification.from_pretrained(
    args.model, num_labels=1, dtype=torch.float32
)
model.config.pad_token_id = tokenizer.pad_token_id
with open(args.pairs, encoding="utf-8") as file:
    rows = [json.loads(line) for line in file]
seconds, tokens = [], []


class Clock(TrainerCallback):
    def on_step_begin(self, *_, **__):
        self.started = time.perf_counter()

    def on_step_end(self, *_, **__):
        seconds.append(time.perf_counter() - self.started)


class Counting(RewardTrainer):
    def training_step(self, model, inputs, *rest, **named):
        tokens.append(int(inputs["attention_mask"].sum()))
        return super().training_step(model, inputs, *rest, **named)


config = RewardConfig(
    output_dir=tempfile.mkdtemp(), per_device_train_batch_size=args.batch_size,
    max_steps=args.steps, report_to=[], save_strategy="no", use_cpu=True,
    bf16=args.dtype == "bfloat16", learning_rate=1e-6, logging_steps=1000, disable_tqdm=True,
    gradient_checkpointing=False, max_length=128,
)
data = Dataset.from_list(rows[:4096])
Counting(
    model=model, args=config, processing_class=tokenizer, train_dataset=data, callbacks=[Clock()]
).train()
with open("/proc/self/status", encoding="utf-8") as file:  # ru_maxrss would know the parent's too
    peak = next(int(ln.split()[1]) for ln in file if ln.startswith("VmHWM")) * 1024
print(json.dumps({"seconds": seconds[1:], "tokens": tokens[1:], "peak_bytes": peak}))
