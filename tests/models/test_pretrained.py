import json
import re
import shutil
import weakref

import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from minirlhf.errors import MACHINE, UserError
from minirlhf.models import pretrained
from minirlhf.models.config import ModelConfig
from minirlhf.models.families import config_from_hf, config_to_hf
from minirlhf.models.heads import RewardModel, ValueHeadModel, normalize_scores
from minirlhf.models.pretrained import (
    in_memory,
    load_pretrained,
    load_reward_model,
    offload,
    remarks,
    save_pretrained,
    stored_head,
    without_weights,
)
from minirlhf.models.stored import tensor_files
from minirlhf.models.transformer import CausalLM
from tests import conftest
from tests.conftest import EACH_FAMILY, PEERS, make_peer

ROW = torch.tensor([[5, 98, 0, 41, 7, 7, 63, 12]])
LLAMA = {
    "model_type": "llama", "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2 = {
    "model_type": "gpt2", "vocab_size": 9, "n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 4,
}


def without(values: dict, *keys: str) -> dict:
    return {k: v for k, v in values.items() if k not in keys}


def config_in(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


def write_config(folder, values) -> None:
    (folder / "config.json").write_text(json.dumps(values))


def in_both_spellings(values: dict) -> dict:
    """config.json of transformers 5 with, beside it, what version 4 reads."""
    older = {"torch_dtype": values["dtype"]}
    if roped := values.get("rope_parameters"):
        scaling = without(roped, "rope_theta")
        plain = scaling == {"rope_type": "default"}
        older |= {"rope_theta": roped["rope_theta"], "rope_scaling": None if plain else scaling}
    return values | older


def same(one: CausalLM, two: CausalLM) -> bool:
    first, second = one.state_dict(), two.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def store(folder, changes: dict[str, torch.Tensor]) -> None:
    """Puts tensors beside those of a folder, or in their place."""
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | changes, folder / "model.safetensors")


@pytest.fixture
def copy(peer, tmp_path):
    """A copy of a peer's folder that a test may spoil."""

    def of(name="llama"):
        return shutil.copytree(peer(name)[1], tmp_path / "copy")

    return of


# ---- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PEERS)
@torch.no_grad()
def test_save_pretrained_gives_transformers_the_same_model(name, peer, tmp_path):
    theirs, folder = peer(name)
    lm = load_pretrained(folder)
    save_pretrained(lm, tmp_path)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(back(ROW).logits, theirs(ROW).logits)
    assert config_in(tmp_path) == in_both_spellings(config_in(folder))
    stored, original = (load_file(f / "model.safetensors") for f in (tmp_path, folder))
    assert stored.keys() == original.keys()  # a tied lm_head is not stored twice
    again = load_pretrained(tmp_path)
    assert same(again, lm)
    assert torch.equal(again.logits(again(ROW)), lm.logits(lm(ROW)))


@pytest.mark.parametrize("name", EACH_FAMILY)
def test_load_pretrained_reads_shards(name, peer, tmp_path):
    theirs, folder = peer(name)
    theirs.save_pretrained(tmp_path, max_shard_size="16KB")
    assert len(tensor_files(tmp_path)) > 2
    assert same(load_pretrained(tmp_path), load_pretrained(folder))


def test_save_pretrained_over_shards_replaces_them(peer, tmp_path):
    theirs, folder = peer("llama")
    theirs.save_pretrained(tmp_path, max_shard_size="16KB")
    lm = load_pretrained(folder)
    with torch.no_grad():
        lm.lm_head.weight.zero_()
    save_pretrained(lm, tmp_path)
    assert (load_pretrained(tmp_path).lm_head.weight == 0).all()


def test_load_pretrained_reads_gpt2_of_the_first_days(peer, copy):
    # Saved from the bare trunk: no "transformer." before names, and the causal mask as a tensor.
    folder = copy("gpt2")
    tensors = load_file(folder / "model.safetensors")
    bare = {n.removeprefix("transformer."): t for n, t in tensors.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
    bare["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(bare, folder / "model.safetensors")
    assert same(load_pretrained(folder), load_pretrained(peer("gpt2")[1]))


def test_load_pretrained_ignores_the_frequencies_that_old_llamas_store(peer, copy):
    folder = copy("llama")
    store(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert same(load_pretrained(folder), load_pretrained(peer("llama")[1]))


@pytest.mark.parametrize("name", ["smollm2", "gpt2"])
def test_load_pretrained_accepts_a_tied_head_stored_twice(name, peer, copy):
    folder = copy(name)
    tensors = load_file(folder / "model.safetensors")
    tied = next(t for n, t in tensors.items() if "embed_tokens" in n or "wte" in n)
    store(folder, {"lm_head.weight": tied.clone()})
    assert same(load_pretrained(folder), load_pretrained(peer(name)[1]))
    store(folder, {"lm_head.weight": tied + 1})
    with pytest.raises(UserError, match=r"'lm_head.weight' differs from the embedding.*tie_word"):
        load_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_the_files_unless_asked(dtype, peer, tmp_path):
    lm = load_pretrained(peer("llama")[1], dtype=dtype)
    assert {p.dtype for p in lm.parameters()} == {dtype}
    save_pretrained(lm, tmp_path)
    for key in ("dtype", "torch_dtype"):
        assert config_in(tmp_path)[key] == str(dtype).removeprefix("torch.")
    kept = load_pretrained(tmp_path)
    assert {p.dtype for p in kept.parameters()} == {dtype} and same(kept, lm)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).dtype == dtype
    wide = load_pretrained(tmp_path, dtype=torch.float64)
    assert wide.logits(wide(ROW)).dtype == torch.float64
    assert all(p.requires_grad and p.is_leaf for p in kept.parameters())


def test_mixed_dtypes_need_one_to_be_chosen(copy):
    folder = copy()
    store(folder, {"model.norm.weight": torch.ones(32, dtype=torch.bfloat16)})
    with pytest.raises(UserError, match="mixes bfloat16 and float32: choose one dtype"):
        load_pretrained(folder)
    lm = load_pretrained(folder, dtype=torch.float32)
    assert {p.dtype for p in lm.parameters()} == {torch.float32}


def test_save_pretrained_writes_a_value_head_beside_the_model(peer, tmp_path):
    model = ValueHeadModel(load_pretrained(peer("gpt2")[1]))
    with torch.no_grad():
        model.v_head.weight.fill_(3.0)
    save_pretrained(model, tmp_path, pad_token_id=17)
    head = load_file(tmp_path / "value_head.safetensors")
    assert torch.equal(head["v_head.summary.weight"], torch.full((1, 32), 3.0))
    assert torch.equal(head["v_head.summary.bias"], torch.zeros(1))
    assert same(load_pretrained(tmp_path), model.lm)
    assert config_in(tmp_path)["pad_token_id"] == 17


@pytest.mark.parametrize("pad, written", [(0, 0), (98, 98), (None, None)])
def test_save_pretrained_writes_the_pad_id_it_is_given(pad, written, peer, tmp_path):
    save_pretrained(load_pretrained(peer("llama")[1]), tmp_path, pad_token_id=pad)
    assert config_in(tmp_path)["pad_token_id"] == written  # id 0 is a token like any other


def test_save_pretrained_refuses_a_config_made_by_hand(tmp_path):
    config = ModelConfig("llama", 9, 8, 8, 1, 2, 2, 4, 16)
    with pytest.raises(ValueError, match=r"made by hand has no config.json: use config_from_hf"):
        save_pretrained(CausalLM(config), tmp_path)


# ---- reward models -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", EACH_FAMILY)
@torch.no_grad()
def test_reward_model_scores_alike_in_transformers(family, peer, tmp_path):
    unread = 98 if family == "gpt2" else None
    model = RewardModel(load_pretrained(peer(family)[1]), unread)
    model.score.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(3))
    save_pretrained(model, tmp_path, pad_token_id=98)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    trunk = "GPT2" if family == "gpt2" else family.capitalize()
    assert config_in(tmp_path)["architectures"] == [f"{trunk}ForSequenceClassification"]
    assert type(theirs).__name__ == f"{trunk}ForSequenceClassification"
    assert theirs.config.problem_type == "regression" and theirs.config.num_labels == 1
    assert config_in(tmp_path)["label2id"] == {"LABEL_0": 0}

    rng, lengths = torch.Generator().manual_seed(4), torch.tensor([1, 9, 4])
    tokens = torch.randint(98, (3, 9), generator=rng)
    padded = tokens.masked_fill(torch.arange(9) >= lengths[:, None], 98)
    seen = (padded != 98).long()
    expected = theirs(padded, attention_mask=seen).logits[:, 0]
    assert expected.std() > 0.1
    torch.testing.assert_close(model(tokens, lengths), expected, rtol=0, atol=1e-4)

    again = load_reward_model(tmp_path)
    assert torch.equal(again(tokens, lengths), model(tokens, lengths))
    assert again.unread == unread and again.whole
    assert load_reward_model(tmp_path, dtype=torch.bfloat16).score.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_reward_model_of_transformers_scores_alike_here(family, tmp_path):
    theirs = make_peer(family, "SequenceClassification", num_labels=1, pad_token_id=98)
    theirs.save_pretrained(tmp_path)
    model = load_reward_model(tmp_path)
    expected = theirs(ROW[:, 2:]).logits[0]
    torch.testing.assert_close(model(ROW[:, 2:], torch.tensor([6])), expected, rtol=0, atol=1e-4)


def test_a_language_model_is_not_a_reward_model_and_the_reverse(peer, tmp_path):
    folder = peer("llama")[1]
    with pytest.raises(UserError, match=r"has no 'score.weight': not a reward model"):
        load_reward_model(folder)
    save_pretrained(RewardModel(load_pretrained(folder)), tmp_path)
    with pytest.raises(UserError, match=r"is a reward model, not a language model.*its reward"):
        load_pretrained(tmp_path)
    assert (stored_head(tmp_path), stored_head(folder)) == ("score", None)


def test_a_score_head_of_two_outputs_is_refused(tmp_path):
    make_peer("llama", "SequenceClassification", num_labels=2).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"'score.weight' is \(2, 32\).*one output"):
        load_reward_model(tmp_path)


@torch.no_grad()
def make_ensemble(folder, lcb_coef: float = 0.5) -> RewardModel:
    model = RewardModel(load_pretrained(folder), heads=3, lcb_coef=lcb_coef)
    model.score.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(3))
    return model


OURS = {"reward_heads", "reward_lcb_coef", "reward_mean", "reward_std"}


@torch.no_grad()
def test_an_ensemble_comes_back_and_transformers_reads_its_heads(peer, tmp_path):
    model, length = make_ensemble(peer("llama")[1]), torch.tensor([8])
    save_pretrained(model, tmp_path, pad_token_id=98)
    again = load_reward_model(tmp_path)
    assert (again.heads, again.lcb_coef) == (3, 0.5)
    assert torch.equal(again(ROW, length), model(ROW, length))
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert theirs.config.num_labels == 3
    expected = theirs(ROW).logits
    torch.testing.assert_close(model.head_scores(ROW, length), expected, rtol=0, atol=1e-4)
    assert config_in(tmp_path).keys() & OURS == {"reward_heads", "reward_lcb_coef"}
    assert without_weights(tmp_path, reward=True).heads == 3


@torch.no_grad()
def test_what_normalises_scores_comes_back(peer, tmp_path):
    model = normalize_scores(make_ensemble(peer("llama")[1]), 3.0, 2.0)
    save_pretrained(model, tmp_path / "one")
    again, length = load_reward_model(tmp_path / "one"), torch.tensor([8])
    assert torch.equal(again(ROW, length), model(ROW, length))
    assert (again.reward_mean, again.reward_std) == (1.5, 1.0)
    # another tool may leave the scale beside the head
    edited = config_in(tmp_path / "one") | {"reward_mean": 1, "reward_std": 4}
    write_config(tmp_path / "one", edited)
    raw = model(ROW, length) + 1.5
    torch.testing.assert_close(load_reward_model(tmp_path / "one")(ROW, length), (raw - 1) / 4)
    # trained further without being normalised, nothing of it is left
    plain = load_reward_model(tmp_path / "one")
    plain.reward_mean, plain.reward_std = 0.0, 1.0
    save_pretrained(plain, tmp_path / "two")
    assert config_in(tmp_path / "two").keys() & OURS == {"reward_heads", "reward_lcb_coef"}


def test_a_single_head_needs_no_key_of_ours(peer, tmp_path):
    save_pretrained(RewardModel(load_pretrained(peer("llama")[1])), tmp_path)
    assert not config_in(tmp_path).keys() & OURS


@pytest.mark.parametrize(
    ("changes", "match"),  # of an ensemble of three
    [
        ({"reward_heads": 2}, r"'score.weight' is \(3, 32\): a reward model has 2 outputs"),
        ({"reward_heads": 1}, r"'score.weight' is \(3, 32\): a reward model has one output"),
        ({"reward_heads": None}, r"config.json: reward_heads: is None: needs an integer from 1"),
        ({"reward_heads": 0}, r"reward_heads: is 0: needs an integer from 1"),
        ({"reward_heads": True}, r"reward_heads: is True: needs an integer"),
        ({"reward_lcb_coef": -1}, r"reward_lcb_coef: is -1: 0 for a single head, else 0 or more"),
        ({"reward_lcb_coef": "1"}, r"reward_lcb_coef: is '1': needs a finite number"),
        ({"reward_mean": 10**400}, r"reward_mean: is 1000.*: needs a finite number"),
        ({"reward_mean": None}, r"reward_mean: is None: needs a finite number"),
        ({"reward_std": 0}, r"reward_std: is 0: needs a number above 0"),
        ({"reward_std": -2.0}, r"reward_std: is -2.0: needs a number above 0"),
    ],
)
def test_an_ensemble_whose_config_does_not_fit_is_refused(peer, tmp_path, changes, match):
    save_pretrained(make_ensemble(peer("llama")[1]), tmp_path)
    write_config(tmp_path, config_in(tmp_path) | changes)
    with pytest.raises(UserError, match=match):
        load_reward_model(tmp_path)


def test_a_lower_bound_of_a_single_head_is_refused(peer, tmp_path):
    save_pretrained(RewardModel(load_pretrained(peer("llama")[1])), tmp_path)
    write_config(tmp_path, config_in(tmp_path) | {"reward_lcb_coef": 1})
    with pytest.raises(UserError, match=r"reward_lcb_coef: is 1: 0 for a single head"):
        load_reward_model(tmp_path)


# ---- tensors: strict both ways -------------------------------------------------------------------


def test_parameters_are_aligned_whatever_the_file(peer):
    # Else the same weights from two files give products that differ in the last bit.
    for name in ("qwen2", "gpt2"):
        lm = load_pretrained(peer(name)[1])
        assert all(p.data_ptr() % 64 == 0 and p.is_contiguous() for p in lm.parameters())


def test_remarks_name_each_folder_whose_weights_lose_digits(peer, tmp_path):
    _, wide = peer("llama")
    save_pretrained(load_pretrained(wide, torch.bfloat16), tmp_path / "narrow")
    both = [wide, tmp_path / "narrow", wide]
    told = f"{wide}: weights are rounded to bfloat16, which can undo fine-tuning"
    assert remarks(both, torch.bfloat16) == [told]
    assert remarks(both, torch.float32) == []
    # float16 has as many bytes and more digits
    save_pretrained(load_pretrained(wide).half(), tmp_path / "half")
    assert len(remarks([tmp_path / "half"], torch.bfloat16)) == 1
    assert remarks([tmp_path / "narrow"], torch.float16) == []


@pytest.mark.parametrize("fails", [False, True])
def test_offloaded_models_come_back_as_they_were(peer, tmp_path, fails):
    _, folder = peer("llama")
    save_pretrained(make_ensemble(folder), tmp_path / "rm")
    lm = load_pretrained(folder, torch.float64)
    reward = load_reward_model(tmp_path / "rm", torch.float32)
    models = {lm: folder, reward: tmp_path / "rm"}
    before = [{n: t.clone() for n, t in model.state_dict().items()} for model in models]
    held = [weakref.ref(p) for model in models for p in model.parameters()]
    for model, place in models.items():
        offload(model, place)
    assert not any(there() is not None for there in held)  # nor does anyone else hold them
    for _ in range(2):  # each time
        assert all(t.is_meta for model in models for t in model.state_dict().values())
        try:
            with in_memory(*models), in_memory(reward):
                for model, was in zip(models, before, strict=True):
                    now = model.state_dict()
                    assert all(torch.equal(now[n], t) for n, t in was.items())
                    assert all(now[n].dtype == t.dtype for n, t in was.items())
                    assert not any(p.requires_grad for p in model.parameters())
                assert not fails or 1 / 0
        except ZeroDivisionError:
            pass
    assert (reward.heads, reward.lcb_coef) == (3, 0.5)
    with in_memory(there := load_pretrained(folder)):  # one that never left
        pass
    assert not next(there.parameters()).is_meta


def test_an_offloaded_model_whose_file_was_written_does_not_come_back(copy):
    folder = copy("llama")
    model = load_pretrained(folder)
    offload(model, folder)
    with in_memory(model):
        pass
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes())  # the same, for all that is known without reading it
    with pytest.raises(UserError, match="safetensors: has changed since it was read"):
        with in_memory(model):
            pass


def test_every_missing_extra_or_misshapen_tensor_is_named(copy):
    for name in ("qwen3-biases", "gpt2"):
        folder = copy(name)
        path = folder / "model.safetensors"
        tensors = load_file(path)
        assert len(tensors) > 20
        for tensor in tensors:
            named = re.escape(f"'{tensor}'")
            save_file(without(tensors, tensor), path)
            with pytest.raises(UserError, match=f"lacks {named}: incomplete download"):
                load_pretrained(folder)
            for wrong in (tensors[tensor][:1].clone(), torch.tensor(1.0), torch.ones(2, 2, 2)):
                save_file({**tensors, tensor: wrong}, path)
                got, right = re.escape(str(tuple(wrong.shape))), tuple(tensors[tensor].shape)
                told = f"{named} is {got}, config.json asks for {re.escape(str(right))}"
                with pytest.raises(UserError, match=told):
                    load_pretrained(folder)
        save_file({**tensors, "odd.weight": torch.ones(1)}, path)
        with pytest.raises(UserError, match=r"has '[a-z.]*odd.weight', which this architecture"):
            load_pretrained(folder)
        shutil.rmtree(folder)


def test_many_problems_are_counted(copy):
    folder = copy()
    save_file({"x": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks 'model.embed_tokens.weight'; .* and \d+ more"):
        load_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_tensors_of_another_kind_are_refused(dtype, copy):
    folder = copy()
    store(folder, {"model.norm.weight": torch.ones(32).to(dtype)})
    with pytest.raises(UserError, match=f"'model.norm.weight' is {dtype}"):
        load_pretrained(folder)


# ---- config.json ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "llama-llama3", "llama-yarn-given", "llama-linear"])
@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_the_older_spelling_of_config_json_is_the_same_model(kind, key, peer, copy):
    folder = copy(kind)
    values = config_in(folder)
    scaling = values.pop("rope_parameters")
    values["rope_theta"] = scaling.pop("rope_theta")
    scaling[key] = scaling.pop("rope_type")
    values["rope_scaling"] = None if scaling[key] == "default" else scaling
    values["torch_dtype"] = values.pop("dtype")
    write_config(folder, values)
    older, newer = load_pretrained(folder), load_pretrained(peer(kind)[1])
    assert older.config.rope_theta == newer.config.rope_theta
    assert torch.equal(older.logits(older(ROW)), newer.logits(newer(ROW)))
    save_pretrained(older, folder)
    assert config_in(folder) == in_both_spellings(config_in(peer(kind)[1]))


def test_config_defaults_are_those_of_transformers():
    for family in ("llama", "qwen2", "mistral", "qwen3"):
        config = config_from_hf({**LLAMA, "model_type": family, "head_dim": None})
        theirs = transformers.AutoConfig.for_model(family)
        assert config.norm_eps == theirs.rms_norm_eps
        assert config.rope_theta == theirs.rope_parameters["rope_theta"]
        assert config.tied_embeddings is theirs.tie_word_embeddings
        assert config.head_dim == (theirs.head_dim if family == "qwen3" else 32 // 4)
    assert config_from_hf({**LLAMA, "model_type": "mistral"}).sliding_window == 4096
    assert config_from_hf(without(LLAMA, "num_key_value_heads")).num_kv_heads == 4
    gpt2 = config_from_hf(GPT2)
    assert (gpt2.intermediate_size, gpt2.norm_eps, gpt2.tied_embeddings) == (32, 1e-5, True)
    assert (gpt2.activation, gpt2.norm, gpt2.positions) == ("gelu_tanh", "layer", "learned")


@pytest.mark.parametrize(
    "changes, window",
    [
        ({"model_type": "llama", "sliding_window": 8}, None),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": False}, None),
        ({"model_type": "qwen2", "sliding_window": 8}, None),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True}, 8),
        ({"model_type": "qwen2", "use_sliding_window": True}, 4096),
        ({"model_type": "qwen3", "sliding_window": 8, "layer_types": ["full_attention"] * 2}, None),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True,
          "layer_types": ["full_attention", "sliding_attention"]}, 8),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mistral", "sliding_window": 8}, 8),
    ],
)
def test_sliding_window_is_read_where_the_family_uses_it(changes, window):
    assert config_from_hf({**LLAMA, **changes}).sliding_window == window


@pytest.mark.parametrize(
    "family, asked, biases",  # of q, k, v; of the output; of the MLP
    [
        ("llama", False, (False, False, False)),
        ("llama", True, (True, True, True)),
        ("mistral", True, (False, False, False)),
        ("qwen2", False, (True, False, False)),
        ("qwen2", True, (True, False, False)),
        ("qwen3", True, (True, True, False)),
    ],
)
def test_biases_are_those_the_family_has(family, asked, biases):
    values = {**LLAMA, "model_type": family, "attention_bias": asked, "mlp_bias": asked}
    config = config_from_hf(values)
    assert (config.qkv_bias, config.out_bias, config.mlp_bias) == biases


ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters")
LINEAR, NEWER = {"rope_type": "linear", "factor": 4.0}, {"rope_type": "default", "rope_theta": 99.0}


@pytest.mark.parametrize(
    ("said", "theta", "scaling"),  # what is read: what transformers reads
    [
        ({"rope_theta": 7.0, "rope_scaling": LINEAR, "rope_parameters": NEWER}, 7.0, LINEAR),
        ({"rope_scaling": LINEAR, "rope_parameters": NEWER}, 10000.0, LINEAR),
        ({"rope_theta": 7.0, "rope_scaling": LINEAR | {"rope_theta": 50.0}}, 50.0, LINEAR),
        ({"rope_theta": 7.0, "rope_scaling": None, "rope_parameters": NEWER}, 99.0, None),
        ({"rope_theta": 7.0, "rope_scaling": {}, "rope_parameters": NEWER | LINEAR}, 99.0, LINEAR),
        ({"rope_theta": 7.0, "rope_parameters": LINEAR}, 7.0, LINEAR),
        ({"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 4.0}}, 7.0, LINEAR),
        ({"rope_theta": 7.0, "rope_scaling": {"type": "dynamic", **LINEAR}}, 7.0, LINEAR),
    ],
)
@torch.no_grad()
def test_of_two_spellings_of_rope_that_one_counts_which_transformers_reads(
    said, theta, scaling, copy
):
    folder = copy()
    write_config(folder, without(config_in(folder), "rope_parameters") | said)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert theirs.config.rope_parameters["rope_theta"] == theta
    lm = load_pretrained(folder)
    assert (lm.config.rope_theta, lm.config.rope_scaling) == (theta, scaling)
    torch.testing.assert_close(lm.logits(lm(ROW)), theirs(ROW).logits, rtol=0, atol=1e-4)
    save_pretrained(lm, folder)  # what was read stands there in both spellings
    written = config_in(folder)
    assert (written["rope_theta"], written["rope_scaling"]) == (theta, scaling)
    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(again(ROW).logits, theirs(ROW).logits)


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_what_version_4_needs_of_rope_is_written_out(kind):
    scaling = without(conftest.ROPE[kind], "original_max_position_embeddings")
    values = {**LLAMA, "rope_scaling": {"rope_type": kind, **scaling}}
    written = config_to_hf(config_from_hf(values))["rope_scaling"]
    assert written == {"rope_type": kind, **scaling, "original_max_position_embeddings": 64}


def test_unknown_keys_are_carried_through():
    values = {**LLAMA, "architectures": ["LlamaForCausalLM"], "note": [1]}
    code = {"auto_map": {"AutoModel": "x.Y"}, "_attn_implementation_internal": "owner/kernel"}
    written = without(config_to_hf(config_from_hf(values | code)), *ROPE_KEYS)
    assert written == values  # save for what names code


ROPED = {"rope_theta": 500.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0}
BAD = [  # more are in tests/test_bad_models.py
    (LLAMA, {"model_type": "mamba"}, "model_type: is 'mamba': supported: llama, mistral, qwen2"),
    (LLAMA, {"model_type": ["llama"]}, "model_type: is"),
    (LLAMA, {"hidden_size": None}, "hidden_size: is None: must be an integer from 1"),
    (LLAMA, {"hidden_size": 0}, "hidden_size: is 0"),
    (LLAMA, {"hidden_size": 32.0}, "hidden_size: is 32.0"),
    (LLAMA, {"hidden_size": True}, "hidden_size: is True"),
    (LLAMA, {"hidden_size": 30}, "hidden_size: is 30: must be a multiple of the 4"),
    (LLAMA, {"vocab_size": -1}, "vocab_size: is -1"),
    (LLAMA, {"intermediate_size": [48]}, "intermediate_size: is"),
    (LLAMA, {"num_hidden_layers": 10**6}, "num_hidden_layers: is 1000000: .* to 1024"),
    (LLAMA, {"num_attention_heads": 0}, "num_attention_heads: is 0"),
    (LLAMA, {"num_key_value_heads": 3}, "num_key_value_heads: is 3: must divide the 4"),
    (LLAMA, {"num_key_value_heads": 8}, "num_key_value_heads: is 8: must divide the 4"),
    (LLAMA, {"head_dim": 7}, "head_dim: is 7: must be even"),
    (LLAMA, {"head_dim": 0}, "head_dim: is 0"),
    (LLAMA, {"hidden_size": 4, "num_key_value_heads": 4}, "head_dim: is 1: must be even"),
    (LLAMA, {"max_position_embeddings": None}, "max_position_embeddings: is None"),
    (LLAMA, {"rms_norm_eps": 0}, "rms_norm_eps: is 0: must be a positive number"),
    (LLAMA, {"rms_norm_eps": "1e-5"}, "rms_norm_eps: is '1e-5'"),
    (LLAMA, {"rms_norm_eps": 1e-31}, "rms_norm_eps: is 1e-31: must be a positive number"),
    (LLAMA, {"initializer_range": "0.1"}, "initializer_range: is '0.1': must be a positive number"),
    (LLAMA, {"initializer_range": None}, "initializer_range: is None: must be .*, or left out"),
    (LLAMA, {"rope_theta": 1.0}, "rope_theta: is 1.0: must be above 1"),
    (LLAMA, {"rope_parameters": {"rope_theta": 0.5}}, "rope_parameters: rope_theta: is 0.5: must"),
    (LLAMA, {"rope_theta": 10**400}, "rope_theta: is 10000"),
    (LLAMA, {"hidden_act": "relu"}, "hidden_act: is 'relu': supported: silu"),
    (LLAMA, {"hidden_act": ["silu"]}, "hidden_act: is"),
    (LLAMA, {"hidden_act": "x\n" * 99}, r"hidden_act: is 'x\\nx\\n.{60,80}…: supported"),
    (LLAMA, {"attention_bias": "no"}, "attention_bias: is 'no': must be true or false"),
    (LLAMA, {"mlp_bias": 1}, "mlp_bias: is 1"),
    (LLAMA, {"tie_word_embeddings": "false"}, "tie_word_embeddings: is 'false'"),
    (GPT2, {"quantization": {"group_size": 64}}, "quantization: is .*quantised weights are"),
    (LLAMA, {"pretraining_tp": 2}, "pretraining_tp: is 2: not implemented; supported: 1"),
    (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor: is 0.5"),
    (LLAMA, {"rope_scaling": "yarn"}, "rope_scaling: is 'yarn': must be one object"),
    (LLAMA, {"rope_scaling": {"type": "longrope"}}, "rope_scaling: rope_type: is 'longrope': supp"),
    (LLAMA, {"rope_scaling": {"type": ["linear"]}}, "rope_type: is"),
    (LLAMA, {"rope_scaling": {"type": "linear", "factor": "2"}}, "factor: is '2'"),
    (LLAMA, {"rope_scaling": {"type": "yarn", "factor": None}}, "factor: is None"),
    (LLAMA, {"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": "1"}}, "beta_fast: is '1'"),
    (LLAMA, {"rope_scaling": {"type": "yarn", "factor": 2, "mscale": 1.0}}, "mscale: is 1.0: YaRN"),
    (LLAMA, {"rope_scaling": {"type": "yarn", "factor": 2, "truncate": False}}, "truncate: is F"),
    (LLAMA, {"rope_parameters": {**ROPED, "rope_theta": -1}}, "rope_parameters: rope_theta: is -1"),
    (LLAMA, {"rope_parameters": {**ROPED, "factor": None}}, "rope_parameters: factor: is None"),
    (LLAMA, {"rope_parameters": {**ROPED, "low_freq_factor": 4.0}}, "low_freq_factor: is 4.0"),
    (LLAMA, {"rope_parameters": {**ROPED, "original_max_position_embeddings": 1.5}}, "is 1.5"),
    (LLAMA, {"rope_parameters": {**ROPED, "partial_rotary_factor": 0.5}}, "partial_rotary_f.* 0.5"),
    (LLAMA, {"rope_parameters": {"full_attention": ROPED}}, "rope_parameters: is .*same for all"),
    (LLAMA, {"model_type": "mistral", "sliding_window": 0}, "sliding_window: is 0"),
    (LLAMA, {"model_type": "qwen2", "use_sliding_window": 1}, "use_sliding_window: is 1"),
    (LLAMA, {"model_type": "qwen2", "layer_types": 5}, "layer_types: is 5: must be a list"),
    (GPT2, {"n_embd": 9}, "hidden_size: is 9: must be a multiple of the 2"),
    (GPT2, {"n_inner": 0}, "n_inner: is 0"),
    (GPT2, {"n_positions": None}, "n_positions: is None"),
    (GPT2, {"activation_function": "mish"}, "activation_function: is 'mish'"),
    (GPT2, {"scale_attn_weights": False}, "scale_attn_weights: is False: .*supported: True"),
    (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: is True"),
    (GPT2, {"add_cross_attention": True}, "add_cross_attention: is True"),
]


@pytest.mark.parametrize("base, changes, told", BAD, ids=[str(row[1])[:50] for row in BAD])
def test_bad_values_of_config_json_are_refused_by_key(base, changes, told):
    config_from_hf(base)
    with pytest.raises(UserError, match=f"^the/config.json: .*{told}"):
        config_from_hf({**base, **changes}, "the/config.json")


def test_the_largest_sizes_allowed_fit_an_element_count():
    keys = ("hidden_size", "intermediate_size", "head_dim", "num_attention_heads")
    values = {**LLAMA, **dict.fromkeys(keys, 2**20), "num_hidden_layers": 1, "vocab_size": 2**31}
    with torch.device("meta"):
        assert CausalLM(config_from_hf(values)).lm_head.weight.shape == (2**31, 2**20)


def test_config_json_must_be_an_object(copy):
    write_config(folder := copy(), [1])
    with pytest.raises(UserError, match=r"config\.json: is a list: must be a JSON object$"):
        load_pretrained(folder)


def test_save_pretrained_tells_an_error_of_the_library_in_one_line(tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("no space left")

    monkeypatch.setattr(pretrained, "save_file", full)
    lm = CausalLM(config_from_hf(LLAMA))
    with pytest.raises(UserError, match=r"cannot be written \(no space left\)") as told:
        save_pretrained(lm, tmp_path)
    assert told.value.code == MACHINE
