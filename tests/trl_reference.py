"""The numbers of TRL on small fixed inputs: what test_trl_parity.py compares with.

TRL's PPO and its peers cannot be installed beside what the tests need, so each environment is one
of its own, and what it computes is kept in tests/data:

    pip install torch trl==0.9.6 transformers==4.44.2 accelerate==0.33.0 peft==0.12.0 \
        "datasets<3" "numpy<2" pyarrow==17.0.0 rich
    python tests/trl_reference.py tests/data/trl_0_9_6.json

    pip install torch trl==1.16.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 datasets
    python tests/trl_reference.py tests/data/trl_1_16_0.json

Methods of TRL's trainers are called on objects that hold only what these methods read. Shapes: B
rows, T ids of the longest; a list of lists has one list a row, of its response's tokens.
"""

import json
import math
import sys
from collections import defaultdict
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

SHAPE = {
    "vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32,
    "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}

# Rows of unequal lengths, padded on the right; id 0 is padding and in no row.
QUERIES = [[3, 4, 5], [1, 2], [9, 8, 7, 6]]
RESPONSES = [[6, 1], [7, 7, 3, 9], [2]]
SCORES = [1.5, -0.75, 0.25]
SETTINGS = {"gamma": 0.95, "lam": 0.9, "cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1}
KL_COEF, TARGET, HORIZON = 0.2, 0.05, 40
REF, OLD, NEW = 0.0, 0.5, 0.9  # phases of the weights of reference, rollout and training pass

PAIRS = [
    {"chosen_ids": [3, 4, 5, 6], "rejected_ids": [3, 4, 1], "margin": 0.5},
    {"chosen_ids": [9, 2], "rejected_ids": [9, 8, 7, 1, 1], "margin": 0.0},
    {"chosen_ids": [5, 5, 5], "rejected_ids": [5, 7], "margin": 1.25},
]
CENTER = 0.01


def fill(model: nn.Module, phase: float) -> nn.Module:
    """Weights by a formula of their names' order, so that no file has to hold them."""
    offset = 0
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            n = torch.arange(offset, offset + parameter.numel(), dtype=torch.float64)
            offset += parameter.numel()
            values = 0.7 * torch.sin(1.7 * n + phase * torch.cos(0.3 * n))
            parameter.copy_(values.view_as(parameter))
    return model


def direction(parameter: Tensor) -> Tensor:
    """What a gradient is projected on."""
    n = torch.arange(parameter.numel(), dtype=torch.float64)
    return torch.cos(0.9 * n).view_as(parameter)


def projected(model: nn.Module, loss: Tensor) -> list[Tensor]:
    """One number of each parameter's gradient, in the order of their names."""
    parameters = [p for _, p in sorted(model.named_parameters())]
    gradient = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
    return [(g * direction(g)).sum() for g in gradient]


def rounded(value: object) -> object:
    """Tensors as lists, numbers with 10 digits."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, Tensor):
        return rounded(value.detach().tolist())
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return value if value is None else float(f"{value:.10g}")


# ---- TRL 0.9.6: PPOTrainer -----------------------------------------------------------------------


def ppo_trainer(**settings: object):
    from trl import PPOConfig
    from trl.trainer.ppo_trainer import PPOTrainer
    from trl.trainer.utils import AdaptiveKLController

    trainer = object.__new__(PPOTrainer)
    trainer.config = PPOConfig(mini_batch_size=3, batch_size=3, **{**SETTINGS, **settings})
    trainer.kl_ctl = AdaptiveKLController(KL_COEF, TARGET, HORIZON)
    trainer.is_encoder_decoder = False
    return trainer


def value_head_model(phase: float):
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import AutoModelForCausalLMWithValueHead

    lm = LlamaForCausalLM(LlamaConfig(**SHAPE)).double()
    model = AutoModelForCausalLMWithValueHead(lm).double()
    model.is_peft_model = False  # else set by from_pretrained
    fill(model.pretrained_model, phase)
    fill(model.v_head, phase)
    return model


def forward(trainer, phase: float):
    """TRL's own pass over all rows: log-probs, logits, values, mask (B, T - 1); the model."""
    rows = [torch.tensor(q + r) for q, r in zip(QUERIES, RESPONSES, strict=True)]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    queries, responses = ([torch.tensor(x) for x in part] for part in (QUERIES, RESPONSES))
    model = value_head_model(phase)
    logprobs, logits, values, mask = trainer.batched_forward_pass(
        model, queries, responses, inputs, return_logits=True
    )
    return (logprobs, logits, values, mask), model


def by_row(values: Tensor, mask: Tensor) -> list[list[float]]:
    return [row[here.bool()].tolist() for row, here in zip(values, mask, strict=True)]


def moments(scores: list[list[float]]) -> list[list[float]]:
    """TRL's running mean and standard deviation after each batch of scores."""
    from trl.trainer.utils import RunningMoments

    running, seen = RunningMoments(SimpleNamespace(use_distributed=False)), []
    for batch in scores:
        running.update(torch.tensor(batch))
        seen.append([float(running.mean), float(running.std)])
    return seen


def ppo_reference() -> dict:
    trainer = ppo_trainer()
    with torch.no_grad():
        (ref_logprobs, ref_logits, _, _), _ = forward(trainer, REF)
        (old_logprobs, old_logits, values, mask), _ = forward(trainer, OLD)
    scores = torch.tensor(SCORES, dtype=torch.float64)
    rewards, non_score, kls = trainer.compute_rewards(scores, old_logprobs, ref_logprobs, mask)
    kept, advantages, returns = trainer.compute_advantages(values, rewards, mask)

    (logprobs, logits, vpreds, _), model = forward(trainer, NEW)
    arguments = old_logprobs, kept, logits, vpreds, logprobs, mask, advantages, returns
    policy_loss, value_loss, stats = trainer.loss(*arguments)
    gradients = {"policy": policy_loss, "value": value_loss}
    gradients = {name: projected(model, loss) for name, loss in gradients.items()}
    ratio = by_row(stats.pop("policy/ratio"), mask)
    stats.pop("policy/advantages")
    step = trainer.record_step_stats(
        kl_coef=KL_COEF, masks=mask, kls=kls, logprobs=old_logprobs, ref_logprobs=ref_logprobs,
        non_score_reward=non_score, scores=scores, queries=QUERIES, responses=RESPONSES,
        train_stats={name: value[None] for name, value in stats.items()},
    )
    names = ("objective/kl", "objective/entropy", "ppo/mean_non_score_reward", "ppo/mean_scores",
             "ppo/std_scores", "ppo/val/var_explained", "tokens/responses_len_mean")

    penalties = {}
    for kind in ("kl", "abs", "mse", "full"):
        trainer.config.kl_penalty = kind
        pair = (old_logprobs, ref_logprobs)
        if kind == "full":
            pair = (old_logits.log_softmax(-1), ref_logits.log_softmax(-1))
        penalties[kind] = by_row(trainer._kl_penalty(*pair), mask)
    trainer.kl_ctl.update(float(step["objective/kl"]), len(SCORES))
    coefs = [trainer.kl_ctl.value]
    for kl, n in ((0.0, 3), (0.052, 8), (-1.0, 3)):
        trainer.kl_ctl.update(kl, n)
        coefs.append(trainer.kl_ctl.value)

    cells = {
        "old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "old_values": values,
        "rewards": rewards, "returns": returns, "advantages": advantages, "logprobs": logprobs,
        "values": vpreds,
    }
    return {
        **{name: by_row(x, mask) for name, x in cells.items()},
        "ratio": ratio, "penalties": penalties, "kl_coefs": coefs,
        "loss": {"policy": policy_loss, "value": value_loss},
        "stats": stats | {name: step[name] for name in names},
        "gradients": gradients,
        **ppo_defects(rewards, values, mask, arguments),
        "running_moments": moments(RUNNING_SCORES),
    }


RUNNING_SCORES = [[1.0, 2.0, 4.0], [0.5, -3.0], [10.0, 10.0, 9.0, 2.5]]


def ppo_defects(rewards: Tensor, values: Tensor, mask: Tensor, arguments: tuple) -> dict:
    """What TRL computes where it is known to be wrong, and with the fault switched off."""
    from trl.core import masked_whiten

    whitening = ppo_trainer(whiten_rewards=True)
    _, _, leaked = whitening.compute_advantages(values, rewards, mask)
    masked = masked_whiten(rewards * mask, mask, shift_mean=False) * mask  # masked once more
    _, _, clean = ppo_trainer().compute_advantages(values, masked, mask)

    guarded, free = (ppo_trainer(ratio_threshold=x) for x in (0.5, math.inf))
    guarded_loss, free_loss = (t.loss(*arguments)[0] for t in (guarded, free))
    return {
        "whitened_rewards": by_row(masked, mask),
        "returns_of_whitened": by_row(clean, mask),
        "returns_of_whitened_unmasked": by_row(leaked, mask),
        "guarded_policy_loss": guarded_loss, "unguarded_policy_loss": free_loss,
    }


# ---- TRL 1.16: RewardTrainer ---------------------------------------------------------------------


def reward_trainer(center: float | None):
    from trl import RewardTrainer

    trainer = object.__new__(RewardTrainer)
    trainer.args = SimpleNamespace(center_rewards_coefficient=center)
    trainer.accelerator = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer.model = SimpleNamespace(training=True)
    trainer._metrics = {"train": defaultdict(list)}
    trainer._total_train_tokens, trainer._tp_size = 0, 1
    return trainer


def reward_reference() -> dict:
    from transformers import LlamaConfig, LlamaForSequenceClassification
    from trl.trainer.reward_trainer import DataCollatorForPreference

    config = LlamaConfig(**SHAPE, num_labels=1)
    model = fill(LlamaForSequenceClassification(config).double().eval(), NEW)
    out = {}
    for name, center, margin in (
        ("plain", None, False), ("margin", None, True), ("centred", CENTER, True),
    ):
        rows = [{k: v for k, v in pair.items() if margin or k != "margin"} for pair in PAIRS]
        batch = DataCollatorForPreference(pad_token_id=0)(rows)
        trainer = reward_trainer(center)
        loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
        gradient = projected(model, loss)
        metrics = {n: values[0] for n, values in trainer._metrics["train"].items()
                   if n != "num_tokens"}
        scores = outputs.logits.squeeze(-1)
        out[name] = {"loss": loss, "scores": scores, "metrics": metrics, "gradient": gradient}
    return out


# ---- TRL 1.16: DPOTrainer, KTOTrainer, ORPOTrainer, CPOTrainer -----------------------------------

REJECTED = [[2], [5, 5, 8], [4, 1]]  # beside RESPONSES, which are chosen
LIKED = [True, False, True]  # of RESPONSES alone
KTO_PHASES = {"kto": (NEW, REF), "kto, KL above 0": (REF, NEW)}
BETA, SMOOTHING, SIMPO_BETA, GAMMA, WEIGHTS = 0.3, 0.1, 2.0, 0.5, (1.5, 0.75)


def language_model(phase: float) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return fill(LlamaForCausalLM(LlamaConfig(**SHAPE)).double().eval(), phase)


def fused(model: nn.Module):
    """A model as TRL patches it, which gives what its trainers read in the place of logits."""

    def call(input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **_: object):
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
        targets, logprobs = labels[:, 1:], logits.log_softmax(-1)
        at_labels = logprobs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        return SimpleNamespace(
            log_probs=torch.where(targets >= 0, at_labels, 0), mean_logits=logits.mean(-1),
            entropy=-(logprobs.exp() * logprobs).sum(-1), is_top1=logits.argmax(-1) == targets,
        )

    return call


def direct_trainer(kind: type, **settings: object):
    trainer = object.__new__(kind)
    alone = lambda x: x  # noqa: E731
    trainer.accelerator = SimpleNamespace(device="cpu", gather=alone, gather_for_metrics=alone)
    trainer.args = SimpleNamespace(gradient_checkpointing_kwargs=None)
    trainer.model = nn.Module()  # asked whether it is in training, and whether it has adapters
    trainer.model.is_gradient_checkpointing = False
    trainer.ref_model = fused(language_model(REF))
    trainer._metrics = {"train": defaultdict(list)}
    trainer._total_train_tokens, trainer._tp_size = 0, 1
    trainer.precompute_ref_logps = trainer.aux_loss_enabled = False
    for name, value in settings.items():
        setattr(trainer, name, value)
    return trainer


def loss_and_metrics(trainer, model: nn.Module, batch: dict) -> dict:
    loss = trainer._compute_loss(fused(model), batch, False)
    metrics = {n: values[0] for n, values in trainer._metrics["train"].items()
               if n.startswith(("rewards/", "logps/")) or n in ("entropy", "kl")}
    return {"loss": loss, "metrics": metrics, "gradient": projected(model, loss)}


def direct_reference() -> dict:
    from trl import DPOTrainer, KTOTrainer
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    model, out = language_model(NEW), {}
    rows = [{"prompt_ids": q, "chosen_ids": c, "rejected_ids": r}
            for q, c, r in zip(QUERIES, RESPONSES, REJECTED, strict=True)]
    for loss in ("sigmoid", "robust", "hinge", "ipo"):
        trainer = direct_trainer(
            DPOTrainer, beta=BETA, loss_types=[loss], loss_weights=[1.0], label_smoothing=SMOOTHING,
            ld_alpha=None, f_divergence_type="reverse_kl", use_weighting=False,
        )
        batch = DataCollatorForPreference(pad_token_id=0)(rows)
        out[loss] = loss_and_metrics(trainer, model, batch)
    turned = RESPONSES[-1:] + RESPONSES[:-1]  # as its _prepare_dataset does with a batch
    rows = [{"prompt_ids": q, "completion_ids": c, "KL_completion_ids": k, "label": label}
            for q, c, k, label in zip(QUERIES, RESPONSES, turned, LIKED, strict=True)]
    batch = DataCollatorForUnpairedPreference(pad_token_id=0)(rows)
    for name, (policy, ref) in KTO_PHASES.items():
        trainer = direct_trainer(KTOTrainer, beta=BETA, loss_type="kto", calculate_KL=True,
                                 desirable_weight=WEIGHTS[0], undesirable_weight=WEIGHTS[1],
                                 ref_model=fused(language_model(ref)))
        out[name] = loss_and_metrics(trainer, language_model(policy), batch)
    means = torch.tensor([[-0.5, -1.25, -3.0], [-1.0, -0.75, -2.0]], dtype=torch.float64)
    losses, *_ = direct_trainer(ORPOTrainer, beta=BETA).odds_ratio_loss(*means)
    out["orpo"] = {"means": means, "losses": -losses}  # TRL adds them as -losses.mean()
    trainer = direct_trainer(CPOTrainer, beta=SIMPO_BETA, alpha=0.0, loss_type="simpo",
                             simpo_gamma=GAMMA, label_smoothing=0.0)
    losses, chosen, rejected = trainer.cpo_loss(*means)
    out["simpo"] = {"means": means, "losses": losses, "rewards": torch.stack((chosen, rejected))}
    return out


# ---- GRPO and RLOO ------------------------------------------------------------------------------

# Two prompts, three responses to each, of unequal lengths; those that do not end with EOS were cut.
ANSWERS = [[6, 1], [7, 7, 3, 9], [2], [4, 8, 1], [3], [10, 9]]
ANSWER_SCORES = [1.5, -0.75, 0.25, 0.0, 2.0, 0.5]
EOS, SAMPLES, LIMIT = 1, 3, 5  # SAMPLES of a prompt; LIMIT: tokens of a response
KL_BETA, CLIPS, DELTA, CISPO_BOUND = 0.1, (0.02, 0.05), 1.1, 1.05

GROUPS = {  # name -> what differs from TRL's settings below
    "grpo": {"loss_type": "grpo"}, "bnpo": {"loss_type": "bnpo"}, "dapo": {},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "batch": {"scale_rewards": "batch"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "cispo": {"loss_type": "cispo", "epsilon_high": CISPO_BOUND},
    "delta": {"delta": DELTA}, "kl": {"beta": KL_BETA},
    "truncated": {"mask_truncated_completions": True},
    "truncated, grpo": {"mask_truncated_completions": True, "loss_type": "grpo"},
}


class Patched(nn.Module):
    """A model as TRL patches it, that may be asked whether it is in training."""

    is_gradient_checkpointing = False

    def __init__(self, model: nn.Module):
        super().__init__()
        self.call = fused(model)

    def forward(self, **inputs: Tensor):
        return self.call(**inputs)


def group_trainer(kind: type, old: float, **changes: object):
    """Of a rollout by the policy of phase `old`."""
    alone, arguments = lambda x, **_: x, ("delta",)
    settings = {
        "beta": 0.0, "epsilon_low": CLIPS[0], "epsilon_high": CLIPS[1], "loss_type": "dapo",
        "importance_sampling_level": "token", "scale_rewards": "group", "delta": None,
        "mask_truncated_completions": False, "multi_objective_aggregation": "sum_then_normalize",
        "normalize_advantages": False, "reward_clip_range": None, "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None, "use_vllm": False, "_entropy_bonus_enabled": False,
        "vllm_importance_sampling_correction": False, "current_gradient_accumulation_steps": 1,
        "max_completion_length": LIMIT, "environment_factories": None, "environments": None,
        "tools": None, "_is_vlm": False, "_tokenizer": SimpleNamespace(pad_token_id=0),
        "pad_to_multiple_of": None, "eos_token_ids": [EOS], "num_generations": SAMPLES,
        "num_iterations": 2, "reward_func_names": ["r"], "reward_funcs": [None],
        "reward_weights": torch.ones(1, dtype=torch.float64), "_pending_extra_logs": {},
        "_pending_metrics": {}, "log_multimodal": False,
    } | changes
    trainer = direct_trainer(kind, **{n: v for n, v in settings.items() if n not in arguments})
    trainer.model = Patched(language_model(old))
    trainer.accelerator = SimpleNamespace(
        device="cpu", gather=alone, reduce=alone, process_index=0, num_processes=1,
        autocast=nullcontext, is_main_process=False,
    )
    trainer.args = SimpleNamespace(
        delta=settings["delta"], use_bias_correction_kl=False, report_to=[],
        steps_per_generation=1, gradient_accumulation_steps=1, per_device_train_batch_size=9,
        gradient_checkpointing_kwargs=None,
    )
    trainer.state = SimpleNamespace(global_step=0)
    trainer._logs = defaultdict(list) | {"rewards": defaultdict(list)}
    prompts = [QUERIES[row // SAMPLES] for row in range(len(ANSWERS))]
    drawn = prompts, ANSWERS, None, ANSWERS, None, {}, None, None
    if kind.__name__ == "RLOOTrainer":
        drawn = prompts, ANSWERS, ANSWERS
    trainer._generate = lambda _: drawn
    scores = torch.tensor(ANSWER_SCORES, dtype=torch.float64)[:, None]
    trainer._calculate_rewards = lambda *_: scores
    return trainer


def group_results(trainer) -> dict:
    inputs = [{"prompt": None}] * len(ANSWERS)
    batch, model = trainer._generate_and_score_completions(inputs), language_model(NEW)
    loss = trainer._compute_loss(fused(model), batch)
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items()
               if name in ("kl", "entropy", "reward", "reward_std", "frac_reward_zero_std",
                           "cispo_clip_ratio") or name.startswith("clip_ratio")}
    metrics = {name: None if math.isnan(value) else value for name, value in metrics.items()}
    return {"advantages": batch["advantages"], "loss": loss, "metrics": metrics,
            "gradient": projected(model, loss)}


def split_loss(trainer, rows: int) -> Tensor:
    """The loss of an optimizer step, added up over micro-batches of so many rows."""
    batch = trainer._generate_and_score_completions([{"prompt": None}] * len(ANSWERS))
    trainer.current_gradient_accumulation_steps = len(ANSWERS) // rows
    trainer.args.steps_per_generation = trainer.current_gradient_accumulation_steps
    model, total = fused(language_model(NEW)), torch.zeros((), dtype=torch.float64)
    for start in range(0, len(ANSWERS), rows):
        part = {name: x[start : start + rows] if x.dim() else x for name, x in batch.items()}
        total = total + trainer._compute_loss(model, part)
    return total


def group_reference() -> dict:
    from trl import GRPOTrainer, RLOOTrainer

    out = {name: group_results(group_trainer(GRPOTrainer, OLD, **changes))
           for name, changes in GROUPS.items()}
    for name in ("grpo", "bnpo", "dapo"):
        trainer = group_trainer(GRPOTrainer, OLD, **GROUPS[name])
        out[name]["split"] = [split_loss(trainer, rows) for rows in (3, 2, 1)]
    rloo = {"beta": 0.0}, {"beta": KL_BETA}, {"normalize_advantages": True}
    for name, changes in zip(("rloo", "rloo, kl", "rloo, normalized"), rloo, strict=True):
        out[name] = group_results(group_trainer(RLOOTrainer, NEW, **changes))  # at ratio 1
    return out


# ---- reward functions: what TRL gives them, and what it makes of what they return ----------------

FUNCTION_BATCH = {  # B = 3; a prompt is a text or a conversation
    "prompts": ["ab", "c", "d"], "completions": ["x", "yz", ""], "answer": ["x", None, "z"],
    "completion_ids": [[4, 5, 0], [6, 7], [0]],
}


def chat(text: str, role: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def by_text(prompts, completions, completion_ids, **columns):
    return [len(p) + 10 * len(c) for p, c in zip(prompts, completions, strict=True)]


def by_message(prompts, completions, **columns):
    return [len(p[-1]["content"]) + 10 * len(c[0]["content"]) + 100 * (c[0]["role"] == "assistant")
            for p, c in zip(prompts, completions, strict=True)]


async def later(completions, **columns):
    return [len(c) for c in completions]


class Judge:
    async def __call__(self, completions, **columns):
        return torch.tensor([2.0 * len(c) for c in completions], dtype=torch.float64)


FUNCTIONS = {  # name -> (function, whether prompts are conversations)
    "text": (by_text, False), "message": (by_message, True), "later": (later, False),
    "list of one message": (later, True), "judge": (Judge(), False),
    "partial": (partial(by_text, completion_ids=None), False),
    "numpy": (lambda completions, **_: np.array([len(c) for c in completions]), False),
    "bools": (lambda completions, **_: [c == "x" for c in completions], False),
    "tensors of one": (lambda completions, **_: [torch.tensor([1.5])] * 3, False),
    "generator": (lambda completions, **_: (len(c) for c in completions), False),
    "none": (lambda completions, answer, **_: [a and 1 for a in answer], False),
}


def function_reference() -> dict:
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.utils import start_event_loop_in_daemon

    _, loop, ready = start_event_loop_in_daemon("reference")
    ready.wait()
    out = {}
    for name, (function, is_chat) in FUNCTIONS.items():
        trainer = SimpleNamespace(
            accelerator=SimpleNamespace(device="cpu", is_main_process=False),
            reward_funcs=[function], reward_func_names=[name], environments=None,
            reward_processing_classes=[None],
            _log_completion_extra=None, _log_metric=None, async_loop=loop,
            args=SimpleNamespace(report_to=[]), state=SimpleNamespace(global_step=0),
        )
        batch = FUNCTION_BATCH
        prompts = [chat(p, "user") if is_chat else p for p in batch["prompts"]]
        answers = [chat(c, "assistant") if is_chat else c for c in batch["completions"]]
        rows = [{"prompt": p, "answer": a} for p, a in zip(prompts, batch["answer"], strict=True)]
        rewards = GRPOTrainer._calculate_rewards(trainer, rows, prompts, answers,
                                                 batch["completion_ids"])
        out[name] = [None if math.isnan(r) else r for r in rewards[:, 0].tolist()]
    return out


# --------------------------------------------------------------------------------------------------

REFERENCES = {
    "0.9.6": ppo_reference,
    "1.16.0": lambda: reward_reference() | {
        "functions": function_reference(), "direct": direct_reference(),
        "groups": group_reference(),
    },
}


def compute() -> dict:
    """What the TRL that is installed here computes, as JSON."""
    torch.manual_seed(0)
    return {"trl": version("trl")} | rounded(REFERENCES[version("trl")]())


def shown(value: object, indent: str = "") -> str:
    """JSON with a key a line and each list on one."""
    if not isinstance(value, dict):
        return json.dumps(value)
    inner = indent + " "
    lines = [f"{inner}{json.dumps(key)}: {shown(each, inner)}" for key, each in value.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        file.write(shown(compute()) + "\n")


if __name__ == "__main__":
    main()
