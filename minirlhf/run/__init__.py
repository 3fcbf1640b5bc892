"""What every run has, whatever it trains.

Read settings.py (what a config class declares), flags.py, config_file.py and yaml_file.py (how one
is given), folder.py, place.py and lock.py (the run's folder, where it may be, who holds it),
distributed.py and watch.py (several processes), dry_run.py (two steps, measured), crash.py (what is
kept of a fault), resume.py (what a resumed run may change), started.py and repeat.py (a run that
begins again, or another like it), checkpoint.py and kinds.py (what changes in a run, its commit),
optim.py (AdamW, rate, clipping), meters.py and glossary.py (the log's numbers), machine.py (device
and dtype), display.py and trackers.py (what is told), terminal.py (colours), language.py
(translations), completion.py (for shells).
README.md says what a crash loses. Imports equations and files; knows neither models nor data.
"""
