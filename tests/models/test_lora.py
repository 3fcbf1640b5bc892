import copy
import re

import pytest
import torch
from torch import nn

from minirlhf.errors import UserError
from minirlhf.models.families import config_from_hf
from minirlhf.models.heads import RewardModel, ValueHeadModel, critic_from_reward_model
from minirlhf.models.lora import (
    LoRALinear,
    adapters,
    add_lora,
    base_of,
    has_lora,
    merge_lora,
    merged_copy,
    share,
)
from minirlhf.models.pretrained import load_pretrained, load_reward_model, save_pretrained
from minirlhf.models.transformer import CausalLM, Linear, initialize
from minirlhf.run.checkpoint import TrainState, load_checkpoint, save_checkpoint
from minirlhf.run.optim import make_optimizer
from minirlhf.streams import generator

LLAMA = config_from_hf({
    "model_type": "llama", "vocab_size": 11, "hidden_size": 8, "intermediate_size": 12,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 16, "tie_word_embeddings": False, "initializer_range": 0.5,
})
GPT2 = config_from_hf({
    "model_type": "gpt2", "vocab_size": 11, "n_embd": 8, "n_layer": 2, "n_head": 2,
    "n_positions": 16, "initializer_range": 0.5,
})
CONFIGS = pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
KINDS = pytest.mark.parametrize("wrap", [lambda lm: lm, ValueHeadModel, RewardModel])
ALL = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
TOKENS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
LENGTHS = torch.tensor([4, 3])


def make_lm(config=LLAMA, dtype=torch.float64):
    return initialize(CausalLM(config).to(dtype), generator(0, "test"))


def outputs(model):
    """(N,) every number that the model computes of TOKENS."""
    if isinstance(model, RewardModel):
        return model(TOKENS, LENGTHS)
    if isinstance(model, ValueHeadModel):
        hidden, values = model(TOKENS)
        return torch.cat((model.lm.logits(hidden).flatten(), values.flatten()))
    return model.logits(model(TOKENS)).flatten()


def train(model):
    """Updates every trainable number: two steps, since A has no gradient while B is 0."""
    optimizer = make_optimizer(model, 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (outputs(model) - 1).square().sum().backward()  # the 1 moves values, which start at 0
        optimizer.step()
    return optimizer


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def two_by_two():
    base = nn.Linear(2, 2).double()
    layer = LoRALinear(base, rank=2, alpha=6.0, rng=generator(0, "test"))
    with torch.no_grad():
        layer.base.weight.copy_(torch.tensor([[1, 2], [3, 4]]))
        layer.base.bias.copy_(torch.tensor([10, 20]))
        layer.lora_A.copy_(torch.tensor([[1, -1], [0, 1]]))
        layer.lora_B.copy_(torch.tensor([[2, 1], [0.5, 0]]))
    return layer, torch.tensor([5, 3], dtype=torch.float64)


# ---- one layer -----------------------------------------------------------------------------------


def test_lora_linear_by_hand():
    # W x + b = (5 + 6 + 10, 15 + 12 + 20) = (21, 47); A x = (5 - 3, 3) = (2, 3);
    # B A x = (2·2 + 3, 2/2) = (7, 1); alpha / rank = 6 / 2 = 3; h = (21 + 21, 47 + 3)
    layer, x = two_by_two()
    assert layer(x).tolist() == [42, 50]


def test_lora_linear_gradient_by_hand():
    # Of the sum of h: dA = 3 (Bᵀ 1) xᵀ with Bᵀ 1 = (2.5, 1); dB = 3 · 1 (A x)ᵀ with A x = (2, 3)
    layer, x = two_by_two()
    layer(x).sum().backward()
    assert layer.lora_A.grad.tolist() == [[37.5, 22.5], [15, 9]]
    assert layer.lora_B.grad.tolist() == [[6, 9], [6, 9]]
    assert layer.base.weight.grad is None and layer.base.bias.grad is None


def test_lora_linear_merged_by_hand():
    # B A = [[2, -2 + 1], [0.5, -0.5]]; W + 3 B A = [[1 + 6, 2 - 3], [3 + 1.5, 4 - 1.5]]
    layer, x = two_by_two()
    plain = layer.merged()
    assert type(plain) is Linear
    assert plain.weight.tolist() == [[7, -1], [4.5, 2.5]]
    assert plain.bias.tolist() == [10, 20]
    assert plain(x).tolist() == [42, 50]


def test_lora_linear_merged_rounds_once_in_bfloat16():
    # (1 + 3/128)² = 1 + 6/128 + 9/16384, and bfloat16 near 1 has steps of 1/128: rounding the
    # product first would lose its last term and leave 0.
    layer = LoRALinear(nn.Linear(1, 1, bias=False).bfloat16(), 1, 1.0, generator(0, "test"))
    with torch.no_grad():
        layer.base.weight.fill_(-(1 + 6 / 128))
        layer.lora_A.fill_(1 + 3 / 128)
        layer.lora_B.fill_(1 + 3 / 128)
    assert layer.merged().weight.item() == 9 / 16384


def test_rslora_divides_by_the_root_of_the_rank():
    # rank 4, alpha 6: s = 6 / 2 = 3 in place of 6 / 4
    base = nn.Linear(2, 2)
    scales = [LoRALinear(base, 4, 6.0, generator(0, "test"), rslora=r).scaling for r in (1, 0)]
    assert scales == [3, 1.5]


def two_by_two_with_magnitudes():
    layer, x = two_by_two()
    dora = LoRALinear(layer.base, 2, 6.0, generator(0, "test"), dora=True)
    with torch.no_grad():
        dora.lora_A.copy_(layer.lora_A)
        dora.lora_B.copy_(layer.lora_B)
    return dora, x


def test_dora_by_hand():
    # m = the lengths of W's rows, (sqrt 5, 5); W + 3 B A = [[7, -1], [4.5, 2.5]] has rows of length
    # sqrt 50 and sqrt 26.5; (W + 3 B A) x = (32, 30), as above without b = (10, 20)
    layer, x = two_by_two_with_magnitudes()
    wanted = [32 * (5 / 50) ** 0.5 + 10, 30 * 5 / 26.5**0.5 + 20]
    assert layer(x).tolist() == pytest.approx(wanted, abs=1e-6)
    assert layer.merged()(x).tolist() == pytest.approx(wanted, abs=1e-6)
    rows = layer.merged().weight.norm(dim=1).tolist()
    assert rows == pytest.approx([5**0.5, 5], abs=1e-6)  # their lengths are m


def test_dora_gradient_by_hand():
    # With f = m / |W + 3 B A| a constant, of the sum of h: dB = 3 f (A x)ᵀ with A x = (2, 3), and
    # dm = (W + 3 B A) x / |W + 3 B A| = (32 / sqrt 50, 30 / sqrt 26.5)
    layer, x = two_by_two_with_magnitudes()
    layer(x).sum().backward()
    f = [(5 / 50) ** 0.5, 5 / 26.5**0.5]
    rows = layer.lora_B.grad.tolist()
    for row, factor in zip(rows, f, strict=True):
        assert row == pytest.approx([6 * factor, 9 * factor], abs=1e-6)
    wanted = [32 / 50**0.5, 30 / 26.5**0.5]
    assert layer.magnitude.grad.tolist() == pytest.approx(wanted, abs=1e-6)
    assert layer.base.weight.grad is None


@pytest.mark.filterwarnings("ignore")  # of its imports
def test_lora_linear_agrees_with_peft():
    peft = pytest.importorskip("peft")
    ours = LoRALinear(nn.Linear(6, 4), 3, 12.0, generator(0, "test"))
    nn.init.normal_(ours.lora_B, generator=generator(1, "test"))
    base = nn.Sequential()
    base.add_module("q_proj", nn.Linear(6, 4))
    base.q_proj.load_state_dict({"weight": ours.base.weight, "bias": ours.base.bias})
    theirs = peft.get_peft_model(
        base, peft.LoraConfig(r=3, lora_alpha=12, lora_dropout=0.0, target_modules=["q_proj"])
    )
    layer = theirs.base_model.model.q_proj
    layer.lora_A["default"].load_state_dict({"weight": ours.lora_A})
    layer.lora_B["default"].load_state_dict({"weight": ours.lora_B})
    x = torch.randn(5, 6, generator=generator(2, "test"))
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-6)
    merged = theirs.merge_and_unload().q_proj.weight
    torch.testing.assert_close(ours.merged().weight, merged, rtol=0, atol=1e-6)


# ---- add_lora ------------------------------------------------------------------------------------


@CONFIGS
@KINDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_add_lora_leaves_outputs_bit_for_bit(config, wrap, dtype):
    model = wrap(make_lm(config, dtype))
    before = outputs(model)
    assert add_lora(model, 2, 4.0) is model
    assert torch.equal(outputs(model), before)


def test_add_lora_trains_by_hand_counted_parameters():
    # D 8, I 12, one key-value head of 4, rank 2: an adapter has 2 · (in + out) numbers.
    # q 32, k 24, v 24, o 32, gate 40, up 40, down 40: 232 a layer, 464 in two.
    def count(model):
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    assert count(add_lora(make_lm(), 2, 4.0)) == 464
    assert count(add_lora(RewardModel(make_lm()), 2, 4.0)) == 464 + 8
    assert count(add_lora(ValueHeadModel(make_lm()), 2, 4.0)) == 464 + 8 + 1
    # GPT-2: q, k, v, o 32 each, up and down 2 · (8 + 32) = 80 each; 288 a layer
    assert count(add_lora(make_lm(GPT2), 2, 4.0)) == 576


@CONFIGS
@KINDS
def test_add_lora_gives_gradients_to_adapters_and_heads_only(config, wrap):
    model = add_lora(wrap(make_lm(config)), 2, 4.0)
    train(model)
    heads = {"v_head.weight", "v_head.bias", "score.weight"}
    for name, parameter in model.named_parameters():
        wanted = name in heads or name.endswith((".lora_A", ".lora_B"))
        assert parameter.requires_grad == wanted, name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == wanted, name


def test_add_lora_trains_a_head_that_was_frozen():
    model = RewardModel(make_lm()).requires_grad_(False)
    assert "score.weight" in trainable(add_lora(model, 2, 4.0))


@KINDS
def test_add_lora_step_changes_outputs_and_no_base_weight(wrap):
    model = wrap(make_lm())
    base, before = copy.deepcopy(model.state_dict()), outputs(model)
    train(add_lora(model, 2, 4.0))
    assert not torch.isclose(outputs(model), before).any()
    after = model.state_dict()
    for name, tensor in base.items():
        is_head = name.startswith(("v_head", "score"))
        name = name if name in after else re.sub(r"_proj\.", "_proj.base.", name)
        assert torch.equal(after[name], tensor) != is_head, name


def test_add_lora_adds_two_keys_a_layer():
    lm = make_lm()
    before = {re.sub(r"_proj\.", "_proj.base.", name) for name in lm.state_dict()}
    added = set(add_lora(lm, 2, 4.0).state_dict()) - before
    parts = {"self_attn": "qkvo", "mlp": ("gate", "up", "down")}
    assert added == {
        f"model.layers.{i}.{part}.{layer}_proj.lora_{matrix}"
        for i in (0, 1) for part, layers in parts.items() for layer in layers for matrix in "AB"
    }
    assert before <= set(lm.state_dict())


def test_add_lora_adapts_every_linear_layer_of_the_trunk():
    def adapted(lm):
        layers = [n for n, m in add_lora(lm, 1, 1.0).named_modules() if isinstance(m, LoRALinear)]
        return len(layers), {name.rpartition(".")[2] for name in layers}

    assert adapted(make_lm(LLAMA)) == (14, ALL)  # lm_head is no part of the trunk
    assert adapted(make_lm(GPT2)) == (12, ALL - {"gate_proj"})


def test_add_lora_draws_a_within_its_bound_and_b_zero():
    # Kaiming's bound with a = sqrt(5) is sqrt(6 / ((1 + 5) in)) = 1 / sqrt(64); a uniform law has
    # a standard deviation of bound / sqrt(3).
    layer = LoRALinear(nn.Linear(64, 3), 100, 1.0, generator(0, "test"))
    A = layer.lora_A.detach()
    assert 0.124 < float(A.abs().max()) <= 0.125
    assert float(A.std()) == pytest.approx(0.125 / 3**0.5, rel=0.02)
    assert not layer.lora_B.any()


def test_add_lora_draws_are_a_function_of_seed_and_layer():
    def draws(wrap=lambda lm: lm, **options):
        lm = add_lora(wrap(make_lm()), 2, 4.0, **options)
        state = lm.state_dict()
        return {n.removeprefix("lm."): t for n, t in state.items() if n.endswith("lora_A")}

    first, other_seed = draws(), draws(seed=1)
    flat = torch.stack([t.flatten()[:16] for t in first.values()])
    assert len(flat.unique(dim=0)) == 14  # no two layers alike
    assert not any(torch.equal(first[name], other_seed[name]) for name in first)
    for other in (draws(), draws(ValueHeadModel)):
        assert other and all(torch.equal(first[name], tensor) for name, tensor in other.items())


def test_add_lora_leaves_the_global_generator_alone():
    lm = make_lm()
    before = torch.get_rng_state()
    merge_lora(add_lora(lm, 2, 4.0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("targets", "layers"), [
    (("attention",), {"q_proj", "k_proj", "v_proj", "o_proj"}),
    (("mlp",), {"gate_proj", "up_proj", "down_proj"}),
    (("q_proj", "*down*"), {"q_proj", "down_proj"}),
    (("all",), ALL),
])
def test_add_lora_adapts_the_layers_that_are_named(targets, layers):
    found = adapters(add_lora(make_lm(), 1, 1.0, targets=targets))
    assert {name.split(".")[-1] for name in found} == layers
    assert len(found) == 2 * len(layers)  # in both blocks


def test_add_lora_adapts_a_layer_by_its_whole_name():
    found = adapters(add_lora(make_lm(), 1, 1.0, targets=("layers.1.*.v_proj",)))
    assert list(found) == ["model.layers.1.self_attn.v_proj"]


@CONFIGS
@KINDS
def test_dora_begins_as_the_base_and_merges(config, wrap):
    model = wrap(make_lm(config))
    before = outputs(model)
    add_lora(model, 2, 4.0, dora=True, rslora=True)
    torch.testing.assert_close(outputs(model), before, rtol=0, atol=1e-12)
    train(model)
    trained = outputs(model)
    assert not torch.isclose(trained, before).any()
    torch.testing.assert_close(outputs(merge_lora(model)), trained, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_add_lora_takes_dtype_and_device_of_the_base(dtype):
    on_cpu = add_lora(make_lm(dtype=dtype), 2, 4.0)
    on_meta = add_lora(CausalLM(LLAMA).to("meta", dtype), 2, 4.0)
    for lm, device in ((on_cpu, "cpu"), (on_meta, "meta")):
        assert {(p.dtype, p.device.type) for p in lm.parameters()} == {(dtype, device)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0: must be 1 or more"),
        ({"alpha": 0.0}, "alpha is 0.0: must be above 0 and finite"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"alpha": float("inf")}, "alpha is inf"),
        ({"targets": ("q_proj", "c_attn")}, "target 'c_attn' is no layer of this model: legal are "
         "all, attention, mlp or names as q_proj, k_proj, v_proj, o_proj"),
        ({"targets": ("lm_head",)}, "target 'lm_head' is no layer"),
    ],
)
def test_add_lora_refuses_and_leaves_the_model_as_it_was(options, message):
    model = RewardModel(make_lm())
    before = trainable(model)
    with pytest.raises(ValueError, match=message):
        add_lora(model, **{"rank": 2, "alpha": 4.0, **options})
    assert not has_lora(model)
    assert trainable(model) == before


def test_add_lora_refuses_a_second_time():
    lm = add_lora(make_lm(), 2, 4.0)
    with pytest.raises(ValueError, match="has adapters already: call merge_lora"):
        add_lora(lm, 2, 4.0)


# ---- merge_lora ----------------------------------------------------------------------------------


@CONFIGS
@KINDS
def test_merge_lora_keeps_the_function_and_restores_the_model(config, wrap):
    model = wrap(make_lm(config))
    names = list(model.state_dict())
    train(add_lora(model, 2, 4.0))
    unmerged = outputs(model)
    assert merge_lora(model) is model
    torch.testing.assert_close(outputs(model), unmerged, rtol=0, atol=1e-6)
    assert list(model.state_dict()) == names
    assert {type(m) for n, m in model.named_modules() if n.endswith("_proj")} == {Linear}
    assert trainable(model) == set(dict(model.named_parameters()))
    assert not has_lora(model)


@CONFIGS
def test_merge_lora_then_save_and_load_gives_the_same_logits(config, tmp_path):
    lm = add_lora(make_lm(config), 2, 4.0)
    train(lm)
    unmerged = outputs(lm)
    save_pretrained(merge_lora(lm), tmp_path)
    loaded = outputs(load_pretrained(tmp_path))
    assert torch.equal(loaded, outputs(lm))
    torch.testing.assert_close(loaded, unmerged, rtol=0, atol=1e-6)


def test_save_pretrained_refuses_what_a_folder_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match="has adapters: call merge_lora"):
        save_pretrained(add_lora(make_lm(), 2, 4.0), tmp_path)
    policy = critic_from_reward_model(make_lm(), RewardModel(make_lm()))
    with pytest.raises(ValueError, match=r"a trunk of its own: save the policy, model\.lm"):
        save_pretrained(policy, tmp_path)
    assert not list(tmp_path.iterdir())


def test_merge_lora_then_save_and_load_gives_the_same_scores(tmp_path):
    model = add_lora(RewardModel(make_lm()), 2, 4.0)
    train(model)
    save_pretrained(merge_lora(model), tmp_path, pad_token_id=0)
    assert torch.equal(outputs(load_reward_model(tmp_path)), outputs(model))


def test_merge_lora_then_add_lora_has_the_merged_model_as_its_base():
    lm = add_lora(make_lm(), 2, 4.0)
    train(lm)
    merged = outputs(merge_lora(lm))
    train(add_lora(lm, 2, 4.0))
    assert torch.equal(outputs(base_of(lm)), merged)


def test_merge_lora_refuses_a_model_without_adapters():
    with pytest.raises(ValueError, match="has no adapters: call add_lora first"):
        merge_lora(make_lm())


# ---- the rest ------------------------------------------------------------------------------------


@KINDS
def test_has_lora_is_true_between_add_and_merge(wrap):
    model = wrap(make_lm())
    seen = [has_lora(model), has_lora(add_lora(model, 1, 1.0)), has_lora(merge_lora(model))]
    assert seen == [False, True, False]


@CONFIGS
@KINDS
def test_base_of_is_the_model_before_exactly_and_shares_its_weights(config, wrap):
    model = wrap(make_lm(config))
    before, heads = outputs(model), {"v_head", "score"}
    weights = {id(p) for n, p in model.named_parameters() if n.split(".")[0] not in heads}
    base = base_of(add_lora(model, 2, 4.0))
    assert not has_lora(base) and has_lora(model)
    assert torch.equal(outputs(base), before)
    assert weights <= {id(p) for p in base.parameters()}  # the same tensors, no copies
    if wrap not in (ValueHeadModel, RewardModel):
        train(model)
        assert torch.equal(outputs(base), before)
        assert not torch.isclose(outputs(model), before).any()


def test_share_gives_each_tree_adapters_of_its_own():
    lm = make_lm()
    before, other = outputs(lm), share(lm)
    train(add_lora(lm, 2, 4.0))
    assert torch.equal(outputs(other), before)
    trained = outputs(lm)
    train(add_lora(other, 3, 4.0, seed=1))
    assert torch.equal(outputs(lm), trained)
    frozen = [{id(p) for p in m.parameters() if not p.requires_grad} for m in (lm, other)]
    assert frozen[0] == frozen[1] and len(frozen[0]) == 14 + 4 + 3  # linears, norms; first and last


def test_merged_copy_leaves_what_is_trained_and_what_is_shared():
    lm = add_lora(make_lm(), 2, 4.0)
    train(lm)
    base, trained, learned = outputs(base_of(lm)), outputs(lm), trainable(lm)
    copied = merged_copy(lm)
    torch.testing.assert_close(outputs(copied), trained, rtol=0, atol=1e-6)
    assert trainable(lm) == learned and torch.equal(outputs(lm), trained)
    assert torch.equal(outputs(base_of(lm)), base)


@KINDS
def test_checkpoint_of_adapters_restores_bit_for_bit(wrap, tmp_path):
    model = add_lora(wrap(make_lm()), 2, 4.0)
    commit = save_checkpoint(TrainState(model, train(model), step=1), tmp_path)
    other = add_lora(wrap(make_lm()), 2, 4.0, seed=1)
    state = TrainState(other, make_optimizer(other, 0.1))
    load_checkpoint(state, commit)
    assert state.step == 1
    assert torch.equal(outputs(other), outputs(model))


def test_checkpoint_of_another_rank_is_refused(tmp_path):
    lm = add_lora(make_lm(), 2, 4.0)
    commit = save_checkpoint(TrainState(lm, make_optimizer(lm, 0.1)), tmp_path)
    other = add_lora(make_lm(), 3, 4.0)
    with pytest.raises(UserError, match="weights of another model"):
        load_checkpoint(TrainState(other, make_optimizer(other, 0.1)), commit)
