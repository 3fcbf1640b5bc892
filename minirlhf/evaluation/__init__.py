"""What a model is worth, in numbers that mean what they say.

Read reward.py (held-out preferences), card.py (a reward model on one page), policy.py (held-out
prompts, paired with the policy's start), rollout.py and updates.py (statistics of a rollout and of
the updates on it), samples.py, invariants.py (what must hold at a run's start) and alarms.py (what
a run warns of). README.md says which number to look at first. Imports batches and what lies below.
"""
