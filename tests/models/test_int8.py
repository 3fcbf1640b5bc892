import pytest
import torch
from torch import nn

from minirlhf.models.generation import generate
from minirlhf.models.int8 import Int8Linear, Int8LM
from minirlhf.models.lora import add_lora, merged_copy
from minirlhf.models.sampling import Sampling
from minirlhf.models.transformer import CausalLM, initialize
from minirlhf.streams import generator
from tests.models.test_quantized import GPT2, LLAMA, TOKENS, make_lm, make_packed


def test_int8_linear_by_hand():
    # W rows (127, -254) and (1, 0.5): scales 2 and 1/127, bytes (64, -127) since 63.5 is rounded to
    # the even 64, and (127, 64) as well. x (10.5, 127): scale 1, bytes (10, 127) and, of the half
    # that is left, (127, 0) / 254. Products 672 - 16129 = -15457, times 2, and 1333.5 + 8128, times
    # 1/127; biases 1 and 0.
    weight = torch.tensor([[127.0, -254.0], [1.0, 0.5]])
    layer = Int8Linear(weight, torch.tensor([1.0, 0.0]))
    out = layer(torch.tensor([[[10.5, 127.0]]]))
    torch.testing.assert_close(out, torch.tensor([[[-30913.0, 74.5]]]), rtol=1e-6, atol=0)


def test_int8_linear_rounds_its_input_to_two_bytes_and_zeros_stay_zeros():
    # With weights of whole numbers only x is rounded: by at most half a step, max |x| / 127 / 254.
    layer, x = Int8Linear(127 * torch.eye(16)), torch.randn(5, 16, generator=generator(0, "x"))
    x[2] = 0
    error = (layer(x) / 127 - x).abs()
    assert (error <= x.abs().amax(1, keepdim=True) / 127 / 254 / 2 * (1 + 1e-3)).all()
    assert (layer(x)[2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_depends_on_no_other(dtype):
    weight = torch.randn(24, 16, generator=generator(0, "w"))
    layer, x = Int8Linear(weight), torch.randn(7, 1, 16, generator=generator(0, "x")).to(dtype)
    x[3] *= 1000
    together = layer(x)
    assert together.dtype == dtype and together.shape == (7, 1, 24)
    alone = torch.cat([layer(row[None]) for row in x])
    assert torch.equal(together, alone)  # to the last bit: the sums are of whole numbers


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_the_copy_is_near_the_policy_and_leaves_it_alone(config):
    lm = make_lm(config)
    before = {n: p.clone() for n, p in lm.named_parameters()}
    copy = Int8LM(lm)
    assert not [m for m in copy.modules() if isinstance(m, nn.Linear)]
    p, q = (m.logits(m(TOKENS)).log_softmax(-1) for m in (lm, copy))
    kl = (p.exp() * (p - q)).sum(-1)
    assert 0 < kl.mean() < 1e-3
    assert all(torch.equal(p, before[n]) for n, p in lm.named_parameters())


def test_the_copy_of_a_policy_with_adapters_has_them_merged():
    lm = add_lora(make_packed(8).float(), 2, 4.0)
    for name, parameter in lm.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, generator=generator(1, name))
    torch.testing.assert_close(
        Int8LM(lm)(TOKENS), Int8LM(merged_copy(lm))(TOKENS), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("tied", [True, False])
def test_generate_draws_from_the_copy(tied):
    config = LLAMA.__class__(**vars(LLAMA) | {"tied_embeddings": tied})
    lm = initialize(CausalLM(config), generator(0, "test"))
    keys, prompts = torch.arange(3), [[1, 2], [3], [4, 5, 6]]
    made = generate(Int8LM(lm), prompts, Sampling(4), [], keys)
    exact = generate(lm, prompts, Sampling(4), [], keys)
    assert torch.equal(made.response_mask, exact.response_mask)
    # What is said of a token is the log-prob under the copy that drew it.
    copy = Int8LM(lm)
    row = made.tokens[0, :6]
    expected = copy.logits(copy(row[None]))[0].log_softmax(-1)
    found = torch.stack([expected[1 + t, row[2 + t]] for t in range(4)])
    torch.testing.assert_close(made.logprobs[0], found, rtol=0, atol=1e-5)
    assert (made.logprobs - exact.logprobs).abs().max() > 1e-6
