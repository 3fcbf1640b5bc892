"""RLHF of language models from scratch in pure PyTorch.

Public names are imported from their modules on first use (PEP 562), so that `import minirlhf`, and
with it `minirlhf --help`, does not wait for torch.
"""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "errors": ("UserError",),
    "masking": ("masked_mean", "masked_sum", "masked_standardize", "masked_rescale"),
    "kl": ("kl_k1", "kl_k2", "kl_k3", "AdaptiveKL"),
    "losses": (
        "bradley_terry_loss",
        "plackett_luce_loss",
        "preference_accuracy",
        "dpo_loss",
        "clipped_surrogate",
        "clipped_value_loss",
    ),
    "advantages": ("token_rewards", "gae", "group_advantages"),
    "transformer": ("CausalLM", "ModelConfig"),
    "logprobs": ("token_logprobs",),
    "heads": ("ValueHeadModel", "RewardModel"),
    "pretrained": ("load_pretrained", "save_pretrained", "load_reward_model"),
    "generation": ("Sampling", "Generation", "generate", "decode_steps"),
    "tokenizer": ("load_tokenizer", "Tokenizer"),
    "rollout": ("Rollout", "RolloutBuffer"),
    "meters": ("Meters", "AverageMeter"),
    "checkpoint": ("TrainState", "save_checkpoint", "load_checkpoint"),
    "recipes.sft": ("sft", "SFTConfig"),
    "recipes.reward": ("reward", "RewardConfig"),
    "ppo_config": ("PPOConfig",),
    "ppo_update": ("ppo_step", "PPOStats"),
    "recipes.ppo": ("ppo",),
}
_MODULE_OF = {name: f"{__name__}.{module}" for module, names in _PUBLIC.items() for name in names}

__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # the next use finds it without coming here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
