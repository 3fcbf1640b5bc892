"""A decoding step in sizes that stay: the texts are those of a plain one, and it is one graph.

Compiling takes a minute, so that is behind the marker `slow`; whether a step can be captured whole,
and what a cache of fixed sizes gives, is not.
"""

import shutil
from dataclasses import replace

import pytest
import torch

from minirlhf import streams
from minirlhf.models import compiled_decoding, compiling
from minirlhf.models.cache import KVCache
from minirlhf.models.compiled_decoding import StaticCache, compiled_step, longest_row, step
from minirlhf.models.generation import generate
from minirlhf.models.lora import add_lora
from minirlhf.models.sampling import Sampling
from tests.tiny_ppo import PROMPTS, tiny_lm

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch, while it compiles
IDS = [*(prompt.ids for prompt in PROMPTS), [3, 4]]  # 5 rows, two of one prompt
KEYS = streams.key(0, "test", torch.arange(5))
GPT2 = {"family": "gpt2", "norm": "layer", "activation": "gelu_tanh", "gated_mlp": False,
        "positions": "learned", "num_kv_heads": 4, "qkv_bias": True, "out_bias": True,
        "mlp_bias": True}
MODELS = {
    "llama": tiny_lm, "gpt2": lambda: tiny_lm(**GPT2), "qwen3": lambda: tiny_lm(qk_norm=True),
    "adapters": lambda: add_lora(tiny_lm(num_layers=1), 2, 4.0, 0),
}


def made(name: str, compiles: bool):
    lm = MODELS[name]().double()
    if name == "adapters":
        with torch.no_grad():
            for parameter in filter(lambda p: p.requires_grad, lm.parameters()):
                parameter.add_(0.1)
    lm.compiles_decoding = compiles
    return lm


def assert_same(plain, compiled, sampling=None, atol=1e-12) -> None:
    sampling = sampling or Sampling(8)
    one, other = (generate(lm, IDS, sampling, [0], KEYS) for lm in (plain, compiled))
    assert torch.equal(one.tokens, other.tokens) and one.finish_reason == other.finish_reason
    assert set(one.finish_reason) == {"eos", "length"}  # some rows end before the others
    torch.testing.assert_close(one.logprobs, other.logprobs, rtol=0, atol=atol)


@pytest.mark.parametrize("name", MODELS)
def test_a_cache_of_fixed_sizes_gives_the_texts_of_one_that_grows(name, monkeypatch):
    monkeypatch.setattr(compiled_decoding, "compiled_step", lambda: step)
    assert_same(made(name, False), made(name, True))


def test_every_step_is_of_one_size_and_rows_stay(monkeypatch):
    sizes = set()

    def watched(lm, tokens, cache):
        hidden = step(lm, tokens, cache)
        sizes.add((tokens.shape, cache.keys[1].shape, cache.key_mask.shape, hidden.shape))
        return hidden

    monkeypatch.setattr(compiled_decoding, "compiled_step", lambda: watched)
    assert_same(made("llama", False), made("llama", True))
    # 5 rows are held as 8, and 4 + 8 cells as 128
    assert sizes == {((8,), (8, 2, 128, 8), (8, 128), (8, 32))}


@pytest.mark.parametrize("changes, expected", [
    ({}, float("inf")), ({"sliding_window": 40}, 40), (GPT2, 64),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 64),
])
def test_no_cell_is_made_that_the_model_refuses(changes, expected):
    config = replace(tiny_lm().config, **changes)
    assert longest_row(config) == expected
    cache = KVCache(config, 3, 41, torch.zeros(1))
    static = StaticCache(cache, config)
    # 128 cells, or as many as are allowed: the token drawn last is not read, so 40 suffice for 41
    assert static.keys[0].shape[2] == static.longest + 1 == min(128, expected)
    assert len(static.lengths) == 4 and static.active.tolist() == [0, 1, 2]


def test_a_step_is_captured_whole_and_once(monkeypatch):
    from torch._dynamo.testing import CompileCounter

    captured = CompileCounter()
    monkeypatch.setattr(
        compiled_decoding, "compiled_step",
        lambda: torch.compile(step, backend=captured, fullgraph=True, dynamic=False))
    plain, compiled = made("adapters", False), made("adapters", True)
    for sampling in (Sampling(8), Sampling(6, top_k=9)):  # of one capacity
        assert_same(plain, compiled, sampling)
    assert captured.frame_count == 1


def test_decoding_is_compiled_on_a_gpu_or_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(compiling, "ready_compiler", lambda device: None)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **settings: None)
    lm = tiny_lm()
    compiling.compile_blocks(lm)
    assert not lm.compiles_decoding  # this is a CPU
    compiling.compile_decoding(lm)
    assert lm.compiles_decoding and not type(lm).compiles_decoding


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no compiler")
@pytest.mark.parametrize("name, dtype, atol", [
    ("llama", torch.float64, 1e-12), ("gpt2", torch.float64, 1e-12), ("llama", torch.float32, 1e-5)
])
def test_a_compiled_step_gives_the_texts_of_a_plain_one(name, dtype, atol, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled_step.cache_clear()
    plain, compiled = made(name, False).to(dtype), made(name, False).to(dtype)
    compiling.compile_decoding(compiled)
    assert_same(plain, compiled, atol=atol)
