"""Where other tools' parameters went: `minirlhf coming-from trl`, `minirlhf coming-from
llama-factory`.

`ours` is a flag of the section's recipe, `minirlhf VERB`, or a name to import; empty where nothing
stands for it, and then the last column says why.
"""

import sys
import textwrap
from itertools import zip_longest
from typing import NamedTuple

from minirlhf.errors import OK, UserError, run
from minirlhf.run.settings import nearest

WIDTH = 40  # of a column of names; the longest name to import has 39 characters


class Row(NamedTuple):
    theirs: str
    ours: str  # several parted by ", "
    difference: str


class Section(NamedTuple):
    title: str
    recipe: str
    rows: tuple[Row, ...]


def _rows(*rows: tuple[str, str, str]) -> tuple[Row, ...]:
    return tuple(Row(*row) for row in rows)


_TRAINING = _rows(
    ("output_dir", "--out", "holds run.json, logs, checkpoints, model; refused where not empty"),
    ("num_train_epochs", "--epochs", "1 unless told; there 3"),
    ("lr_scheduler_type", "--schedule", "constant, linear, cosine; ends at the last step"),
    ("warmup_steps", "--warmup-steps", "the first step has a rate above 0; there 0"),
    ("learning_rate", "--learning-rate", "1e-5 unless told, in ppo 3e-6; there 5e-5"),
    ("weight_decay", "--weight-decay", "of matrices only"),
    ("adam_epsilon", "--adam-epsilon", "1e-8 unless told, in ppo 1e-5; there 1e-8"),
    ("max_grad_norm", "--max-grad-norm", "none: off; a norm that is not finite stops the run"),
    ("logging_steps", "--log-every", "means over all steps since the last line, none is lost"),
    ("save_steps", "--save-every", "a commit holds all that resuming needs, with checksums"),
    ("save_total_limit", "--keep", "at least 2, and only whole commits count"),
    ("resume_from_checkpoint", "--resume", "bit for bit on a CPU, ppo too"),
    ("bf16", "--dtype", "float32 unless told; log-probs and losses always are"),
    ("seed", "--seed", "all randomness derives from it; nothing global is drawn"),
    ("report_to, log_with", "minirlhf metrics", "metrics.jsonl and samples.jsonl, always"),
)
_NOT_PPO = tuple(row for row in _TRAINING if row.theirs != "num_train_epochs")

_TRL_PPO_CONFIG = _rows(
    ("model_name", "--model", "a folder that is loaded; there a note for the tracker"),
    ("query_dataset", "--data", "a file that is read; there a note for the tracker"),
    ("reward_model", "--reward", "a folder or file.py:function; there a note for the tracker"),
    ("seed", "--seed", "the same seed gives the same run, to the bit on a CPU"),
    ("steps", "--steps", "iterations that are run; there read for a number that nothing uses"),
    ("learning_rate", "--learning-rate",
     "3e-6 unless told; there 1.41e-5. AdamW, linear to 0 unless --schedule constant"),
    ("adap_kl_ctrl", "--kl-target", "none: the coefficient is fixed, which is the default here"),
    ("init_kl_coef", "--kl-coef", "0.05 unless told; there 0.2"),
    ("kl_penalty", "--kl-estimator", "kl is k1, mse is k2, abs and full the same; also k3"),
    ("target", "--kl-target", "nats a response, the same"),
    ("horizon", "--kl-horizon", "in responses, the same"),
    ("gamma", "--gamma", "the same"),
    ("lam", "--lam", "the same"),
    ("cliprange", "--clip-low, --clip-high", "two numbers, which may differ"),
    ("cliprange_value", "--value-clip", "none: off"),
    ("vf_coef", "--vf-coef", "the same"),
    ("batch_size", "--batch-size", "responses in an iteration: 64 unless told; there 128"),
    ("mini_batch_size", "--micro-batch-size, --micro-batch-tokens",
     "rows in a forward pass; there also those of an update, of which --mini-batches decides"),
    ("forward_batch_size", "--micro-batch-size, --mini-batches", "mini_batch_size, deprecated"),
    ("gradient_accumulation_steps", "--mini-batches",
     "batch_size / (mini_batch_size · it): updates in an epoch; all tokens of one weigh alike"),
    ("backward_batch_size", "--mini-batches", "batch_size / it"),
    ("ppo_epochs", "--epochs", "whole micro-batches are shuffled, so the first ratio is 1"),
    ("max_grad_norm", "--max-grad-norm", "1 unless told; there none"),
    ("early_stopping", "--early-stop-kl", "none: off"),
    ("target_kl", "--early-stop-kl", "mean k3 over the epoch; there 1.5 × it, of one mini-batch"),
    ("ratio_threshold", "--max-ratio", "the update is left out; there the optimizer steps on 0"),
    ("use_score_scaling", "--score-scaling", "scale"),
    ("use_score_norm", "--score-scaling", "normalize; there only with use_score_scaling"),
    ("score_clip", "--score-clip", "the same"),
    ("whiten_rewards", "--whiten-rewards", "padding stays 0; there it leaks into advantages"),
    ("gradient_checkpointing", "--gradient-checkpointing", "takes effect; there it never does"),
    ("optimize_device_cache", "--micro-batch-tokens", "bounds memory instead of emptying a cache"),
    ("optimize_cuda_cache", "--micro-batch-tokens", "deprecated there"),
    ("compare_steps", "", "nothing is uploaded"),
    ("push_to_hub_if_best_kwargs", "", "nothing is uploaded"),
    ("log_with", "minirlhf metrics", "metrics.jsonl and samples.jsonl, always"),
    ("tracker_kwargs, tracker_project_name, project_kwargs", "", "there is no tracker"),
    ("exp_name, task_name", "--out", "a run's name is its folder's"),
    ("accelerator_kwargs", "--device, --dtype", "there is no accelerate"),
    ("remove_unused_columns", "--reward", "all other columns are passed to a reward function"),
    ("world_size, global_backward_batch_size, global_batch_size", "", "one process"),
    ("is_encoder_decoder", "", "decoders only"),
    ("is_peft_model", "--lora-rank", "0: all weights"),
)
_TRL_PPO_TRAINER = _rows(
    ("config", "minirlhf.PPOConfig", "every field is a flag"),
    ("model", "minirlhf.ValueHeadModel", "the critic is a head, or a model: --critic"),
    ("ref_model", "--ref", "none: the policy at step 0, also under adapters"),
    ("tokenizer", "minirlhf.load_tokenizer", "of --model; padding has no id here"),
    ("dataset", "minirlhf.data.examples.load_prompts", "a file, or a list of Prompt"),
    ("optimizer, lr_scheduler", "minirlhf.TrainState", "pass your own optimizer"),
    ("data_collator, training_data_collator", "minirlhf.RolloutBuffer", "cuts by length"),
    ("num_shared_layers", "--lora-rank", "the reference shares all layers: adapters off"),
    ("generate", "minirlhf.batches.collect.sample", "a text depends on its prompt and key alone"),
    ("generate(length_sampler=…)", "--min-new-tokens, --max-new-tokens", "bounds, not a draw"),
    ("generate(generate_ref_response=True)", "minirlhf sample", "of any model folder"),
    ("step", "minirlhf.ppo_step",
     "on a buffer that rollouts.measure has filled; or loop over ppo(...)"),
    ("step(response_masks=…)", "minirlhf.Rollout", "masked cells are skipped, not zeroed"),
    ("log_stats", "minirlhf metrics", "metrics.jsonl, always; its names are those of TRL 1.x"),
    ("save_pretrained", "minirlhf.save_pretrained",
     "of policy.lm as others read it; of the policy also its head, in a file of its own"),
    ("BestOfNSampler", "minirlhf sample, minirlhf score",
     "sample --samples N, then score: line i scores line i, keep the best of each N"),
)
_TRL1_PPO_CONFIG = _rows(
    ("learning_rate", "--learning-rate", "3e-6 unless told, as there from 1.0 on; 5e-5 to 0.28"),
    ("total_episodes", "--steps", "it / batch_size, rounded up"),
    ("num_total_batches", "--steps", "given; there filled in from total_episodes"),
    ("batch_size", "--batch-size",
     "64 unless told; there filled in, see per_device_train_batch_size"),
    ("mini_batch_size, local_mini_batch_size", "--mini-batches",
     "there filled in: batch_size / num_mini_batches"),
    ("micro_batch_size", "--micro-batch-size",
     "most rows in a training pass; there filled in: per_device_train_batch_size · processes"),
    ("num_mini_batches", "--mini-batches",
     "updates in an epoch; there one each gradient_accumulation_steps passes"),
    ("num_ppo_epochs", "--epochs", "whole micro-batches are shuffled, so the first ratio is 1"),
    ("local_rollout_forward_batch_size", "--rollout-batch-size",
     "rows sampled at once: 256 unless told; there 64, also of the passes that measure"),
    ("response_length", "--max-new-tokens", "64 unless told; there 53"),
    ("stop_token", "", "eos always ends a response; there none does unless told"),
    ("stop_token_id", "--stop", "strings, several; there one id"),
    ("temperature", "--temperature", "1 unless told; there 0.7"),
    ("missing_eos_penalty", "--missing-eos-penalty",
     "of what the length cut; there of all without the tokenizer's eos, stop_token_id or not"),
    ("kl_coef", "--kl-coef", "0.05 unless told, the same; adaptive with --kl-target, there never"),
    ("kl_estimator", "--kl-estimator", "k1 and k3, the same; also k2, abs, full"),
    ("cliprange", "--clip-low, --clip-high", "two numbers, which may differ"),
    ("cliprange_value", "--value-clip", "the same; none: off"),
    ("vf_coef", "--vf-coef", "the same"),
    ("gamma", "--gamma", "the same"),
    ("lam", "--lam", "the same"),
    ("whiten_rewards", "--whiten-rewards", "the same; there mini-batches must have 8 rows"),
    ("num_sample_generations", "--sample-every, --sample-prompts",
     "steps between tables; there tables in a run, nearly greedy"),
    ("sft_model_path", "--model", "a folder that is loaded; there for the example script"),
    ("reward_model_path", "--reward", "a folder that is loaded; there for the example script"),
    ("dataset_num_proc", "", "data is read once, in order; there for the example script"),
    ("model_adapter_name, ref_adapter_name", "--lora-rank",
     "one adapter; without it the policy is the reference"),
    ("world_size, local_batch_size", "", "one process"),
    ("ds3_gather_for_generation", "", "there is no DeepSpeed"),
    ("push_to_hub", "", "nothing is uploaded"),
    ("exp_name, run_name", "--out", "a run's name is its folder's; there up to 0.26"),
)
_TRL1_PPO_TRAINING = _rows(
    ("per_device_train_batch_size", "--batch-size, --micro-batch-size",
     "times gradient_accumulation_steps and processes the batch there; alone, rows in a pass"),
    ("gradient_accumulation_steps", "--batch-size, --mini-batches",
     "multiplies the batch there, and divides the updates in an epoch"),
    ("num_train_epochs", "--steps", "prompts · it / batch_size; there without total_episodes"),
    ("max_steps", "--steps", "there PPO does not read it"),
    ("lr_scheduler_type", "--schedule", "linear unless told, as there; cosine, constant"),
    ("warmup_steps", "--warmup-steps", "the first step has a rate above 0; there 0"),
    ("weight_decay", "--weight-decay", "of matrices only"),
    ("adam_epsilon", "--adam-epsilon", "1e-5 unless told; there 1e-8"),
    ("max_grad_norm", "--max-grad-norm", "1 unless told; there PPO does not read it"),
    ("gradient_checkpointing", "--gradient-checkpointing",
     "takes effect; there only on a model that has it on already"),
    ("bf16", "--dtype", "float32 unless told; there true unless told, in 0.19 and later"),
    ("eval_strategy, eval_steps", "--eval-every", "held-out prompts; there no evaluation"),
    ("logging_steps", "--log-every", "1 unless told; there each iteration, whatever it says"),
    ("save_steps", "--save-every", "20 unless told; there 500"),
    ("seed", "--seed",
     "the same seed gives the same run, to the bit on a CPU; there mini-batches have none"),
    ("resume_from_checkpoint", "--resume", "bit for bit on a CPU; there train() has no such thing"),
    *(row for row in _TRAINING
      if row.theirs in ("output_dir", "save_total_limit", "report_to, log_with")),
)
_TRL1_PPO_TRAINER = _rows(
    ("args", "minirlhf.PPOConfig", "every field is a flag; there config in 0.12"),
    ("processing_class", "minirlhf.load_tokenizer", "of --model; padding has no id here"),
    ("model", "minirlhf.ValueHeadModel", "--model; there policy in 0.12"),
    ("ref_model", "--ref",
     "none: the policy at step 0, also under adapters; there ref_policy in 0.12"),
    ("reward_model", "--reward",
     "also functions and services; the score is on the last token, there on the one after"),
    ("value_model", "--critic", "none: a head on the policy's trunk; there always a second model"),
    ("train_dataset", "--data", "texts, messages or ids; there ids"),
    ("eval_dataset", "--eval-data", "scored beside the start; there only for tables of samples"),
    ("data_collator", "minirlhf.RolloutBuffer", "cuts by length"),
    ("optimizers", "minirlhf.TrainState", "pass your own optimizer"),
    ("callbacks, train", "minirlhf.ppo",
     "a generator: the body of your own for loop, after each iteration"),
    ("peft_config", "--lora-rank, --lora-alpha", "adapters, merged into the model at the end"),
    ("generate_completions", "--sample-every", "a table of fixed prompts"),
    ("save_model", "minirlhf.save_pretrained", "pass policy.lm"),
)
_TRL_REWARD = _rows(
    ("model", "--model", "a language or reward model; one score a text"),
    ("args.max_length", "--max-length, --overlong", "is obeyed; what happens to longer rows too"),
    ("data_collator", "minirlhf.batches.preferences.collate", "pass your own to reward(...)"),
    ("train_dataset", "--data", "text, messages or ids; a margin may miss in any row"),
    ("eval_dataset", "--eval-data", "several as NAME=FILE, told under eval_NAME_"),
    ("tokenizer", "minirlhf.load_tokenizer", "of --model"),
    ("model_init", "minirlhf.reward", "build the state yourself, then loop"),
    ("compute_metrics", "minirlhf.evaluation.reward.evaluate", "its argument metrics"),
    ("callbacks", "minirlhf.reward", "the body of your own for loop"),
    ("optimizers", "minirlhf.TrainState", "pass your own optimizer"),
    ("preprocess_logits_for_metrics", "", "evaluation keeps two numbers a pair, no logits"),
    ("peft_config", "--lora-rank, --lora-alpha", "the head always learns, and is saved"),
    ("column margin", "minirlhf.bradley_terry_loss", "a margin meets its own pair only"),
    ("accuracy", "minirlhf.preference_accuracy", "a tie is wrong; also half, and ties"),
    ("evaluate, visualize_samples", "--show-samples", "one pass; -1 shows all, the last row too"),
    ("eval_steps", "--eval-every", "0: at the end only"),
    ("per_device_train_batch_size", "--batch-size", "pairs in an update: 16 unless told; there 8"),
    ("gradient_accumulation_steps", "--micro-batch-tokens", "changes memory, never the gradient"),
    ("center_rewards_coefficient", "--center-rewards-coefficient", "the same"),
    ("max_steps", "--steps", "instead of --epochs"),
    ("remove_unused_columns", "", "unknown columns do no harm"),
    ("dataset_num_proc", "", "data is read once, in order"),
)
_LF_PPO = _rows(
    ("model_name_or_path, adapter_name_or_path", "--model", "a folder of whole weights"),
    ("dataset, dataset_dir", "--data, --columns", "a file; no dataset_info.json"),
    ("template", "minirlhf.data.chat_template.compile_template", "the model's own chat template"),
    ("cutoff_len", "--max-prompt-length, --overlong", "longer prompts are an error unless told"),
    ("reward_model", "--reward", "a folder or file.py:function"),
    ("reward_model_type full", "--reward", "a reward model's folder"),
    ("reward_model_type lora, reward_model_adapters", "--reward",
     "merge the adapter first; minirlhf reward does when it ends"),
    ("reward_model_type api", "--reward, --reward-format",
     "http://host:port/path with llama-factory; there no timeout, no retry, no check of the reply"),
    ("ref_model, ref_model_adapters", "--ref",
     "none: the policy at step 0; there the base under a continued adapter"),
    ("ref_model_quantization_bit, reward_model_quantization_bit", "", "nothing is quantised"),
    ("ppo_buffer_size", "--mini-batches", "updates in an epoch"),
    ("per_device_train_batch_size · gradient_accumulation_steps · ppo_buffer_size",
     "--batch-size", "responses in an iteration: 64 unless told; there 8"),
    ("per_device_train_batch_size", "--micro-batch-size, --rollout-batch-size",
     "of training and of sampling, apart"),
    ("ppo_epochs", "--epochs", "the same"),
    ("ppo_target", "--kl-target", "none unless told; there 6, which hardly moves anything"),
    ("ppo_score_norm", "--score-scaling", "normalize: by running mean and deviation"),
    ("ppo_whiten_rewards", "--whiten-rewards", "padding stays 0; there it leaks into advantages"),
    ("init_kl_coef 0.2, not reachable", "--kl-coef", "a flag"),
    ("gamma, lam, cliprange, vf_coef, not reachable",
     "--gamma, --lam, --clip-low, --clip-high, --value-clip, --vf-coef", "flags"),
    ("max_steps", "--steps", "iterations"),
    ("num_train_epochs", "--steps", "prompts · epochs / batch_size"),
    ("finetuning_type lora", "--lora-rank", "0 is full; there lora of rank 8"),
    ("finetuning_type freeze, oft", "", "all weights, or LoRA"),
    ("lora_rank", "--lora-rank", "the same"),
    ("lora_alpha", "--lora-alpha", "32 unless told; there twice the rank"),
    ("lora_dropout", "", "no dropout in reinforcement learning: old and new must agree"),
    ("lora_target", "--lora-rank", "all linear layers"),
    ("temperature", "--temperature", "1 unless told; log-probs are of that law, there not"),
    ("top_p, top_k", "--top-p, --top-k", "off unless told; there .7 and 50, log-probs of all"),
    ("max_new_tokens", "--max-new-tokens", "64 unless told; there 1024"),
    ("repetition_penalty, length_penalty, num_beams", "", "would sample from another law"),
    ("plot_loss", "minirlhf metrics", "metrics.jsonl has every number"),
)
_LF_REWARD = _rows(
    ("stage rm", "minirlhf reward", "loads as a sequence classifier; there a value_head file"),
    ("dataset, eval_dataset", "--data, --eval-data", "a margin column is read; there ignored"),
    ("val_size", "--eval-data", "give a file of its own"),
    ("cutoff_len", "--max-length, --overlong", "drop, truncate or stop; counted and told"),
    ("per_device_train_batch_size · gradient_accumulation_steps", "--batch-size",
     "pairs in an update"),
    ("finetuning_type lora, lora_rank", "--lora-rank", "the head always learns"),
    ("lora_alpha", "--lora-alpha", "32 unless told"),
    ("eval_steps", "--eval-every", "0: at the end only"),
    ("max_steps", "--steps", "instead of --epochs"),
    ("predict_with_generate, do_predict", "minirlhf score", "scores of a file"),
)

TABLES: dict[str, tuple[Section, ...]] = {
    "trl": (
        Section("PPOConfig of TRL 0.9.6", "ppo", _TRL_PPO_CONFIG),
        Section("PPOTrainer of TRL 0.9.6", "ppo", _TRL_PPO_TRAINER),
        Section("PPOConfig of TRL 0.12 to 1.12", "ppo", _TRL1_PPO_CONFIG),
        Section("TrainingArguments of TRL 0.12 to 1.12's PPOConfig", "ppo", _TRL1_PPO_TRAINING),
        Section("PPOTrainer of TRL 0.12 to 1.12", "ppo", _TRL1_PPO_TRAINER),
        Section("RewardTrainer and RewardConfig of TRL 0.11", "reward", _TRL_REWARD),
        Section("TrainingArguments of RewardConfig", "reward", _TRAINING),
    ),
    "llama-factory": (
        Section("stage ppo", "ppo", _LF_PPO),
        Section("stage ppo: TrainingArguments", "ppo", _NOT_PPO),
        Section("stage rm", "reward", _LF_REWARD),
        Section("stage rm: TrainingArguments", "reward", _TRAINING),
    ),
}
USAGE = f"""usage: minirlhf coming-from TOOL

Prints what another tool's parameters are called here, and what behaves differently.
TOOL is {" or ".join(TABLES)}. minirlhf ppo --preset sets PPO's numbers as they had them."""


def table(section: Section) -> str:
    """A parameter's name there, its name here, and what differs; long names are wrapped."""
    lines = [f"{section.title} → minirlhf {section.recipe}"]
    for theirs, ours, difference in section.rows:
        names = (
            textwrap.wrap(name, WIDTH, break_on_hyphens=False) for name in (theirs, ours or "-")
        )
        for there, here, rest in zip_longest(*names, [difference], fillvalue=""):
            lines.append(f"  {there:<{WIDTH}}  {here:<{WIDTH}}  {rest}".rstrip())
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    tool = words[0] if words else "--help"
    if tool in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(OK)
    if tool not in TABLES:
        is_flag = tool.startswith("-")
        what, names = ("unknown flag", ["--help"]) if is_flag else ("no such tool", TABLES)
        raise UserError(tool, what, f"{nearest(tool, names)}; tools: {', '.join(TABLES)}")
    if len(words) > 1:
        raise UserError(words[1], "unexpected argument", "give a tool alone")
    print("\n\n".join(table(section) for section in TABLES[tool]))
    return OK


if __name__ == "__main__":
    sys.exit(run(main))
