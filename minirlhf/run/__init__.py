"""What every run has, whatever it trains.

Read settings.py (what a config class declares), flags.py and config_file.py (a command line and a
file become a config), folder.py and lock.py (the run's folder, its log, and who holds it),
dry_run.py (two steps that are measured), resume.py (what a resumed run may change), checkpoint.py
and kinds.py (all that changes in a run, its commit, and what fits it), optim.py (AdamW, learning
rate, clipping), meters.py and glossary.py (the numbers of the log), machine.py (device and dtype),
display.py (what is told), terminal.py (colours, widths), language.py (translations).
README.md says what a crash loses. Imports equations and files; knows neither models nor data.
"""
