"""What every run has, whatever it trains.

Read settings.py (what a config class declares), flags.py, config_file.py and yaml_file.py (how one
is given), folder.py, place.py and lock.py (the run's folder), distributed.py and watch.py (several
processes), dry_run.py (two steps, measured), crash.py, resume.py, started.py and repeat.py (a run
that failed, goes on, begins again), checkpoint.py, tensors.py, kinds.py (what changes), optim.py
(AdamW, rate, clipping), meters.py and glossary.py (the log's numbers), machine.py (device, dtype),
display.py, trackers.py, terminal.py, language.py (what is told), completion.py (for shells).
README.md says what a crash loses. Imports equations and files; knows neither models nor data.
"""
