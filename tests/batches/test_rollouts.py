"""What PPO learns from: how rows are cut, split, sampled and written down."""

import json
import math

import pytest
import torch
from torch import nan

from minirlhf import streams
from minirlhf.batches.collect import columns_of, replay_rows, sample
from minirlhf.batches.credit import assign_credit
from minirlhf.batches.rollouts import Rollout, RolloutBuffer, measure
from minirlhf.data.examples import Prompt
from minirlhf.models.alignment import unpack
from minirlhf.models.sampling import Sampling
from minirlhf.models.transformer import initialize
from minirlhf.setup.ppo_settings import PPOConfig
from tests.tiny_ppo import tiny_lm, tiny_policy

T, F = True, False


class Letters:
    """Ids 0 to 19 as letters; 0 is eos, which is an ordinary token here and has a text."""

    eos_ids, vocab_size = (0,), 20

    def decode(self, ids):
        return "".join("_bcdefghijklmnopqrst"[i] for i in ids)

    def decode_after(self, before, ids):
        return self.decode(ids)

    def answer_text(self, prompt, prompt_ids, ids):
        return self.decode(ids)


def by_hand() -> Rollout:
    """Four rows of 3, 4, 5 and 2 tokens."""
    return Rollout(
        rows=torch.arange(4),
        tokens=torch.tensor([[1, 2, 3, 0, 0], [4, 5, 6, 7, 0], [8, 9, 1, 2, 3], [4, 5, 0, 0, 0]]),
        prompt_lengths=torch.tensor([2, 1, 3, 1]),
        response_mask=torch.tensor([[T, F, F], [T, T, T], [T, T, F], [T, F, F]]),
        scores=torch.tensor([0.5, 1.5, 2.5, 3.5]),
        old_values=torch.tensor([[1.0, nan, nan], [2, 3, 4], [5, 6, nan], [7, nan, nan]]),
    )


def buffer_of(rollout: Rollout, rows: int = 2, tokens: int = 6) -> RolloutBuffer:
    buffer = RolloutBuffer(rows, tokens)
    buffer.add(rollout)
    return buffer


def test_add_cuts_rows_of_like_length_and_trims_them():
    # shortest first: rows 3, 0 of 2 and 3 tokens fill 2 x 3 = 6 cells; rows 1 and 2 would need 10
    first, second, third = buffer_of(by_hand()).micro_batches
    assert first.rows.tolist() == [3, 0]
    assert first.tokens.tolist() == [[4, 5, 0], [1, 2, 3]]
    assert first.prompt_lengths.tolist() == [1, 2]
    assert first.response_mask.tolist() == [[T], [T]]
    assert first.scores.tolist() == [3.5, 0.5]
    assert first.old_values.tolist() == [[7.0], [1.0]]
    assert first.advantages is None
    assert second.tokens.tolist() == [[4, 5, 6, 7]]
    assert second.response_mask.tolist() == [[T, T, T]]
    assert third.tokens.tolist() == [[8, 9, 1, 2, 3]]
    assert third.response_mask.tolist() == [[T, T]]


def test_add_again_adds_rows():
    buffer = buffer_of(by_hand())
    buffer.add(by_hand())
    assert len(buffer) == 8
    assert [m.rows.tolist() for m in buffer.micro_batches] == 2 * [[3, 0], [1], [2]]
    wide = buffer_of(by_hand(), rows=3, tokens=1000)  # no more rows than that
    assert [m.rows.tolist() for m in wide.micro_batches] == [[3, 0, 1], [2]]


def test_rows_of_a_group_stay_neighbours_in_the_order_of_the_longest():
    # lengths 3, 4, 5, 2 by themselves; groups of rows 0, 1 and 2, 3 are as long as 4 and 5
    buffer = RolloutBuffer(3, 1000)
    buffer.add(by_hand(), 2)
    assert [m.rows.tolist() for m in buffer.micro_batches] == [[0, 1, 2], [3]]
    tight = RolloutBuffer(2, 1000)
    tight.add(by_hand(), 2)
    assert [m.rows.tolist() for m in tight.micro_batches] == [[0, 1], [2, 3]]
    assert tight.micro_batches[1].tokens.shape == (2, 5)  # as wide as its own rows need


def test_add_refuses_a_row_without_response_or_prompt():
    empty = by_hand()._replace(response_mask=torch.zeros(4, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="no response token: eos counts as one"):
        buffer_of(empty)
    bare = by_hand()._replace(prompt_lengths=torch.tensor([2, 0, 3, 1]))
    with pytest.raises(ValueError, match="no prompt token: start it with a BOS"):
        buffer_of(bare)


def test_lengths_span_tokens_that_the_policy_did_not_choose():
    mask = torch.tensor([[T, F, T], [F, T, F], [T, T, F], [T, F, F]])
    holes = by_hand()._replace(response_mask=mask, prompt_lengths=torch.tensor([2, 1, 3, 1]))
    assert holes.response_lengths.tolist() == [3, 2, 2, 1]
    assert holes.lengths.tolist() == [5, 3, 5, 2]
    cut = holes.select(torch.tensor([1, 3]))
    assert cut.tokens.tolist() == [[4, 5, 6], [4, 5, 0]]
    assert cut.response_mask.tolist() == [[F, T], [T, F]]


def test_tokens_lists_the_cells_under_the_mask_and_set_tokens_is_its_inverse():
    buffer = buffer_of(by_hand())
    assert buffer.flat("old_values").tolist() == [7, 1, 2, 3, 4, 5, 6]
    buffer.set_flat("returns", torch.arange(7.0))
    assert buffer.flat("returns").tolist() == [0, 1, 2, 3, 4, 5, 6]
    cells = [[[0.0], [1.0]], [[2.0, 3.0, 4.0]], [[5.0, 6.0]]]
    assert [m.returns.tolist() for m in buffer.micro_batches] == cells


def test_row_sums_ignore_what_is_outside_the_mask():
    assert buffer_of(by_hand(), rows=4, tokens=99).row_sums("old_values").tolist() == [7, 1, 9, 11]


def test_unpack_puts_values_under_the_mask_and_carries_the_gradient():
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    cells = unpack(values, torch.tensor([[F, T, F], [T, F, T]]))
    assert cells.tolist() == [[0, 1, 0], [2, 0, 3]]
    (cells * torch.tensor([[9.0, 4, 9], [5, 9, 6]])).sum().backward()
    assert values.grad.tolist() == [4, 5, 6]


def many_rows(count: int = 23) -> RolloutBuffer:
    rollout = Rollout(
        torch.arange(count), torch.zeros(count, 2).long(), torch.ones(count).long(),
        torch.ones(count, 1).bool(), torch.zeros(count),
    )
    return buffer_of(rollout, rows=2, tokens=99)


def numbers(parts) -> list[list[list[int]]]:
    return [[micro.rows.tolist() for micro in part] for part in parts]


@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_minibatches_hold_every_micro_batch_once(count):
    buffer = many_rows()
    parts = buffer.minibatches(count, seed=0, iteration=0, epoch=0)
    assert len(parts) == count
    together = sorted(rows for part in numbers(parts) for rows in part)
    assert together == [m.rows.tolist() for m in buffer.micro_batches]
    sizes = [sum(map(len, part)) for part in numbers(parts)]
    assert max(sizes) - min(sizes) <= 2  # one micro-batch


def test_minibatches_are_a_pure_function_of_seed_iteration_and_epoch():
    base = numbers(many_rows().minibatches(3, 1, 2, 4))
    assert numbers(many_rows().minibatches(3, 1, 2, 4)) == base
    for others in ((9, 2, 4), (1, 9, 4), (1, 2, 9)):
        assert numbers(many_rows().minibatches(3, *others)) != base


def test_minibatches_refuse_more_than_there_are_micro_batches():
    with pytest.raises(ValueError, match=r"13 mini-batches need as many .*, there are 12"):
        many_rows().minibatches(13, 0, 0, 0)


PROMPTS = [
    Prompt([3, 4], "cd", "p:1", {"answer": 7}),
    Prompt([5], "e", "p:2", {"answer": 8, "topic": "x"}),
    Prompt([6, 7, 8, 9], "fghi", "p:3", {}),
    Prompt([5], "e", "p:4", {"topic": "y"}),
]
KEYS = streams.key(0, "test", torch.arange(4))
LM = tiny_lm(torch.float64)


def drawn(sampling: Sampling, rows_at_once: int = 4):
    return sample(LM, PROMPTS, KEYS, sampling, Letters(), rows_at_once)


def test_sample_gives_the_same_rows_however_many_are_sampled_at_once():
    together, rollout = drawn(Sampling(12))
    for rows_at_once in (1, 3):
        apart, other = drawn(Sampling(12), rows_at_once)
        assert apart == together
        assert torch.equal(other.tokens, rollout.tokens)
        assert torch.equal(other.response_mask, rollout.response_mask)
    assert together.response_ids[1] != together.response_ids[3]  # one prompt, two keys


def test_sample_gives_texts_and_left_aligned_rows():
    made, rollout = drawn(Sampling(12))
    assert made.prompts == ["cd", "e", "fghi", "e"]
    assert made.prompt_ids == [[3, 4], [5], [6, 7, 8, 9], [5]]
    assert "eos" in made.finish_reasons and "length" in made.finish_reasons
    for b, ids in enumerate(made.response_ids):
        row, prompt = rollout.tokens[b].tolist(), made.prompt_ids[b]
        assert row[: len(prompt) + len(ids)] == prompt + ids
        assert set(row[len(prompt) + len(ids) :]) <= {0}
        assert rollout.response_mask[b].tolist() == [t < len(ids) for t in range(12)]
        assert (ids[-1] == 0) == (made.finish_reasons[b] == "eos")
        assert made.completions[b] == Letters().decode(ids).removesuffix("_")  # without eos
    assert rollout.rows.tolist() == [0, 1, 2, 3]
    assert rollout.prompt_lengths.tolist() == [2, 1, 4, 1]
    assert rollout.scores.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("rows_at_once", [1, 3])
def test_sample_keeps_the_logprobs_that_tokens_were_drawn_with(rows_at_once):
    made, rollout = drawn(Sampling(12, temperature=0.7, top_k=3), rows_at_once)
    for b, ids in enumerate(made.response_ids):
        row, first = made.prompt_ids[b] + ids, len(made.prompt_ids[b])
        logits = LM.logits(LM(torch.tensor([row])))[0, first - 1 : -1] / 0.7
        best = logits.topk(3).values  # all that could be drawn
        chosen = logits.gather(-1, torch.tensor(ids)[:, None])[:, 0]
        expected = chosen - best.logsumexp(-1)
        kept = rollout.sampled_logprobs[b]
        torch.testing.assert_close(kept[: len(ids)], expected, rtol=0, atol=1e-9)
        assert not kept[len(ids) :].any()


def test_sample_offers_the_columns_of_all_prompts_whatever_stands_in_the_batch():
    made, _ = drawn(Sampling(1))
    assert made.columns == {"answer": [7, 8, None, None], "topic": [None, "x", None, "y"]}
    names = columns_of(PROMPTS)
    assert names == ["answer", "topic"]
    made, _ = sample(LM, PROMPTS[2:3], KEYS[:1], Sampling(1), Letters(), 4, names)
    assert made.columns == {"answer": [None], "topic": [None]}


def test_sample_cuts_a_stop_string_from_the_text_and_keeps_it_in_the_ids():
    free, _ = drawn(Sampling(12))
    stop = free.completions[1][2:4]  # two letters that row 1 writes as its third and fourth
    made, rollout = drawn(Sampling(12, stop_strings=(stop,)))
    assert made.finish_reasons[1] == "stop"
    assert made.completions[1] == free.completions[1][:2]
    assert made.response_ids[1] == free.response_ids[1][:4]
    assert rollout.response_mask[1].sum() == 4


def test_replay_rows_are_enough_to_compute_the_advantages_again():
    policy = tiny_policy(torch.float64)
    ref = initialize(tiny_lm(torch.float64), torch.Generator().manual_seed(4))
    config = PPOConfig(model="m", data="d", reward=("r",), out="o", gamma=0.9, lam=0.8)
    made, rollout = sample(policy.lm, PROMPTS, KEYS, Sampling(6), Letters(), 4)
    buffer = buffer_of(rollout._replace(scores=torch.tensor([1.0, -2.0, 0.5, 3.0])), 2, 99)
    measure(policy, ref, buffer, temperature=1.0)
    assign_credit(buffer, config, kl_coef=0.3)

    rows = [json.loads(json.dumps(row)) for row in replay_rows(made, buffer)]
    assert [row["score"] for row in rows] == [1.0, -2.0, 0.5, 3.0]
    raw = []
    for row, made_ids in zip(rows, made.response_ids, strict=True):
        n = len(made_ids)
        assert row["response_ids"] == made_ids
        pairs = zip(row["old_logprobs"], row["ref_logprobs"], strict=True)
        rewards = [-0.3 * (old - ref) for old, ref in pairs]
        rewards[-1] += row["score"]
        assert row["rewards"] == pytest.approx(rewards, abs=1e-6)
        values = [*row["old_values"], 0.0]
        deltas = [rewards[t] + 0.9 * values[t + 1] - values[t] for t in range(n)]
        raw.append([sum(0.72 ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)])
        returns = [a + v for a, v in zip(raw[-1], row["old_values"], strict=True)]
        assert row["returns"] == pytest.approx(returns, abs=1e-6)
    flat = [a for row in raw for a in row]
    mean = sum(flat) / len(flat)
    std = math.sqrt(sum((a - mean) ** 2 for a in flat) / len(flat))
    for row, advantages in zip(rows, raw, strict=True):
        assert row["advantages"] == pytest.approx([(a - mean) / std for a in advantages], abs=1e-6)
        assert row.keys() >= {"prompt", "response", "finish_reason", "prompt_ids"}
