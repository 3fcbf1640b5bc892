"""From rows of a file to token ids.

Read examples.py (what a recipe is given), split.py (a file's rows), formats.py (which columns they
may have, published.py: others' columns), parts.py (text, messages, ids), arguments.py (what rows
tell the chat template), encoding.py (all to ids), tokenizer.py (what a folder says of text), whose
dialogues.py joins a vocabulary.py (library.py: what it may cost, control.py: names of control
tokens) and a chat_template.py (run by template_worker.py), ending.py (what is written behind an
answer), rankings.py (ranked lists) and batching.py (rows of a step). Imports errors, streams and
files; not models, not run.
"""
