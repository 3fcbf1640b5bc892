"""PPO from the command line: what it prints, writes, exports, resumes and refuses."""

import io
import json
import math
import os
import shutil
import signal
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from hashlib import sha256

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from minirlhf.batches import rollouts
from minirlhf.cli import main
from minirlhf.data.tokenizer import load_tokenizer, train_tokenizer
from minirlhf.equations.policy import Surrogate, clipped_surrogate
from minirlhf.errors import BAD_INPUT, NON_FINITE, OK, STOPPED
from minirlhf.models import pretrained
from minirlhf.models.heads import ValueHeadModel
from minirlhf.models.lora import merge_lora
from minirlhf.models.transformer import CausalLM, initialize
from minirlhf.recipes import ppo as recipe
from minirlhf.run.checkpoint import verify
from minirlhf.run.folder import Run
from minirlhf.setup import ppo as loading
from minirlhf.setup.policy_data import prompt_room
from tests import tiny_ppo
from tests.tiny_folders import leftovers, read_lines, save_scorer, timeless
from tests.tiny_ppo import REWARD, SHAPE, command, config_of, parameters, policy_at, run_steps

world = tiny_ppo.world

WRITTEN = (
    "samples.jsonl", "model/model.safetensors", "model/config.json",
    "checkpoints/step-00000004/model.safetensors",
    "checkpoints/step-00000004/optimizer.safetensors",
)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """(folder, what was printed) of a run that nothing interrupted."""
    out, printed = tmp_path_factory.mktemp("runs") / "whole", io.StringIO()
    with redirect_stdout(printed):
        assert main(command(world, out, "--save-rollouts", "--verbose")) == OK
    return out, printed.getvalue()


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
        ("memory", "about "), ("device", "cpu"), ("dtype", "float32"), ("seed", "0"),
    )
    for name, value in facts:
        assert f"\n  {name:<25}  {value}" in printed
    assert ": detected prompts (prompt) · 5 rows\n" in printed
    assert f"aligned model in {out / 'model'}" in printed


def test_main_writes_metrics_samples_and_checkpoints(whole):
    out, _ = whole
    assert [line["step"] for line in read_lines(out / "metrics.jsonl")] == [3, 4]
    assert read_lines(out / "metrics.jsonl")[1]["episode"] == 16
    rows = read_lines(out / "samples.jsonl")
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


def cut_short(monkeypatch, argv: list[str], how) -> int | None:
    """Runs argv, where `how` happens once step 3 is logged; its exit code."""
    log = Run.log

    def interrupted(self, state, *rest):
        log(self, state, *rest)
        if state.step == 3:
            how()

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", interrupted)
        return main(argv)


def test_main_resumes_after_a_signal_to_the_same_bytes(whole, world, tmp_path, monkeypatch):
    out, argv = tmp_path / "run", command(world, tmp_path / "run", "--save-rollouts")
    code = cut_short(monkeypatch, argv, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert code == STOPPED
    assert timeless(out) == []  # the report of step 3 was cut short: the resumed run writes it
    assert not (out / "model").exists() and leftovers(out) == []
    for _ in range(2):  # the second time nothing is left to do
        assert main([*argv, "--resume"]) == OK
        assert json.dumps(timeless(out)) == json.dumps(timeless(whole[0]))
        for name in WRITTEN:
            assert (out / name).read_bytes() == (whole[0] / name).read_bytes()


def test_main_resumes_in_half_precision_to_the_same_bytes(world, tmp_path, monkeypatch, capsys):
    settings = {"dtype": "bfloat16", "log_every": 1}
    assert main(command(world, tmp_path / "whole", **settings)) == OK
    assert f"warning: {world / 'policy'}: weights are rounded to bfl" in capsys.readouterr().out
    argv = command(world, tmp_path / "run", **settings)
    with pytest.raises(ZeroDivisionError):
        cut_short(monkeypatch, argv, lambda: 1 / 0)
    assert main([*argv, "--resume"]) == OK
    assert json.dumps(timeless(tmp_path / "run")) == json.dumps(timeless(tmp_path / "whole"))
    masters = "checkpoints/step-00000004/optimizer.safetensors"
    assert (tmp_path / "run" / masters).read_bytes() == (tmp_path / "whole" / masters).read_bytes()
    saved = load_file(tmp_path / "run" / masters)
    assert {t.dtype for t in saved.values()} == {torch.float32}
    weight = load_file(tmp_path / "run/model/model.safetensors")["model.norm.weight"]
    master = saved["lm.model.norm.weight.master"]
    assert torch.equal(weight, master.bfloat16()) and not torch.equal(weight.float(), master)


@pytest.mark.parametrize("adapters", [[], ["--lora-rank", "2"]], ids=["full", "lora"])
@pytest.mark.parametrize("trains", [True, False])
def test_main_starts_a_critic_from_a_reward_model(trains, adapters, world, tmp_path):
    flags = adapters + ([] if trains else ["--no-train-critic"])
    argv = command(world, tmp_path / "run", *flags, critic=world / "reward", steps=2, save_every=1)
    assert main(argv) == OK
    start = load_file(world / "reward" / "model.safetensors")
    saved = load_file(tmp_path / "run/checkpoints/step-00000002/model.safetensors")
    critic = {n.removeprefix("critic."): t for n, t in saved.items() if n.startswith("critic.")}
    if not trains:  # what is frozen is read again from where it came
        assert not critic and "v_head.weight" not in saved
        return
    assert not torch.equal(saved["v_head.weight"], start["score.weight"])
    if adapters:
        return
    same = [torch.equal(t, start[f"model.{n}"]) for n, t in critic.items()]
    assert len(same) == len(start) - 1  # all but the score head
    assert not all(same)
    exported = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert exported.keys() == load_file(world / "policy" / "model.safetensors").keys()


def test_main_starts_the_critic_from_the_value_head_beside_a_policy(world, tmp_path, capsys):
    folder = shutil.copytree(world / "policy", tmp_path / "trl")  # as TRL 0.x leaves it
    head = {"v_head.summary.weight": torch.rand(1, 32), "v_head.summary.bias": torch.ones(1)}
    before = load_file(folder / "model.safetensors")
    save_file(before | head, folder / "model.safetensors")
    out = tmp_path / "run"
    assert main(command(world, out, "--verbose", model=folder, steps=1, save_every=1)) == OK
    start = load_file(out / "checkpoints/step-00000000/model.safetensors")
    assert torch.equal(start["v_head.weight"], head["v_head.summary.weight"])
    assert torch.equal(start["v_head.bias"], head["v_head.summary.bias"])
    printed = capsys.readouterr().out
    assert f"\n  {'critic':<25}  a value head on the policy's trunk, as it stands in" in printed
    assert printed.count(f"{folder}: a language model with a value head") == 1
    assert load_file(out / "model" / "model.safetensors").keys() == before.keys()


def test_main_learns_from_a_weighted_sum_and_logs_each_part(world, tmp_path, capsys):
    code = tmp_path / "own.py"
    code.write_text(
        "def length(completions):\n    return [float(len(c)) for c in completions]\n"
        "def dense(completion_ids):\n    return [[0.5] * len(ids) for ids in completion_ids]\n"
        "def some(completions):\n    return [None] * len(completions)\n"
    )
    argv = command(world, tmp_path / "run", "--save-rollouts", "--verbose", steps=1,
                   sample_every=0, log_every=1)
    at = argv.index("--reward")
    names = [f"2*{code}:length", f"{code}:dense", f"{code}:some", f"0.1*{world}/reward"]
    argv[at + 1 : at + 2] = names
    assert main(argv) == OK
    told = [words.split() for words in capsys.readouterr().out.splitlines()]
    assert ["reward", "length", "2", "x", f"{code}:length"] in told
    (line,) = read_lines(tmp_path / "run" / "metrics.jsonl")
    rows = read_lines(tmp_path / "run" / "samples.jsonl")
    rows = [row for row in rows if row["kind"] == "rollout"]
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
    save_scorer(own, SHAPE, 5, 5, vocab_size=tokenizer.vocab_size)
    argv = command(world, tmp_path / "run", steps=1, reward=own)
    assert main(argv) == OK
    assert f"{own} (its own tokenizer: texts are re-encoded)" in capsys.readouterr().out
    (row, *_) = read_lines(tmp_path / "run" / "samples.jsonl")
    ids = tokenizer.encode(row["prompt"]) + tokenizer.encode(row["response"], bos=False)
    ids += [] if row["finish_reason"] == "length" else [0]
    model = pretrained.load_reward_model(own)
    alone = model(torch.tensor([ids]), torch.tensor([len(ids)])).item()
    assert row["score"] == pytest.approx(alone, abs=1e-5)


def test_main_refuses_to_resume_with_another_reward_function(world, tmp_path, capsys):
    spec = tmp_path / "reward.py"
    spec.write_text(REWARD)
    argv = command(world, tmp_path / "run", steps=1, reward=f"{spec}:vowels")
    assert main(argv) == OK
    spec.write_text(REWARD.replace("aeiou", "aeio"))
    assert main([*argv, "--resume"]) == BAD_INPUT
    assert "reward.py: has changed since the run began" in capsys.readouterr().err


def test_main_keeps_what_a_reward_function_imports_and_what_ran(world, tmp_path, capsys):
    code, helper, out = tmp_path / "reward.py", tmp_path / "own_helper.py", tmp_path / "run"
    rule = "LIST = [1.0]\n"
    code.write_text("from pathlib import Path\nfrom own_helper import LIST\n"
                    "Path(__file__).write_text('')\n"  # after it was read, before it is hashed
                    "def f(completions):\n    return LIST * len(completions)\n")
    helper.write_text(rule)
    sums = [sha256(file.read_bytes()).hexdigest() for file in (code, helper)]
    source = code.read_text()
    argv = command(world, out, steps=1, sample_every=0, reward=f"{code}:f")
    assert main(argv) == OK
    facts = json.loads((out / "run.json").read_text())
    assert [facts["inputs"][str(file)] for file in (code, helper)] == sums
    assert {str(code), str(helper)} <= set(facts["named_by"]["reward"])
    code.write_text(source)
    helper.write_text(rule + "# other\n")
    del sys.modules["own_helper"]  # as in another process
    assert main([*argv, "--resume"]) == BAD_INPUT
    assert "own_helper.py: has changed since the run began" in capsys.readouterr().err



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
    monkeypatch.setattr(pretrained, "load_reward_model", loaded)
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
    assert (out / "metrics.jsonl").read_bytes().startswith(before)
    lines = read_lines(out / "metrics.jsonl")
    assert [line["objective/kl_coef"] for line in lines] == [0.1, 0.1, 0.7, 0.7]
    assert [line["lr"] for line in lines] == [1e-3, 1e-3, 1e-4, 1e-4]


def test_main_exports_a_lora_run_merged(world, tmp_path):
    out = tmp_path / "run"
    assert main(command(world, out, steps=2, lora_rank=2, log_every=1)) == OK
    assert read_lines(out / "metrics.jsonl")[0]["objective/kl"] == 0
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


def test_main_measures_the_kl_to_a_reference_that_is_named(world, tmp_path, capsys):
    named = command(world, tmp_path / "named", "--verbose", steps=1, ref=world / "other")
    assert main(named) == OK
    assert read_lines(tmp_path / "named" / "metrics.jsonl")[0]["objective/kl"] != 0
    assert f"reference                  {world / 'other'}" in capsys.readouterr().out


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

# ---- losses of one's own -------------------------------------------------------------------------


def surrogate_of(**changes):
    def loss(logprobs, old_logprobs, advantages):
        ratio = torch.exp(logprobs - old_logprobs)
        good = Surrogate(-ratio * advantages, ratio, torch.zeros_like(ratio).bool())
        return good._replace(**{name: change(good) for name, change in changes.items()})

    return loss


@pytest.mark.parametrize(
    ("policy_loss", "told"),
    [
        (lambda new, old, advantages: -new * advantages, "Tensor: return a Surrogate"),
        (surrogate_of(loss=lambda s: s.loss.mean()), r"a loss that is \(\): one number"),
        (surrogate_of(loss=lambda s: s.loss.sum(1)), r"a loss that is \(2,\): one number"),
        (surrogate_of(clipped=lambda s: None), "a clipped that is NoneType"),
        (surrogate_of(loss=lambda s: s.loss.detach()), "without gradient"),
    ],
)
def test_ppo_refuses_a_policy_loss_that_gives_something_else(policy_loss, told):
    with pytest.raises(ValueError, match=f"policy_loss gave .*{told}"):
        run_steps(config_of(steps=1), policy_loss=policy_loss)


def test_ppo_gives_a_policy_loss_the_mask_where_it_asks_for_it():
    ends = []

    def whole(logprobs, old_logprobs, advantages, response_mask):
        assert response_mask.shape == logprobs.shape and response_mask.dtype == torch.bool
        return clipped_surrogate(logprobs, old_logprobs, advantages, 0.2, 0.2)

    for policy_loss in (whole, None):
        _, state = run_steps(config_of(steps=2), policy_loss=policy_loss)
        ends.append(parameters(state.model))
    assert torch.equal(*ends)


def test_main_learns_from_a_policy_loss_of_ones_own(world, tmp_path):
    """The surrogate without its clips: as with clips that nothing reaches, and not as with tight
    ones."""
    weights = []
    for name, clip, policy_loss in (
        ("own", 1e-9, surrogate_of()), ("wide", 1e9, None), ("tight", 1e-9, None)
    ):
        argv = command(world, tmp_path / name, steps=2, clip_low=min(clip, 1), clip_high=clip)
        assert recipe.main(argv[1:], policy_loss=policy_loss) == OK
        weights.append((tmp_path / name / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]
