"""The language model and what is put on it.

Read transformer.py (one decoder for all families, with config.py, rotary.py and linear.py),
heads.py (the value head, the reward model), alignment.py (which state belongs to which token),
logprobs.py (log-probs and entropy without all logits at once), generation.py (sampling, with
cache.py) and support.py (which tokens could be drawn); then lora.py, compiling.py, and the files:
pretrained.py, families.py, stored.py. Imports equations and files; knows neither data nor run.
"""
