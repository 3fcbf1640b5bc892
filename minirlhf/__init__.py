"""RLHF of language models from scratch in pure PyTorch.

Who reads begins at README.md, "Read it in this order". Who runs types `minirlhf --help`. Each
folder is a wing whose own docstring says what lives there; it imports only from wings below it:

    tools > recipes, lessons > setup > evaluation > batches > rewards > models, data, run >
    equations, files

Public names are imported from their modules on first use (PEP 562), so that `import minirlhf`, and
with it `minirlhf --help`, does not wait for torch.
"""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "errors": ("UserError",),
    "equations.masking": ("masked_mean", "masked_sum", "masked_standardize", "masked_rescale"),
    "equations.kl": ("kl_k1", "kl_k2", "kl_k3", "AdaptiveKL"),
    "equations.advantages": ("token_rewards", "gae"),
    "equations.critic_free": (
        "group_advantages",
        "batch_scaled_advantages",
        "leave_one_out_advantages",
        "rewards_to_go",
        "sequence_surrogate",
        "cispo_loss",
    ),
    "equations.policy": ("clipped_surrogate", "clipped_value_loss"),
    "equations.preference": (
        "bradley_terry_loss",
        "plackett_luce_loss",
        "preference_accuracy",
    ),
    "equations.dpo": (
        "dpo_loss",
        "robust_dpo_loss",
        "ipo_loss",
        "hinge_dpo_loss",
        "simpo_loss",
        "orpo_loss",
        "kto_loss",
    ),
    "models.config": ("ModelConfig",),
    "models.transformer": ("CausalLM",),
    "models.logprobs": ("token_logprobs",),
    "models.divergence": ("token_divergence",),
    "models.heads": ("ValueHeadModel", "RewardModel"),
    "models.pretrained": ("load_pretrained", "save_pretrained", "load_reward_model"),
    "models.lora": ("add_lora", "merge_lora"),
    "models.peft_files": ("save_adapter", "load_adapter"),
    "models.sampling": ("Sampling",),
    "models.generation": ("Generation", "generate", "decode_steps"),
    "data.tokenizer": ("load_tokenizer", "Tokenizer"),
    "data.examples": ("load_prompts", "load_pairs", "load_texts"),
    "rewards.function": ("function_reward",),
    "batches.rollouts": ("Rollout", "RolloutBuffer"),
    "evaluation.updates": ("PPOStats",),
    "run.meters": ("Meters", "AverageMeter"),
    "run.checkpoint": ("TrainState", "save_checkpoint", "load_checkpoint"),
    "setup.sft_settings": ("SFTConfig",),
    "setup.reward_settings": ("RewardConfig",),
    "setup.dpo_settings": ("DPOConfig",),
    "setup.ppo_settings": ("PPOConfig",),
    "setup.grpo_settings": ("GRPOConfig",),
    "setup.distill_settings": ("DistillConfig",),
    "recipes.sft": ("sft",),
    "recipes.reward": ("reward",),
    "recipes.dpo": ("dpo",),
    "recipes.ppo": ("ppo", "ppo_step"),
    "recipes.grpo": ("grpo", "grpo_step"),
    "recipes.distill": ("distill",),
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
