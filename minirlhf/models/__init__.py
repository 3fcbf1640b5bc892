"""The language model and what is put on it.

Read transformer.py (a decoder for all families; config.py, rotary.py, cache.py), heads.py (value
head, reward model), alignment.py (which state belongs to which token), logprobs.py, divergence.py
(log-probs, entropy, a KL without all logits at once), sampling.py, generation.py and support.py.
Then lora.py with targets.py, dropout.py, quantized.py, int8.py, compiling.py, compiled_decoding.py,
parallel.py, sharded.py (several processes: passes they share, models they share out). Files:
pretrained.py, families.py, stored.py, stored_heads.py, stored_model.py; peft_files.py,
peft_config.py, fingerprint.py. README.md says which. Imports the top and files, not data nor run.
"""
