"""From rows of a file to token ids.

Read examples.py (what a recipe is given), split.py (a file's rows), formats.py (which columns they
may have, published.py: others' columns), parts.py (their text, messages, ids), arguments.py (what
they tell the chat template), encoding.py (all to ids) and tokenizer.py (what a folder says of
text), whose dialogues.py is a vocabulary.py with a chat_template.py, which runs template_worker.py;
ending.py has what a template writes behind an answer. Then rankings.py (ranked lists) and
batching.py (which rows a step takes). README.md has the
formats. Imports errors, streams and files; knows neither models nor run.
"""
