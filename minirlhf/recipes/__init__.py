"""One algorithm a file, with all its settings: what `minirlhf sft`, `reward`, … run.

Read ppo.py: `ppo`, the generator, then `ppo_step`, the update, then `main`. grpo.py, distill.py,
sft.py, reward.py and dpo.py are made alike. Each yields after every step; the caller's own `for`
replaces every callback. README.md shows loops and losses of your own. Recipes import all that lies
below, never each other.
"""
