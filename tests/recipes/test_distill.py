"""On-policy distillation: what counts in the loss, and that a run is what it says."""

import json
import math
import re
import shutil

import pytest
import torch

from minirlhf import streams
from minirlhf.cli import main
from minirlhf.errors import BAD_INPUT, OK, UserError
from minirlhf.evaluation.distill import compare, evaluate_student, student_table
from minirlhf.models.lora import add_lora
from minirlhf.models.pretrained import load_pretrained
from minirlhf.models.sampling import Sampling
from minirlhf.models.transformer import CausalLM
from minirlhf.recipes.distill import distill, sample_responses, update_weights
from minirlhf.run.checkpoint import TrainState
from minirlhf.setup.distill_settings import DistillConfig
from tests.kill_harness import SHAPE, command, make_world
from tests.tiny_folders import read_lines, rebuilt_at_each_step, save_lm, timeless
from tests.tiny_ppo import PROMPTS, Letters, f64, parameters, state_of, tiny_lm

SMALL = {"hidden_size": 16, "head_dim": 4}


def config_of(**settings) -> DistillConfig:
    values = {
        "model": "m", "teacher": "t", "data": "d", "out": "o", "batch_size": 4, "steps": 4,
        "micro_batch_size": 2, "max_new_tokens": 6, "learning_rate": 1e-2,
    }
    return DistillConfig(**{**values, **settings})


def teacher_of(dtype=f64, **changes) -> CausalLM:
    """Of another width than the student, so of other weights, and padded by two words more."""
    return tiny_lm(dtype, **{**SMALL, "vocab_size": 22, **changes}).requires_grad_(False)


def laws(lm: CausalLM, prompt: list[int], response: list[int], temperature: float) -> torch.Tensor:
    """(n, 20) log-probs before each token of a response that is read alone, of the words of both
    models; nats."""
    logits = lm.logits(lm(torch.tensor([prompt + response])))[0, :, :20]
    return (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)


def apart(student, teacher, prompt, response, beta, temperature=1.0) -> torch.Tensor:
    """(n,) the divergence before each token, written out once more."""
    logp = laws(student, prompt, response, temperature)
    logq = laws(teacher, prompt, response, temperature).detach()
    if beta in (0, 1):
        first, second = (logp, logq) if beta else (logq, logp)
        return (first.exp() * (first - second)).sum(-1)
    logm = (beta * logq.exp() + (1 - beta) * logp.exp()).log()
    of_q, of_p = ((law.exp() * (law - logm)).sum(-1) for law in (logq, logp))
    return beta * of_q + (1 - beta) * of_p


def sampled(student: CausalLM, config: DistillConfig):
    return sample_responses(state_of(student, config), PROMPTS, Letters(), config)


# ---- what counts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [
    {}, {"gkd_beta": 0.0}, {"gkd_beta": 0.3}, {"temperature": 0.7}, {"top_k": 10, "batch_size": 12},
    {"top_p": 0.6, "gkd_beta": 0.0},
], ids=str)
def test_the_step_is_that_of_the_mean_over_tokens_for_any_micro_batch(settings):
    """Rows of unequal lengths read alone; all 20 words count, however few could be drawn."""
    config, teacher = config_of(**settings, max_grad_norm=None), teacher_of()
    completions, rollout = sampled(tiny_lm(f64), config)
    rows = list(zip(completions.prompt_ids, completions.response_ids, strict=True))
    assert len({len(ids) for _, ids in rows}) > 1
    student = tiny_lm(f64)
    each = [apart(student, teacher, *row, config.gkd_beta, config.temperature) for row in rows]
    mean = torch.cat(each).mean()
    mean.backward()
    expected = torch.cat([(p - p.grad).detach().flatten() for p in student.parameters()])
    for sizes in ({"micro_batch_size": 1}, {"micro_batch_size": 4}, {"micro_batch_tokens": 14}):
        student = tiny_lm(f64)
        state = TrainState(student, torch.optim.SGD(student.parameters(), lr=1.0))
        metrics = update_weights(state, rollout, teacher, config_of(**vars(config) | sizes))
        assert metrics["loss"] == pytest.approx(mean.item(), abs=1e-9)
        torch.testing.assert_close(parameters(student), expected, rtol=0, atol=1e-9)


def test_held_out_divergences_are_means_over_tokens_in_both_directions():
    student, teacher, config = tiny_lm(f64), teacher_of(), config_of(rollout_batch_size=3)
    sampling = Sampling(6, 0.8)
    keys = streams.key(5, "evaluation", torch.arange(4))
    found = compare(student, teacher, PROMPTS, keys, sampling, Letters(), config)
    rows = list(zip(found.completions.prompt_ids, found.completions.response_ids, strict=True))
    reverse, forward = (
        [apart(student, teacher, *row, beta, 0.8).detach() for row in rows] for beta in (1, 0)
    )
    assert found.tokens.tolist() == [len(ids) for _, ids in rows]
    for got, expected in ((found.kl, reverse), (found.forward_kl, forward)):
        expected = torch.stack([x.sum() for x in expected])
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    metrics = evaluate_student(student, teacher, PROMPTS, sampling, Letters(), config, 5)
    assert metrics["kl"] == pytest.approx(torch.cat(reverse).mean().item(), abs=1e-9)
    assert metrics["forward_kl"] == pytest.approx(torch.cat(forward).mean().item(), abs=1e-9)
    assert metrics["response_length"] == sum(len(ids) for _, ids in rows) / 4
    assert metrics["eos_rate"] == sum(ids[-1] == 0 for _, ids in rows) / 4


def test_the_table_tells_the_kl_of_each_response():
    student, teacher, config = tiny_lm(f64), teacher_of(), config_of()
    rows = student_table(student, teacher, 7, PROMPTS[:2], Sampling(6), Letters(), config, 1)
    keys = streams.key(1, "sample table", torch.arange(2))
    found = compare(student, teacher, PROMPTS[:2], keys, Sampling(6), Letters(), config)
    assert [row["response"] for row in rows] == found.completions.completions
    for row, ids, prompt in zip(rows, found.completions.response_ids, PROMPTS, strict=False):
        assert row["kl"] == pytest.approx(apart(student, teacher, prompt.ids, ids, 1).mean().item())
        assert (row["step"], row["kind"]) == (7, "sample")


@pytest.mark.parametrize("beta", [1.0, 0.5, 0.0])
def test_a_student_comes_near_to_its_teacher(beta):
    student, teacher = tiny_lm(**SMALL, num_layers=1), teacher_of(torch.float32)
    before = parameters(teacher)

    def kls():
        found = evaluate_student(student, teacher, PROMPTS * 8, Sampling(6), Letters(), config, 0)
        return found["kl"], found["forward_kl"]

    config = config_of(steps=40, batch_size=16, gkd_beta=beta, micro_batch_size=16)
    first = kls()
    *_, last = distill(state_of(student, config), PROMPTS, teacher, Letters(), config)
    assert last.number == 40
    assert all(now < then / 3 for now, then in zip(kls(), first, strict=True))
    assert torch.equal(parameters(teacher), before)


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    student, config = tiny_lm(f64), config_of()
    step = next(distill(state_of(student, config), PROMPTS, tiny_lm(f64), Letters(), config))
    assert step.metrics["loss"] == pytest.approx(0, abs=1e-12)
    assert step.metrics["grad_norm"] == pytest.approx(0, abs=1e-12)


def test_adapters_learn_and_leave_the_base():
    student, teacher, config = tiny_lm(), teacher_of(torch.float32), config_of(steps=20)
    add_lora(student, 2, 4.0)
    trained = [p for p in student.parameters() if p.requires_grad]
    frozen = [p.clone() for p in student.parameters() if not p.requires_grad]
    state = TrainState(student, torch.optim.AdamW(trained, lr=1e-2))
    losses = [s.metrics["loss"] for s in distill(state, PROMPTS, teacher, Letters(), config)]
    assert losses[-1] < losses[0]
    left = [p for p in student.parameters() if not p.requires_grad]
    assert all(torch.equal(p, q) for p, q in zip(left, frozen, strict=True))


def test_a_step_counts_what_was_sampled():
    config = config_of(steps=None, epochs=2.0, batch_size=3)
    state = state_of(tiny_lm(), config)
    steps = list(distill(state, PROMPTS, teacher_of(torch.float32), Letters(), config))
    assert len(steps) == 4  # two batches of 3 hold the 4 prompts once
    assert state.samples == 12 and steps[-1].metrics["epoch"] == 3.0
    read = steps[0].metrics["num_tokens"], 3 * steps[0].metrics["completions/mean_length"]
    assert read[0] - round(read[1]) in {sum(map(len, ids)) for ids in (
        [[3, 4], [5], [6, 7, 8, 9]], [[3, 4], [5], [2, 2, 9]], [[3, 4], [6, 7, 8, 9], [2, 2, 9]],
        [[5], [6, 7, 8, 9], [2, 2, 9]])}


# ---- what is refused -----------------------------------------------------------------------------


def test_a_token_that_the_teacher_lacks_is_an_error():
    student, teacher, config = tiny_lm(f64), teacher_of(vocab_size=15), config_of(batch_size=32)
    with pytest.raises(UserError, match=r"vocabulary: token 1\d was sampled, the teacher has 15"):
        next(distill(state_of(student, config), PROMPTS, teacher, Letters(), config))


def test_a_loss_that_is_not_finite_stops_or_is_skipped_and_counted():
    teacher = teacher_of(torch.float32)
    torch.nn.init.constant_(teacher.model.norm.weight, math.nan)
    config = config_of(skip_nonfinite=1)
    student = tiny_lm()
    before, state = parameters(student), state_of(student, config)
    steps = distill(state, PROMPTS, teacher, Letters(), config)
    metrics = next(steps).metrics
    assert metrics["skipped_updates"] == 1 and "loss" not in metrics
    assert torch.equal(parameters(student), before)
    with pytest.raises(UserError, match="step 2: loss: is nan") as error:
        next(steps)
    assert error.value.code == 3


# ---- a run ---------------------------------------------------------------------------------------


def test_distill_goes_on_bit_for_bit_from_any_yield(tmp_path):
    config, teacher = config_of(steps=5, warmup_steps=1), teacher_of(torch.float32)

    def steps_of(state):
        return distill(state, PROMPTS, teacher, Letters(), config)

    whole = state_of(tiny_lm(), config)
    expected = [step.metrics for step in steps_of(whole)]
    steps, state = rebuilt_at_each_step(lambda: state_of(tiny_lm(), config), steps_of, tmp_path)
    assert [step.metrics for step in steps] == expected
    assert torch.equal(parameters(state.model), parameters(whole.model))
    assert (state.step, state.samples) == (5, 20)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("world"))
    shutil.copytree(folder / "model", folder / "narrow")
    save_lm(folder / "narrow", SHAPE, 1, vocab_size=250)
    shutil.copytree(folder / "model", folder / "short")
    save_lm(folder / "short", SHAPE, 1, vocab_size=258, max_position_embeddings=12)
    return folder


def test_main_tells_the_kl_before_and_after(world, tmp_path, capsys):
    out, few = tmp_path / "run", str(world / "few_prompts.jsonl")
    argv = command("distill", world, out, steps=4, log_every=1)
    at = argv.index("--eval-data") + 1
    argv[at : at + 1] = [few, f"again={few}"]
    assert main(argv) == OK
    told, lines = capsys.readouterr().out, timeless(out)
    assert [line["step"] for line in lines if "eval/kl" in line] == [0, 2, 4]
    first, last = lines[0], lines[-1]
    assert "loss" not in first and first["eval/kl"] == first["eval/again/kl"]
    assert last["eval/kl"] < first["eval/kl"]
    assert (
        f"  eval, 3 prompts: KL {last['eval/kl']:.4g}, forward KL {last['eval/forward_kl']:.4g}, "
        f"KL at step 0 {first['eval/kl']:.4g}, "
        f"forward KL at step 0 {first['eval/forward_kl']:.4g}\n"
    ) in told
    assert "  loss: generalised JSD, beta 0.5, the mean over response tokens\n" in told
    rows = read_lines(out / "samples.jsonl")
    assert [(row["step"], row["prompt"]) for row in rows[:3]] == [
        (0, "It was"), (0, "It was!"), (2, "It was")
    ]
    assert re.search(r"  samples at step 4\n +\d\.\d{3}  It was | ", told)
    saved = json.loads((out / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert saved["baselines"]["eval/"] == [first["eval/kl"], first["eval/forward_kl"]]


def test_main_with_lora_writes_a_merged_model_that_changed(world, tmp_path):
    out = tmp_path / "run"
    assert main(command("distill", world, out, lora_rank=2)) == OK
    before, after = (load_pretrained(f).state_dict() for f in (world / "model", out / "model"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert changed and all("_proj" in name for name in changed)


def another_tokenizer(world, tmp_path):
    shutil.copytree(world / "teacher", tmp_path / "t")
    path = tmp_path / "t" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"] = {
        {"a": "b", "b": "a"}.get(k, k): v for k, v in tokenizer["model"]["vocab"].items()
    }
    path.write_text(json.dumps(tokenizer))
    return tmp_path / "t"


def of(name):
    return lambda world, _: world / name


REFUSED = [
    (of("model"), {}, "is the student: nothing would be learned"),
    (of("narrow"), {}, "vocab_size: is 250: must be at least the tokenizer's 258"),
    (another_tokenizer, {}, "has another tokenizer than the student: give a model that reads the"),
    (of("gone"), {}, "gone"),
    (of("short"), {"max_new_tokens": 12}, "fill the model's context: use less than 12"),
    (of("teacher"), {"eval_data": "x", "gkd_beta": 1.5}, "--gkd-beta: got 1.5"),
    (of("teacher"), {"eval_prompts": 1}, "--eval-prompts: got 1"),
]


@pytest.mark.parametrize(("teacher", "changes", "told"), REFUSED, ids=[t for *_, t in REFUSED])
def test_what_cannot_work_is_refused(teacher, changes, told, world, tmp_path, capsys):
    argv = command("distill", world, tmp_path / "out", **changes)
    argv[argv.index("--teacher") + 1] = str(teacher(world, tmp_path))
    assert main(argv) == BAD_INPUT
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
