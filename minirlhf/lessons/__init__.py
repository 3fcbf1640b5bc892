"""The algorithms as one reads them: a page each, default settings only.

Read sft.py, then reward.py, then ppo.py; grpo.py does without its critic, distill.py without a
reward, dpo.py without sampling too. Each does to the weights what its recipe does with default
settings on a CPU, byte for byte; a test holds the two together. What a lesson leaves out (settings,
checkpoints, logs, evaluation, most faults) is in `recipes/`. A lesson has at most 200 lines, and
zero_grad, backward, clip and step on neighbouring ones.

A lesson may import what a recipe may: every wing below. The two do not import each other.
"""
