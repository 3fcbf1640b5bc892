"""Tables of other tools' parameters: complete, and nothing in them that does not exist here."""

import itertools
from dataclasses import fields

import pytest

import minirlhf
from minirlhf import cli
from minirlhf.errors import BAD_INPUT, OK
from minirlhf.setup.distill_settings import DistillConfig
from minirlhf.setup.dpo_settings import DPOConfig
from minirlhf.setup.grpo_settings import GRPOConfig
from minirlhf.setup.ppo_settings import PPOConfig
from minirlhf.setup.reward_settings import RewardConfig
from minirlhf.tools.coming_from import TOOLS, WIDTH, Section, sections

FLAGS = {
    recipe: {"--" + f.name.replace("_", "-") for f in fields(config)}
    for recipe, config in (
        ("ppo", PPOConfig), ("grpo", GRPOConfig), ("reward", RewardConfig), ("dpo", DPOConfig),
        ("distill", DistillConfig),
    )
}

# Fields of trl 0.9.6's PPOConfig and of that of 0.12 to 1.12 (with the two that went in between),
# of trl 1.x's GRPOConfig, what its RLOOConfig has otherwise, of trl 0.11's RewardTrainer, and those
# that LLaMA-Factory reads for ppo.
TRL_PPO = """
exp_name seed log_with task_name model_name query_dataset reward_model remove_unused_columns
tracker_kwargs accelerator_kwargs project_kwargs tracker_project_name push_to_hub_if_best_kwargs
steps learning_rate adap_kl_ctrl init_kl_coef kl_penalty target horizon gamma lam cliprange
cliprange_value vf_coef batch_size forward_batch_size mini_batch_size gradient_accumulation_steps
world_size ppo_epochs max_grad_norm optimize_cuda_cache optimize_device_cache early_stopping
target_kl compare_steps ratio_threshold use_score_scaling use_score_norm score_clip whiten_rewards
gradient_checkpointing is_encoder_decoder is_peft_model backward_batch_size
global_backward_batch_size global_batch_size
""".split()
TRL_PPO_TRAINER = """
config model ref_model tokenizer dataset optimizer data_collator num_shared_layers lr_scheduler
training_data_collator generate step log_stats save_pretrained
""".split()
TRL1_PPO = """
learning_rate dataset_num_proc num_mini_batches total_episodes local_rollout_forward_batch_size
num_sample_generations response_length stop_token stop_token_id temperature missing_eos_penalty
sft_model_path world_size num_total_batches micro_batch_size local_batch_size batch_size
local_mini_batch_size mini_batch_size push_to_hub reward_model_path model_adapter_name
ref_adapter_name num_ppo_epochs whiten_rewards kl_coef kl_estimator cliprange vf_coef
cliprange_value gamma lam ds3_gather_for_generation exp_name run_name
""".split()
TRL1_PPO_TRAINER = """
args processing_class model ref_model reward_model train_dataset value_model data_collator
eval_dataset optimizers callbacks peft_config train save_model generate_completions
""".split()
TRL_GRPO = """
model_init_kwargs disable_dropout cast_lm_head_to_fp32 remove_unused_columns num_generations
num_generations_eval max_completion_length ds3_gather_for_generation shuffle_dataset
generation_batch_size steps_per_generation temperature top_p top_k min_p generation_kwargs
chat_template_kwargs repetition_penalty use_transformers_paged cache_implementation use_vllm
vllm_mode vllm_model_impl vllm_structured_outputs_regex vllm_server_base_url vllm_server_host
vllm_server_port vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization
vllm_max_model_length vllm_tensor_parallel_size vllm_enable_sleep_mode beta num_iterations epsilon
delta epsilon_high sapo_temperature_neg sapo_temperature_pos importance_sampling_level
reward_weights multi_objective_aggregation scale_rewards loss_type mask_truncated_completions
sync_ref_model ref_model_mixup_alpha ref_model_sync_steps top_entropy_quantile
max_tool_calling_iterations vllm_importance_sampling_correction vllm_importance_sampling_mode
vllm_importance_sampling_cap off_policy_mask_threshold use_bias_correction_kl log_completions
num_completions_to_print log_unique_prompts log_completions_hub_repo learning_rate
""".split()
TRL_RLOO = """
num_generations beta num_iterations epsilon epsilon_high reward_weights normalize_advantages
reward_clip_range
""".split()
TRL_REWARD = """
model data_collator train_dataset eval_dataset tokenizer model_init compute_metrics callbacks
optimizers preprocess_logits_for_metrics peft_config remove_unused_columns dataset_num_proc
center_rewards_coefficient evaluate visualize_samples
""".split()
LLAMA_FACTORY = """
ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards ref_model
ref_model_adapters ref_model_quantization_bit reward_model reward_model_adapters
reward_model_quantization_bit lora_rank lora_alpha lora_dropout lora_target temperature top_p top_k
max_new_tokens max_steps template cutoff_len dataset plot_loss resume_from_checkpoint
logging_steps save_steps learning_rate lr_scheduler_type max_grad_norm
""".split()
# Fields of their own of trl 1.16's configs with the arguments of its trainers, and those of the
# DPO and KTO stages of LLaMA-Factory.
TRL_DPO = """
learning_rate model_init_kwargs trust_remote_code router_aux_loss_coef disable_dropout
dataset_num_proc max_length truncation_mode padding_free pad_to_multiple_of
precompute_ref_log_probs precompute_ref_batch_size loss_type loss_weights ld_alpha f_divergence_type
f_alpha_divergence_coef label_smoothing beta use_weighting discopop_tau activation_offloading
sync_ref_model ref_model_mixup_alpha ref_model_sync_steps pad_token model ref_model args
data_collator train_dataset eval_dataset processing_class compute_metrics callbacks optimizers
quantization_config peft_config
""".split()
TRL_KTO = """
loss_type desirable_weight undesirable_weight beta learning_rate max_length train_sampling_strategy
""".split()
TRL_ORPO_CPO = """
learning_rate max_length max_completion_length beta disable_dropout padding_value
generate_during_eval is_encoder_decoder model_init_kwargs trust_remote_code dataset_num_proc
label_smoothing cpo_alpha simpo_gamma alpha
""".split()
TRL_GKD = """
temperature lmbda beta max_new_tokens teacher_model_name_or_path teacher_model_init_kwargs
disable_dropout seq_kd teacher_model
""".split()
LLAMA_FACTORY_DPO = """
pref_beta pref_ftx pref_bco_weight pref_loss dpo_label_smoothing kto_chosen_weight
kto_rejected_weight simpo_gamma ref_model ref_model_adapters ref_model_quantization_bit ld_alpha
""".split()
SECTIONS = sections()
OF = {section.title: section for section in SECTIONS}
SHARED = (
    "TrainingArguments of RewardConfig, DPOConfig and its kin, and of the stages ppo, rm, dpo, kto"
)


def names(*sections: Section) -> set[str]:
    return {name for s in sections for there, _, _ in s.rows for name in there.split(", ")}


@pytest.mark.parametrize(
    ("theirs", "sections"),
    [
        (TRL_PPO, ["PPOConfig of TRL 0.9.6"]),
        (TRL_PPO_TRAINER, ["PPOTrainer of TRL 0.9.6"]),
        (TRL1_PPO, ["PPOConfig of TRL 0.12 to 1.12"]),
        (TRL1_PPO_TRAINER, ["PPOTrainer of TRL 0.12 to 1.12"]),
        (TRL_GRPO, ["GRPOConfig of TRL 1.x"]),
        (TRL_RLOO, ["RLOOConfig of TRL 1.x"]),
        (TRL_REWARD, ["RewardTrainer and RewardConfig of TRL 0.11"]),
        (TRL_DPO, ["DPOConfig and DPOTrainer of TRL 1.16"]),
        (TRL_KTO, ["KTOConfig and KTOTrainer of TRL 1.16"]),
        (TRL_ORPO_CPO, ["ORPOConfig and CPOConfig of TRL 1.16"]),
        (TRL_GKD, ["GKDConfig and GKDTrainer of TRL 1.16"]),
        (LLAMA_FACTORY_DPO, ["stages dpo and kto of LLaMA-Factory"]),
        (LLAMA_FACTORY, ["stage ppo of LLaMA-Factory", SHARED]),
    ],
    ids=["PPOConfig", "PPOTrainer", "PPOConfig 1", "PPOTrainer 1", "GRPO", "RLOO", "RewardTrainer",
         "DPO", "KTO", "ORPO and CPO", "GKD", "LF dpo", "LF"],
)
def test_tables_are_complete(theirs, sections):
    assert set(theirs) - names(*(OF[title] for title in sections)) == set()


def test_tables_of_ppo_config_have_nothing_else():
    assert names(OF["PPOConfig of TRL 0.9.6"]) == set(TRL_PPO)
    assert names(OF["PPOConfig of TRL 0.12 to 1.12"]) == set(TRL1_PPO)


def exists(name: str, verbs: list[str]) -> bool:
    """Whether each verb has such a flag, or there is such a verb or public name."""
    if name.startswith("--"):
        return all(name in FLAGS[verb] for verb in verbs)
    if name.startswith("minirlhf "):
        return name.split()[1] in cli.VERBS
    module, _, attribute = name.rpartition(".")
    return module == "minirlhf" and attribute in minirlhf.__all__


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: s.title)
def test_everything_of_ours_exists(section):
    assert section.rows and set(section.tools) <= set(TOOLS) and set(section.verbs) <= FLAGS.keys()
    for there, ours, difference in section.rows:
        assert [n for n in ours.split(", ") if n != "-" and not exists(n, section.verbs)] == []
        assert there and difference
        assert max(map(len, f"{there} {ours}".replace("minirlhf ", "").split())) <= WIDTH


def test_exists_can_fail():
    assert not exists("--no-such-flag", ["ppo"])
    assert not exists("--show-samples", ["ppo", "reward"]) and exists("--show-samples", ["reward"])
    assert not exists("minirlhf dance", ["ppo"])
    assert not exists("minirlhf.no_name", ["ppo"])


@pytest.mark.parametrize("tool", TOOLS)
def test_coming_from_prints_every_row(tool, capsys):
    assert cli.main(["coming-from", tool]) == OK
    lines = capsys.readouterr().out.splitlines()
    starts = [2, 4 + WIDTH, 6 + 2 * WIDTH, None]  # of the three columns
    for section in (section for section in SECTIONS if tool in section.tools):
        at = lines.index(f"{section.title} → minirlhf {', '.join(section.verbs)}")
        here = list(itertools.takewhile(bool, lines[at + 1 :]))  # up to an empty line
        for column, (start, end) in enumerate(itertools.pairwise(starts)):
            printed = " ".join(" ".join(line[start:end] for line in here).split())
            assert printed == " ".join(row[column] for row in section.rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lamafactory"], "lamafactory: no such tool: the nearest is llama-factory; tools: trl"),
        (["--trl"], "--trl: unknown flag: tools: trl, llama-factory"),
        (["trl", "ppo"], "ppo: unexpected argument: give a tool alone"),
    ],
)
def test_coming_from_refuses_what_it_does_not_know(words, message, capsys):
    assert cli.main(["coming-from", *words]) == BAD_INPUT
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_coming_from_names_its_tools(words, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["coming-from", *words])
    assert left.value.code == OK
    assert "TOOL is trl or llama-factory" in capsys.readouterr().out
