"""Which rows a step takes, how they are cut by length, and how they are laid out."""

import torch

from minirlhf.data.batching import cut_by_tokens, epoch_batches, next_rows, total_steps
from minirlhf.models.alignment import pad_right


def listed(parts: list[torch.Tensor]) -> list[list[int]]:
    return [part.tolist() for part in parts]


def test_pad_right_by_hand():
    assert pad_right([[1], [2, 3, 4], [5, 6]]).tolist() == [[1, 0, 0], [2, 3, 4], [5, 6, 0]]


def test_cut_by_tokens_by_hand():
    lengths = torch.tensor([5, 1, 3, 2, 4])
    # sorted: rows 1 3 2 4 0 of 1 2 3 4 5 tokens. 2 rows x 2 = 4 cells fit into 6, 3 x 3 = 9 do not;
    # row 2 alone, since 2 x 4 = 8; rows 4 and 0 alone
    assert listed(cut_by_tokens(lengths, 9, 6)) == [[1, 3], [2], [4], [0]]
    assert listed(cut_by_tokens(lengths, 9, 10)) == [[1, 3, 2], [4, 0]]  # 3 x 3 = 9, 2 x 5 = 10


def test_cut_by_tokens_keeps_the_row_limit():
    assert listed(cut_by_tokens(torch.ones(5, dtype=torch.int64), 2, 100)) == [[0, 1], [2, 3], [4]]


def test_cut_by_tokens_gives_an_overlong_row_a_part_of_its_own():
    assert listed(cut_by_tokens(torch.tensor([9, 1, 1]), 9, 4)) == [[1, 2], [0]]
    assert listed(cut_by_tokens(torch.tensor([9, 8]), 9, 0)) == [[1], [0]]


def test_cut_by_tokens_counts_the_texts_of_each_row():
    lengths, texts = torch.tensor([2, 1, 3]), torch.tensor([3, 2, 1])
    # sorted: row 1, 2 texts of 1; row 0, 3 of 2; row 2, 1 of 3. (2 + 3) x 2 = 10, (3 + 1) x 3 = 12
    assert listed(cut_by_tokens(lengths, 9, 9, texts)) == [[1], [0], [2]]
    assert listed(cut_by_tokens(lengths, 9, 10, texts)) == [[1, 0], [2]]
    assert listed(cut_by_tokens(lengths, 9, 17, texts)) == [[1, 0], [2]]
    assert listed(cut_by_tokens(lengths, 9, 18, texts)) == [[1, 0, 2]]


def test_cut_by_tokens_of_nothing_is_nothing():
    assert cut_by_tokens(torch.zeros(0, dtype=torch.int64), 4, 4) == []


def test_cut_by_tokens_holds_every_row_once_sorted_and_within_both_limits():
    lengths = torch.randint(1, 40, (200,), generator=torch.Generator().manual_seed(0))
    parts = cut_by_tokens(lengths, 6, 64)
    assert sorted(torch.cat(parts).tolist()) == list(range(200))
    flat = lengths[torch.cat(parts)]
    assert torch.equal(flat, flat.sort().values)
    for part in parts:
        assert len(part) <= 6 and (len(part) * lengths[part].max() <= 64 or len(part) == 1)


def test_epoch_batches_hold_every_row_once_and_only_the_last_is_short():
    lengths = torch.randint(1, 40, (205,), generator=torch.Generator().manual_seed(0))
    batches = epoch_batches(lengths, 3, seed=0, epoch=0)
    assert sorted(torch.cat(batches).tolist()) == list(range(205))
    assert [len(batch) for batch in batches] == [3] * 68 + [1]


def test_epoch_batches_are_a_pure_function_and_differ_by_epoch_and_seed():
    lengths = torch.arange(1, 101)
    before = lengths.clone()
    first = listed(epoch_batches(lengths, 4, seed=0, epoch=0))
    assert listed(epoch_batches(lengths, 4, seed=0, epoch=0)) == first
    assert listed(epoch_batches(lengths, 4, seed=0, epoch=1)) != first
    assert listed(epoch_batches(lengths, 4, seed=1, epoch=0)) != first
    assert torch.equal(lengths, before)


def test_epoch_batches_hold_rows_of_like_length_in_no_order_of_length():
    lengths = torch.arange(1024) // 8  # 256 batches of 4, 32 to a pool: 128 of 1024 rows
    batches = epoch_batches(lengths, 4, seed=0, epoch=0)
    spread = [int(lengths[b].max() - lengths[b].min()) for b in batches]
    # 4 neighbours of 128 sorted draws from 128 lengths span about 3; 4 rows at random about 77
    assert sum(spread) / len(spread) < 5
    starts = [int(lengths[b].min()) for b in batches]
    assert starts != sorted(starts)


def test_epoch_batches_of_small_data_differ_from_epoch_to_epoch():
    lengths = torch.arange(1, 41)
    made = [epoch_batches(lengths, 4, seed=0, epoch=e) for e in (0, 1)]
    first, second = ({tuple(sorted(b.tolist())) for b in batches} for batches in made)
    assert len(first & second) < 5  # of 10


def test_epoch_batches_of_fewer_rows_than_a_batch_is_one_batch():
    (batch,) = epoch_batches(torch.tensor([3, 1, 2]), 8, seed=0, epoch=0)
    assert sorted(batch.tolist()) == [0, 1, 2]


def test_next_rows_hold_each_prompt_once_an_epoch_in_an_order_of_its_own():
    rows = next_rows(0, 21, total=7, seed=0).tolist()
    epochs = [rows[i : i + 7] for i in (0, 7, 14)]
    assert [sorted(epoch) for epoch in epochs] == 3 * [list(range(7))]
    assert epochs[0] != epochs[1] != epochs[2]


def test_next_rows_are_a_pure_function_of_what_was_consumed():
    whole = next_rows(0, 21, total=7, seed=0)
    for start, count in ((0, 3), (3, 4), (5, 16), (13, 2), (20, 1)):
        assert torch.equal(next_rows(start, count, 7, 0), whole[start : start + count])
    assert not torch.equal(next_rows(0, 21, 7, seed=1), whole)


def test_next_rows_cycle_where_there_are_fewer_prompts_than_rows():
    assert next_rows(0, 5, total=1, seed=0).tolist() == [0, 0, 0, 0, 0]
    rows = next_rows(4, 8, total=2, seed=0).tolist()
    assert [sorted(rows[i : i + 2]) for i in (0, 2, 4, 6)] == 4 * [[0, 1]]


def test_total_steps():
    assert total_steps(40, 4, 1.0) == 10
    assert total_steps(41, 4, 1.0) == 11
    assert total_steps(40, 4, 2.5) == 25
    assert total_steps(40, 4, 1.1) == 11
    assert total_steps(400, 4, 0.07) == 7  # 0.07 * 100 is 7.000000000000001 in binary
    assert total_steps(40, 4, 0.01) == 1
    assert total_steps(40, 4, 1e-9) == 1
    assert total_steps(40, 4, 3.0, 7) == 7
