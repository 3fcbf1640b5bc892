"""What a command reads, refuses and loads before its loop begins.

Read sft.py, reward.py and ppo_settings.py (the settings of each recipe, and what they refuse), then
ppo.py (all that PPO looks at before it costs anything), presets.py (other trainers' numbers),
common.py, and memory_plans.py and memory.py (what a run will hold). Imports evaluation and what
lies below.
"""
