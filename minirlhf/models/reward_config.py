"""A reward model's keys of config.json: how many heads it has, and what normalises its score."""

from pathlib import Path

from torch import Tensor

from minirlhf.errors import UserError, printable
from minirlhf.models.heads import RewardModel
from minirlhf.models.transformer import CausalLM

REWARD_KEYS = ("reward_heads", "reward_lcb_coef", "reward_mean", "reward_std")  # ours
LARGEST = 1e30  # of a number


def reward_model_of(lm: CausalLM, score: Tensor, folder: Path) -> RewardModel:
    """The reward model, without its weights, that config.json and the head's shape describe.

    Args:
        score: the head's weight as stored, (heads, D).
        folder: named by every error.
    Raises:
        UserError: several labels that are no ensemble; a key that does not fit.
    """
    source, where = lm.config.source, folder / "config.json"
    heads = source.get("reward_heads", 1)
    if type(heads) is not int or heads < 1:
        raise UserError(
            f"{where}: reward_heads", f"is {printable(repr(heads), 80)}", "needs an integer from 1"
        )
    if score.shape[:1] != (heads,):
        legal = "one output: shape (1, hidden_size)" if heads == 1 else f"{heads} outputs"
        what = f"'score.weight' is {tuple(score.shape)}"
        raise UserError(folder, what, f"a reward model has {legal}")
    numbers = {"reward_lcb_coef": 0.0, "reward_mean": 0.0, "reward_std": 1.0}
    for key, default in numbers.items():
        value = numbers[key] = source.get(key, default)
        got = f"is {printable(repr(value), 80)}"
        if type(value) not in (int, float) or not abs(value) <= LARGEST:
            raise UserError(f"{where}: {key}", got, "needs a finite number")
    lcb_coef, mean, std = numbers.values()
    if lcb_coef < 0 or (lcb_coef and heads == 1):
        legal = "0 for a single head, else 0 or more"
        raise UserError(f"{where}: reward_lcb_coef", f"is {lcb_coef}", legal)
    if not std > 0:
        raise UserError(f"{where}: reward_std", f"is {std}", "needs a number above 0")
    model = RewardModel(lm, bool(source.get("read_before_eos", False)), heads, float(lcb_coef))
    model.reward_mean, model.reward_std = float(mean), float(std)
    return model


def reward_keys(model: RewardModel) -> dict:
    """What config.json says of a reward model; a single head that is not normalised needs no key
    of ours."""
    labels = [f"LABEL_{head}" for head in range(model.heads)]
    keys = {
        "id2label": {str(head): label for head, label in enumerate(labels)},
        "label2id": {label: head for head, label in enumerate(labels)},
        "problem_type": "regression",  # else vLLM puts a sigmoid on the score
        "read_before_eos": model.read_before_eos,
    }
    if model.heads > 1:  # other tools see that many numbers for a text, and no reward
        keys |= {"reward_heads": model.heads, "reward_lcb_coef": model.lcb_coef}
    if (model.reward_mean, model.reward_std) != (0.0, 1.0):
        keys |= {"reward_mean": model.reward_mean, "reward_std": model.reward_std}
    return keys
