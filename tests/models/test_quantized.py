import math
import weakref
from statistics import NormalDist

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from minirlhf.errors import UserError
from minirlhf.models.families import config_from_hf
from minirlhf.models.heads import RewardModel, ValueHeadModel
from minirlhf.models.lora import LoRALinear, add_lora, base_of, merge_lora, merged_copy
from minirlhf.models.pretrained import (
    in_memory,
    load_pretrained,
    load_reward_model,
    offload,
    save_pretrained,
)
from minirlhf.models.quantized import (
    QuantizedLinear,
    from_int8,
    from_nf4,
    nf4_codebook,
    pack,
    quantize_trunk,
    quantized_layers,
    to_int8,
    to_nf4,
)
from minirlhf.models.transformer import CausalLM, Linear, initialize
from minirlhf.streams import generator

BITS = pytest.mark.parametrize("bits", [8, 4])
SHAPES = pytest.mark.parametrize("shape", [(4, 64), (5, 7), (1, 1), (3, 65), (300, 64), (129, 130)])
LLAMA = config_from_hf({
    "model_type": "llama", "vocab_size": 11, "hidden_size": 8, "intermediate_size": 12,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 16, "tie_word_embeddings": True, "initializer_range": 0.5,
})
GPT2 = config_from_hf({
    "model_type": "gpt2", "vocab_size": 11, "n_embd": 8, "n_layer": 2, "n_head": 2,
    "n_positions": 16, "initializer_range": 0.5,
})
TOKENS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


def normal(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype).normal_(generator=generator(0, "weights"))


def make_lm(config=LLAMA):
    return initialize(CausalLM(config), generator(0, "test"))


def linear(weight, bias=None):
    layer = Linear(weight.shape[1], weight.shape[0], bias is not None, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


# ---- 8 bits --------------------------------------------------------------------------------------


def test_int8_by_hand():
    # 254 / 127 = 2 and 12.7 / 127 = 0.1; 3 / 2 = 1.5 and 5 / 2 = 2.5 are rounded to the even 2
    codes, scales = to_int8(torch.tensor([[254.0, 3, -5, 0], [-12.7, 0.04, 0.06, 1.0]]))
    assert codes.tolist() == [[127, 2, -2, 0], [-127, 0, 1, 10]] and codes.dtype == torch.int8
    torch.testing.assert_close(scales, torch.tensor([[2.0], [0.1]]), rtol=1e-6, atol=0)
    assert from_int8(codes, scales)[0].tolist() == [254, 4, -4, 0]


@SHAPES
def test_int8_error_is_at_most_half_a_step_of_its_channel(shape):
    weight = normal(*shape)
    error = (weight - from_int8(*to_int8(weight))).abs()
    bound = weight.abs().amax(1, keepdim=True) / 254
    assert (error <= bound * (1 + 1e-4)).all()


# ---- 4 bits --------------------------------------------------------------------------------------


def test_nf4_codebook_is_quantiles_of_the_normal_distribution():
    # The outermost probability is the mean of (1 - 1/30) and (1 - 1/32). Upward from the median
    # the positive values are 8 even steps in probability, downward the negative 7: by symmetry
    # those are the mirrored quantiles upward. All are divided by the largest.
    p = 0.5 * ((1 - 1 / 30) + (1 - 1 / 32))
    assert p == pytest.approx(0.9677083, abs=1e-7)  # as bitsandbytes' source has it
    q = NormalDist().inv_cdf
    up = [q(0.5 * (8 - k) / 8 + p * k / 8) / q(p) for k in range(9)]
    down = [-q(0.5 * (7 - k) / 7 + p * k / 7) / q(p) for k in range(7, 0, -1)]
    book = nf4_codebook()
    assert book.dtype == torch.float32 and len(book) == 16
    torch.testing.assert_close(book.double(), torch.tensor(down + up).double(), rtol=0, atol=1e-7)
    assert book[0] == -1 and book[7] == 0 and book[15] == 1
    assert (book.diff() > 0).all()


def test_nf4_codes_are_packed_two_a_byte_by_hand():
    # absmax 2, so /2 gives 1, 0.5, -1, -0.02, 0 …; nearest values: 1 (15), 0.4407 or 0.5626: the
    # second is 0.0626 off, the first 0.0593, so 12; -1 (0); 0 (7), as for the rest of the block.
    weight = torch.zeros(1, 64)
    weight[0, :4] = torch.tensor([2.0, 1.0, -2.0, -0.04])
    packed = to_nf4(weight)
    assert packed.codes.tolist() == [15 * 16 + 12, 0 * 16 + 7] + [7 * 16 + 7] * 30
    # One block: its absmax is the mean of all, so what remains is 0.
    assert (packed.mean, packed.scales.tolist(), packed.scales_scale.tolist()) == (2, [0], [0])
    back = from_nf4(packed, (1, 64))
    assert back[0, [0, 2]].tolist() == [2, -2] and (back[0, 3:] == 0).all()
    assert back[0, 1] == 2 * nf4_codebook()[12]


def test_double_quantisation_by_hand():
    # Two blocks of absmax 1 and 3: mean 2, what remains is -1 and 1, the step 1/127.
    packed = to_nf4(torch.cat((torch.full((64,), 1.0), torch.full((64,), -3.0))))
    assert packed.mean == 2 and packed.scales.tolist() == [-127, 127]
    torch.testing.assert_close(packed.scales_scale, torch.tensor([1 / 127]), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        from_nf4(packed, (2, 64)), torch.tensor([[1.0], [-3.0]]).expand(2, 64), rtol=0, atol=1e-6
    )


@SHAPES
def test_nf4_error_is_at_most_half_of_the_widest_gap_and_of_a_scales_step(shape):
    weight = normal(*shape)
    flat = weight.flatten()
    blocks = F.pad(flat, (0, -len(flat) % 64)).view(-1, 64)
    absmax = blocks.abs().amax(1)
    # Half of a step of a block of 256 scales: the largest distance from their mean / 127 / 2.
    rest = (absmax - absmax.mean()).abs()
    step = torch.cat([part.amax().expand(len(part)) for part in rest.split(256)]) / 127
    bound = absmax * nf4_codebook().diff().max() / 2 + step / 2
    error = (weight - from_nf4(to_nf4(weight), shape)).abs().flatten()
    error = F.pad(error, (0, -len(flat) % 64)).view(-1, 64)
    assert (error <= bound[:, None] * (1 + 1e-4)).all()


def test_nf4_is_finer_than_even_steps_where_weights_are_normal():
    # What quantiles are for (QLoRA, sec. 3): of 16 even steps in a block the error is larger.
    weight = normal(64, 64)
    absmax = weight.abs().amax(1, keepdim=True)
    even = (weight / absmax * 7).round() / 7 * absmax
    error = (weight - from_nf4(to_nf4(weight), (64, 64))).square().mean()
    assert error < 0.8 * (weight - even).square().mean()


def test_blocks_of_zeros_stay_zeros():
    weight = normal(4, 64)
    weight[1] = 0
    for back in (from_int8(*to_int8(weight)), from_nf4(to_nf4(weight), (4, 64))):
        assert (back[1] == 0).all() and back.isfinite().all()


# ---- layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "most"), [(8, 1.01), (4, 0.53)])
def test_bytes_of_a_weight(bits, most):
    layer = QuantizedLinear(linear(normal(576, 1536)), bits)
    held = sum(buffer.nbytes for buffer in layer.buffers()) / (576 * 1536)
    # 8: 1 + 4 / 1536; 4: 1/2 + 1/64, and 4 bytes for each 64 * 256 weights and one mean
    exact = {8: 1 + 4 / 1536, 4: 1 / 2 + 1 / 64 + 4 * 55 / (576 * 1536)}[bits]
    assert held == pytest.approx(exact, abs=1e-9) and held <= most
    assert not list(layer.parameters())


@BITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows", [(3,), (2, 3), (2, 1)])
def test_a_layer_computes_with_the_weights_it_unpacks(bits, dtype, rows):
    plain = linear(normal(16, 10), torch.arange(16.0)).to(dtype)
    layer = QuantizedLinear(plain, bits)
    x = normal(*rows, 10, dtype=torch.float64).to(dtype).requires_grad_()
    weight = layer.dequantized().to(dtype)
    expected = F.linear(x, weight, plain.bias)
    # bfloat16 has 8 bits: the product is rounded to them, and again with the bias.
    close = {"rtol": 0.02, "atol": 0.1} if dtype == torch.bfloat16 else {"rtol": 0, "atol": 1e-4}
    assert layer(x).dtype == dtype
    torch.testing.assert_close(layer(x), expected, **close)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, **close)
    gradient = normal(*rows, 16, dtype=torch.float64).to(dtype)
    layer(x).backward(gradient)
    torch.testing.assert_close(x.grad, gradient @ weight, **close)


@BITS
def test_no_float_weight_is_kept_between_forward_and_backward(bits):
    layer = QuantizedLinear(linear(normal(8, 8)), bits)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        layer(normal(2, 8).requires_grad_())
    assert kept == []


def test_numbers_stay_as_they_are_packed_whatever_dtype_the_model_gets():
    layer = QuantizedLinear(linear(normal(4, 64), torch.ones(4)), 4)
    before = layer.dequantized()
    moved = nn.Sequential(layer).to(torch.bfloat16)[0]
    assert torch.equal(moved.dequantized(), before) and moved.bias.dtype == torch.bfloat16


@BITS
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_refused(bits, value):
    weight = normal(2, 3)
    weight[1, 1] = value
    with pytest.raises(ValueError, match="not finite"):
        QuantizedLinear(linear(weight), bits)


def test_other_bits_are_refused():
    with pytest.raises(ValueError, match="bits is 3: 8 and 4 are legal"):
        QuantizedLinear(linear(normal(2, 3)), 3)


# ---- models --------------------------------------------------------------------------------------


@BITS
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("wrap", [lambda lm: lm, ValueHeadModel, RewardModel])
def test_only_linear_layers_of_the_trunk_are_packed(bits, config, wrap):
    model = wrap(make_lm(config))
    trunk = model.lm.model if isinstance(model, ValueHeadModel) else model.model
    layers = {n for n, m in trunk.named_modules() if isinstance(m, nn.Linear)}
    others = {n: p.clone() for n, p in model.named_parameters() if "_proj" not in n}
    prefix = next(n for n, m in model.named_modules() if m is trunk)
    assert quantize_trunk(model, bits).keys() == {f"{prefix}.{name}" for name in layers}
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n], p) for n, p in others.items())
    assert not any("weight" in n for n in after if "_proj" in n)


def adapted(bits, config=LLAMA):
    model = ValueHeadModel(make_lm(config))
    quantize_trunk(model, bits)
    add_lora(model, 2, 4.0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, generator=generator(1, name))
    return model


@BITS
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_gradients_reach_every_adapter_with_and_without_checkpointing(bits, config):
    gradients = []
    for checkpointing in (False, True):
        model = adapted(bits, config)
        model.lm.model.checkpointing = checkpointing
        hidden, values = model(TOKENS)
        (model.lm.logits(hidden).square().sum() + (values - 1).square().sum()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    off, on = gradients
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    assert len(layers) == len(quantized_layers(model)) > 0
    assert off.keys() == on.keys() and len(off) == 2 * len(layers) + 2
    for name, gradient in off.items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(on[name], gradient, rtol=1e-6, atol=1e-6)


@BITS
def test_a_packed_model_is_near_the_one_it_was_made_of(bits):
    plain, packed = make_lm(), make_lm()
    quantize_trunk(packed, bits)
    whole = {n: m for n, m in plain.named_modules() if n in quantized_layers(packed)}
    for name, layer in quantized_layers(packed).items():
        with torch.no_grad():
            whole[name].weight.copy_(layer.dequantized())
    torch.testing.assert_close(packed(TOKENS), plain(TOKENS), rtol=0, atol=1e-5)


# ---- folders -------------------------------------------------------------------------------------


@BITS
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_loading_packs_what_packing_after_loading_does(bits, config, dtype, tmp_path):
    save_pretrained(make_lm(config), tmp_path)
    loaded = load_pretrained(tmp_path, dtype, trunk_bits=bits)
    after = load_pretrained(tmp_path, dtype)
    quantize_trunk(after, bits)
    one, other = loaded.state_dict(), after.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[n], other[n]) and one[n].dtype == other[n].dtype for n in one)
    layers = quantized_layers(loaded).values()
    assert {layer.weight.dtype for layer in layers} == {dtype or torch.float32}


def test_loading_holds_one_layer_in_full_at_a_time(tmp_path, monkeypatch):
    save_pretrained(make_lm(), tmp_path)
    alive, most = weakref.WeakSet(), []

    def watched(weight, bits):
        alive.add(weight)
        most.append(len(alive))
        return pack(weight, bits)

    monkeypatch.setattr("minirlhf.models.pretrained.pack", watched)
    load_pretrained(tmp_path, trunk_bits=4)
    assert len(most) == 14 and max(most) <= 2  # the next is read while the last still has a name


@BITS
def test_a_reward_model_is_loaded_packed_with_its_head_in_full(bits, tmp_path):
    model = RewardModel(make_lm())
    save_pretrained(model, tmp_path)
    loaded = load_reward_model(tmp_path, trunk_bits=bits)
    assert len(quantized_layers(loaded)) == 14
    assert torch.equal(loaded.score.weight, model.score.weight)
    quantize_trunk(model, bits)
    lengths = torch.tensor([4, 3])
    torch.testing.assert_close(loaded(TOKENS, lengths), model(TOKENS, lengths), rtol=0, atol=0)
    offload(loaded, tmp_path)
    with in_memory(loaded):
        torch.testing.assert_close(loaded(TOKENS, lengths), model(TOKENS, lengths), rtol=0, atol=0)


def test_loading_names_the_weight_that_is_not_finite(tmp_path):
    lm = make_lm()
    save_pretrained(lm, tmp_path)
    tensors = {n: t.clone() for n, t in lm.state_dict().items()}
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = math.nan
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1\.mlp\.up_proj\.weight': a weight is not finite"):
        load_pretrained(tmp_path, trunk_bits=8)


@BITS
@pytest.mark.parametrize("targets", [("all",), ("attention",)])
@pytest.mark.parametrize("dora", [False, True])
def test_merging_keeps_what_was_trained(bits, targets, dora):
    model = make_packed(bits)
    add_lora(model, 2, 4.0, targets=targets, dora=dora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, generator=generator(1, name))
    trained = model(TOKENS)
    copy, base = merged_copy(model), base_of(model)
    assert quantized_layers(base).keys() == quantized_layers(make_packed(bits)).keys()
    torch.testing.assert_close(base(TOKENS), make_packed(bits)(TOKENS), rtol=0, atol=0)
    for merged in (copy, merge_lora(model)):
        assert merged.state_dict().keys() == make_lm().state_dict().keys()
        torch.testing.assert_close(merged(TOKENS), trained, rtol=0, atol=1e-12)


def make_packed(bits):
    lm = make_lm().double()
    quantize_trunk(lm, bits)
    return lm


def test_a_quantised_trunk_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="the trunk is quantised"):
        save_pretrained(make_packed(8), tmp_path)
