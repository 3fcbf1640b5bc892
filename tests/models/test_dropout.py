"""Dropout of adapters: masks by hand, where they are drawn, and what must not change them."""

import hashlib

import pytest
import torch
from torch import nn

from minirlhf.models.dropout import Dropout, dropout_of
from minirlhf.models.lora import LoRALinear, adapters, add_lora, merged_copy, share
from minirlhf.streams import generator
from tests.models.test_lora import CONFIGS, LENGTHS, LLAMA, TOKENS, make_lm

WORD = 1 << 64


def mix(x: int) -> int:
    """SplitMix64 of a whole number: 64 bits without a sign."""
    x = (x + 0x9E3779B97F4A7C15) % WORD
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB % WORD
    return x ^ x >> 31


def kept(p: float, seed: int, step: int, row: int, token: int, layer: int, width: int) -> list:
    """Which channels a mask keeps: of each hash the lowest 16 bits first, read with a sign."""
    name = hashlib.sha256(b"dropout").digest()[:8]
    key = mix(seed ^ mix(int.from_bytes(name, "little")))
    for index in (step, row):
        key = mix(key ^ mix(index))
    key = mix(mix(key ^ mix(token)) ^ layer)
    draws = []
    for channel in range(width):
        draw = mix(key ^ mix(channel // 4)) >> 16 * (channel % 4) & 0xFFFF
        draws.append(draw - (1 << 16) if draw >= 1 << 15 else draw)
    return [draw >= round(p * 2**16) - 2**15 for draw in draws]


def shaken(model):
    """The model with a B that is not 0, so that what its adapters read shows."""
    for name, layer in adapters(model).items():
        nn.init.normal_(layer.lora_B, generator=generator(7, name))
    return model


def test_a_layer_drops_what_its_adapter_reads_by_hand():
    # W = I, A = (1 1 1 1 1 1), B = 2 and s = alpha / rank = 3 / 1:
    #     h = x + 6 (sum of the kept x) / (1 - 1/4) = x + 8 (sum of the kept x)
    layer = LoRALinear(nn.Linear(6, 6, bias=False), 1, 3.0, generator(0, "test")).double()
    with torch.no_grad():
        layer.base.weight.copy_(torch.eye(6))
        layer.lora_A.fill_(1)
        layer.lora_B.fill_(2)
    x = torch.tensor([[[1.0, 2, 4, 8, 16, 32], [64, 128, 256, 512, 1024, 2048]]]).double()
    dropout = dropout_of(0.25, 5, 3, torch.tensor([9])).of_tokens(torch.zeros(1, 2))
    out, wanted, masks = layer(x, dropout)[0], [], []
    for token, row in enumerate(x[0].tolist()):
        masks.append(kept(0.25, 5, 3, 9, token, int(layer.key), 6))
        change = 8 * sum(value for value, stays in zip(row, masks[-1], strict=True) if stays)
        wanted.append([value + change for value in row])
    assert out.flatten().tolist() == pytest.approx([*wanted[0], *wanted[1]], abs=1e-6)
    assert masks[0] != masks[1] and not all(masks[0] + masks[1])


def test_no_gradient_passes_what_is_dropped_and_the_frozen_layer_sees_all():
    layer = LoRALinear(nn.Linear(6, 1, bias=False), 1, 1.0, generator(0, "test")).double()
    with torch.no_grad():
        layer.base.weight.fill_(1)
        layer.lora_A.fill_(1)
        layer.lora_B.fill_(1)
    dropout = dropout_of(0.5, 0, 0, torch.arange(1)).of_tokens(torch.zeros(1, 1))
    x = torch.ones(1, 1, 6).double().requires_grad_()
    layer(x, dropout).sum().backward()
    mask = kept(0.5, 0, 0, 0, 0, int(layer.key), 6)
    assert x.grad[0, 0].tolist() == [1 + 2 * stays for stays in mask]  # 1 / (1 - 1/2)
    assert layer.lora_A.grad[0].tolist() == [2 * stays for stays in mask]


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_of_many_numbers_the_share_p_is_dropped_and_their_mean_stays(p):
    # Of 64 · 64 · 250 draws the share's deviation is sqrt(p (1 - p) / 1,024,000) <= 5e-4, and that
    # of a row of 250 numbers sqrt(p (1 - p) / 250)
    dropout = dropout_of(p, 1, 2, torch.arange(64)).of_tokens(torch.zeros(64, 64))
    out = dropout(torch.ones(64, 64, 250), torch.tensor(3))
    dropped = out == 0
    assert dropped.double().mean().item() == pytest.approx(p, abs=2.5e-3)
    assert out.mean().item() == pytest.approx(1, abs=2.5e-3 / (1 - p))
    assert out[~dropped].unique().tolist() == pytest.approx([1 / (1 - p)], rel=1e-3)
    shares = dropped.double()
    for dims in ((1, 2), (0, 2), (0, 1)):  # rows, tokens and channels each have their share
        found, n = shares.mean(dims), shares.numel() / shares.mean(dims).numel()
        assert (found - p).abs().max() < 5 * (p * (1 - p) / n) ** 0.5


def masks_of(seed=0, step=0, row=0, layer=3):
    dropout = dropout_of(0.5, seed, step, torch.tensor([row])).of_tokens(torch.zeros(1, 4))
    return dropout(torch.ones(1, 4, 16), torch.tensor(layer))[0]


def test_each_seed_step_row_token_and_layer_has_masks_of_its_own():
    assert torch.equal(masks_of(), masks_of())
    others = [masks_of(seed=1), masks_of(step=1), masks_of(row=1), masks_of(layer=4)]
    rows = torch.cat([masks_of(), *others])  # 20 masks of 16 channels: one pair in 65,536 agrees
    assert len(rows.unique(dim=0)) == 20


def test_without_a_probability_there_is_no_dropout():
    assert dropout_of(0.0, 0, 0, torch.arange(2)) is None


@CONFIGS
def test_a_row_has_the_same_masks_in_any_batch_and_padding_changes_nothing(config):
    lm, dropout = shaken(add_lora(make_lm(config), 2, 4.0)), dropout_of(0.4, 0, 0, torch.arange(2))
    hidden = lm(TOKENS, lengths=LENGTHS, dropout=dropout)
    for row, length in enumerate(LENGTHS.tolist()):
        mine = Dropout(0.4, dropout.keys[row : row + 1])
        alone = lm(TOKENS[row : row + 1, :length], dropout=mine)
        torch.testing.assert_close(hidden[row, :length], alone[0], rtol=0, atol=1e-6)


def test_rows_that_begin_alike_have_masks_of_their_own():
    lm = shaken(add_lora(make_lm(), 2, 4.0))
    tokens, lengths = TOKENS[:1].repeat(2, 1), torch.tensor([4, 4])
    one, other = lm(tokens, lengths=lengths, dropout=dropout_of(0.4, 0, 0, torch.arange(2)))
    assert not torch.isclose(one, other).any(1).all()
    one, other = lm(tokens, lengths=lengths)
    assert torch.equal(one, other)


@pytest.mark.parametrize("kind", [{}, {"dora": True}], ids=["lora", "dora"])
def test_a_block_that_is_computed_again_draws_its_masks_again(kind):
    found = []
    for checkpointing in (False, True):
        lm = shaken(add_lora(make_lm(), 2, 4.0, **kind))
        lm.model.checkpointing = checkpointing
        hidden = lm(TOKENS, lengths=LENGTHS, dropout=dropout_of(0.4, 0, 0, torch.arange(2)))
        hidden.square().sum().backward()
        found.append([hidden, *(p.grad for p in lm.parameters() if p.requires_grad)])
    assert all(torch.equal(x, again) for x, again in zip(*found, strict=True))
    assert all(x.abs().sum() > 0 for x in found[0])


def test_a_copy_draws_the_same_masks_and_a_merged_model_none():
    lm, dropout = shaken(add_lora(make_lm(), 2, 4.0)), dropout_of(0.4, 0, 0, torch.arange(2))
    assert torch.equal(share(lm)(TOKENS, dropout=dropout), lm(TOKENS, dropout=dropout))
    plain = merged_copy(lm)
    torch.testing.assert_close(plain(TOKENS, dropout=dropout), lm(TOKENS), rtol=0, atol=1e-6)
    assert not torch.allclose(lm(TOKENS, dropout=dropout), lm(TOKENS))


def test_a_forward_pass_refuses_keys_that_are_not_of_its_rows():
    lm = add_lora(make_lm(LLAMA), 2, 4.0)
    with pytest.raises(ValueError, match=r"dropout.keys is \(3,\), tokens is \(2, 4\): give one"):
        lm(TOKENS, dropout=dropout_of(0.1, 0, 0, torch.arange(3)))
