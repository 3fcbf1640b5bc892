"""Where scores come from: any function from completions to a (B,) tensor is a reward source.

Read source.py (what a source is, the sum of several), verifiers.py (rules, as `math`, whose
patterns regex_worker.py searches for), function.py (a Python function as one; what it returns is
read by returned.py, its file is run by user_code.py, what it changes of the process is put back by
containment.py), model.py (a reward model's folder), service.py (rewards over HTTP, their replies
kept by journal.py), shared.py (sources that one of several processes asks), parse.py (what --reward
may say) and load.py (what it names, read). README.md has examples. Imports models, data, run and
what lies below them.
"""
