"""`minirlhf demo`: all of RLHF in two minutes, on a small world whose true reward is known.

In order: command.py (the runs, and what came of them), film_world.py (a grammar that writes film
reviews from the words of film_world.toml), film_judge.py (the true reward, and the noisy rater that
the reward model learns from). Runs the recipes as everybody does.
"""
