"""Groups of settings: each setting is declared once, and its words are those of what reads it."""

import ast
from collections import Counter
from pathlib import Path

import pytest

from minirlhf import cli
from minirlhf.batches.preferences import LIST_LOSSES
from minirlhf.batches.rollouts import KL_ESTIMATORS
from minirlhf.data.examples import OVERLONG
from minirlhf.equations.scores import MISSING_EOS, SCALINGS
from minirlhf.rewards.service import FORMS
from minirlhf.run.optim import SCHEDULES
from minirlhf.run.settings import settings_of
from minirlhf.setup.dpo_settings import DPOConfig
from minirlhf.setup.ppo_settings import PPOConfig
from minirlhf.setup.reward_settings import RewardConfig
from minirlhf.setup.sft_settings import SFTConfig
from minirlhf.tools.check.rows import KINDS
from minirlhf.tools.settings import CheckConfig
from tests.kill_harness import RECIPES

CONFIGS = {name: verb.config() for name, verb in cli.VERBS.items() if verb.settings}


def test_each_setting_is_declared_once():
    declared = Counter()
    for path in (Path(__file__).parents[2] / "minirlhf").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            call = getattr(node, "value", None) if isinstance(node, ast.AnnAssign) else None
            if getattr(getattr(call, "func", None), "id", None) == "setting":
                declared[node.target.id] += 1
    assert len(declared) > 100 and not [name for name, times in declared.items() if times > 1]


# The groups cannot take these from where they are read, which imports torch.
CHOICES = [
    (SFTConfig, "schedule", SCHEDULES), (SFTConfig, "overlong", OVERLONG),
    (RewardConfig, "list_loss", LIST_LOSSES), (PPOConfig, "kl_estimator", KL_ESTIMATORS),
    (PPOConfig, "missing_eos", MISSING_EOS), (PPOConfig, "score_scaling", SCALINGS),
    (PPOConfig, "reward_format", FORMS),
    (CheckConfig, "recipe", ("auto", *(r for r in dict.fromkeys(
        recipe for kind in KINDS.values() for recipe in kind.recipes
    )))),
]


@pytest.mark.parametrize(("config", "name", "known"), CHOICES, ids=[name for _, name, _ in CHOICES])
def test_choices_are_what_is_known_where_they_are_read(config, name, known):
    assert set(settings_of(config)[name].choices) == set(known)


@pytest.mark.parametrize("verb", CONFIGS)
def test_each_setting_has_a_help_sentence_under_a_heading(verb):
    settings = settings_of(CONFIGS[verb])
    assert all(item.help for item in settings.values())
    first = getattr(CONFIGS[verb], "SHOWN_FIRST", settings)
    assert set(first) <= settings.keys() and len(first) <= 28
    if verb in RECIPES:
        required = {name for name, item in settings.items() if item.required}
        assert len(first) <= 15 and required | {"learning_rate", "resume"} <= set(first)


def test_the_trainers_have_their_defaults():
    """From the commands that README and pages show, which name no more than they change."""
    wanted = {
        SFTConfig: {"learning_rate": 2e-5, "batch_size": 16, "epochs": 1.0, "adam_epsilon": 1e-8,
                    "max_length": 1024, "overlong": "drop", "log_every": 10, "save_every": 100},
        RewardConfig: {"learning_rate": 1e-5, "batch_size": 16, "epochs": 1.0, "heads": 1,
                       "adam_epsilon": 1e-8, "overlong": "drop", "log_every": 10},
        DPOConfig: {"learning_rate": 1e-6, "batch_size": 16, "epochs": 1.0, "loss": "sigmoid",
                    "overlong": "drop", "log_every": 10},
        PPOConfig: {"learning_rate": 3e-6, "batch_size": 64, "epochs": 4, "adam_epsilon": 1e-5,
                    "steps": 100, "overlong": "error", "log_every": 1, "save_every": 20,
                    "kl_coef": 0.05, "gamma": 1.0, "lam": 0.95, "clip_low": 0.2, "vf_coef": 0.1},
    }
    for config, numbers in wanted.items():
        found = {name: settings_of(config)[name].default for name in numbers}
        assert found == numbers
