"""The language model and what is put on it.

Read transformer.py (one decoder for all families, with config.py, rotary.py and cache.py), heads.py
(the value head, the reward model), alignment.py (which state belongs to which token), logprobs.py
and divergence.py (log-probs, entropy, the KL of two models, without all logits at once),
sampling.py, generation.py and support.py (how tokens are drawn). Then lora.py with targets.py,
quantized.py and compiling.py. Files: pretrained.py with families.py, stored.py, stored_heads.py and
stored_model.py; of adapters peft_files.py with peft_config.py and fingerprint.py. README.md says
which models. Imports errors, interrupt, streams and files; knows neither data nor run.
"""
