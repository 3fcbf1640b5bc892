import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from minirlhf.models import transformer
from minirlhf.models.alignment import pad_right
from minirlhf.models.cache import KVCache
from minirlhf.models.config import ModelConfig
from minirlhf.models.families import config_from_hf
from minirlhf.models.pretrained import load_pretrained
from minirlhf.models.rotary import RotaryTable, rotary_frequencies
from minirlhf.models.transformer import (
    MOST_ROWS,
    CausalLM,
    Linear,
    RMSNorm,
    initialize,
    linear,
    rotate,
    shapes_only,
)
from tests.conftest import PEERS
from tests.tiny_states import assert_close, f64

RNG = torch.Generator().manual_seed(0)
ROWS = [torch.randint(99, (n,), generator=RNG).tolist() for n in (1, 5, 12, 16)]
TINY = ModelConfig(
    family="llama", vocab_size=11, hidden_size=8, intermediate_size=12, num_layers=2, num_heads=2,
    num_kv_heads=1, head_dim=4, max_positions=32,
)


def tiny(**changes):
    return initialize(CausalLM(replace(TINY, **changes)).double(), torch.Generator().manual_seed(0))


# ---- the same numbers as transformers ------------------------------------------------------------


@pytest.mark.parametrize("name", PEERS)
@torch.no_grad()
def test_logits_are_those_of_transformers(name, peer):
    theirs, folder = peer(name)
    lm = load_pretrained(folder)
    logits = lm.logits(lm(pad_right(ROWS)))
    for row, ours in zip(ROWS, logits, strict=True):
        expected = theirs(torch.tensor([row])).logits[0]
        assert expected.std() > 0.3  # so that the tolerance means something
        assert_close(ours[: len(row)], expected, atol=1e-4)


@pytest.mark.parametrize("name", ["llama-llama3", "llama-dynamic", "gpt2"])
@torch.no_grad()
def test_logits_are_those_of_transformers_up_to_the_last_position(name, peer):
    theirs, folder = peer(name)
    lm = load_pretrained(folder)
    row = torch.randint(99, (1, 64), generator=torch.Generator().manual_seed(1))
    assert_close(lm.logits(lm(row)), theirs(row).logits, atol=1e-4)


@pytest.mark.parametrize("name", ["llama-biases", "qwen3", "gpt2"])
def test_gradients_are_those_of_transformers(name, peer):
    theirs, folder = peer(name)
    lm, row = load_pretrained(folder), torch.tensor([ROWS[2]])
    lm.logits(lm(row)).log_softmax(-1)[..., 7].sum().backward()
    logits = theirs(row).logits
    weights = [theirs.get_input_embeddings().weight, theirs.get_output_embeddings().weight]
    expected = torch.autograd.grad(logits.log_softmax(-1)[..., 7].sum(), weights)
    assert_close(lm.model.embed_tokens.weight.grad, expected[0], atol=1e-4)
    assert_close(lm.unembedding.grad, expected[1], atol=1e-4)


# ---- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"positions": "learned"}, {"qk_norm": True}])
def test_packed_rows_are_those_of_the_padded_ones_gradients_too(changes):
    lengths = torch.tensor([len(row) for row in ROWS])
    tokens = pad_right(ROWS) % TINY.vocab_size
    weights = torch.randn(*tokens.shape, TINY.hidden_size, dtype=f64, generator=RNG)
    weights *= (torch.arange(tokens.shape[1]) < lengths[:, None])[..., None]
    states, gradients = [], []
    for given in (None, lengths):
        lm = tiny(**changes)
        states.append(lm(tokens, lengths=given))
        (states[-1] * weights).sum().backward()
        gradients.append([p.grad for p in lm.parameters() if p.grad is not None])
    for row, (padded, packed) in enumerate(zip(*states, strict=True)):
        assert_close(packed[: lengths[row]], padded[: lengths[row]], atol=1e-12)
        assert (packed[lengths[row] :] == 0).all()
    for padded, packed in zip(*gradients, strict=True):
        assert_close(packed, padded, atol=1e-12)


def test_full_rows_are_not_packed_and_pad_ids_are_never_looked_up():
    lm, tokens = tiny(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert torch.equal(lm(tokens), lm(tokens, lengths=torch.tensor([3, 3])))
    tokens[1, 2] = 10**6  # no such token: its row ends before it
    assert torch.isfinite(lm(tokens, lengths=torch.tensor([3, 2]))).all()


def test_lengths_of_another_shape_or_beside_a_cache_are_refused():
    lm, tokens = tiny(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    with pytest.raises(ValueError, match="give one length a row"):
        lm(tokens, lengths=torch.tensor([3]))
    with pytest.raises(ValueError, match="none beside a cache"):
        lm(tokens, KVCache(TINY, 2, 4, lm.unembedding), torch.tensor([3, 2]))


class Kept:
    """Bytes that a forward pass leaves for its backward pass, parameters apart."""

    def __init__(self, lm):
        self.bytes, parameters = 0, {p.data_ptr() for p in lm.parameters()}

        def keep(tensor):
            if tensor.data_ptr() not in parameters:
                self.bytes += tensor.numel() * tensor.element_size()
            return tensor

        self.hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)


def test_checkpointing_keeps_less_and_changes_no_bit():
    tokens, lengths = torch.randint(11, (4, 30), generator=RNG), torch.tensor([30, 7, 12, 30])
    seen = []
    for checkpointing in (False, True):
        lm = tiny(num_layers=6)
        lm.model.checkpointing = checkpointing
        kept = Kept(lm)
        with kept.hooks:
            hidden = lm(tokens, lengths=lengths)
        hidden.sin().sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in lm.parameters() if p.grad is not None])
        seen.append((hidden.detach(), gradients, kept.bytes))
    (hidden, gradients, all_kept), (again, gradients_again, few_kept) = seen
    assert torch.equal(hidden, again) and torch.equal(gradients, gradients_again)
    # of each of 6 blocks its input alone, 79 tokens x 8 channels x 8 bytes; then norm and packing
    assert 6 * 79 * 8 * 8 < few_kept < 0.25 * all_kept


@pytest.mark.parametrize("family", ["rotary", "learned"])
def test_padding_and_later_tokens_change_nothing_before_them(family):
    lm = tiny(positions=family)
    row = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    other = row.clone()
    other[0, 5:] = torch.tensor([0, 7, 10])
    assert torch.equal(lm(row)[:, :5], lm(other)[:, :5])
    assert not torch.equal(lm(row)[:, 5], lm(other)[:, 5])


@pytest.mark.parametrize("family", ["rotary", "learned"])
def test_order_of_tokens_matters(family):
    lm = tiny(positions=family)
    one, two = lm(torch.tensor([[3, 1, 4]])), lm(torch.tensor([[1, 3, 4]]))
    assert (one[0, 2] - two[0, 2]).abs().max() > 1e-6


@pytest.mark.parametrize("lengths", [[1, 1], [5, 2, 3], [4]])
@pytest.mark.parametrize("family", ["rotary", "learned"])
@torch.no_grad()
def test_decoding_with_a_cache_is_the_full_forward(family, lengths):
    lm = tiny(positions=family, num_heads=4, num_kv_heads=2)
    rng = torch.Generator().manual_seed(2)
    rows = torch.randint(11, (len(lengths), 10), generator=rng)
    expected = [lm(row[None])[0] for row in rows]
    cache = KVCache(lm.config, len(lengths), 10, lm.unembedding)
    width = max(lengths)
    prompts = rows[:, :width].clone()
    for prompt, length in zip(prompts, lengths, strict=True):
        prompt[length:] = 10  # whatever lies in the padding must not be seen later
    hidden = lm(prompts, cache)
    for row, length in enumerate(lengths):
        assert_close(hidden[row, :length], expected[row][:length], atol=1e-12)
    cache.hold(torch.tensor(lengths))
    for _ in range(10 - width):
        hidden = lm(rows.gather(1, cache.lengths[:, None]), cache)
        for row, at in enumerate(cache.lengths.tolist()):
            assert_close(hidden[row, 0], expected[row][at], atol=1e-12)
        cache.grow()


@pytest.mark.parametrize("rows", [[0, 1, 3], [1, 2, 3], [2, 0], [1, 0, 2], [0, 1, 2, 3], [3]])
def test_cache_keeps_the_rows_asked_for_and_copies_none_that_may_stay(rows):
    cache = KVCache(TINY, 4, 9, torch.zeros(1))
    cells = cache.keys + cache.values
    for number, cell in enumerate(cells):  # cell (layer, row, column) holds a number of its own
        cell[:, :, :6] = torch.arange(24.0).view(4, 1, 6, 1) + 100 * number
    cache.hold(torch.tensor([4, 5, 6, 3]))
    before, homes = [cell.clone() for cell in cells], [cell.data_ptr() for cell in cells]
    cache.keep(rows)
    assert cache.lengths.tolist() == [[4, 5, 6, 3][row] for row in rows]
    assert cache.longest == max([4, 5, 6, 3][row] for row in rows)
    after = cache.keys + cache.values
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new, old[rows])  # (rows, heads, columns, …), the empty ones still zeros
    assert [cell.data_ptr() for cell in after] == homes
    cache.keep([len(rows) - 1])  # once more, of what is left
    length = int(cache.lengths)
    assert torch.equal(cache.keys[1][:, :, :length], before[1][rows[-1:], :, :length])


def test_cache_refuses_a_second_prompt():
    lm = tiny()
    cache = KVCache(lm.config, 1, 8, lm.unembedding)
    cache.hold(torch.tensor([3]))
    with pytest.raises(ValueError, match="empty cache; after it, one token at a time"):
        lm(torch.tensor([[1, 2]]), cache)


def test_forward_refuses_a_flat_row():
    with pytest.raises(ValueError, match=r"tokens is \(3,\): give \(B, T\)"):
        tiny()(torch.tensor([1, 2, 3]))


def test_sliding_window_allows_rows_up_to_it_and_refuses_longer():
    lm, row = tiny(sliding_window=4), torch.tensor([[1, 2, 3, 4, 5]])
    assert torch.equal(lm(row[:, :4]), tiny()(row[:, :4]))
    with pytest.raises(ValueError, match="5 tokens is longer than the model's sliding window of 4"):
        lm(row)


@pytest.mark.parametrize(
    "changes",
    [{"positions": "learned"}, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}],
)
def test_positions_the_model_does_not_define_are_refused(changes):
    lm = tiny(**changes)
    lm(torch.zeros(1, 32, dtype=torch.int64))
    with pytest.raises(ValueError, match="33 tokens exceeds the model's 32 positions"):
        lm(torch.zeros(1, 33, dtype=torch.int64))


def test_a_cache_does_not_hide_the_limits():
    lm = tiny(sliding_window=4)
    cache = KVCache(lm.config, 1, 8, lm.unembedding)
    cache.hold(torch.tensor([4]))
    with pytest.raises(ValueError, match="5 tokens is longer than the model's sliding window"):
        lm(torch.tensor([[1]]), cache)


# ---- parts by hand -------------------------------------------------------------------------------


def frequencies(head_dim, **scaling):
    config = replace(TINY, head_dim=head_dim, rope_scaling=scaling or None)
    return rotary_frequencies(config)


def test_rotary_frequencies_by_hand():
    freqs, factor = frequencies(4)
    assert_close(freqs, torch.tensor([1, 0.01], dtype=f64))  # 10000^0, 10000^(-2/4)
    assert factor == 1.0


def test_rotary_frequencies_linear_by_hand():
    freqs, factor = frequencies(4, rope_type="linear", factor=4.0)
    assert_close(freqs, torch.tensor([0.25, 0.0025], dtype=f64), atol=1e-12)
    assert factor == 1.0


@pytest.mark.parametrize(
    "turns, second",
    [
        (1.0, 0.01 / 8),  # low_freq_factor turns or fewer: stretched
        (2.5, 0.5 * 0.01 + 0.5 * 0.01 / 8),  # half way between 1 and 4
        (4.0, 0.01),  # high_freq_factor turns or more: kept
    ],
)
def test_rotary_frequencies_llama3_by_hand(turns, second):
    # The second pair turns 0.01 radian a position, so `turns` times in 2 pi turns / 0.01 positions.
    freqs, factor = frequencies(
        4, rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=200 * math.pi * turns,
    )
    assert_close(freqs, torch.tensor([1, second], dtype=f64), atol=1e-12)
    assert factor == 1.0


def test_rotary_frequencies_yarn_by_hand():
    # Pairs turn at 1, 0.1, 0.01, 0.001, hence 100, 10, 1, 0.1 times in 200 pi positions. 50 turns
    # lie between pairs 0 and 1 (floor: 0), 0.2 turns between 2 and 3 (ceil: 3). So the ramp is
    # 0, 1/3, 2/3, 1, and a frequency is scaled by 1 - ramp + ramp / 4 = 1, 3/4, 1/2, 1/4.
    freqs, factor = frequencies(
        8, rope_type="yarn", factor=4.0, beta_fast=50.0, beta_slow=0.2,
        original_max_position_embeddings=200 * math.pi,
    )
    assert_close(freqs, torch.tensor([1, 0.075, 0.005, 0.00025], dtype=f64), atol=1e-12)
    assert factor == pytest.approx(1.1386294361)  # 0.1 ln 4 + 1


def test_rotate_turns_by_the_position():
    cos, sin = RotaryTable(replace(TINY, head_dim=2))(4, torch.zeros(0, dtype=f64))
    x = torch.tensor([1.0, 0.0], dtype=f64).expand(1, 1, 4, 2)
    expected = [[math.cos(m), math.sin(m)] for m in range(4)]
    assert_close(rotate(x, cos[:4], sin[:4])[0, 0], torch.tensor(expected, dtype=f64), atol=1e-12)


def test_rotary_table_grows_without_changing_what_it_said():
    table = RotaryTable(TINY)
    before = table(3, torch.zeros(0))[0].clone()
    after = table(len(before) + 1, torch.zeros(0))[0]
    assert len(after) > len(before)
    assert torch.equal(after[: len(before)], before)
    assert table(3, torch.zeros(0, dtype=torch.bfloat16))[0].dtype == torch.bfloat16
    assert table(3, torch.zeros(0, dtype=torch.bfloat16, device="meta"))[0].is_meta


def test_rms_norm_by_hand():
    norm = RMSNorm(2, eps=0.5).double()
    norm.weight.data = torch.tensor([1.0, 2.0], dtype=f64)
    x = torch.tensor([3.0, 4.0], dtype=f64)  # mean square 12.5, + 0.5 = 13
    assert_close(norm(x), torch.tensor([3 / 13**0.5, 8 / 13**0.5], dtype=f64))


def test_rms_norm_of_bfloat16_has_float32_statistics():
    norm = RMSNorm(3, eps=0.0).bfloat16()
    x = torch.tensor([256.0, 1.0, 0.0]).bfloat16()  # 65536 + 1 has no bfloat16
    wide = RMSNorm(3, eps=0.0)(x.float())
    assert torch.equal(norm(x), wide.bfloat16())


def test_initialize_is_gpt2s():
    config = config_from_hf(
        {
            "model_type": "llama", "vocab_size": 500, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 8, "num_attention_heads": 4, "max_position_embeddings": 32,
            "attention_bias": True, "initializer_range": 0.04,
        }
    )
    lm = initialize(CausalLM(config), torch.Generator().manual_seed(0))
    attention = lm.model.layers[3].self_attn
    # The standard deviation of n draws is known to 1 / sqrt(2 n): 1.1 % of 4096.
    assert lm.model.embed_tokens.weight.std().item() == pytest.approx(0.04, rel=0.05)
    assert attention.q_proj.weight.std().item() == pytest.approx(0.04, rel=0.05)
    assert attention.o_proj.weight.std().item() == pytest.approx(0.01, rel=0.05)  # 0.04 / sqrt(16)
    assert lm.model.layers[3].mlp.down_proj.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert (lm.model.norm.weight == 1).all() and (attention.q_proj.bias == 0).all()
    again = initialize(CausalLM(config), torch.Generator().manual_seed(0))
    assert torch.equal(lm.lm_head.weight, again.lm_head.weight)


@pytest.mark.parametrize("changes", [{}, {"positions": "learned", "norm": "layer"}])
def test_shapes_only_gives_the_models_shapes_without_weights(changes):
    state = torch.random.get_rng_state()
    with shapes_only():
        empty = CausalLM(replace(TINY, **changes))
        head = torch.nn.Linear(8, 1)
    assert torch.equal(torch.random.get_rng_state(), state)  # nothing was drawn
    whole = CausalLM(replace(TINY, **changes))
    assert {p.device.type for p in (*empty.parameters(), *head.parameters())} == {"meta"}
    shapes = [{n: p.shape for n, p in lm.named_parameters()} for lm in (empty, whole)]
    assert shapes[0] == shapes[1]
    # Outside, weights are drawn as ever.
    assert whole.model.embed_tokens.weight.std() > 0.5


# ---- the linear layer ----------------------------------------------------------------------------


def test_rms_norm_of_bfloat16_rounds_before_the_weight():
    # The mean of squares of (3, -1, 1, 1) is 3, and 1 / sqrt(3) = 0.57735 has no bfloat16.
    norm = RMSNorm(4, eps=0.0).bfloat16()
    norm.weight.data = torch.tensor([1.1, 1.3, 0.7, 3.3]).bfloat16()
    rounded = torch.tensor([3.0, -1.0, 1.0, 1.0]).div(3**0.5).bfloat16()
    got = norm(torch.tensor([3.0, -1.0, 1.0, 1.0]).bfloat16())
    assert torch.equal(got, norm.weight * rounded)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=f64)


@pytest.fixture(params=[True, False])
def onednn(request, monkeypatch):
    """Whether few tokens are multiplied by oneDNN, as on processors that are not Intel's."""
    built_with_it = torch.backends.mkldnn.is_available()
    monkeypatch.setattr(transformer, "ONEDNN", request.param and built_with_it)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, f64])
@pytest.mark.parametrize("tokens", [1, 5, 24])
def test_linear_by_hand(tokens, dtype, onednn):
    # Output j is row j of W times x, plus j: 1 · 10 + 0 · 1 + 0, 0 · 10 + 1 · 1 + 1, …
    rows = [[1, 0], [0, 1], [1, 1], [2, 0], [0, 2], [2, 2], [3, 0], [0, 3]]
    weight, bias = torch.tensor(rows, dtype=dtype), torch.arange(8, dtype=dtype)
    x = torch.tensor([10, 1], dtype=dtype).expand(tokens, 1, 2)
    with torch.no_grad():
        got = linear(x, weight, bias)
    assert got.tolist() == [[[10, 2, 13, 23, 6, 27, 36, 10]]] * tokens


@pytest.mark.parametrize("tokens", [0, 1, 3, MOST_ROWS, MOST_ROWS + 1])
@pytest.mark.parametrize("out", [3, 8, 40])
@pytest.mark.parametrize("dtype, atol", [(f64, 1e-12), (torch.float32, 1e-6)])
def test_linear_is_the_plain_product_for_any_number_of_tokens(tokens, out, dtype, atol, onednn):
    x, weight, bias = (numbers(*s).to(dtype) / 4 for s in ((tokens, 1, 6), (out, 6), (out,)))
    with torch.no_grad():
        assert_close(linear(x, weight), F.linear(x, weight), atol)
        assert_close(linear(x, weight, bias), F.linear(x, weight, bias), atol)
        strided = (numbers(1, tokens, 6).to(dtype) / 4).transpose(0, 1)
        assert_close(linear(strided, weight), F.linear(strided, weight), atol)
        assert_close(linear(x, weight.T.contiguous().T), F.linear(x, weight), atol)
        rows = linear(x, weight)
        assert rows.is_contiguous()  # else attention would take a slow road


def test_linear_is_plain_without_onednn(monkeypatch):
    x, weight = torch.ones(2, 1, 3), torch.ones(4, 3)
    monkeypatch.setattr(transformer, "ONEDNN", False)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", None)
    with torch.no_grad():
        assert linear(x, weight).tolist() == [[[3.0] * 4]] * 2


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6), (5, 1, 6)])
def test_whole_rows_are_computed_alike_with_and_without_a_gradient(shape):
    layer, x = Linear(6, 16).to(f64), numbers(*shape).requires_grad_()
    trained = layer(x)
    with torch.no_grad():
        measured = layer(x)
    if shape == (5, 1, 6):
        assert_close(measured, trained, 1e-12)
    else:
        assert torch.equal(measured, trained)
    trained.square().sum().backward()
    # d sum y^2 / dx = 2 y W
    assert_close(x.grad, (2 * trained @ layer.weight).detach(), 1e-12)
    assert layer.weight.grad is not None and layer.bias.grad is not None
