"""What is learned from, in batches.

Read rollouts.py (what a rollout is, its micro-batches, and the passes that measure it), collect.py
(sampling one), groups.py (several responses to a prompt) and credit.py (from scores to advantages);
preferences.py (pairs and ranked lists, each batch with its loss); demonstrations.py (texts, and the
language-model loss); responses.py (pairs as DPO learns them) and kept.py (what their reference says
of them); distillation.py (student and teacher before the same tokens). Imports rewards, models,
data, run and what lies below them.
"""
