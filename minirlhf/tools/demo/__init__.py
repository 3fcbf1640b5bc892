"""`minirlhf demo`: all of RLHF in two minutes, on a small world whose true reward is known.

In order: command.py (the runs), film_data.py (the files that they read), film_world.py (a grammar
that writes film reviews from the words of film_world.toml), film_judge.py (the true reward, and the
noisy rater whose preferences are learned from), outcome.py (what came of it). Runs the recipes as
everybody does.
"""
