"""`minirlhf check`: data and model before a run.

In order: rows.py (a file's rows as they stand, and as token ids), warn.py (what is odd about them),
facts.py (counts and lengths, and what the recipe would refuse), words.py (the facts as text),
command.py (the command). Imports what the recipes read data and models with, and no recipe.
"""
