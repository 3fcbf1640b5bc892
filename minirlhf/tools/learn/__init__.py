"""Exercises: change a line or a setting, look at what happens, and read why.

exercises.toml has the texts, command.py shows them, gradcheck.py compares the gradient of every
loss with finite differences.
"""
