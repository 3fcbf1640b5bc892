"""Held-out prompts: numbers by hand, pairs that stay pairs, and runs that evaluate."""

import json
import math
import os
import signal
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from minirlhf import streams
from minirlhf.batches.rollouts import measure
from minirlhf.cli import main
from minirlhf.data.examples import Prompt
from minirlhf.data.tokenizer import load_tokenizer
from minirlhf.errors import NON_FINITE, OK, STOPPED, Stopped, UserError
from minirlhf.evaluation import policy as policy_evaluation
from minirlhf.evaluation.policy import distinct, duplicates, evaluate_policy
from minirlhf.models import pretrained
from minirlhf.models.generation import generate
from minirlhf.models.heads import ValueHeadModel
from minirlhf.models.lora import add_lora, merge_lora, merged_copy
from minirlhf.models.sampling import Sampling
from minirlhf.run.folder import Run
from minirlhf.run.resume import RunSettings
from minirlhf.setup.policy_data import held_out
from tests import tiny_ppo
from tests.tiny_folders import leftovers, read_lines, timeless, write_lines
from tests.tiny_ppo import PROMPTS, Letters, command, letter_d, policy_at, tiny_lm, tiny_policy

world = tiny_ppo.world

SAMPLING = Sampling(6, 0.8)


def evaluated(policy=None, reward=letter_d, prompts=PROMPTS, ref=None, seed=3, **more):
    policy = tiny_policy(torch.float64) if policy is None else policy
    ref = ref or tiny_lm(torch.float64)
    return evaluate_policy(
        policy.lm, prompts, reward, partial(measure, policy, ref, temperature=0.8), Letters(),
        SAMPLING, seed, **more,
    )


def late_letters(completions) -> torch.Tensor:
    return torch.tensor([float(sum(i > 9 for i in ids)) for ids in completions.response_ids])


def other_policy() -> ValueHeadModel:
    policy = tiny_policy(torch.float64)
    with torch.no_grad():
        policy.lm.lm_head.weight.mul_(1.3)
    return policy


def test_evaluate_policy_from_its_texts_alone():
    """Another derivation: responses drawn one by one, log-probs of whole rows without a batch."""
    policy, ref = other_policy(), tiny_lm(torch.float64)
    got = evaluated(policy, late_letters, micro_batch_size=3)
    scores, kl, sizes, ended, texts = [], 0.0, 0, 0, []
    for row, prompt in enumerate(PROMPTS):
        key = streams.key(3, "evaluation", torch.tensor([row]))
        made = generate(policy.lm, [prompt.ids], SAMPLING, (0,), key)
        ids = made.responses()[0]
        scores.append(float(sum(i > 9 for i in ids)))
        whole = torch.tensor([prompt.ids + ids])
        with torch.no_grad():
            logprobs = [(lm.logits(lm(whole))[0] / 0.8).log_softmax(-1) for lm in (policy.lm, ref)]
        for t, token in enumerate(ids):
            at = len(prompt.ids) - 1 + t
            kl += float(logprobs[0][at, token] - logprobs[1][at, token])
        sizes, ended = sizes + len(ids), ended + (ids[-1] == 0)
        texts.append(Letters().decode(ids))
    assert (got.scores, got.texts) == (scores, texts)
    mean = sum(scores) / 4
    spread = sum((s - mean) ** 2 for s in scores) / 3
    expected = {
        "objective/scores": mean, "objective/scores_se": math.sqrt(spread / 4),
        "objective/kl": kl / 4, "response_length": sizes / 4, "eos_rate": ended / 4,
        "distinct_1": len(set(texts)) / 4, "distinct_2": 0.0,
        "duplicates": 1 - len(set(texts)) / 4,
    }
    assert got.metrics == pytest.approx(expected, abs=1e-9)
    assert 0 < ended < 4 and spread > 0 and kl != 0  # each of them had something to tell


def test_evaluate_policy_counts_by_hand():
    scores = iter([1.0, 2.0, 4.0, 5.0])

    def reward(completions):
        return torch.tensor([next(scores) for _ in completions.completions])

    metrics = evaluated(reward=reward, rows_at_once=3, baseline=[0.0, 2.0, 3.0, 9.0]).metrics
    assert metrics["objective/scores"] == 3
    # squares 4 + 1 + 1 + 4 over 3, over 4 of them
    assert metrics["objective/scores_se"] == pytest.approx(math.sqrt(10 / 3 / 4), abs=1e-12)
    assert metrics["objective/kl"] == 0  # the reference is the policy
    # 2 won, 1 tied, 1 lost: a = z²/4 = 0.9603647, root² = a (4 · 0.625 · 0.375 - 0.25) + 0.75 a²
    # = 1.3519755, root 1.1627448; (1.25 + a -+ root) / (2 + 2 a)
    got = [metrics[name] for name in ("win_rate", "win_rate_low", "win_rate_high")]
    assert got == pytest.approx([0.625, 0.2672, 0.8604], abs=1e-4)


# the cat, cat the, the cat, the dog: three kinds of four; no text has five words
@pytest.mark.parametrize(("n", "expected"), [(1, 3 / 7), (2, 3 / 4), (3, 1.0), (5, 0.0)])
def test_distinct_and_duplicates_by_hand(n, expected):
    assert distinct(["the cat the cat", "the dog", "", "dog"], n) == pytest.approx(expected)
    assert duplicates(["a", "b", "a", "a", "b"]) == pytest.approx(3 / 5)
    assert duplicates(["a", "A", "a "]) == 0.0


def test_evaluate_policy_answers_alike_however_it_is_cut():
    whole = evaluated(other_policy())
    for rows in (1, 3):
        cut = evaluated(other_policy(), rows_at_once=rows, micro_batch_size=1)
        assert (cut.scores, cut.texts) == (whole.scores, whole.texts)
        assert cut.metrics == pytest.approx(whole.metrics, abs=1e-9)
    more = evaluated(other_policy(), prompts=[*PROMPTS, PROMPTS[0]])
    assert more.texts[:4] == whole.texts  # a longer file leaves its first rows as they are
    assert evaluated(other_policy(), seed=4).texts != whole.texts


def test_evaluate_policy_draws_no_random_number_and_changes_no_weight():
    policy, ref = other_policy(), tiny_lm(torch.float64)
    before = [p.detach().clone() for p in policy.parameters()]
    state = torch.get_rng_state()
    assert evaluated(policy, ref=ref).metrics == evaluated(policy, ref=ref).metrics
    assert torch.equal(torch.get_rng_state(), state)
    for p, old in zip(policy.parameters(), before, strict=True):
        assert torch.equal(p, old) and p.grad is None


def test_evaluate_policy_refuses_what_it_cannot_average():
    with pytest.raises(ValueError, match="1 prompts: a standard error needs 2 or more"):
        evaluated(prompts=PROMPTS[:1])
    with pytest.raises(UserError, match=r"evaluation, response 2: score: is nan") as caught:
        evaluated(reward=lambda completions: torch.tensor([0, 0, math.nan, 0]))
    assert caught.value.code == NON_FINITE


def test_held_out_takes_the_first_prompts():
    assert held_out(PROMPTS, None, "f") == PROMPTS
    assert held_out(PROMPTS, 3, "f") == PROMPTS[:3]
    assert held_out(PROMPTS, 9, "f") == PROMPTS
    with pytest.raises(UserError, match=r"few\.jsonl: 1 prompt to evaluate on: give 2 or more"):
        held_out(PROMPTS[:1], None, "few.jsonl")


def test_merged_copy_computes_the_same_and_leaves_the_model_as_it_was():
    lm = add_lora(tiny_lm(torch.float64), 2, 8.0, seed=1)
    with torch.no_grad():
        for name, p in lm.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    before = {name: p.detach().clone() for name, p in lm.named_parameters()}
    row = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        expected = lm.logits(lm(row))
        copy = merged_copy(lm)
        torch.testing.assert_close(copy.logits(copy(row)), expected, rtol=0, atol=1e-9)
        assert torch.equal(lm.logits(lm(row)), expected)
    now = dict(lm.named_parameters())
    assert now.keys() == before.keys() and all(torch.equal(now[n], before[n]) for n in before)
    assert not now["model.layers.0.self_attn.q_proj.base.weight"].requires_grad
    assert copy.state_dict().keys() == merge_lora(lm).state_dict().keys()


# ---- runs ----------------------------------------------------------------------------------------

REWARD = """
def letters(completions, bonus):
    return [sum(ord(c) % 7 for c in t) + b for t, b in zip(completions, bonus, strict=True)]
"""


@pytest.fixture(scope="module")
def held(world):
    """The world with two held-out files and a reward that nearly every text changes."""
    for name, count in (("short", 3), ("long", 6)):
        rows = [{"prompt": "A plot" + "?" * i, "bonus": i / 8} for i in range(count)]
        write_lines(world / f"{name}.jsonl", rows)
    (world / "letters.py").write_text(REWARD, encoding="utf-8")
    return world


def evaluating(held, out, *flags: str, **settings) -> list[str]:
    values = {"eval_data": held / "long.jsonl", "eval_every": 1, "keep": 9, "save_every": 1,
              "reward": f"{held / 'letters.py'}:letters", "sample_every": 0, "seed": 3}
    return command(held, out, *flags, **{**values, **settings})


@pytest.fixture(scope="module")
def whole(held, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluations") / "whole"
    assert main(evaluating(held, out, "--keep-best")) == OK
    return out


def evals(out) -> list[dict]:
    return [line for line in timeless(out) if "eval/objective/scores" in line]


def state_at(out, step: int) -> dict:
    return json.loads((out / f"checkpoints/step-{step:08}/state.json").read_text("utf-8"))


def is_exported(out, lm) -> bool:
    """Whether best/ holds these weights."""
    exported, kept = load_file(out / "best" / "model.safetensors"), lm.state_dict()
    same = (torch.equal(exported[name], kept[name]) for name in kept)
    return exported.keys() == kept.keys() and all(same)


def test_main_evaluates_at_the_start_between_and_at_the_end(held, whole, tmp_path):
    assert [line["step"] for line in evals(whole)] == [0, 1, 2, 3, 4]
    start, *later = evals(whole)
    assert start["eval/objective/kl"] == 0 and "eval/win_rate" not in start
    wanted = {"objective/scores", "objective/scores_se", "objective/kl", "response_length",
              "eos_rate", "distinct_1", "distinct_2", "duplicates", "win_rate", "win_rate_low",
              "win_rate_high"}
    for line in later:
        assert {n for n in line if n.startswith("eval/")} == {f"eval/{name}" for name in wanted}
    assert later[-1]["eval/objective/kl"] != 0
    out = tmp_path / "run"
    assert main(evaluating(held, out, eval_every=0, log_every=4)) == OK
    assert [line["step"] for line in read_lines(out / "metrics.jsonl")] == [0, 4]
    assert evals(out)[1]["eval/objective/scores"] == later[-1]["eval/objective/scores"]


def test_main_compares_with_the_scores_of_the_start(held, whole):
    """The last evaluation once more, from the last checkpoint and the folder that it began with."""
    start = ValueHeadModel(pretrained.load_pretrained(held / "policy"))
    end, tokenizer = policy_at(whole, 4, held), load_tokenizer(held / "policy")
    prompts = [Prompt(tokenizer.encode("A plot" + "?" * i), "", "", {}) for i in range(6)]
    scores = []
    for policy in (start, end):
        keys = streams.key(3, "evaluation", torch.arange(6))
        ids = [p.ids for p in prompts]
        made = generate(policy.lm, ids, Sampling(5), tokenizer.eos_ids, keys).responses()
        texts = [tokenizer.decode(ids) for ids in made]
        scores.append([sum(ord(c) % 7 for c in t) + i / 8 for i, t in enumerate(texts)])
    assert state_at(whole, 4)["baselines"] == {"eval/": scores[0]}
    won = sum((b > a) + 0.5 * (b == a) for a, b in zip(*scores, strict=True)) / 6
    assert evals(whole)[-1]["eval/win_rate"] == pytest.approx(won, abs=1e-12)
    assert evals(whole)[-1]["eval/objective/scores"] == pytest.approx(sum(scores[1]) / 6, abs=1e-6)
    assert won not in (0, 0.5, 1)


def test_main_keeps_the_policy_of_the_best_evaluation(held, whole):
    means = [line["eval/objective/scores"] for line in evals(whole)]
    best = max(range(1, 5), key=lambda n: means[n])
    assert means[best] > means[0] and best != 4, "choose another seed: nothing is told apart"
    assert is_exported(whole, policy_at(whole, best, held).lm)
    names = {path.name for path in (whole / "best").iterdir()}
    assert names == {path.name for path in (whole / "model").iterdir()}
    assert state_at(whole, 4)["best"] == means[best]
    assert leftovers(whole) == []


def test_evaluation_does_not_change_what_is_learnt(held, whole, tmp_path):
    out, argv = tmp_path / "run", evaluating(held, tmp_path / "run")
    at = argv.index("--eval_data")
    del argv[at : at + 4]  # and eval_every
    assert main(argv) == OK
    assert not (out / "best").exists() and evals(out) == []
    for name in ("model/model.safetensors", "checkpoints/step-00000004/optimizer.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_main_names_its_sets_and_takes_so_many_prompts_of_each(held, whole, tmp_path, capsys):
    argv = evaluating(held, tmp_path / "run", eval_prompts=2, steps=1)
    at = argv.index("--eval_data")
    argv[at + 1 : at + 2] = [f"a={held / 'short.jsonl'}", f"b={held / 'long.jsonl'}"]
    assert main(argv) == OK
    printed = capsys.readouterr().out
    assert "  eval/a, 2 prompts: reward " in printed and "  eval/b, 2 prompts: reward " in printed
    start = read_lines(tmp_path / "run" / "metrics.jsonl")[0]
    # both files begin with the same two prompts, and their keys are those of their places
    for name in ("objective/scores", "objective/kl", "distinct_1"):
        assert start[f"eval/a/{name}"] == start[f"eval/b/{name}"]
    baselines = state_at(tmp_path / "run", 1)["baselines"]
    assert list(baselines) == ["eval/a/", "eval/b/"]
    assert baselines["eval/b/"] == state_at(whole, 4)["baselines"]["eval/"][:2]


def test_at_most_twelve_lines_come_before_the_first_step(held, tmp_path, capsys):
    argv = evaluating(held, tmp_path / "run", steps=1, sample_every=1, sample_prompts=4)
    assert main(argv) == OK
    lines = capsys.readouterr().out.splitlines()
    # a win rate is that over the start's answers: the evaluation that comes before is of no step
    assert next(i for i, line in enumerate(lines) if "win rate" in line) <= 12, lines


def test_main_keeps_the_best_of_a_run_with_adapters(held, tmp_path):
    out = tmp_path / "run"
    assert main(evaluating(held, out, "--keep-best", lora_rank=2)) == OK
    means = [line["eval/objective/scores"] for line in evals(out)]
    best = max(range(5), key=lambda n: means[n])
    assert best > 0, "choose another seed: nothing is kept"
    assert is_exported(out, merge_lora(policy_at(out, best, held, lora=2)).lm)


@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_a_signal_inside_an_evaluation_loses_nothing(at, held, whole, tmp_path, monkeypatch, capfd):
    """The first evaluation is that of the start; the fifth that of the last step."""
    out, calls, real = tmp_path / "run", [], policy_evaluation.sample
    argv = evaluating(held, out, "--keep-best")

    def counted(*arguments):
        calls.append(1)
        if len(calls) == 2 * at:  # 4 prompts at once: an evaluation has two parts
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(policy_evaluation, "sample", counted)
        assert main(argv) == STOPPED
    assert len(calls) == 2 * at
    assert not (out / "model").exists() and leftovers(out) == []
    assert [line["step"] for line in evals(out)] == list(range(at - 1))
    assert main([*argv, "--resume"]) == OK
    assert json.dumps(timeless(out)) == json.dumps(timeless(whole))
    for name in ("best/model.safetensors", "model/model.safetensors",
                 "checkpoints/step-00000004/optimizer.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_a_run_cut_between_best_and_its_checkpoint_ends_alike(held, whole, tmp_path, monkeypatch):
    """best/ is then ahead of the state that the run goes on from."""
    out, export, cut = tmp_path / "run", Run.export, []
    argv = evaluating(held, out, "--keep-best")

    def and_die(self, write, name="model"):
        export(self, write, name)
        cut.append(name)
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "export", and_die)
        with pytest.raises(RuntimeError, match="power cut"):
            main(argv)
    assert cut == ["best"] and (out / "best").exists()
    assert main([*argv, "--resume"]) == OK
    assert json.dumps(timeless(out)) == json.dumps(timeless(whole))
    for path in (whole / "best").iterdir():
        assert (out / "best" / path.name).read_bytes() == path.read_bytes()


def test_evaluation_ends_at_a_signal_while_it_measures(monkeypatch, capfd):
    from minirlhf import interrupt

    with interrupt.listening(), pytest.raises(Stopped):
        policy = other_policy()

        def signalled(buffer):
            os.kill(os.getpid(), signal.SIGTERM)
            measure(policy, tiny_lm(torch.float64), buffer, 0.8)

        evaluate_policy(policy.lm, PROMPTS, letter_d, signalled, Letters(), SAMPLING, 3)


def test_keep_best_takes_only_what_is_better(tmp_path, capsys):
    written = []
    state = tiny_ppo.state_of(tiny_policy(), tiny_ppo.config_of())
    with Run(RunSettings(out=str(tmp_path / "out")), "ppo") as r:
        for score in (1.0, 0.5, 1.0, 2.0, 2.0, 1.5, 2.5):
            metrics = {"eval/a/objective/scores": score, "eval/b/objective/scores": -score}
            policy_evaluation.keep_best(r, state, metrics, lambda: written.append(state.best))
    assert written == [2.0, 2.5] and state.best == 2.5
    assert "best so far: 2.5, was 2; the policy is in" in capsys.readouterr().out
