"""PPO's settings as others had them: `--preset NAME`, and `--explain-preset NAME` for the sources.

A preset sets numbers, not faults: what was wrong there is right here, and said under `differs`.
Models, data, the length of the run and what only memory and speed depend on stay with you, unless
the source fixes them.
"""

from minirlhf.run.flags import Preset

_TRL = "trl 0.9.6, ppo_config.py: "
_LF = "LLaMA-Factory, "
_HF = "transformers, TrainingArguments: "
_N = "arXiv:2403.17031, "
_SFD = "summarize_from_feedback_details: "
_I = "arXiv:2203.02155, "

_TRL_VALUES = {
    "batch_size": (128, _TRL + "batch_size"),
    "mini_batches": (1, _TRL + "batch_size / (mini_batch_size · gradient_accumulation_steps)"),
    "epochs": (4, _TRL + "ppo_epochs"),
    "learning_rate": (1.41e-5, _TRL + "learning_rate"),
    "schedule": ("constant", "trl 0.9.6, ppo_trainer.py: lr_scheduler None"),
    "warmup_steps": (0, "trl 0.9.6, ppo_trainer.py: lr_scheduler None"),
    "weight_decay": (0.0, "trl 0.9.6, ppo_trainer.py: torch's Adam"),
    "adam_epsilon": (1e-8, "trl 0.9.6, ppo_trainer.py: torch's Adam"),
    "critic_learning_rate": (1.41e-5, "trl 0.9.6, ppo_trainer.py: one group of parameters"),
    "max_grad_norm": (None, _TRL + "max_grad_norm"),
    "kl_coef": (0.2, _TRL + "init_kl_coef"),
    "kl_target": (6.0, _TRL + "target, adap_kl_ctrl"),
    "kl_horizon": (10_000.0, _TRL + "horizon"),
    "kl_estimator": ("k1", _TRL + "kl_penalty 'kl'"),
    "kl_in": ("reward", "trl 0.9.6, ppo_trainer.py: compute_rewards"),
    "gamma": (1.0, _TRL + "gamma"),
    "lam": (0.95, _TRL + "lam"),
    "clip_low": (0.2, _TRL + "cliprange"),
    "clip_high": (0.2, _TRL + "cliprange"),
    "value_clip": (0.2, _TRL + "cliprange_value"),
    "vf_coef": (0.1, _TRL + "vf_coef"),
    "entropy_coef": (0.0, "trl 0.9.6, ppo_trainer.py: loss"),
    "dual_clip": (None, "trl 0.9.6, ppo_trainer.py: loss"),
    "max_ratio": (10.0, _TRL + "ratio_threshold"),
    "early_stop_kl": (None, _TRL + "early_stopping False"),
    "whiten_advantages": (True, "trl 0.9.6, ppo_trainer.py: compute_advantages"),
    "whiten_rewards": (False, _TRL + "whiten_rewards"),
    "score_scaling": ("none", _TRL + "use_score_scaling, use_score_norm"),
    "score_clip": (None, _TRL + "score_clip"),
    "missing_eos_penalty": (0.0, "trl 0.9.6, ppo_trainer.py: has none"),
    "bootstrap_truncated": (False, "trl 0.9.6, ppo_trainer.py: compute_advantages"),
}
_TRL_DIFFERS = (
    "whitened rewards are masked again: there padding leaks into the advantages",
    "an update beyond max_ratio is left out: there the optimizer steps on gradients of 0",
    "losses count all tokens of an update alike: there each mini_batch_size rows weigh alike",
    "log-probs are of the law that is sampled, at its temperature; there always at temperature 1",
    "metrics are masked: minirlhf metrics",
)

TRL = Preset(
    "TRL 0.9.6's PPOTrainer and its PPOConfig",
    {
        **_TRL_VALUES,
        "temperature": (1.0, "trl 0.9.6, ppo_trainer.py: log-probs of raw logits"),
        "top_k": (0, "trl 0.9.6, docs: generation_kwargs of the quickstart"),
        "top_p": (1.0, "trl 0.9.6, docs: generation_kwargs of the quickstart"),
    },
    _TRL_DIFFERS,
)

LLAMA_FACTORY = Preset(
    "LLaMA-Factory's ppo stage, which runs on TRL 0.9.6",
    {
        **_TRL_VALUES,
        "batch_size": (8, _HF + "per_device_train_batch_size · accumulation · ppo_buffer_size 1"),
        "mini_batches": (1, _LF + "finetuning_args.py: ppo_buffer_size"),
        "epochs": (4, _LF + "finetuning_args.py: ppo_epochs"),
        "learning_rate": (5e-5, _HF + "learning_rate"),
        "critic_learning_rate": (5e-5, _HF + "learning_rate"),
        "schedule": ("linear", _HF + "lr_scheduler_type"),
        "warmup_steps": (0, _HF + "warmup_steps"),
        "weight_decay": (0.0, _HF + "weight_decay"),
        "adam_epsilon": (1e-8, _HF + "adam_epsilon"),
        "max_grad_norm": (1.0, _HF + "max_grad_norm"),
        "kl_target": (6.0, _LF + "finetuning_args.py: ppo_target"),
        "whiten_rewards": (False, _LF + "finetuning_args.py: ppo_whiten_rewards"),
        "score_scaling": ("none", _LF + "finetuning_args.py: ppo_score_norm"),
        "temperature": (0.95, _LF + "generating_args.py: temperature"),
        "top_p": (0.7, _LF + "generating_args.py: top_p"),
        "top_k": (50, _LF + "generating_args.py: top_k"),
        "max_new_tokens": (1024, _LF + "generating_args.py: max_new_tokens"),
        "lora_rank": (8, _LF + "finetuning_args.py: finetuning_type lora, lora_rank"),
        "lora_alpha": (16.0, _LF + "finetuning_args.py: lora_alpha, twice the rank"),
    },
    (
        *_TRL_DIFFERS,
        "no dropout while measuring or training: there old values see 0.1 of it (LF#5246)",
        "the reference is the policy at step 0, not the base under an adapter that is continued "
        "(LF#6805)",
        "the learning rate ends at the last step: there it counts a part batch that is never run",
        "kl_horizon 10,000 is in responses: with 8 a step kl_coef hardly moves, there as here",
    ),
)

NPLUS = Preset(
    "Huang et al. 2024, The N+ Implementation Details of RLHF with PPO (TL;DR summaries)",
    {
        "steps": (1953, _N + "table of PPO: 1,000,000 episodes, 512 a step"),
        "batch_size": (512, _N + "table of PPO: batch size"),
        "mini_batches": (1, _N + "table of PPO: number of mini-batches"),
        "epochs": (4, _N + "table of PPO: update iterations"),
        "learning_rate": (3e-6, _N + "table of PPO: optimizer"),
        "critic_learning_rate": (3e-6, _SFD + "one optimizer for both"),
        "schedule": ("linear", _N + "table of PPO: scheduler"),
        "warmup_steps": (0, _SFD + "warm_up_steps 0"),
        "weight_decay": (0.01, _SFD + "torch's AdamW, which decays by that if not told"),
        "adam_epsilon": (1e-5, _N + "table of PPO: optimizer"),
        "max_grad_norm": (None, _SFD + "clips no gradient"),
        "kl_coef": (0.05, _N + "table of PPO: beta"),
        "kl_target": (None, _N + "table of PPO: beta is fixed"),
        "kl_estimator": ("k1", _SFD + "logprobs - ref_logprobs"),
        "kl_in": ("reward", _SFD + "non_score_reward"),
        "gamma": (1.0, _N + "table of PPO: gamma"),
        "lam": (0.95, _N + "table of PPO: lambda"),
        "clip_low": (0.2, _N + "table of PPO: policy clip"),
        "clip_high": (0.2, _N + "table of PPO: policy clip"),
        "value_clip": (0.2, _N + "table of PPO: value clip"),
        "vf_coef": (0.1, _N + "table of PPO: value function coefficient"),
        "entropy_coef": (0.0, _SFD + "has none"),
        "dual_clip": (None, _SFD + "has none"),
        "max_ratio": (None, _SFD + "has none"),
        "early_stop_kl": (None, _SFD + "has none"),
        "whiten_advantages": (True, _N + "detail 25, advantage whitening"),
        "whiten_rewards": (False, _SFD + "whiten_rewards False"),
        "score_scaling": ("none", _SFD + "has none"),
        "score_clip": (None, _SFD + "has none"),
        "missing_eos": ("replace", _N + "detail 23, the EOS trick"),
        "missing_eos_penalty": (1.0, _N + "detail 23: a score of -1"),
        "bootstrap_truncated": (False, _SFD + "advantages"),
        "temperature": (0.7, _N + "table of PPO: sampling temperature"),
        "top_k": (0, _SFD + "generation_config"),
        "top_p": (1.0, _SFD + "generation_config"),
        "max_new_tokens": (53, _SFD + "response_length"),
    },
    (
        "its critic is a model of its own that starts from the reward model: give --critic",
        "a response ends at its eos: there 53 tokens are always sampled and cut afterwards",
        "the score lands on the last real token: there one after it, discounted by lambda",
        "weight_decay is for matrices: there for biases and norms too",
        "metrics are masked: there approxkl, entropy and ratio count padding",
    ),
)

INSTRUCTGPT = Preset(
    "Ouyang et al. 2022, InstructGPT, appendix C.4, without its pretraining mix",
    {
        "steps": (500, _I + "C.4: 256k episodes, 512 a step"),
        "batch_size": (512, _I + "C.4: batch size of an iteration"),
        "mini_batches": (8, _I + "C.4: minibatches of 64"),
        "epochs": (1, _I + "C.4: a single inner epoch"),
        "schedule": ("constant", _I + "C.4: constant after warm-up"),
        "warmup_steps": (9, _I + "C.4: 10 iterations, from a tenth of the peak; see below"),
        "critic_learning_rate": (9e-6, _I + "C.4: value function of the 1.3B and 6B policies"),
        "kl_coef": (0.02, _I + "C.4: beta"),
        "kl_target": (None, _I + "C.4: beta is fixed"),
        "kl_estimator": ("k1", _I + "eq. 2"),
        "kl_in": ("reward", _I + "eq. 2"),
        "gamma": (1.0, _I + "C.4: no discount"),
        "clip_low": (0.2, _I + "C.4: PPO clip ratio"),
        "clip_high": (0.2, _I + "C.4: PPO clip ratio"),
        "temperature": (1.0, _I + "C.4: temperature of rollouts"),
    },
    (
        "no pretraining mix (gamma 27.8 in eq. 2) and no moving average of weights (0.992)",
        "its critic is a model of its own that starts from the reward model: give --critic",
        "the policy's learning rate was swept for each model: learning_rate stays ours",
        "what the paper does not tell (lambda, value loss, Adam's epsilon …) stays ours",
        "warmup_steps 9: after w warm-up steps, the first at 1 / (w + 1), comes the peak",
        "Adam's betas are 0.9 and 0.999: there 0.9 and 0.95 (appendix C)",
    ),
)

PPO = {
    "trl-0.9": TRL,
    "llama-factory": LLAMA_FACTORY,
    "nplus": NPLUS,
    "instructgpt": INSTRUCTGPT,
}
