"""The language model and what is put on it.

Read transformer.py (one decoder for all families, with config.py, rotary.py and cache.py), heads.py
(the value head, the reward model), alignment.py (which state belongs to which token), logprobs.py
and divergence.py (log-probs, entropy, the KL of two models, without all logits at once),
sampling.py, generation.py and support.py (how tokens are drawn). Then lora.py with targets.py,
dropout.py, quantized.py, int8.py, compiling.py with compiled_decoding.py, and parallel.py (passes
that several processes share). Files: pretrained.py, families.py, stored.py,
stored_heads.py, stored_model.py; of adapters peft_files.py, peft_config.py, fingerprint.py.
README.md says which. Imports errors, interrupt, ranks, streams, files; knows neither data nor run.
"""
