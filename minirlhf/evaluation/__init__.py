"""What a model is worth, in numbers that mean what they say.

Read reward.py (held-out preferences), dpo.py (the same of a policy), card.py (a reward model on one
page), policy.py (held-out prompts, paired with the policy's start), distill.py (a student's KL to
its teacher on such prompts), rollout.py, groups.py and updates.py (statistics of a step of PPO or
GRPO), invariants.py (what must hold in one), alarms.py (what a run warns of), samples.py and
report/ (a run on one page).
README.md says which number to look at first. Imports batches and what lies below.
"""
