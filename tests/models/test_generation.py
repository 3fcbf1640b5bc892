import math
import weakref
from dataclasses import replace

import pytest
import torch
import transformers

from minirlhf import streams
from minirlhf.errors import NON_FINITE, UserError
from minirlhf.models import generation
from minirlhf.models.alignment import response_states
from minirlhf.models.config import ModelConfig
from minirlhf.models.generation import decode_steps, generate
from minirlhf.models.logprobs import token_logprobs
from minirlhf.models.pretrained import load_pretrained
from minirlhf.models.sampling import Sampling, before_stop, draw, sampling_distribution, support_of
from minirlhf.models.transformer import CausalLM, initialize
from tests.conftest import PEERS
from tests.tiny_states import assert_close, f64

PROMPTS = [[5, 98, 0, 41, 7], [63], [12, 12, 90, 3, 3, 3, 8, 1]]
GREEDY = Sampling(12, temperature=0)


def keys(n: int, start: int = 0) -> torch.Tensor:
    return streams.key(0, "test", torch.arange(start, start + n))


def random_lm(vocabulary: int = 20) -> CausalLM:
    config = ModelConfig("llama", vocabulary, 16, 24, 2, 4, 2, 4, 64, tied_embeddings=False)
    lm = initialize(CausalLM(config).double(), torch.Generator().manual_seed(3))
    with torch.no_grad():
        lm.lm_head.weight.mul_(20)  # a distribution that is neither flat nor certain
    return lm


def counting_lm(**changes) -> CausalLM:
    """Token i is followed by i + 1 (15 by 0), with all but e^-80 of the mass."""
    config = ModelConfig("llama", 16, 16, 8, 1, 2, 2, 8, 32, tied_embeddings=False)
    lm = initialize(CausalLM(replace(config, **changes)), torch.Generator().manual_seed(0))
    with torch.no_grad():
        lm.model.layers[0].self_attn.o_proj.weight.zero_()
        lm.model.layers[0].mlp.down_proj.weight.zero_()
        lm.model.embed_tokens.weight.copy_(torch.eye(16))  # the norm makes the 1 a 4
        lm.lm_head.weight.copy_(20 * torch.eye(16).roll(1, 0))
    return lm


def letters(ids: list[int]) -> str:
    return "".join("abcdefghijklmnop"[i] for i in ids)


# ---- greedy, the cache, and the distribution of the model ----------------------------------------


@pytest.mark.parametrize(
    ("name", "new", "penalty"),
    [*((name, 12, 1.0) for name in PEERS), ("llama", 30, 1.3), ("llama", 30, 0.8)],
)
def test_greedy_text_is_that_of_transformers(name, new, penalty, peer):
    theirs, folder = peer(name)
    prompts = [p[:4] for p in PROMPTS] if name == "mistral-window" else PROMPTS
    sampling = Sampling(new, temperature=0, repetition_penalty=penalty)
    out = generate(load_pretrained(folder), prompts, sampling, [], keys(3))
    for prompt, response in zip(prompts, out.responses(), strict=True):
        row = torch.tensor([prompt])
        expected = theirs.generate(
            row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=new,
            pad_token_id=0, repetition_penalty=penalty,
        )
        assert response == expected[0, len(prompt) :].tolist()


LAWS = [
    Sampling(14),
    Sampling(14, temperature=0.6),
    Sampling(14, temperature=1.7, top_k=5),
    Sampling(14, top_p=0.7),
    Sampling(14, min_p=0.2),
    Sampling(14, repetition_penalty=1.5),
    Sampling(14, temperature=0.8, top_k=9, top_p=0.9, min_p=0.05, repetition_penalty=1.2),
]


def their_law(tokens: list[int], logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The distribution that transformers samples from, (V,) log-probs."""
    steps = [transformers.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)]
    steps += [transformers.TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        steps += [transformers.TopKLogitsWarper(sampling.top_k)]
    steps += [transformers.TopPLogitsWarper(sampling.top_p)]
    steps += [transformers.MinPLogitsWarper(sampling.min_p)]
    scores = logits[None]
    for step in steps:
        scores = step(torch.tensor([tokens]), scores)
    return scores[0].log_softmax(-1)


@pytest.mark.parametrize("sampling", LAWS)
@torch.no_grad()
def test_logprobs_are_those_of_the_law_sampled(sampling):
    # Each is computed again from a full forward without a cache, one row at a time.
    lm, prompts = random_lm(), [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5]]
    out = generate(lm, prompts, sampling, [7], keys(3))
    assert out.logprobs.dtype == f64 and out.logprobs.min() < -0.5
    for row, prompt in enumerate(prompts):
        tokens = out.tokens[row, : out.lengths[row]].tolist()
        for t, at in enumerate(range(len(prompt), len(tokens))):
            logits = lm.logits(lm(torch.tensor([tokens[:at]])))[0, -1]
            distribution = their_law(tokens[:at], logits, sampling)
            assert_close(out.logprobs[row, t], distribution[tokens[at]], atol=1e-9)
        assert (out.logprobs[row, len(tokens) - len(prompt) :] == 0).all()


@pytest.mark.parametrize("sampling", [LAWS[0], LAWS[-1], replace(GREEDY, max_new_tokens=14)])
def test_a_row_does_not_depend_on_its_batch(sampling):
    lm, rng = random_lm(), torch.Generator().manual_seed(1)
    prompts = [torch.randint(20, (n,), generator=rng).tolist() for n in (3, 1, 7, 2, 5, 1)]
    together = generate(lm, prompts, sampling, [7, 11], keys(6))
    assert len({len(r) for r in together.responses()}) > 1  # rows do leave at different times
    order = [4, 2, 0, 5, 1, 3]
    permuted = generate(lm, [prompts[i] for i in order], sampling, [7, 11], keys(6)[order])
    assert permuted.responses() == [together.responses()[i] for i in order]
    assert permuted.finish_reason == [together.finish_reason[i] for i in order]
    for i, prompt in enumerate(prompts):
        alone = generate(lm, [prompt], sampling, [7, 11], keys(1, start=i))
        assert alone.responses() == [together.responses()[i]]
        n = len(alone.responses()[0])
        assert_close(alone.logprobs[0], together.logprobs[i, :n], atol=1e-12)


def test_rows_of_one_prompt_share_its_prefill():
    lm, prompts = random_lm(), [[5, 9], [3], [5, 9], [5, 9], [3]]
    shapes = []
    with lm.register_forward_pre_hook(lambda _, given: shapes.append(tuple(given[0].shape))):
        together = generate(lm, prompts, Sampling(9), [0], keys(5))
    assert shapes[0] == (2, 2)  # [5, 9] and [3, padding]
    assert shapes[1:] == [(int(active), 1) for active in together.response_mask.sum(0)[1:]]
    assert len(set(map(tuple, together.responses()))) > 2  # one prompt, several keys
    for b, prompt in enumerate(prompts):
        alone = generate(lm, [prompt], Sampling(9), [0], keys(1, b))
        assert alone.responses()[0] == together.responses()[b]
        got = together.logprobs[b][together.response_mask[b]]
        assert_close(got, alone.logprobs[0], 1e-9)


def test_the_key_alone_decides_what_is_drawn():
    lm = random_lm()
    texts = generate(lm, [[3]] * 4, Sampling(10), [], keys(4)[[0, 1, 0, 2]]).responses()
    assert texts[0] == texts[2] and texts[0] != texts[1] != texts[3]
    torch.manual_seed(1)
    assert generate(lm, [[3]], Sampling(10), [], keys(1)).responses() == texts[:1]
    assert generate(lm, [[3]], Sampling(5), [], keys(1)).responses() == [texts[0][:5]]


def test_greedy_logprobs_are_zero():
    # All the mass is on the token that is drawn.
    out = generate(random_lm(), [[3], [1, 2]], GREEDY, [], keys(2))
    assert (out.logprobs == 0).all() and out.response_mask.all()


# ---- where rows end ------------------------------------------------------------------------------


def test_generate_ends_rows_at_any_eos_and_keeps_it():
    # Counting up from 1, 8, 5 and 3: the eos 4 after three tokens, 9 after one, 9 after four; the
    # fourth row meets 4 at once.
    prompts = [[0, 1], [8], [5], [7, 7, 3]]
    out = generate(counting_lm(), prompts, Sampling(10), [9, 4], keys(4))
    assert out.responses() == [[2, 3, 4], [9], [6, 7, 8, 9], [4]]
    assert out.finish_reason == ["eos"] * 4
    assert out.prompt_lengths.tolist() == [2, 1, 1, 3] and out.lengths.tolist() == [5, 2, 5, 4]
    assert out.tokens.tolist() == [
        [0, 1, 2, 3, 4], [8, 9, 0, 0, 0], [5, 6, 7, 8, 9], [7, 7, 3, 4, 0],
    ]
    assert out.response_mask.sum(1).tolist() == [3, 1, 4, 1]
    assert out.response_mask[0].tolist() == [True, True, True, False]
    assert_close(out.logprobs, torch.zeros(4, 4), atol=1e-6)


def test_generate_ends_rows_at_the_length():
    out = generate(counting_lm(), [[1], [6]], Sampling(2), [3, 9], keys(2))
    assert out.responses() == [[2, 3], [7, 8]]
    assert out.finish_reason == ["eos", "length"]  # an eos that comes last is still one
    out = generate(counting_lm(), [[1]], Sampling(1), [], keys(1))
    assert out.responses() == [[2]] and out.finish_reason == ["length"]


def test_decode_steps_drops_rows_that_ended():
    steps = list(decode_steps(counting_lm(), [[1], [8], [5]], Sampling(5), [4, 9], keys(3)))
    assert [step.rows.tolist() for step in steps] == [[0, 1, 2], [0, 2], [0, 2], [2]]
    assert [step.tokens.tolist() for step in steps] == [[2, 9, 6], [3, 7], [4, 8], [9]]
    reasons = [step.finish_reasons for step in steps]
    assert reasons == [[None, "eos", None], [None, None], ["eos", None], ["eos"]]


@pytest.mark.parametrize(
    ("prompts", "new", "stops", "eos", "responses", "reasons"),
    [
        # It is kept through the token that completes it. From b: c d e f ...; "de" spans two
        # tokens. From k: l m n ...: "n" is one token.
        ([[1], [10], [4]], 6, ("de", "n", "zz"), 15, ["cde", "lmn", "fghijk"],
         ["stop", "stop", "length"]),
        # The prompt ends in "c", the response begins with "d": "cd" is not in the response.
        ([[1, 2]], 3, ("cd",), 15, ["def"], ["length"]),
        ([[1]], 6, ("c",), 2, ["c"], ["eos"]),  # eos beats a stop string
    ],
)
def test_stop_strings_by_hand(prompts, new, stops, eos, responses, reasons):
    sampling = Sampling(new, stop_strings=stops)
    out = generate(counting_lm(), prompts, sampling, [eos], keys(len(prompts)), behind(letters))
    assert [letters(r) for r in out.responses()] == responses and out.finish_reason == reasons


def behind(decode):
    """Of a tokenizer to which ids say the same wherever they stand."""
    return lambda before, ids: decode(ids)


def test_a_stop_string_is_looked_for_in_the_response_as_it_stands_behind_the_prompt():
    def decode(before: list[int], ids: list[int]) -> str:  # a first blank is lost, as by Llama's
        return " ".join(map(str, ids)) if not before else "".join(f" {id}" for id in ids)

    sampling = Sampling(4, stop_strings=(" 2",))  # the first token of the response
    out = generate(counting_lm(), [[1]], sampling, [], keys(1), decode)
    assert out.responses() == [[2]] and out.finish_reason == ["stop"]


def test_a_stop_string_may_end_inside_a_token():
    def words(ids: list[int]) -> str:
        return "".join(["<", "en", "d> and", " more"][i - 2] for i in ids)

    sampling = Sampling(4, stop_strings=("<end>",))
    out = generate(counting_lm(), [[1]], sampling, [], keys(1), behind(words))
    assert out.responses() == [[2, 3, 4]] and out.finish_reason == ["stop"]
    assert before_stop(words(out.responses()[0]), sampling.stop_strings) == ""


# Characters of four byte-level tokens each. Of the 15 tokens from 1 on some are nothing at all:
# those before a single character, or three among those of three characters.
@pytest.mark.parametrize(("text", "nothing"), [("😀", range(1, 12)), ("😀😁😂", (3, 7, 11))])
def test_stop_strings_of_many_tokens_some_of_which_are_nothing(text, nothing):
    held = dict(zip((i for i in range(1, 16) if i not in nothing), text.encode(), strict=True))

    def decode(before: list[int], ids: list[int]) -> str:
        return bytes(held[i] for i in ids if i in held).decode(errors="replace")

    sampling = Sampling(20, stop_strings=(text,))
    out = generate(counting_lm(), [[0]], sampling, [], keys(1), decode)
    assert out.responses() == [list(range(1, 16))] and out.finish_reason == ["stop"]


@pytest.mark.parametrize(
    "text, stops, expected",
    [
        ("a stop b", ("stop",), "a "),
        ("xyx", ("y", "x"), ""),  # the first in the text, not in the list
        ("abc", ("d",), "abc"),
        ("abc", (), "abc"),
    ],
)
def test_before_stop_by_hand(text, stops, expected):
    assert before_stop(text, stops) == expected


def test_generate_needs_no_pad_id_and_sees_no_padding():
    # Token 0 is what fills rows: as a prompt, as an eos and as a response it is like any other.
    out = generate(counting_lm(), [[0, 0], [14]], Sampling(4), [0], keys(2))
    assert out.responses() == [[1, 2, 3, 4], [15, 0]]
    assert out.finish_reason == ["length", "eos"]


# ---- the distribution sampled, by hand -----------------------------------------------------------

QUARTERS = torch.tensor([[0.1, 0.4, 0.2, 0.3]], dtype=f64).log()


@pytest.mark.parametrize(
    "sampling, expected",
    [
        (Sampling(1), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(1, temperature=0), [0, 1, 0, 0]),
        # squares: 1, 16, 4, 9 of 30
        (Sampling(1, temperature=0.5), [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        (Sampling(1, top_k=1), [0, 1, 0, 0]),
        (Sampling(1, top_k=2), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(1, top_k=4), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(1, top_k=99), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(1, top_p=0.01), [0, 1, 0, 0]),  # the best is always kept
        (Sampling(1, top_p=0.39), [0, 1, 0, 0]),
        (Sampling(1, top_p=0.41), [0, 4 / 7, 0, 3 / 7]),  # the fewest whose mass reaches p
        (Sampling(1, top_p=0.69), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(1, top_p=0.71), [0, 4 / 9, 2 / 9, 3 / 9]),
        (Sampling(1, top_p=0.91), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(1, min_p=0.2), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(1, min_p=0.26), [0, 4 / 9, 2 / 9, 3 / 9]),  # below 0.26 x 0.4 = 0.104
        (Sampling(1, min_p=0.7), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(1, min_p=1.0), [0, 1, 0, 0]),
        # top-p works on what top-k left: 4/7 and 3/7, of which the first alone reaches 0.5
        (Sampling(1, top_k=2, top_p=0.5), [0, 1, 0, 0]),
        # and on what the temperature made: 16/30 reaches 0.5 alone
        (Sampling(1, temperature=0.5, top_p=0.5), [0, 1, 0, 0]),
    ],
)
def test_sampling_distribution_by_hand(sampling, expected):
    before = QUARTERS.clone()
    distribution = sampling_distribution(QUARTERS, sampling)
    assert_close(distribution.exp(), torch.tensor([expected], dtype=f64), atol=1e-9)
    assert torch.equal(QUARTERS, before)


def test_sampling_distribution_takes_the_first_of_equals():
    # Four equal tokens: two of them have exactly 1/2, the first two in order.
    distribution = sampling_distribution(torch.zeros(1, 4), Sampling(1, top_p=0.5))
    assert distribution.exp().tolist() == [[0.5, 0.5, 0, 0]]
    greedy = sampling_distribution(torch.tensor([[1.0, 3.0, 3.0]]), Sampling(1, temperature=0))
    assert greedy.tolist() == [[-math.inf, 0, -math.inf]]


def test_sampling_distribution_repetition_penalty_by_hand():
    # A positive logit is divided, a negative one multiplied: both become less likely.
    logits = torch.tensor([[2.0, -1.0, 2.0, -1.0]], dtype=f64)
    seen = torch.tensor([[True, True, False, False]])
    distribution = sampling_distribution(logits, Sampling(1, repetition_penalty=2.0), seen)
    assert_close(distribution, torch.tensor([[1.0, -2.0, 2.0, -1.0]], dtype=f64).log_softmax(-1))
    greedy = sampling_distribution(logits, Sampling(1, temperature=0, repetition_penalty=2.0), seen)
    assert greedy[0].exp().tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("sampling", LAWS)
def test_sampling_distribution_is_that_of_transformers(sampling):
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        logits = torch.randn(1, 50, generator=rng, dtype=f64) * 3
        tokens = torch.randint(50, (12,), generator=rng)
        seen = torch.zeros(1, 50, dtype=torch.bool)
        seen[0, tokens] = True
        expected = their_law(tokens.tolist(), logits[0], sampling)
        assert_close(sampling_distribution(logits, sampling, seen)[0], expected, atol=1e-9)


def test_sampling_distribution_of_bfloat16_is_float32():
    logits = torch.tensor([[1.0, 2.0]]).bfloat16()
    distribution = sampling_distribution(logits, Sampling(1))
    assert distribution.dtype == torch.float32
    assert_close(distribution, logits.float().log_softmax(-1))


# ---- draw ----------------------------------------------------------------------------------------


LAW = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]]).log()


def test_support_of_names_what_was_left_or_what_was_taken_away_by_hand():
    def narrowed(banned=None, **settings):
        sampling = Sampling(4, **settings)
        return support_of(sampling_distribution(LAW, sampling, banned=banned), sampling, banned)

    # the two most probable tokens of each row
    kept = narrowed(top_k=2)
    assert kept.ids.tolist() == [0, 1, 2, 3] and kept.counts.tolist() == [2, 2]
    assert not kept.banned and kept.ids.dtype == torch.int32
    # the fewest that reach 0.85: 0.5 + 0.3 + 0.15; 0.4 + 0.3 + 0.2
    kept = narrowed(top_p=0.85)
    assert kept.ids.tolist() == [0, 1, 2, 1, 2, 3] and kept.counts.tolist() == [3, 3]
    # a minimum length alone: what it forbids is shorter than what it leaves
    taken = narrowed(min_new_tokens=2, banned=torch.tensor([1, 3]))
    assert taken.ids.tolist() == [1, 3, 1, 3] and taken.counts.tolist() == [2, 2] and taken.banned
    taken = narrowed(min_new_tokens=2)
    assert taken.ids.tolist() == [] and taken.counts.tolist() == [0, 0] and taken.banned
    # both: what is left of the rest, 0 and 2 of the first row
    kept = narrowed(min_new_tokens=2, top_k=2, banned=torch.tensor([1, 3]))
    assert kept.ids.tolist() == [0, 2, 0, 2] and not kept.banned
    assert narrowed() is None and narrowed(temperature=0.5) is None
    assert narrowed(top_k=2, temperature=0) is None  # greedy: nothing to learn from


NARROWED = [
    Sampling(6, top_k=3, temperature=0.7),
    Sampling(6, top_p=0.8),
    Sampling(6, min_p=0.2),
    Sampling(6, min_new_tokens=4),
    Sampling(6, min_new_tokens=4, top_p=0.7, temperature=1.3),
]


@pytest.mark.parametrize("sampling", NARROWED)
def test_logprobs_on_the_support_are_those_of_the_law_sampled(sampling):
    """A forward pass over whole rows, renormalised, gives what the sampler drew from."""
    lm = random_lm()
    made = generate(lm, [[1, 2], [3], [4, 5, 6]], sampling, [0, 7], keys(3))
    states = response_states(lm(made.tokens), made.prompt_lengths, made.response_mask.shape[1])
    targets = response_states(made.tokens, made.prompt_lengths + 1, made.response_mask.shape[1])
    mask = made.response_mask
    got = token_logprobs(
        lm, states[mask], targets[mask], sampling.temperature, support=made.support.flat(mask)
    )
    torch.testing.assert_close(got.logprobs, made.logprobs[mask], rtol=0, atol=1e-9)
    everything = token_logprobs(lm, states[mask], targets[mask], sampling.temperature)
    assert (got.logprobs - everything.logprobs > 1e-3).any()  # it does renormalise


def test_no_eos_is_drawn_before_the_minimum_length():
    lm, prompts = random_lm(), [[i] for i in range(1, 9)]
    every = list(range(0, 20, 2))  # half of all ids end a row
    free = generate(lm, prompts, Sampling(8), every, keys(8))
    held = generate(lm, prompts, Sampling(8, min_new_tokens=3), every, keys(8))
    assert min(map(len, free.responses())) < 3
    for ids in held.responses():
        assert len(ids) >= 4 and not set(ids[:3]) & set(every)


@pytest.mark.parametrize(
    "masses, u, token",
    [
        # The first token whose cumulative mass exceeds u.
        ([0.25, 0.25, 0.5], 0.0, 0),
        ([0.25, 0.25, 0.5], 0.2499, 0),
        ([0.25, 0.25, 0.5], 0.25, 1),
        ([0.25, 0.25, 0.5], 0.4999, 1),
        ([0.25, 0.25, 0.5], 0.5, 2),
        ([0.25, 0.25, 0.5], 1 - 2**-53, 2),
        # Tokens without mass are never drawn, at the start, between, or at the end.
        ([0.0, 0.0, 0.5, 0.5], 0.0, 2),
        ([0.5, 0.0, 0.5], 0.5, 2),
        ([0.5, 0.5, 0.0, 0.0], 1 - 2**-53, 1),
        ([0.5, 0.5, 0.0], 1.0, 1),  # 1 - 2^-53 in float32
        # A cumulative sum that rounding left off 1: the uniform is scaled by it.
        ([0.5, 0.6, 0.0], 0.5, 1),  # 0.5 of 1.1 is 0.55
        ([0.25, 0.25], 0.5, 1),  # 0.5 of 0.5 is 0.25
        ([0.25, 0.25], 0.4999, 0),
    ],
)
def test_draw_by_hand(masses, u, token, monkeypatch):
    monkeypatch.setattr(streams, "uniform", lambda keys, t, dtype: torch.tensor([u], dtype=dtype))
    for dtype in (torch.float32, f64):
        distribution = torch.tensor([masses], dtype=dtype).log()
        if dtype == f64 or u != 1 - 2**-53:
            assert draw(distribution, keys(1), torch.tensor([0])).tolist() == [token]
    distribution = torch.tensor([masses]).log()
    assert distribution[0, draw(distribution, keys(1), torch.tensor([0]))] > -math.inf


def test_draw_uses_the_uniform_of_its_row_and_position():
    distribution = torch.full((3, 1000), 1e-3, dtype=f64).log()
    t = torch.tensor([0, 5, 5])
    expected = [int(streams.uniform(keys(3)[i], t[i]) * 1000) for i in range(3)]
    assert draw(distribution, keys(3), t).tolist() == expected


# 99.9 % points of chi-square with 4 and with 2 degrees of freedom.
@pytest.mark.parametrize("sampling, critical", [(Sampling(1), 18.5), (Sampling(1, top_k=3), 13.8)])
def test_draw_has_the_frequencies_of_the_law(sampling, critical):
    n = 50_000
    logits = torch.tensor([0.05, 0.1, 0.5, 0.2, 0.15]).log().expand(n, 5)
    distribution = sampling_distribution(logits, sampling)
    drawn = draw(distribution, keys(n), torch.zeros(n, dtype=torch.int64))
    counts = torch.bincount(drawn, minlength=5)
    masses = [0.05, 0.1, 0.5, 0.2, 0.15]
    if sampling.top_k:
        masses = [0, 0, 0.5 / 0.85, 0.2 / 0.85, 0.15 / 0.85]
    pairs = [(float(c), n * m) for c, m in zip(counts, masses, strict=True)]
    assert all(count == 0 for count, expected in pairs if expected == 0)
    assert sum((c - e) ** 2 / e for c, e in pairs if e > 0) < critical


def test_generate_has_the_frequencies_of_the_model():
    # Pairs of tokens of a vocabulary of 3: 9 - 1 degrees of freedom, 99.9 % point 26.1.
    lm, n = random_lm(3), 5000
    out = generate(lm, [[1]] * n, Sampling(2, temperature=2.0), [], keys(n))
    pairs = out.tokens[:, 1] * 3 + out.tokens[:, 2]
    counts = torch.bincount(pairs, minlength=9).double()
    with torch.no_grad():
        first = (lm.logits(lm(torch.tensor([[1]])))[0, -1] / 2).softmax(-1)
        logits = lm.logits(lm(torch.tensor([[1, 0], [1, 1], [1, 2]])))[:, -1]
    expected = n * (first[:, None] * (logits / 2).softmax(-1)).flatten()
    assert expected.min() > 25 and expected.max() > 3 * expected.min()
    assert ((counts - expected) ** 2 / expected).sum() < 26.1


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting, value, rule",
    [
        ("max_new_tokens", 0, "at least 1"),
        ("min_new_tokens", -1, "at least 0 and at most max_new_tokens, 5"),
        ("min_new_tokens", 6, "at least 0 and at most max_new_tokens, 5"),
        ("temperature", -0.1, "at least 0"),
        ("temperature", math.inf, "at least 0"),
        ("temperature", math.nan, "at least 0"),
        ("top_k", -1, "at least 0"),
        ("top_p", 0.0, r"in \(0, 1\]"),
        ("top_p", 1.1, r"in \(0, 1\]"),
        ("min_p", -0.1, r"in \[0, 1\]"),
        ("min_p", 1.1, r"in \[0, 1\]"),
        ("repetition_penalty", 0.0, "above 0"),
        ("repetition_penalty", math.inf, "above 0"),
        ("stop_strings", ("a", ""), "a tuple of non-empty strings"),
        ("stop_strings", "ab", "a tuple of non-empty strings"),  # would stop at each letter
    ],
)
def test_sampling_refuses(setting, value, rule):
    with pytest.raises(ValueError, match=rf"^{setting} is .*: must be {rule}"):
        Sampling(**{"max_new_tokens": 5, setting: value})


def test_sampling_knows_whether_it_truncates():
    assert not Sampling(1, temperature=0.5, repetition_penalty=2.0).truncates
    for truncation in ({"top_k": 1}, {"top_p": 0.9}, {"min_p": 0.1}):
        assert Sampling(1, **truncation).truncates


@pytest.mark.parametrize(
    "prompts, sampling, row_keys, told",
    [
        ([], Sampling(1), keys(0), "prompts is empty: give at least one"),
        ([[1], []], Sampling(1), keys(2), "prompt 1 is empty: start it with a BOS"),
        ([[1], [2]], Sampling(1), keys(1), r"keys is \(1,\) torch.int64: give one int64 a"),
        ([[1]], Sampling(1), keys(1).double(), r"keys is \(1,\) torch.float64"),
        ([[1]], Sampling(1), keys(1)[None], r"keys is \(1, 1\)"),
        ([[1] * 3, [1]], Sampling(31), keys(2), r"prompt of 3 tokens and 31 .* 32 positions"),
        ([[1]], Sampling(3, stop_strings=("a",)), keys(1), "stop_strings need decode="),
    ],
)
def test_generate_refuses(prompts, sampling, row_keys, told):
    with pytest.raises(ValueError, match=told):
        generate(counting_lm(), prompts, sampling, [], row_keys)


def test_generate_goes_to_the_last_position():
    # The last token is sampled, not read: 3 + 30 tokens need 32 positions.
    assert len(generate(counting_lm(), [[1] * 3], Sampling(30), [], keys(1)).responses()[0]) == 30


def test_generate_refuses_rows_beyond_a_sliding_window_before_the_first_token():
    lm = counting_lm(sliding_window=8)
    generate(lm, [[1, 2, 3]], Sampling(6), [], keys(1))
    steps = decode_steps(lm, [[1, 2, 3]], Sampling(7), [], keys(1))
    with pytest.raises(ValueError, match="9 tokens is longer than the model's sliding window of 8"):
        next(steps)


@pytest.mark.parametrize("sampling", [Sampling(3), GREEDY, Sampling(3, top_k=2, top_p=0.9)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_stop_the_run(sampling, bad):
    lm = counting_lm()
    with torch.no_grad():
        lm.lm_head.weight[5] = bad
    told = "sampled token 1: the model's logits are not finite: the weights have diverged"
    with pytest.raises(UserError, match=told) as caught:
        generate(lm, [[1]], sampling, [], keys(1))
    assert caught.value.code == NON_FINITE == 3


def test_draw_of_nan_is_an_id():
    # What is not finite is told behind the draw, which must not point beyond the vocabulary.
    law = torch.full((2, 5), math.nan)
    assert all(0 <= token < 5 for token in draw(law, keys(2), torch.tensor([0, 0])).tolist())


def test_a_temperature_that_overflows_stops_the_run():
    with pytest.raises(UserError, match="not finite"):
        generate(counting_lm(), [[1]], Sampling(3, temperature=1e-40), [], keys(1))


def test_generate_keeps_no_step(monkeypatch):
    made: list[weakref.ref] = []

    def watched(*args):
        for step in decode_steps(*args):
            assert not any(old() is not None for old in made[:-1])
            made.append(weakref.ref(step.logprobs))
            yield step

    monkeypatch.setattr(generation, "decode_steps", watched)
    out = generate(random_lm(), [[5, 9], [3]], Sampling(9, top_k=3), [0], keys(2))
    assert len(made) == out.response_mask.shape[1] > 3


def test_generate_leaves_no_gradient():
    out = generate(random_lm(), [[1]], Sampling(2), [], keys(1))
    assert not out.logprobs.requires_grad
