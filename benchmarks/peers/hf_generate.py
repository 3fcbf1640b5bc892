"""Peer: transformers' generate(); prints one JSON line for each batch size: new tokens a second."""

import argparse
import json
import os
import time

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import AutoModelForCausalLM

flags = argparse.ArgumentParser()
flags.add_argument("--model", required=True)
flags.add_argument("--prompts", required=True, help="JSON: a list of lists of ids")
flags.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16, 64])
flags.add_argument("--new-tokens", type=int, default=64)
flags.add_argument("--dtype", default="float32")
flags.add_argument("--repeats", type=int, default=3)
args = flags.parse_args()
with open(args.prompts, encoding="utf-8") as file:
    ids = json.load(file)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
for rows in args.batch_sizes:
    x, seconds = torch.tensor(ids[:rows]), []
    for _ in range(args.repeats + 1):
        started = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                input_ids=x, attention_mask=torch.ones_like(x), max_new_tokens=args.new_tokens,
                min_new_tokens=args.new_tokens, do_sample=True, top_k=0, pad_token_id=0,
            )
        seconds.append(time.perf_counter() - started)
    print(json.dumps({"rows": rows, "seconds": seconds[1:]}), flush=True)
