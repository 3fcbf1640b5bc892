"""`minirlhf report`: runs on one page.

In order: settings.py (its settings), command.py (the command) and plot.py (the curves as PNG, with
matplotlib). The page itself is made in evaluation/report/, by which recipes end, too.
"""
