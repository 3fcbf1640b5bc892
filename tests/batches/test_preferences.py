"""Batches of pairs and of ranked lists, their losses, and what scores say, by hand."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from minirlhf.batches.preferences import (
    NEED_SCORES,
    as_pairs,
    bootstrap_weights,
    collate,
    collate_pairs,
    collate_rankings,
    count_texts,
    count_tokens,
    micro_batches,
    row_lengths,
    text_numbers,
    texts_of,
    without_unread,
)
from minirlhf.errors import UserError
from tests.tiny_reward import LISTS, PAIRS, pair, ranking, scored_by_last_token, tiny_model


def test_collate_pairs_by_hand():
    batch = collate_pairs(PAIRS[:2])
    assert batch.tokens.tolist() == [
        [1, 2, 3, 4, 5], [7, 8, 0, 0, 0], [1, 2, 6, 0, 0], [9, 10, 1, 0, 0],
    ]
    assert batch.lengths.tolist() == [5, 2, 3, 3]
    assert batch.margin.tolist() == [0.5, 0.0]
    scores = scored_by_last_token(tiny_model())(batch.tokens, batch.lengths)
    assert [each.tolist() for each in batch.split(scores)] == [[5, 6], [8, 1]]


@pytest.mark.parametrize("examples", [PAIRS, LISTS], ids=["pairs", "lists"])
def test_scores_are_those_of_each_text_alone(examples):
    model, batch = tiny_model(), collate(examples)
    split = batch.split(model(batch.tokens, batch.lengths))
    for example, scores in zip(examples, split, strict=True):
        for ids, score in zip(texts_of(example), scores, strict=True):
            alone = model(torch.tensor([ids]), torch.tensor([len(ids)]))
            torch.testing.assert_close(score[None], alone, rtol=0, atol=1e-12)


RIGHT, WRONG = math.log(4 / 3), math.log(4)  # sigmoid(log 3) = 3/4


@pytest.mark.parametrize(
    ("chosen", "rejected", "margin", "probability", "smoothing", "center", "expected"),
    [
        # -log sigmoid(2 - 1 - 1) = -log sigmoid(1 + 1 - 2) = log 2; 0.5 (2 + 1)^2, (1 - 1)^2
        ([2, 1], [1, -1], [1, 2], [1, 1], 0.0, 0.5, [math.log(2) + 4.5, math.log(2)]),
        # soft labels; smoothed by 1/4 they are 3/4, 1/2 and 1/4
        ([math.log(3)] * 3, [0] * 3, [0] * 3, [1, 0.5, 0], 0.0, 0.0,
         [RIGHT, (RIGHT + WRONG) / 2, WRONG]),
        ([math.log(3)] * 3, [0] * 3, [0] * 3, [1, 0.5, 0], 0.25, 0.0,
         [0.75 * RIGHT + 0.25 * WRONG, (RIGHT + WRONG) / 2, 0.25 * RIGHT + 0.75 * WRONG]),
    ],
)
def test_pair_loss_by_hand(chosen, rejected, margin, probability, smoothing, center, expected):
    batch = collate_pairs(PAIRS[: len(chosen)])._replace(
        margin=torch.tensor(margin), chosen_probability=torch.tensor(probability)
    )
    scores = torch.tensor([*chosen, *rejected], dtype=torch.float32)
    torch.testing.assert_close(batch.loss(scores, smoothing, center), torch.tensor(expected))


def test_collate_rankings_by_hand():
    batch = collate_rankings(LISTS[1:])
    assert batch.tokens.tolist() == [
        [2, 1, 2, 0], [2, 8, 0, 0], [2, 6, 0, 0], [3, 4, 5, 7], [4, 6, 0, 0],
    ]
    assert batch.lengths.tolist() == [3, 2, 2, 4, 2]
    assert batch.ranks.tolist() == [[1, 2, 2], [1, 2, 0]]
    assert batch.mask.tolist() == [[True] * 3, [True, True, False]]
    scores = scored_by_last_token(tiny_model())(batch.tokens, batch.lengths)
    assert [each.tolist() for each in batch.split(scores)] == [[2, 8, 6], [7, 6]]


def test_ranking_loss_by_hand():
    batch = collate_rankings(LISTS[1:])
    scores = torch.tensor([0.0, math.log(2), 0.0, 0.0, math.log(3)])
    # a choice of one of three with weights 1, 2, 1: log 4; a pair of weights 1, 3: log 4
    torch.testing.assert_close(batch.loss(scores), torch.full((2,), math.log(4)))
    # (2 mean)^2: (2 log 2 / 3)^2 and (log 3)^2
    extra = torch.tensor([(2 * math.log(2) / 3) ** 2, math.log(3) ** 2])
    torch.testing.assert_close(batch.loss(scores, 0.0, 10.0), math.log(4) + 10 * extra)


def test_list_of_two_is_lost_on_as_a_pair_is():
    scores = torch.tensor([1.5, -0.25, 2.0, 0.5, 3.0, -1.0], dtype=torch.float64)  # 3 chosen first
    pairs = [pair([1], [2], [3])] * 3
    lists = [ranking([1], [[2], [3]])] * 3
    side_by_side = torch.stack(scores.chunk(2), 1).flatten()
    for center, loss in itertools.product((0.0, 0.1), ("plackett-luce", "pairs")):
        of_pairs = collate(pairs).loss(scores, 0.0, center)
        of_lists = collate(lists, loss).loss(side_by_side, 0.0, center)
        torch.testing.assert_close(of_pairs, of_lists, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("loss", "margin", "chosen_probability"),
    [("margins", 1.5, 1.0), ("probabilities", 0.0, 1 / (1 + math.exp(-1.5)))],
)
def test_list_of_two_with_scores_is_lost_on_as_its_pair_is(loss, margin, chosen_probability):
    scores = torch.tensor([2.0, 0.5], dtype=torch.float64)
    two = [ranking([1], [[2], [3]], scores=[2.5, 1.0])]
    one = replace(pair([1], [2], [3]), margin=margin, chosen_probability=chosen_probability)
    of_list = collate(two, loss).loss(scores, 0.1, 0.1)
    torch.testing.assert_close(of_list, collate([one]).loss(scores, 0.1, 0.1), rtol=0, atol=1e-6)


def test_pairs_of_a_list_by_hand():
    """A list of one best and two that tie, scored 0, log 2, 0, then a list of two, scored log 3, 0.

    -log sigmoid(d) = log(1 + exp(-d)): log 3 and log 2 for d = -log 2 and 0, and those that tie are
    not compared; log 4/3 for d = log 3.
    """
    scores = torch.tensor([0.0, math.log(2), 0.0, math.log(3), 0.0], dtype=torch.float64)
    batch = collate_rankings(LISTS[1:], "pairs")
    assert batch.tokens.tolist() == collate_rankings(LISTS[1:]).tokens.tolist()
    assert [each.tolist() for each in batch.split(scores)] == [
        scores[:3].tolist(), scores[3:].tolist(),
    ]
    expected = torch.tensor([math.log(6) / 2, math.log(4 / 3)], dtype=torch.float64)
    torch.testing.assert_close(batch.loss(scores), expected, rtol=0, atol=1e-12)
    # (2 mean)^2, as of a whole order
    extra = [(2 * math.log(2) / 3) ** 2, math.log(3) ** 2]
    extra = 10 * torch.tensor(extra, dtype=torch.float64)
    torch.testing.assert_close(batch.loss(scores, 0.0, 10.0), expected + extra, rtol=0, atol=1e-12)
    # a label wrong with probability 1/4 takes a quarter from the other side: log 3/2, log 2, log 4
    flipped = torch.tensor([math.log(3) / 2, math.log(4)], dtype=torch.float64)
    smooth = 0.75 * expected + 0.25 * flipped
    torch.testing.assert_close(batch.loss(scores, 0.25), smooth, rtol=0, atol=1e-12)


def test_scores_of_a_list_as_margins_by_hand():
    """Scores 3, 1, 1: two pairs of margin 2. The model's 2, 0, log 2 win by 0 and -log 2 of it."""
    batch = collate([ranking([1], [[2], [3], [4]], [1, 2, 2], scores=[3.0, 1.0, 1.0])], "margins")
    scores = torch.tensor([2.0, 0.0, math.log(2)], dtype=torch.float64)
    expected = torch.tensor([(math.log(2) + math.log(3)) / 2], dtype=torch.float64)
    torch.testing.assert_close(batch.loss(scores), expected, rtol=0, atol=1e-12)


def test_scores_of_a_list_as_probabilities_by_hand():
    """Scores log 3, 0, 0: the first wins with probability 3/4, those that tie with 1/2.

    A model of three equal scores loses log 2 on each pair. One with the list's own scores loses
    each label's entropy, log 4 - 3/4 log 3 twice and log 2, and can do no better: no gradient.
    """
    own = [math.log(3), 0.0, 0.0]
    batch = collate([ranking([1], [[2], [3], [4]], [1, 2, 2], scores=own)], "probabilities")
    equal = torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(batch.loss(equal).item(), math.log(2), rtol=0, atol=1e-7)
    scores = torch.tensor(own, dtype=torch.float64, requires_grad=True)
    loss = batch.loss(scores)
    entropies = 2 * (math.log(4) - 0.75 * math.log(3)) + math.log(2)
    torch.testing.assert_close(loss.item(), entropies / 3, rtol=0, atol=1e-7)
    loss.backward()
    torch.testing.assert_close(scores.grad, torch.zeros_like(scores), rtol=0, atol=1e-7)


def test_lists_are_refused_by_losses_that_need_scores_or_labels():
    for loss in NEED_SCORES:
        with pytest.raises(ValueError, match=f"^t:1 has no scores: {loss} needs them"):
            collate(LISTS, loss)
    with pytest.raises(ValueError, match=r"label_smoothing is 0.1: only pairs have a label"):
        collate_rankings(LISTS).loss(torch.zeros(9), 0.1)


def test_counts_of_examples_by_hand():
    assert row_lengths(LISTS).tolist() == [3, 3, 4]
    assert row_lengths(PAIRS).tolist() == [5, 3, 8, 4, 3]
    assert count_texts(LISTS).tolist() == [4, 3, 2] and count_texts(PAIRS).tolist() == [2] * 5
    assert [count_tokens(e) for e in (*LISTS, PAIRS[0])] == [10, 7, 6, 8]


def test_text_numbers_say_which_text_each_row_of_a_batch_is():
    """Texts are counted through all examples; a batch of pairs has its chosen texts first."""
    assert text_numbers(PAIRS, [2, 0]).tolist() == [4, 0, 5, 1]
    batch, texts = collate_pairs([PAIRS[2], PAIRS[0]]), [t for e in PAIRS for t in texts_of(e)]
    for row, length, number in zip(batch.tokens, batch.lengths, [4, 0, 5, 1], strict=True):
        assert row[:length].tolist() == texts[number]
    # lists of 4, 3 and 2 texts: the last begins at 7
    assert text_numbers(LISTS, [2, 0]).tolist() == [7, 8, 0, 1, 2, 3]


@pytest.mark.parametrize(
    ("most", "parts"),
    # 4 texts of at most 3 tokens, 3 of 3, 2 of 4: shortest first, the longest decides the width
    [(1, [[0], [1], [2]]), (20, [[0], [1, 2]]), (21, [[0, 1], [2]]), (36, [[0, 1, 2]])],
)
def test_micro_batches_keep_the_texts_of_a_list_together(most, parts):
    assert [part.tolist() for part in micro_batches(LISTS, most)] == parts


def test_as_pairs_are_all_of_different_rank():
    shown = [[(p.chosen_ids, p.rejected_ids) for p in as_pairs(e)] for e in LISTS]
    assert shown[0] == [
        ([9], [7, 5]), ([9], [3]), ([9], [4, 2]), ([7, 5], [3]), ([7, 5], [4, 2]), ([3], [4, 2]),
    ]
    assert shown[1] == [([1, 2], [8]), ([1, 2], [6])]  # the two that tie are not compared
    assert as_pairs(PAIRS[0]) == [PAIRS[0]]
    first = as_pairs(LISTS[1])[0]
    assert (first.prompt_ids, first.margin, first.where) == ([2], 0.0, "t:2")
    scored = ranking([1], [[2], [3], [4]], [1, 1, 2], scores=[2.5, 2.5, 1.0])
    assert [pair.margin for pair in as_pairs(scored)] == [1.5, 1.5]


def test_without_unread_by_hand():
    cut = without_unread(pair([1], [2, 0], [0, 3]), 0)
    assert (cut.prompt_ids, cut.chosen_ids, cut.rejected_ids) == ([1], [2], [0, 3])
    assert without_unread(pair([1], [0], [2, 0, 9]), 0).rejected_ids == [2, 0, 9]  # another eos
    with pytest.raises(UserError, match="t:1: a text of nothing but eos: remove the row"):
        without_unread(pair([], [2], [0]), 0)
    cut = without_unread(ranking([1], [[2, 0], [0], [3]], [1, 2, 2]), 0)
    assert cut.responses == [[2], [], [3]] and cut.ranks == [1, 2, 2]


def test_bootstrap_weights_are_a_function_of_seed_row_and_head():
    assert bootstrap_weights(3, torch.tensor([5, 0]), 1).tolist() == [[1.0], [1.0]]  # one head
    rows = torch.arange(200)
    found = bootstrap_weights(0, rows, 3)
    assert torch.equal(bootstrap_weights(0, rows.flip(0)[:7], 3), found.flip(0)[:7])
    assert torch.equal(bootstrap_weights(0, rows, 5)[:, :3], found)  # a head more moves no other
    assert not torch.equal(found[:, 0], found[:, 1])
    assert not torch.equal(found, bootstrap_weights(1, rows, 3))


def test_bootstrap_weights_are_poisson():
    found = bootstrap_weights(0, torch.arange(20_000), 2)
    for head in found.T:
        for n, share in enumerate((0.36788, 0.36788, 0.18394, 0.06131)):  # 1/(e n!)
            # five standard deviations of a share of 20,000
            assert float((head == n).double().mean()) == pytest.approx(share, abs=0.018)
        assert float(head.mean()) == pytest.approx(1.0, abs=0.036)
    assert abs(float(torch.corrcoef(found.T)[0, 1])) < 0.036
