"""What a command reads, refuses and loads before its loop begins.

Read groups.py (settings that commands share), then {policy,sft,reward,dpo,ppo,grpo}_settings.py and
distill_settings.py (the config of each recipe, and what it refuses) with adapter_settings.py (their
dropout), parallel_settings.py and presets/ (other trainers' numbers). sft.py, reward.py, dpo.py,
ppo.py, grpo.py and distill.py look at what a run is given before it costs anything, then load it,
by what they share: training.py and common.py, policy.py and policy_data.py (rewards and prompts),
roles.py (the models, and which of them share weights), memory.py (about how much a run will hold)
and longest.py (the rows of a dry run). The settings import no torch. Imports evaluation and what
lies below.
"""
