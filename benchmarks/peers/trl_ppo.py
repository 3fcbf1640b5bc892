"""Peer: TRL's PPO, 1.12 (the last release that has it) or 0.9.6 (the classic step). Prints one JSON
line: seconds of each update but the first, sampling and scoring included, and the peak of resident
memory."""

import argparse
import json
import os
import random
import tempfile
import time

os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)

flags = argparse.ArgumentParser()
flags.add_argument("--engine", choices=["trl112", "trl096"], required=True)
flags.add_argument("--model", required=True)
flags.add_argument("--prompts", required=True, help="JSON: a list of lists of ids")
flags.add_argument("--batch-size", type=int, default=16)
flags.add_argument("--new-tokens", type=int, default=64)
flags.add_argument("--epochs", type=int, default=2)
flags.add_argument("--mini-batches", type=int, default=2)
flags.add_argument("--updates", type=int, default=3)
flags.add_argument("--dtype", default="float32")
args = flags.parse_args()
torch.manual_seed(0)
random.seed(0)
tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
with open(args.prompts, encoding="utf-8") as file:
    ids = json.load(file)[: args.batch_size * args.updates]
bf16, rows, times = args.dtype == "bfloat16", args.batch_size, []


def trl112() -> None:
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.started = time.perf_counter()

        def on_step_end(self, *_, **__):
            now = time.perf_counter()
            times.append(now - self.started)
            self.started = now

    def model(kind, **more):
        made = kind.from_pretrained(args.model, dtype=torch.float32, **more)
        made.config.pad_token_id = 0
        return made

    tokenizer.pad_token_id = 0
    config = PPOConfig(
        # Accumulating would step in every other mini-batch only: TRL steps once in so many passes.
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=rows,
        gradient_accumulation_steps=1, num_mini_batches=args.mini_batches,
        num_ppo_epochs=args.epochs, total_episodes=rows * args.updates,
        response_length=args.new_tokens, local_rollout_forward_batch_size=rows, report_to=[],
        save_strategy="no", num_sample_generations=0, use_cpu=True, bf16=bf16, learning_rate=1e-6,
        kl_estimator="k1", disable_tqdm=True, gradient_checkpointing=False,
        missing_eos_penalty=1.0, stop_token=None,
    )
    data = Dataset.from_dict({"input_ids": ids})
    PPOTrainer(
        args=config, processing_class=tokenizer, model=model(AutoModelForCausalLM),
        ref_model=model(AutoModelForCausalLM),
        reward_model=model(AutoModelForSequenceClassification, num_labels=1),
        value_model=model(AutoModelForSequenceClassification, num_labels=1),
        train_dataset=data, eval_dataset=data.select(range(rows)), callbacks=[Clock()],
    ).train()


def trl096() -> None:
    from trl import (
        AutoModelForCausalLMWithValueHead,
        PPOConfig,
        PPOTrainer,
        create_reference_model,
    )

    policy = AutoModelForCausalLMWithValueHead.from_pretrained(
        args.model, torch_dtype=torch.float32
    )
    scorer = AutoModelForSequenceClassification.from_pretrained(
        args.model, num_labels=1, torch_dtype=torch.float32
    )
    scorer.config.pad_token_id = tokenizer.pad_token_id
    config = PPOConfig(
        batch_size=rows, mini_batch_size=rows // args.mini_batches, gradient_accumulation_steps=1,
        ppo_epochs=args.epochs, learning_rate=1e-6,
        accelerator_kwargs={"cpu": True, "mixed_precision": "bf16" if bf16 else "no"},
    )
    trainer = PPOTrainer(config, policy, create_reference_model(policy), tokenizer)
    for update in range(args.updates):
        started = time.perf_counter()
        queries = [torch.tensor(i) for i in ids[update * rows : (update + 1) * rows]]
        answers = trainer.generate(
            queries, batch_size=rows, return_prompt=False, max_new_tokens=args.new_tokens,
            min_new_tokens=args.new_tokens, do_sample=True, top_k=0, top_p=1.0,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers = [answer[: args.new_tokens] for answer in answers]
        texts = torch.stack([torch.cat(pair) for pair in zip(queries, answers, strict=True)])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            scores = scorer(texts).logits[:, 0].float()
        trainer.step(queries, answers, list(scores))
        times.append(time.perf_counter() - started)


{"trl112": trl112, "trl096": trl096}[args.engine]()
with open("/proc/self/status", encoding="utf-8") as file:  # ru_maxrss would know the parent's too
    peak = next(int(ln.split()[1]) for ln in file if ln.startswith("VmHWM")) * 1024
print(json.dumps({"seconds": times[1:], "peak_bytes": peak}))
