"""One sample of one step as a table that a person can check: `minirlhf explain ppo [RUN]`.

Every number is that of the functions in `minirlhf.equations`. command.py picks the algorithm,
record.py reads what a run recorded, tiny.py makes a record of the demo's model where no run is
given, rollouts.py has what PPO and GRPO share; ppo.py, grpo.py and preference.py (reward models,
DPO) compute and lay out; page.py prints tables and equations.
"""
