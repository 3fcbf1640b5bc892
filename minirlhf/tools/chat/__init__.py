"""`minirlhf chat`: a conversation in the terminal, with what each token is worth.

In order: answer.py (a model that answers, piece by piece), heat.py (the reward, value, KL,
advantage or log-prob of each token, by the functions that PPO runs), screen.py (columns and
colours), load.py (the models, and what a run says of them), keyboard.py (what is typed),
conversation.py (everyone's answer, and /commands), command.py (the command). Imports what loads
models and scores them.
"""
