"""The language model and what is put on it.

Read transformer.py (one decoder for all families, with config.py, rotary.py and cache.py), heads.py
(the value head, the reward model), alignment.py (which state belongs to which token), logprobs.py
(log-probs and entropy without all logits at once), divergence.py (the same for the KL of two
models), sampling.py (what a token is drawn from), generation.py (the loop that draws) and
support.py (which tokens could be drawn). Then lora.py, quantized.py and compiling.py. The files are
read by pretrained.py, families.py, stored.py and stored_heads.py (the heads of peers). README.md
says which models. Imports errors, interrupt, streams and files; knows neither data nor run.
"""
