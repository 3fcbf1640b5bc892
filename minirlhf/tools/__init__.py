"""What looks at data, models and runs from outside; no recipe imports it.

check/ (data before a run), selftest/ (whether a device computes right), chat/ (a talk with a
model), sample.py and score.py (what it says), best_of.py (its best responses as data; unfinished.py
lets it go on), tasks.py (problems with exact answers), serve.py (a reward model as a service;
answers.py has its replies), report/ (runs on one page), explain/ (one step in numbers), learn/
(exercises), metrics.py (what the log's numbers mean), coming_from.py (other tools' parameters),
export.py (a checkpoint as a model), rerun.py (again), completion.py (for shells), demo/ (all of
RLHF in two minutes) and curve.py (its picture). settings.py and sampling_settings.py have the
settings. May import everything but the command line.
"""
