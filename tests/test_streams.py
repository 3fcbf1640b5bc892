import pytest
import torch

from minirlhf import streams


def signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def splitmix64(x: int) -> int:
    """One step of the published generator, in Python's unbounded integers."""
    z = (x + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def chi_square(counts: torch.Tensor) -> float:
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


def test_mix_is_the_published_splitmix64():
    # The first outputs of the reference C code for seed 0: its state is 0, golden, 2 golden.
    golden = 0x9E3779B97F4A7C15
    states = torch.tensor([0, signed(golden), signed(2 * golden % 2**64)])
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert streams.mix(states).tolist() == [signed(out) for out in published]


def test_mix_wraps_as_64_bit_integers_do():
    values = [1, -1, 2**63 - 1, -(2**63), 123456789, -987654321]
    expected = [signed(splitmix64(v % 2**64)) for v in values]
    assert streams.mix(torch.tensor(values)).tolist() == expected


def test_key_differs_for_each_seed_stream_and_index():
    keys = {
        int(streams.key(seed, stream, i, j))
        for seed in (0, 1, -1, 2**62)
        for stream in ("sample", "order", "")
        for i in range(10)
        for j in range(10)
    }
    assert len(keys) == 4 * 3 * 10 * 10
    assert int(streams.key(0, "a", 0)) != int(streams.key(0, "a"))
    assert int(streams.key(0, "a", 1, 2)) != int(streams.key(0, "a", 2, 1))


def test_key_is_the_same_in_every_process():
    # Written down once: a change would make every run differ from those before it. The first 8
    # bytes of sha256("sample") are af2bdbe1aa9b6ec1, read in little-endian order.
    name = int.from_bytes(bytes.fromhex("af2bdbe1aa9b6ec1"), "little")
    inner = splitmix64(7 ^ splitmix64(name))
    expected = splitmix64(inner ^ splitmix64(3))
    assert int(streams.key(7, "sample", 3)) == signed(expected)


def test_key_of_a_tensor_is_the_key_of_each_element():
    index = torch.tensor([[0, 1], [5, -3]])
    keys = streams.key(3, "x", index, 4)
    assert keys.shape == (2, 2) and keys.dtype == torch.int64
    expected = [[int(streams.key(3, "x", i, 4)) for i in row] for row in index.tolist()]
    assert keys.tolist() == expected


def test_uniform_by_hand():
    # The top 53 bits of mix(key ^ mix(t)), as a fraction of 2^53.
    key, t = 42, 7
    bits = splitmix64(key ^ splitmix64(t))
    drawn = streams.uniform(torch.tensor([key]), t)
    assert drawn.dtype == torch.float64 and drawn.tolist() == [(bits >> 11) / 2**53]


def test_uniform_stays_below_one(monkeypatch):
    for bits, expected in ((-1, 1 - 2**-53), (0, 0.0), (-(2**63), 0.5)):
        monkeypatch.setattr(streams, "mix", lambda x, bits=bits: torch.full_like(x, bits))
        assert streams.uniform(torch.tensor([0]), 0).tolist() == [expected]


def test_uniform_in_float32_is_the_nearest_to_that_in_float64():
    keys = streams.key(0, "test", torch.arange(10_000))
    exact, made = streams.uniform(keys, 3), streams.uniform(keys, 3, torch.float32)
    assert made.dtype == torch.float32 and torch.equal(made, exact.float())


@pytest.mark.parametrize("across", ["keys", "positions"])
def test_uniform_is_uniform(across):
    n, at = 100_000, torch.arange(100_000)
    keys, t = (streams.key(0, "u", at), 3) if across == "keys" else (streams.key(0, "u"), at)
    u = streams.uniform(keys, t)
    assert u.shape == (n,) and 0 <= u.min() and u.max() < 1
    # Of n draws the mean has standard deviation sqrt(1/12/n) = 0.00091, the variance 0.00024.
    assert abs(u.mean() - 0.5) < 4 * 0.00091
    assert abs(u.var() - 1 / 12) < 4 * 0.00024
    # 99.9 % point of chi-square with 99 degrees of freedom: 148.2.
    assert chi_square(torch.bincount((u * 100).long(), minlength=100)) < 148.2
    # Neighbours are unrelated: their correlation has standard deviation 1 / sqrt(n) = 0.0032.
    assert abs(torch.corrcoef(torch.stack((u[:-1], u[1:])))[0, 1]) < 4 * 0.0032


def test_uniform_of_one_row_does_not_depend_on_the_others():
    keys = streams.key(0, "u", torch.arange(5))
    together = streams.uniform(keys, torch.arange(5))
    alone = [streams.uniform(keys[i : i + 1], i).item() for i in range(5)]
    assert together.tolist() == alone


@pytest.mark.parametrize("n", [0, 1, 2, 1000])
def test_permutation_is_one(n):
    order = streams.permutation(0, "order", 0, n)
    assert order.dtype == torch.int64 and order.sort().values.tolist() == list(range(n))


def test_permutation_depends_on_seed_stream_and_epoch_alone():
    orders = {
        tuple(streams.permutation(seed, stream, epoch, 100).tolist())
        for seed in (0, 1)
        for stream in ("a", "b")
        for epoch in (0, 1)
    }
    assert len(orders) == 8 and tuple(range(100)) not in orders
    torch.manual_seed(5)
    again = streams.permutation(1, "b", 1, 100)
    assert tuple(again.tolist()) in orders


def test_permutations_are_equally_likely():
    orders = [tuple(streams.permutation(0, "p", e, 3).tolist()) for e in range(3000)]
    counts = torch.tensor([orders.count(order) for order in sorted(set(orders))])
    # 99.9 % point of chi-square with 3! - 1 = 5 degrees of freedom: 20.5.
    assert len(counts) == 6 and chi_square(counts) < 20.5


def test_generator_is_fresh_and_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    draws = [torch.rand(3, generator=streams.generator(0, "init", i)).tolist() for i in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert torch.equal(before, torch.get_rng_state())
