"""From rows of a file to token ids.

Read examples.py (what a recipe is given), split.py (a file's rows), formats.py (which columns they
may have; others' by published.py, questions.py and answers.py), parts.py (text, messages, ids),
arguments.py (what rows tell the chat template), encoding.py (all to ids), tokenizer.py (what a
folder says of text, an old one in merges.py), control.py (what stays text), vocabulary.py
(library.py: what it may cost) and chat_template.py (run by template_worker.py), joined by
rendering.py (to text), dialogues.py (to ids) and turns.py (which are learned); pieces.py (back to
text); ending.py, rankings.py, unpaired.py and batching.py (which rows a step takes). Imports
errors, streams and files; not models, not run.
"""
