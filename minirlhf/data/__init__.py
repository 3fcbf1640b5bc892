"""From rows of a file to token ids.

Read examples.py (what a recipe is given), formats.py (which columns a row may have), parts.py (a
column's text, messages or ids), encoding.py (these to ids) and tokenizer.py, which is a
vocabulary.py with a chat_template.py, whose process is template_worker.py. Then rankings.py (ranked
lists) and batching.py (which rows a step takes). README.md has the formats. Imports errors, streams
and files; knows neither models nor run.
"""
