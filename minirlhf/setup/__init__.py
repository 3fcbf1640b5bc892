"""What a command reads, refuses and loads before its loop begins.

Read groups.py (settings that commands share), then {sft,reward,ppo}_settings.py (the config of each
recipe, and what it refuses) with presets/ (other trainers' numbers), and sft.py, reward.py and
ppo.py (what is looked at before it costs anything, then loaded) with ppo_data.py, common.py,
memory.py (about how much a run will hold), and longest.py (the rows of a dry run). The settings
import no torch. Imports evaluation and what lies below.
"""
