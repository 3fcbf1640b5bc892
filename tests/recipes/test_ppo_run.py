"""PPO's loop: dropped and rebuilt, killed and resumed, refused, and from the command line."""

import io
import json
import math
import os
import shutil
import signal
from contextlib import redirect_stdout
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nan

from minirlhf.batches import rollouts
from minirlhf.batches.rollouts import measure
from minirlhf.cli import main
from minirlhf.data.examples import Prompt
from minirlhf.data.tokenizer import load_tokenizer, train_tokenizer
from minirlhf.errors import BAD_INPUT, BUG, NON_FINITE, OK, STOPPED, UserError
from minirlhf.evaluation.samples import sample_table, show_samples
from minirlhf.models import pretrained
from minirlhf.models.families import config_from_hf
from minirlhf.models.heads import RewardModel, ValueHeadModel, initialize_score
from minirlhf.models.lora import add_lora, merge_lora
from minirlhf.models.sampling import Sampling
from minirlhf.models.transformer import CausalLM, initialize
from minirlhf.recipes import ppo as recipe
from minirlhf.recipes.ppo import ppo
from minirlhf.run.checkpoint import load_checkpoint, save_checkpoint, verify
from minirlhf.run.folder import Run
from minirlhf.run.resume import RunSettings
from minirlhf.run.settings import validate
from minirlhf.setup import ppo as loading
from minirlhf.setup.ppo import prompt_room
from tests.recipes.test_ppo import (
    PROMPTS,
    Letters,
    config_of,
    letter_d,
    measured,
    parameters,
    run_steps,
    state_of,
    tiny_lm,
    tiny_policy,
)

# ---- the loop ------------------------------------------------------------------------------------


def with_lora(policy: ValueHeadModel) -> ValueHeadModel:
    return add_lora(policy, rank=2, alpha=8.0, seed=0)


@pytest.mark.parametrize(
    ("settings", "prepare", "ref"),
    [
        ({"kl_target": 0.1, "kl_horizon": 20.0, "mini_batches": 2}, lambda p: p, tiny_lm),
        ({"lora_rank": 2}, with_lora, lambda: None),
    ],
    ids=["adaptive", "lora"],
)
def test_dropping_and_rebuilding_the_generator_at_every_yield_changes_no_bit(
    settings, prepare, ref, tmp_path
):
    config = config_of(save_rollouts=True, **settings)

    def fresh():
        return state_of(prepare(tiny_policy()), config)

    def steps_from(state):
        return ppo(state, PROMPTS, letter_d, ref(), Letters(), config)

    whole = fresh()
    expected = [(step.metrics, step.samples) for step in steps_from(whole)]
    assert len(expected) == 4

    state, got = fresh(), []
    for _ in range(4):
        step = next(steps_from(state))
        got.append((step.metrics, step.samples))
        commit = save_checkpoint(state, tmp_path)
        state = fresh()
        load_checkpoint(state, commit)
    assert json.dumps(got) == json.dumps(expected)
    assert torch.equal(parameters(state.model), parameters(whole.model))
    assert (state.kl_coef, state.samples, state.step) == (whole.kl_coef, 16, 4)
    assert state.meters.as_dict() == whole.meters.as_dict()
    assert next(steps_from(state), None) is None


def test_ppo_samples_the_prompts_of_each_epoch_once():
    seen = []

    def reward(completions):
        seen.extend(tuple(ids) for ids in completions.prompt_ids)
        return letter_d(completions)

    run_steps(config_of(steps=3, batch_size=2, epochs=1), reward, prompts=PROMPTS[:3])
    assert len(set(seen[:3])) == len(set(seen[3:])) == 3


def test_ppo_texts_do_not_depend_on_how_many_rows_are_sampled_at_once():
    runs = []
    for rows in (1, 3, 256):
        config = config_of(rollout_batch_size=rows, steps=1, save_rollouts=True)
        (step,), _ = run_steps(config)
        runs.append([row["response_ids"] for row in step.samples])
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ppo_learns_to_write_a_letter(dtype):
    config = config_of(steps=15, batch_size=16, micro_batch_size=16, learning_rate=5e-3)
    steps, _ = run_steps(config, policy=tiny_policy(dtype))
    scores = [step.metrics["objective/scores"] for step in steps]
    first, last = sum(scores[:3]) / 3, sum(scores[-3:]) / 3
    assert first < 1 and last > first + 2  # of 6 letters


def test_lora_reference_is_the_policy_without_its_adapters():
    policy = with_lora(tiny_policy())
    base = {n: p.detach().clone() for n, p in policy.named_parameters() if not p.requires_grad}
    state = state_of(policy, config_of())
    steps = list(ppo(state, PROMPTS, letter_d, None, Letters(), config_of(lora_rank=2)))
    assert steps[0].metrics["objective/kl"] == 0
    assert steps[3].metrics["objective/kl"] != 0
    now = dict(policy.named_parameters())
    assert all(torch.equal(now[name], before) for name, before in base.items())
    buffer = measured(policy)
    own = buffer.tokens("ref_logprobs")
    measure(policy, None, buffer, 1.0)
    assert torch.equal(buffer.tokens("ref_logprobs"), own)  # as a copy of the base gives
    assert not torch.equal(buffer.tokens("old_logprobs"), own)


def test_measure_refuses_no_reference_for_a_policy_without_adapters():
    buffer = measured(tiny_policy())
    with pytest.raises(ValueError, match="no adapters"):
        measure(tiny_policy(), None, buffer, 1.0)


def test_ppo_stops_where_the_reference_is_not_the_starting_policy():
    other = initialize(tiny_lm(), torch.Generator().manual_seed(9))
    state = state_of(tiny_policy(), config_of())
    with pytest.raises(UserError, match=r"nats before any training.*--ref") as caught:
        next(ppo(state, PROMPTS, letter_d, other, Letters(), config_of()))
    assert caught.value.code == BUG
    config = config_of(ref="another folder")
    step = next(ppo(state, PROMPTS, letter_d, other, Letters(), config))
    assert step.metrics["objective/kl"] != 0


def test_ppo_stops_where_training_passes_are_not_those_that_measured():
    policy, calls = tiny_policy(), []

    def drift(module, inputs, hidden):
        calls.append(1)
        return hidden * (1 + 1e-2 * len(calls))

    policy.lm.model.norm.register_forward_hook(drift)
    config = config_of(ref="another folder")  # else the KL of step 1 would tell first
    with pytest.raises(UserError, match="step 1: val/ratio: the first ratio is off 1") as caught:
        run_steps(config, policy=policy)
    assert caught.value.code == BUG


@pytest.mark.parametrize("bad", [nan, math.inf])
def test_ppo_stops_at_a_score_that_is_not_finite_and_changes_nothing(bad):
    state = state_of(tiny_policy(), config_of())
    before = parameters(state.model)
    steps = ppo(state, PROMPTS, lambda c: torch.tensor([0, 0, bad, 0]), tiny_lm(), Letters(),
                config_of())
    with pytest.raises(UserError, match=r"step 1, response 2: score: is (nan|inf)") as caught:
        next(steps)
    assert caught.value.code == NON_FINITE
    assert torch.equal(parameters(state.model), before)
    assert (state.step, state.samples) == (0, 0)


def test_score_refuses_another_number_of_scores():
    with pytest.raises(ValueError, match=r"reward gave \(4, 1\): give one score each, 4"):
        run_steps(config_of(), reward=lambda completions: torch.zeros(4, 1))


def test_sample_table_takes_the_same_prompts_and_keys_at_every_step():
    state = state_of(tiny_policy(), config_of())
    first = sample_table(state, PROMPTS, letter_d, Letters(), Sampling(6), 3, 2, seed=0)
    state.step, state.samples = 7, 28
    again = sample_table(state, PROMPTS, letter_d, Letters(), Sampling(6), 3, 4, seed=0)
    assert [row.pop("step") for row in first] == [0, 0, 0]
    assert [row.pop("step") for row in again] == [7, 7, 7]
    assert again == first
    assert first[0].keys() == {"kind", "prompt", "response", "finish_reason", "score"}


def test_show_samples_prints_and_keeps_them(tmp_path, capsys):
    prompts = [Prompt([3], [{"role": "user", "content": "how are you"}], "p", {})]
    state = state_of(tiny_policy(), config_of())
    state.step = 7
    rows = sample_table(state, prompts, letter_d, Letters(), Sampling(6), 4, 4, seed=0)
    with Run(RunSettings(out=str(tmp_path / "out")), "ppo") as r:
        show_samples(r, state, rows)
    shown = capsys.readouterr().out
    assert "samples at step 7" in shown
    assert "how are you |" in shown  # the last message of a dialogue
    kept = (tmp_path / "out" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in kept] == rows


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_new_tokens": 7}, "min_new_tokens 7 is above max_new_tokens 6: lower one or raise"),
        (
            {"bootstrap_truncated": True, "critic": "c", "score_scaling": "normalize"},
            "bootstrap_truncated: a critic from a reward model values truncated responses in that",
        ),
        (
            {"bootstrap_truncated": True, "critic": "c", "whiten_rewards": True},
            "leave out score_scaling, score_clip and whiten_rewards",
        ),
        ({"compile": True, "dtype": "bfloat16"}, "compile with bfloat16: graphs with and without"),
        (
            {"offload_frozen": True, "kl_in": "loss", "kl_estimator": "full"},
            "offload_frozen: a full KL in the loss reads the reference",
        ),
        ({"stop": ("", "!")}, "stop: got an empty string, which every text contains"),
        ({"kl_in": "loss"}, "kl_in loss with kl_estimator k1: the gradient .* use k2 or full"),
        ({"kl_in": "loss", "kl_estimator": "abs"}, "kl_in loss with kl_estimator abs"),
        (
            {"missing_eos": "ramp", "missing_eos_penalty": 1.0},
            "missing_eos_buffer is 0, must be from 1 to max_new_tokens 6",
        ),
        (
            {"missing_eos": "ramp", "missing_eos_penalty": 1.0, "missing_eos_buffer": 7},
            "missing_eos_buffer is 7, must be from 1 to max_new_tokens 6",
        ),
        ({"missing_eos": "ramp", "missing_eos_buffer": 3}, "a ramp to nothing; use one above 0"),
        ({"missing_eos_buffer": 3}, "missing_eos_buffer goes with missing_eos ramp"),
        (
            {"bootstrap_truncated": True, "missing_eos_penalty": 1.0},
            "bootstrap_truncated: a truncated response then has no score that a missing_eos rule",
        ),
        ({"bootstrap_truncated": True, "missing_eos": "replace"}, "leave out one of them"),
        ({"dual_clip": 1.2}, r"dual_clip 1.2: must be above 1 \+ clip_high 0.2"),
        (
            {"dual_clip": 3.0, "epochs": 1, "mini_batches": 1},
            "dual_clip: the ratio of the only update is 1; raise epochs or mini_batches",
        ),
        ({"max_ratio": 3.0, "epochs": 1, "mini_batches": 1}, "max_ratio: the ratio of the only"),
        ({"top_k": 1}, "top_k 1: one token is left to draw, .*; use 0, or 2 or more$"),
        ({"min_p": 1.0}, "min_p 1: one token is left to draw, .*; use less$"),
        ({"early_stop_kl": 0.1, "epochs": 1}, "there is one epoch, and none after it to leave out"),
        (
            {"early_stop_kl": 0.1, "epochs": 2, "mini_batches": 1},
            "early_stop_kl: one mini-batch moves nothing before the last of two epochs",
        ),
        ({"train_critic": False}, "no-train-critic: goes with --critic, a value head has to learn"),
        (
            {"train_critic": False, "critic": "c", "critic_learning_rate": 1.0},
            "leave out critic_learning_rate and critic_warmup_steps",
        ),
        (
            {"train_critic": False, "critic": "c", "critic_warmup_steps": 1},
            "leave out critic_learning_rate and critic_warmup_steps",
        ),
        *(
            ({"train_critic": False, "critic": "c"} | rescaled, "no-train-critic: its values stay")
            for rescaled in (
                {"score_scaling": "scale"}, {"score_clip": 1.0}, {"whiten_rewards": True},
                {"reward": ("0.1*c",)},
            )
        ),
        ({"ptx_data": "texts.jsonl"}, "ptx_data and ptx_coef go together: give both, or neither"),
        ({"ptx_coef": 1.0}, "ptx_data and ptx_coef go together"),
        ({"critic_warmup_steps": 4}, "the policy would never learn, there are 4 steps"),
        ({"temperature": 0.0}, "temperature: got 0.0, must be a finite number > 0"),
        (
            {"batch_size": 10, "mini_batches": 3, "micro_batch_size": 4},
            "batch_size 10 is less than 3 mini_batches of micro_batch_size 4: use batch_size 12 "
            "or micro_batch_size 3 or mini_batches 2",
        ),
        (
            {"batch_size": 2, "mini_batches": 3, "micro_batch_size": 1},
            "use batch_size 3 or mini_batches 2$",
        ),
        (
            {"batch_size": 2, "mini_batches": 1, "micro_batch_size": 3},
            "use batch_size 3 or micro_batch_size 2$",
        ),
        ({"kl_target": 6.0, "kl_coef": 0.0}, "kl_coef is 0, which no factor can move"),
        (
            {"kl_target": 6.0, "kl_horizon": 0.8},
            "kl_horizon 0.8 is too short for batch_size 4: .*use more than 0.8",
        ),
    ],
)
def test_config_refuses_what_ppo_cannot_do(settings, message):
    with pytest.raises(UserError, match=message):
        validate(config_of(**settings))
    with pytest.raises(UserError, match=message):  # a loop of one's own is told as well
        run_steps(config_of(**settings))


def test_config_takes_the_values_that_its_errors_name():
    for rows, minis, micro in ((12, 3, 4), (10, 3, 3), (10, 2, 4), (3, 3, 1), (2, 2, 1), (2, 1, 2)):
        config = config_of(batch_size=rows, mini_batches=minis, micro_batch_size=micro)
        assert config.check() == []
    assert config_of(kl_target=6.0, kl_horizon=0.81).check() == []
    assert config_of(critic="c", train_critic=False, reward=("c",)).check() == []
    for several in ({"epochs": 1, "mini_batches": 2}, {"epochs": 2, "mini_batches": 1}):
        assert config_of(dual_clip=3.0, max_ratio=3.0, **several).check() == []


# ---- the command line ----------------------------------------------------------------------------

SHAPE = {
    "model_type": "llama", "vocab_size": 258, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
    "eos_token_id": 0,
}
REWARD = """
def vowels(completions, prompts, bonus):
    pairs = zip(completions, bonus, strict=True)
    return [sum(c in "aeiou" for c in text) + more for text, more in pairs]

def broken(completions):
    return [float("nan")] * len(completions)
"""


def random_lm(seed: int, **changes) -> CausalLM:
    lm = CausalLM(config_from_hf({**SHAPE, **changes}))
    return initialize(lm, torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folders of a policy, another policy and a reward model; prompts; a file of rewards."""
    folder = tmp_path_factory.mktemp("world")
    for name in ("policy", "other", "reward"):
        train_tokenizer([], 258, folder / name)
    ends = {"eos_token_id": [0, 67], "top_k": 50}
    (folder / "policy" / "generation_config.json").write_text(json.dumps(ends))
    pretrained.save_pretrained(random_lm(0), folder / "policy")
    pretrained.save_pretrained(random_lm(1), folder / "other")
    scorer = initialize_score(RewardModel(random_lm(2)), torch.Generator().manual_seed(2))
    pretrained.save_pretrained(scorer, folder / "reward", pad_token_id=1)
    rows = [{"prompt": "The film" + "!" * i, "bonus": i / 8} for i in range(5)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARD)
    return folder


def command(world, out, *flags: str, **settings) -> list[str]:
    values = {
        "model": world / "policy", "data": world / "prompts.jsonl", "out": out,
        "reward": f"{world / 'reward.py'}:vowels", "steps": 4, "save_every": 2, "batch_size": 4,
        "micro_batch_size": 2, "epochs": 2, "mini_batches": 2, "max_new_tokens": 5,
        "learning_rate": 1e-2, "kl_target": 0.1, "kl_horizon": 20, "sample_every": 3,
        "sample_prompts": 2, "log_every": 3, **settings,
    }
    return ["ppo", *flags] + [w for k, v in values.items() for w in (f"--{k}", str(v))]


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """(folder, what was printed) of a run that nothing interrupted."""
    out, printed = tmp_path_factory.mktemp("runs") / "whole", io.StringIO()
    with redirect_stdout(printed):
        assert main(command(world, out, "--save-rollouts")) == OK
    return out, printed.getvalue()


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(out) -> list[dict]:
    return [
        {k: v for k, v in line.items() if k != "clock"} for line in lines(out / "metrics.jsonl")
    ]


def leftovers(out) -> list[str]:
    return [p.name for p in out.rglob("*") if p.name.startswith((".tmp", ".trash"))]


def policy_at(out, step: int, world, lora: int = 0) -> ValueHeadModel:
    """The policy of a checkpoint."""
    policy = ValueHeadModel(pretrained.load_pretrained(world / "policy"))
    if lora:
        add_lora(policy, lora, 32.0, 0)
    load_checkpoint(state_of(policy, config_of()), out / "checkpoints" / f"step-{step:08d}")
    return policy


def test_main_prints_what_is_about_to_happen(whole):
    out, printed = whole
    # parameters: 258 · 32 embedded and as many unembedded, 2 layers of 4 · 32² + 3 · 32 · 48 + 64,
    # a norm of 32, a value head of 33
    count = 2 * 258 * 32 + 2 * (4 * 32**2 + 3 * 32 * 48 + 64) + 32 + 33
    facts = (
        ("prompts", "5"), ("epochs over prompts", "3.20"), ("rows in a rollout", "4"),
        ("rows in a forward pass", "at most 2, 4,096 tokens"),
        ("rows in an optimizer step", "about 2, 1 or more forward passes"),
        ("optimisation", "2 epochs of 2 mini-batches a rollout"), ("steps", "4"),
        ("trainable parameters", f"{count:,}"), ("learning rate", "0.01, linear, 0 warm-up steps"),
        ("kl_coef", "0.05, adapting to 0.1 nats a response"), ("gamma, lambda", "1, 0.95"),
        ("clip", "ratio 0.8 to 1.2, value 0.2"),
        ("reference", "the policy at step 0; their KL must be 0 there"),
        ("memory", "about 0."), ("device", "cpu"), ("dtype", "float32"), ("seed", "0"),
    )
    for name, value in facts:
        assert f"\n  {name:<25}  {value}" in printed
    assert "5 rows · kept 5" in printed
    assert f"aligned model in {out / 'model'}" in printed


def test_main_writes_metrics_samples_and_checkpoints(whole):
    out, _ = whole
    assert [line["step"] for line in lines(out / "metrics.jsonl")] == [3, 4]
    assert lines(out / "metrics.jsonl")[1]["episode"] == 16
    rows = lines(out / "samples.jsonl")
    kinds = [(row["step"], row["kind"]) for row in rows]
    rollouts = {n: 4 * [(n, "rollout")] for n in (1, 2, 3, 4)}
    tables = {n: 2 * [(n, "sample")] for n in (0, 3, 4)}
    assert kinds == tables[0] + rollouts[1] + rollouts[2] + rollouts[3] + tables[3] + \
        rollouts[4] + tables[4]
    shown = [row["prompt"] for row in rows if row["kind"] == "sample"]
    assert shown == 3 * ["The film", "The film!"]
    assert all(math.isfinite(v) for line in timeless(out) for v in line.values())
    assert [p.name for p in sorted((out / "checkpoints").iterdir())] == [
        "step-00000002", "step-00000004",
    ]
    assert leftovers(out) == []


def test_main_exports_the_policy_as_transformers_reads_it(whole, world):
    out, _ = whole
    policy = policy_at(out, 4, world)
    row = torch.tensor([[67, 68, 0, 257, 5]])
    peer = transformers.AutoModelForCausalLM.from_pretrained(out / "model")
    with torch.no_grad():
        logits = policy.lm.logits(policy.lm(row))
        torch.testing.assert_close(peer(row).logits, logits, rtol=0, atol=1e-5)
        exported = pretrained.load_pretrained(out / "model")
        assert torch.equal(exported.logits(exported(row)), logits)
    tokenizer = load_tokenizer(out / "model")
    assert tokenizer.fingerprint == load_tokenizer(world / "policy").fingerprint
    # both ends of the model that was aligned, and the rest of its generation_config.json
    assert tokenizer.eos_ids == (0, 67)
    assert peer.generation_config.eos_token_id == [0, 67] and peer.generation_config.top_k == 50


def test_main_resumes_in_half_precision_to_the_same_bytes(world, tmp_path, monkeypatch, capsys):
    settings = {"dtype": "bfloat16", "log_every": 1}
    assert main(command(world, tmp_path / "whole", **settings)) == OK
    assert f"warning: {world / 'policy'}: weights are rounded to bfl" in capsys.readouterr().out
    log, argv = Run.log, command(world, tmp_path / "run", **settings)

    def interrupted(self, state, *rest):
        log(self, state, *rest)
        if state.step == 3:
            raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", interrupted)
        with pytest.raises(RuntimeError, match="power cut"):
            main(argv)
    assert main([*argv, "--resume"]) == OK
    assert json.dumps(timeless(tmp_path / "run")) == json.dumps(timeless(tmp_path / "whole"))
    masters = "checkpoints/step-00000004/optimizer.safetensors"
    assert (tmp_path / "run" / masters).read_bytes() == (tmp_path / "whole" / masters).read_bytes()
    saved = load_file(tmp_path / "run" / masters)
    assert {t.dtype for t in saved.values()} == {torch.float32}
    weight = load_file(tmp_path / "run/model/model.safetensors")["model.norm.weight"]
    master = saved["lm.model.norm.weight.master"]
    assert torch.equal(weight, master.bfloat16()) and not torch.equal(weight.float(), master)


@pytest.mark.parametrize("how", ["raise", "signal"])
def test_main_resumes_to_the_same_bytes(how, whole, world, tmp_path, monkeypatch):
    out, argv = tmp_path / "run", command(world, tmp_path / "run", "--save-rollouts")
    log = Run.log

    def interrupted(self, state, *rest):
        log(self, state, *rest)
        if state.step == 3 and how == "raise":
            raise RuntimeError("power cut")
        if state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", interrupted)
        if how == "raise":  # between two checkpoints: the lines of step 3 are written again
            with pytest.raises(RuntimeError, match="power cut"):
                main(argv)
        else:
            assert main(argv) == STOPPED
    # A signal cuts the report of step 3 short, so that the resumed run writes all of it.
    assert [line["step"] for line in timeless(out)] == ([3] if how == "raise" else [])
    assert not (out / "model").exists() and leftovers(out) == []
    assert main([*argv, "--resume"]) == OK
    assert json.dumps(timeless(out)) == json.dumps(timeless(whole[0]))
    for name in ("samples.jsonl", "model/model.safetensors", "model/config.json",
                 "checkpoints/step-00000004/model.safetensors",
                 "checkpoints/step-00000004/optimizer.safetensors"):
        assert (out / name).read_bytes() == (whole[0] / name).read_bytes()
    assert main([*argv, "--resume"]) == OK  # nothing is left to do
    assert (out / "samples.jsonl").read_bytes() == (whole[0] / "samples.jsonl").read_bytes()


@pytest.mark.parametrize("trains", [True, False])
def test_main_trains_the_head_of_a_critic_beside_adapters_if_asked_to(trains, world, tmp_path):
    flags = ["--lora-rank", "2", *([] if trains else ["--no-train-critic"])]
    argv = command(world, tmp_path / "run", *flags, critic=world / "reward", steps=2, save_every=1)
    assert main(argv) == OK
    start = load_file(world / "reward" / "model.safetensors")
    saved = load_file(tmp_path / "run/checkpoints/step-00000002/model.safetensors")
    assert torch.equal(saved["v_head.weight"], start["score.weight"]) is not trains


@pytest.mark.parametrize("trains", [True, False])
def test_main_starts_a_critic_from_a_reward_model(trains, world, tmp_path):
    flags = [] if trains else ["--no-train-critic"]
    argv = command(world, tmp_path / "run", *flags, critic=world / "reward", steps=2, save_every=1)
    assert main(argv) == OK
    start = load_file(world / "reward" / "model.safetensors")
    saved = load_file(tmp_path / "run/checkpoints/step-00000002/model.safetensors")
    critic = {n.removeprefix("critic."): t for n, t in saved.items() if n.startswith("critic.")}
    same = [torch.equal(t, start[f"model.{n}"]) for n, t in critic.items()]
    assert len(same) == len(start) - 1  # all but the score head
    assert all(same) is not trains
    assert torch.equal(saved["v_head.weight"], start["score.weight"]) is not trains
    exported = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert exported.keys() == load_file(world / "policy" / "model.safetensors").keys()


def give_other_tokenizer(folder) -> None:
    """One of as many ids, two of which have changed places."""
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text("utf-8"))
    vocab = values["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(values), encoding="utf-8")


def test_main_refuses_a_critic_that_cannot_serve(world, tmp_path, capsys):
    argv = command(world, tmp_path / "run", "--no-train-critic")
    assert main(argv) == BAD_INPUT
    assert "goes with --critic" in capsys.readouterr().err
    assert main(command(world, tmp_path / "run", critic=world / "other")) == BAD_INPUT
    assert "not a reward model" in capsys.readouterr().err
    other = shutil.copytree(world / "reward", tmp_path / "reward")
    give_other_tokenizer(other)
    assert main(command(world, tmp_path / "run", critic=other)) == BAD_INPUT
    assert "another tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_main_learns_from_a_weighted_sum_and_logs_each_part(world, tmp_path, capsys):
    code = tmp_path / "own.py"
    code.write_text(
        "def length(completions):\n    return [float(len(c)) for c in completions]\n"
        "def dense(completion_ids):\n    return [[0.5] * len(ids) for ids in completion_ids]\n"
        "def some(completions):\n    return [None] * len(completions)\n"
    )
    argv = command(world, tmp_path / "run", "--save-rollouts", steps=1, sample_every=0, log_every=1)
    at = argv.index("--reward")
    names = [f"2*{code}:length", f"{code}:dense", f"{code}:some", f"0.1*{world}/reward"]
    argv[at + 1 : at + 2] = names
    assert main(argv) == OK
    told = [words.split() for words in capsys.readouterr().out.splitlines()]
    assert ["reward", "length", "2", "x", f"{code}:length"] in told
    (line,) = lines(tmp_path / "run" / "metrics.jsonl")
    rows = [row for row in lines(tmp_path / "run" / "samples.jsonl") if row["kind"] == "rollout"]
    lengths = [len(row["response"]) for row in rows]
    assert line["rewards/length/mean"] == pytest.approx(sum(lengths) / 4, abs=1e-6)
    dense = [len(row["response_ids"]) / 2 for row in rows]
    assert line["rewards/dense/mean"] == pytest.approx(sum(dense) / 4, abs=1e-6)
    assert not [name for name in line if name.startswith("rewards/some/")]  # it never applied
    total = 2 * line["rewards/length/mean"] + line["rewards/dense/mean"]
    total += 0.1 * line["rewards/reward/mean"]
    assert line["objective/scores"] == pytest.approx(total, abs=1e-5)
    # what PPO learned from: at step 0 the KL is 0, so a row's rewards are all of its score
    model = pretrained.load_reward_model(world / "reward")
    for row, length, sum_of_tokens in zip(rows, lengths, dense, strict=True):
        assert len(row["rewards"]) == 1 or row["rewards"][0] == 0.5
        assert sum(row["rewards"]) == pytest.approx(row["score"] + sum_of_tokens, abs=1e-5)
        ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
        alone = model(ids, torch.tensor([ids.shape[1]])).item()
        assert row["score"] == pytest.approx(2 * length + 0.1 * alone, abs=1e-5)


def test_main_reencodes_for_a_reward_model_with_another_tokenizer(world, tmp_path, capsys):
    own = tmp_path / "own"
    tokenizer = train_tokenizer(["the film was good"] * 9, 270, own)
    scorer = RewardModel(random_lm(5, vocab_size=tokenizer.vocab_size))
    initialize_score(scorer, torch.Generator().manual_seed(5))
    pretrained.save_pretrained(scorer, own, pad_token_id=1)
    argv = command(world, tmp_path / "run", steps=1, reward=own)
    assert main(argv) == OK
    assert f"{own} (its own tokenizer: texts are re-encoded)" in capsys.readouterr().out
    (row, *_) = lines(tmp_path / "run" / "samples.jsonl")
    ids = tokenizer.encode(row["prompt"]) + tokenizer.encode(row["response"], bos=False)
    ids += [] if row["finish_reason"] == "length" else [0]
    model = pretrained.load_reward_model(own)
    alone = model(torch.tensor([ids]), torch.tensor([len(ids)])).item()
    assert row["score"] == pytest.approx(alone, abs=1e-5)


def test_main_refuses_to_resume_with_another_reward_function(whole, world, tmp_path, capsys):
    spec = tmp_path / "reward.py"
    spec.write_text(REWARD)
    argv = command(world, tmp_path / "run", steps=1, reward=f"{spec}:vowels")
    assert main(argv) == OK
    spec.write_text(REWARD.replace("aeiou", "aeio"))
    assert main([*argv, "--resume"]) == BAD_INPUT
    assert "reward.py: has changed since the run began" in capsys.readouterr().err


def test_main_scores_with_a_reward_model_folder(world, tmp_path):
    argv = command(world, tmp_path / "run", "--save-rollouts", steps=1, reward=world / "reward")
    assert main(argv) == OK
    model = pretrained.load_reward_model(world / "reward")
    rows = [row for row in lines(tmp_path / "run" / "samples.jsonl") if row["kind"] == "rollout"]
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
        with torch.no_grad():
            expected = float(model(ids, torch.tensor([ids.shape[1]])))
        assert row["score"] == pytest.approx(expected, abs=1e-5)


def test_main_without_frozen_models_in_memory_changes_no_bit(world, tmp_path, monkeypatch):
    settings = {"steps": 2, "log_every": 1, "reward": world / "reward"}
    assert main(command(world, tmp_path / "plain", **settings)) == OK
    seen, read = [], []
    load, step = pretrained.load_reward_model, recipe.ppo_step

    def loaded(*args):
        read.append(load(*args))
        return read[-1]

    def look(what, *models):
        seen.append((what, *(next(model.parameters()).is_meta for model in models)))

    def stepped(policy, *args):
        look("step", policy, args[-3], *read)
        return step(policy, *args)

    def passed(lm, hidden, *rest):
        look("policy" if lm is models[0] else "reference", *models, *read)
        return measured(lm, hidden, *rest)

    def sampled(lm, *rest):
        look("sample", lm, *read)
        return draw(lm, *rest)

    models, measured, draw = [], rollouts.response_pass, recipe.sample
    start = loading.load_policy
    monkeypatch.setattr("minirlhf.rewards.load.load_reward_model", loaded)
    monkeypatch.setattr(recipe, "ppo_step", stepped)
    monkeypatch.setattr(recipe, "sample", sampled)
    monkeypatch.setattr(
        loading, "load_policy", lambda *args: models.append((p := start(*args)).lm) or p
    )
    monkeypatch.setattr(rollouts, "response_pass", passed)
    assert main(command(world, tmp_path / "away", "--offload-frozen", **settings)) == OK
    assert {row for row in seen if row[0] == "step"} == {("step", False, True, True)}
    assert {row for row in seen if row[0] == "sample"} == {("sample", False, True)}
    # The policy is measured and trained, the reference measured; then the reward model is away.
    assert {row for row in seen if len(row) == 3 and row[0] != "sample"} == {
        ("policy", False, True), ("reference", False, True),
    }
    assert timeless(tmp_path / "away") == timeless(tmp_path / "plain")


def test_main_goes_on_with_other_settings_where_that_is_allowed(world, tmp_path, capsys):
    out = tmp_path / "run"
    start = {"log_every": 1, "save_every": 1, "kl_coef": 0.1, "kl_target": "none"}
    start |= {"learning_rate": 1e-3, "schedule": "constant"}
    assert main(command(world, out, steps=2, **start)) == OK
    before = (out / "metrics.jsonl").read_bytes()
    other = start | {"steps": 4, "kl_coef": 0.7, "learning_rate": 1e-4}
    again = command(world, out, "--resume", **other)
    assert main(again) == BAD_INPUT
    assert "or --allow-setting-change" in capsys.readouterr().err
    assert main([*again, "--allow-setting-change"]) == OK
    printed = capsys.readouterr().out
    assert "changed: kl_coef was 0.1, is 0.7" in printed and "steps was 2, is 4" in printed
    text = (out / "metrics.jsonl").read_bytes()
    lines = [json.loads(line) for line in text.splitlines()]
    assert text.startswith(before)
    assert [line["objective/kl_coef"] for line in lines] == [0.1, 0.1, 0.7, 0.7]
    assert [line["lr"] for line in lines] == [1e-3, 1e-3, 1e-4, 1e-4]


@pytest.mark.parametrize(
    ("beside", "change"),
    [
        ({"kl_target": 5}, {"kl_coef": 0.7}),  # the run's own has moved since
        ({"eval_data": "held_out"}, {"temperature": 0.5}),  # later answers are compared
        ({"eval_data": "held_out"}, {"columns": "prompt=prompt"}),  # nor may other prompts be read
        ({}, {"eval_data": "held_out"}),
        ({"eval_data": "held_out"}, {"max_prompt_length": 40}),
    ],
    ids=["kl_coef", "temperature", "columns", "eval_data", "max_prompt_length"],
)
def test_main_never_changes_what_a_run_remembers(beside, change, world, tmp_path, capsys):
    held_out = shutil.copy(world / "prompts.jsonl", tmp_path / "held_out.jsonl")
    start, other = (
        {name: held_out if name == "eval_data" else value for name, value in given.items()}
        for given in ({"steps": 2, **beside}, {"steps": 2, **beside, **change})
    )
    assert main(command(world, tmp_path / "run", **start)) == OK
    again = command(world, tmp_path / "run", "--resume", "--allow-setting-change", **other)
    assert main(again) == BAD_INPUT
    told = capsys.readouterr().err
    assert f"{next(iter(change))} was" in told and "--allow-setting-change" not in told


def test_main_exports_a_lora_run_merged(world, tmp_path):
    out = tmp_path / "run"
    assert main(command(world, out, steps=2, lora_rank=2, log_every=1)) == OK
    assert lines(out / "metrics.jsonl")[0]["objective/kl"] == 0
    policy, row = merge_lora(policy_at(out, 2, world, lora=2)), torch.tensor([[67, 68, 0, 257, 5]])
    exported = pretrained.load_pretrained(out / "model")
    start = pretrained.load_pretrained(world / "policy")
    with torch.no_grad():
        logits = policy.lm.logits(policy.lm(row))
        assert torch.equal(exported.logits(exported(row)), logits)
        assert not torch.equal(start.logits(start(row)), logits)


def test_main_gives_the_critic_a_learning_rate_of_its_own(world, tmp_path):
    policies = []
    for rate in (0.05, 0.1):
        settings = {"steps": 1, "epochs": 1, "mini_batches": 1, "critic_learning_rate": rate}
        assert main(command(world, tmp_path / str(rate), **settings)) == OK
        policies.append(policy_at(tmp_path / str(rate), 1, world))
    slow, fast = policies
    assert torch.equal(parameters(slow.lm), parameters(fast.lm))
    # the head starts at 0, so after one step it is that step
    assert slow.v_head.weight.any()
    torch.testing.assert_close(fast.v_head.weight, 2 * slow.v_head.weight)


def test_main_stops_where_the_reference_differs_unless_it_was_named(
    world, tmp_path, capsys, monkeypatch
):
    load, loaded = pretrained.load_pretrained, []

    def spoiled(*arguments):
        loaded.append(load(*arguments))
        if len(loaded) == 2:  # the reference comes after the policy
            with torch.no_grad():
                loaded[1].model.norm.weight.mul_(1.5)
        return loaded[-1]

    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "load_pretrained", spoiled)
        assert main(command(world, tmp_path / "run", steps=1)) == BUG
    error = capsys.readouterr().err
    assert error.startswith("error: step 1: objective/kl: a token's KL is ")
    assert "the reference is not the starting policy; name another one with --ref" in error
    assert leftovers(tmp_path / "run") == []
    named = command(world, tmp_path / "named", steps=1, ref=world / "other")
    assert main(named) == OK
    assert lines(tmp_path / "named" / "metrics.jsonl")[0]["objective/kl"] != 0
    assert f"reference                  {world / 'other'}" in capsys.readouterr().out


def test_main_refuses_a_reference_with_another_tokenizer(world, tmp_path, capsys):
    other = shutil.copytree(world / "other", tmp_path / "other")
    give_other_tokenizer(other)
    assert main(command(world, tmp_path / "run", ref=other)) == BAD_INPUT
    assert "has another tokenizer than the policy" in capsys.readouterr().err


def test_main_refuses_a_full_kl_to_a_reference_with_other_tokens(world, tmp_path, capsys):
    lm = pretrained.load_pretrained(world / "other")
    rows = lm.config.vocab_size
    source = lm.config.source | {"vocab_size": rows + 8}
    wider = CausalLM(replace(lm.config, vocab_size=rows + 8, source=source))
    initialize(wider, torch.Generator().manual_seed(0))
    other = shutil.copytree(world / "other", tmp_path / "other")
    pretrained.save_pretrained(wider, other)
    argv = command(world, tmp_path / "run", "--kl-estimator", "full", ref=other)
    assert main(argv) == BAD_INPUT
    told = f"has {rows + 8} tokens, the policy {rows}: use another --kl-estimator than full"
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_main_stops_at_a_score_that_is_not_finite(world, tmp_path, capsys):
    out = tmp_path / "run"
    argv = command(world, out, reward=f"{world / 'reward.py'}:broken", sample_every=0)
    assert main(argv) == NON_FINITE
    assert "reward.py:broken: score 0 is nan" in capsys.readouterr().err
    (commit,) = (out / "checkpoints").iterdir()
    assert commit.name == "step-00000000" and verify(commit) is None
    start = ValueHeadModel(pretrained.load_pretrained(world / "policy"))
    assert torch.equal(parameters(policy_at(out, 0, world)), parameters(start))
    assert leftovers(out) == [] and not (out / "model").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward": "absent.py:f"}, "absent.py does not exist"),
        ({"reward": "absent"}, "no such folder"),
        ({"dual_clip": 1.1}, "dual_clip 1.1: must be above 1 + clip_high 0.2"),
        ({"temperature": 0}, "--temperature: got 0.0, must be a finite number > 0"),
        ({"batch_size": 3}, "use batch_size 4 or micro_batch_size 1 or mini_batches 1"),
        ({"max_new_tokens": 64}, "64 fill the model's context: use less than 64"),
        ({"max_new_tokens": 55}, "10 tokens, max_length is 9"),
    ],
)
def test_main_refuses_before_it_writes(settings, message, world, tmp_path, capsys):
    assert main(command(world, tmp_path / "run", **settings)) == BAD_INPUT
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ---- room ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "settings", "room"),
    [
        ({}, {"max_new_tokens": 10}, 54),
        ({}, {"max_new_tokens": 10, "max_prompt_length": 20}, 20),
        ({}, {"max_new_tokens": 10, "max_prompt_length": 60}, 54),
        ({"model_type": "mistral", "sliding_window": 16}, {"max_new_tokens": 10}, 6),
    ],
)
def test_prompt_room_leaves_the_response_in_the_model(changes, settings, room, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**SHAPE, **changes}))
    (tmp_path / "long").mkdir()
    long = {**SHAPE, "max_position_embeddings": 4096}
    (tmp_path / "long" / "config.json").write_text(json.dumps(long))
    for folders in ((tmp_path, tmp_path), (tmp_path / "long", tmp_path)):
        assert prompt_room(config_of(**settings), folders) == room


def test_ppo_trains_on_rows_that_fill_a_model_with_learned_positions():
    lm = {"family": "gpt2", "norm": "layer", "positions": "learned", "gated_mlp": False,
          "num_kv_heads": 4, "max_positions": 12}
    policy, ref = ValueHeadModel(tiny_lm(**lm)), tiny_lm(**lm)
    config = config_of(max_new_tokens=6)
    prompts = [Prompt([5] * 6, "x", "p", {})]  # 6 + 6 tokens, 12 positions
    state = state_of(policy, config)
    step = next(ppo(state, prompts, letter_d, ref, Letters(), config))
    assert step.metrics["response_length"] > 5
