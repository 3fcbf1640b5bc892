"""Every equation of RLHF once, as a function of tensors: shapes, units and paper in its docstring.

Read advantages.py (per-token rewards, GAE), policy.py (the clipped losses), critic_free.py (GRPO,
RLOO, REINFORCE++, GSPO, CISPO), kl.py, preference.py (Bradley-Terry, Plackett-Luce) and dpo.py (DPO
and its family); then masking.py, which all of them reduce with, scores.py (the scale of scores,
rules for truncated responses) and intervals.py (win rates, correlations).
Losses come back unreduced. Imports torch, and nothing of the package.
"""
