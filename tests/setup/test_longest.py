"""Which rows a dry run takes: the heaviest batch that its run would meet."""

from types import SimpleNamespace

import pytest
import torch
from torch import tensor

from minirlhf.data.batching import epoch_batches, next_rows
from minirlhf.data.examples import Pair, Prompt, Text
from minirlhf.setup import longest
from minirlhf.setup.grpo_settings import GRPOConfig
from minirlhf.setup.policy_data import Data
from minirlhf.setup.ppo_settings import PPOConfig
from minirlhf.setup.reward_settings import RewardConfig
from minirlhf.setup.sft_settings import SFTConfig


def texts_of(lengths: list[int]) -> list[Text]:
    return [Text([1] * n, 0, f"d:{i}", {}) for i, n in enumerate(lengths)]


def prompts_of(lengths: list[int], **columns: object) -> list[Prompt]:
    return [Prompt([1] * n, "", f"d:{i}", columns) for i, n in enumerate(lengths)]


def lengths_of(rows: list) -> list[int]:
    return sorted(len(row.ids) for row in rows)


@pytest.fixture
def r():
    """What a dry run is told of the run that it stands for."""
    return SimpleNamespace(steps=0, work=0.0, evaluations=0.0)


def test_heaviest_is_the_batch_of_the_largest_micro_batch_then_of_most_tokens():
    tokens = tensor([1, 1, 9, 5, 5, 5, 9, 2])
    batches = [tensor([0, 1]), tensor([3, 4, 5]), tensor([2, 0]), tensor([6, 7])]

    def each(rows):
        return [tensor([i]) for i in range(len(rows))]

    rows, times = longest.heaviest(batches, each, tokens)
    assert rows.tolist() == [6, 7]
    assert times == (2 + 15 + 10 + 11) / 11
    rows, times = longest.heaviest(batches, longest.whole, tokens)
    assert rows.tolist() == [3, 4, 5]  # 15 tokens in one micro-batch


@pytest.mark.parametrize("steps", [None, 2, 9])
def test_of_training_takes_the_heaviest_batch_of_the_run(r, steps):
    lengths = torch.randint(1, 30, (23,), generator=torch.Generator().manual_seed(1))
    texts = texts_of(lengths.tolist())
    config = SFTConfig(batch_size=4, epochs=2.0, steps=steps, seed=3)
    made, rows, sets = longest.of_training(r, config, texts, {}, longest.of_texts)
    count = steps or 12
    batches = [b for epoch in range(2) for b in epoch_batches(lengths, 4, 3, epoch)][:count]
    totals = [int(lengths[b].sum()) for b in batches]
    assert sum(lengths_of(rows)) == max(totals)
    assert (r.steps, r.work, r.evaluations) == (count, sum(totals) / max(totals), 0.0)
    assert (made.steps, sets) == (2, {})


def test_of_training_makes_no_more_steps_than_the_run(r):
    config = SFTConfig(batch_size=4)
    made, _, _ = longest.of_training(r, config, texts_of([3, 4]), {}, longest.of_texts)
    assert (made.steps, r.steps, r.work) == (1, 1, 1.0)


def test_of_training_takes_the_heaviest_micro_batch_of_each_held_out_set(r):
    config = SFTConfig(batch_size=4, micro_batch_tokens=10, eval_every=2, steps=6)
    sets = {"eval_a_": texts_of([5, 2, 4, 5]), "eval_b_": texts_of([2, 2])}
    _, _, found = longest.of_training(r, config, texts_of([3] * 9), sets, longest.of_texts)
    # sorted and cut: 2 with 4, of 8 cells, then 5 with 5
    assert {prefix: lengths_of(rows) for prefix, rows in found.items()} == {
        "eval_a_": [5, 5], "eval_b_": [2, 2],
    }
    assert r.evaluations == 16 / 10 * 3  # after steps 2, 4 and 6


def test_of_training_keeps_the_texts_of_a_pair_together(r):
    def pair(prompt: int, chosen: int, rejected: int) -> Pair:
        return Pair([1] * prompt, [1] * chosen, [1] * rejected, 0.0, "d:1", {})

    pairs = [pair(1, 8, 1), pair(1, 6, 6), pair(1, 1, 1)]
    config = RewardConfig(batch_size=1)
    _, rows, _ = longest.of_training(r, config, pairs, {}, longest.of_preferences)
    assert rows == [pairs[1]]  # 14 tokens, where the first has 11 and the longest text
    assert r.work == (11 + 14 + 4) / 14


TOKENIZER = SimpleNamespace(eos_ids=(0,))


def data_of(prompts: list[Prompt], sets: dict | None = None, texts: list | None = None) -> Data:
    return Data(prompts, sets or {}, texts or [], {}, [])


def test_of_ppo_takes_the_heaviest_iteration_and_lets_no_response_end(r):
    lengths = torch.randint(1, 30, (9,), generator=torch.Generator().manual_seed(1)).tolist()
    prompts = prompts_of(lengths)
    config = PPOConfig(batch_size=4, steps=5, max_new_tokens=7, stop=(".",), seed=2,
                       critic_warmup_steps=1)
    made, tokenizer, dry = longest.of_ppo(r, config, TOKENIZER, data_of(prompts))
    batches = next_rows(0, 20, 9, 2).split(4)
    totals = [sum(lengths[i] + 7 for i in rows.tolist()) for rows in batches]
    assert sum(lengths_of(dry.prompts)) + 4 * 7 == max(totals)
    assert (r.steps, r.work) == (5, pytest.approx(sum(totals) / max(totals)))
    assert (made.steps, made.stop, made.critic_warmup_steps) == (2, (), 0)
    assert (tokenizer.eos_ids, TOKENIZER.eos_ids) == ((), (0,))


def test_of_ppo_gives_each_prompt_the_columns_of_all(r):
    prompts = [*prompts_of([1], answer="a"), *prompts_of([5])]
    _, _, dry = longest.of_ppo(r, PPOConfig(batch_size=1, steps=2), TOKENIZER, data_of(prompts))
    assert [(len(p.ids), p.columns) for p in dry.prompts] == [(5, {"answer": None})]


def test_of_ppo_evaluates_the_heaviest_rows_that_stand_side_by_side(r):
    sets = {"eval/": prompts_of([1, 2, 3, 9, 4])}
    config = PPOConfig(batch_size=2, steps=3, eval_every=1, max_new_tokens=1)
    _, _, dry = longest.of_ppo(r, config, TOKENIZER, data_of(prompts_of([1, 1]), sets))
    assert [len(p.ids) for p in dry.sets["eval/"]] == [3, 9]
    # 5 answers and 19 tokens of prompts, before the first step and after each
    assert r.evaluations == pytest.approx(24 / 14 * 4)
    config = PPOConfig(batch_size=1, micro_batch_size=1, steps=3, max_new_tokens=1)
    _, _, dry = longest.of_ppo(r, config, TOKENIZER, data_of(prompts_of([1, 1]), sets))
    assert [len(p.ids) for p in dry.sets["eval/"]] == [9, 9]  # a standard error needs two


def test_of_prompts_counts_every_response_to_a_prompt(r):
    # a micro-batch of 3 rows holds the longest prompt three times: 9 + 1 and twice 4 + 1 would be
    # the heaviest of single rows, 7 + 1 with 8 + 1 is not
    config = GRPOConfig(batch_size=2, samples_per_prompt=3, micro_batch_size=3, steps=2,
                        max_new_tokens=1, mini_batches=1)
    order = next_rows(0, 4, 4, 0).tolist()
    lengths = dict(zip(order, [9, 2, 7, 8], strict=True))
    prompts = prompts_of([lengths[i] for i in range(4)])
    made, _, dry = longest.of_prompts(r, config, TOKENIZER, data_of(prompts))
    assert sorted(lengths_of(dry.prompts)) == [2, 9]
    assert (made.steps, made.rollout_rows) == (2, 6)
    assert r.work == pytest.approx((11 + 2 + 15 + 2) / (11 + 2))


def test_of_ppo_takes_the_texts_of_the_heaviest_update(r):
    texts = texts_of([1, 9, 1, 1, 1, 9])
    config = PPOConfig(batch_size=1, steps=2, epochs=3, ptx_batch_size=2)
    _, _, dry = longest.of_ppo(r, config, TOKENIZER, data_of(prompts_of([1]), texts=texts))
    rows = next_rows(0, 12, 6, 0, "text order").split(2)
    totals = [sum(len(texts[i].ids) for i in part.tolist()) for part in rows]
    assert sum(lengths_of(dry.texts)) == max(totals) > min(totals)
