"""What is learned from.

Read rollouts.py (what is kept of a rollout, its micro-batches, the passes that measure it)
collect.py (sampling one) and credit.py (rewards and advantages of its tokens); preferences.py
(pairs and ranked lists, each batch with its loss); demonstrations.py (texts, and the language-model
loss). Imports rewards, models, data and what lies below them.
"""
