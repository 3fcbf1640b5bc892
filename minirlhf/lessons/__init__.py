"""The three algorithms as one reads them: a page each, default settings only.

Read sft.py, then reward.py, then ppo.py. Each does to the weights what its recipe does with default
settings, byte for byte; a test holds the two together. What a lesson leaves out (settings,
checkpoints, logs, evaluation, faults of the machine and of the data) is in `recipes/`.

A lesson may import what a recipe may: every wing below. The two do not import each other.
"""
