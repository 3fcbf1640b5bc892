"""From rows of a file to token ids.

Read examples.py (what a recipe is given), formats.py (which columns a row may have), encoding.py
(parts of a row to ids), tokenizer.py (vocabulary.py is its table of tokens), chat_template.py
(rendered in the process of template_worker.py; special_names.py keeps names of special tokens
text); then rankings.py (ranked lists) and batching.py (which rows a step takes). README.md has the
formats. Imports equations and files; knows neither models nor run.
"""
