import json
import re
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minirlhf.errors import UserError
from minirlhf.files.folders import resolve
from minirlhf.models import fingerprint as prints
from minirlhf.models.heads import RewardModel, ValueHeadModel, initialize_score, normalize_scores
from minirlhf.models.lora import adapters, add_lora, base_of, merge_lora, trunk_of
from minirlhf.models.peft_files import TENSORS, load_adapter, save_adapter
from minirlhf.models.pretrained import (
    load_pretrained,
    load_reward_model,
    read_config,
    remarks,
    save_pretrained,
    stored_head,
    without_weights,
)
from minirlhf.models.quantized import quantize_trunk
from minirlhf.streams import generator
from tests.conftest import EACH_FAMILY, make_peer
from tests.tiny_folders import change_json

ROW = torch.tensor([[5, 98, 0, 41, 7, 7, 63, 12]])
LENGTHS = torch.tensor([8])
CLOSE = {"rtol": 0, "atol": 1e-4}
KINDS = {  # of peft's LoraConfig
    "lora": {"target_modules": "all-linear"},
    "rslora": {"target_modules": "all-linear", "use_rslora": True, "r": 4},
    "dora": {"target_modules": "all-linear", "use_dora": True},
}
CHOICES = {
    "list": {"target_modules": ["q_proj", "down_proj"]},
    "regex": {"target_modules": r".*\.(q|o)_proj"},
    "patterns": {"target_modules": ["q_proj", "v_proj", "up_proj"],
                 "rank_pattern": {"v_proj": 5, r"layers\.1\.mlp\.up_proj": 1},
                 "alpha_pattern": {"model.layers.0.self_attn.q_proj": 2.5, "^model.*up_proj": 9}},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "exclude": {"target_modules": ["q_proj", "k_proj"], "exclude_modules": [r".*\.1\..*k_proj"]},
}


@pytest.fixture(scope="session")
def peft():
    return pytest.importorskip("peft")


def shake(model, names=("lora_A", "lora_B", "magnitude", "score"), seed=3):
    """Moves what is trained away from where it starts."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in names):
                parameter.add_(torch.randn(parameter.shape, generator=rng) * 0.2)
    return model


def made_by_peft(peft, model, folder, base, **kind):
    """A model with adapters as peft has them, saved; its base's folder named in the file."""
    settings = {"r": 3, "lora_alpha": 8, "task_type": "CAUSAL_LM", **kind}
    adapted = shake(peft.get_peft_model(model, peft.LoraConfig(**settings)).eval())
    adapted.save_pretrained(folder)
    change_json(folder / "adapter_config.json", base_model_name_or_path=str(base))
    return adapted


@pytest.fixture
def world(peft, tmp_path):
    """make(name, head, **kind) -> (peft's model, its folder, its base's folder)."""

    def make(name="llama", head="CausalLM", **kind):
        base = tmp_path / "base"
        lm = make_peer(name, "CausalLM")
        lm.save_pretrained(base)
        if head == "SequenceClassification":
            kind = {"task_type": "SEQ_CLS", **kind}
            model = make_peer(name, head, num_labels=1, pad_token_id=1)
            trunk = lm.base_model_prefix
            getattr(model, trunk).load_state_dict(getattr(lm, trunk).state_dict())
        else:
            model = lm
        folder = tmp_path / "adapter"
        return made_by_peft(peft, model, folder, base, **kind), folder, base

    return make


def logits(lm):
    return lm.logits(lm(ROW))


# ---- from peft -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", EACH_FAMILY)
def test_an_adapter_made_by_peft_computes_the_same_here(family, kind, world):
    theirs, folder, base = world(family, **KINDS[kind])
    with torch.no_grad():
        wanted = theirs(ROW).logits
    torch.testing.assert_close(logits(load_pretrained(folder)), wanted, **CLOSE)
    unmerged = load_adapter(load_pretrained(base), folder)
    torch.testing.assert_close(logits(unmerged), wanted, **CLOSE)
    torch.testing.assert_close(logits(base_of(unmerged)), logits(load_pretrained(base)))
    assert not torch.allclose(logits(load_pretrained(base)), wanted, atol=0.01)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("choice", CHOICES)
def test_which_layers_an_adapter_of_peft_has_its_tensors_tell(choice, world):
    theirs, folder, base = world(**CHOICES[choice])
    with torch.no_grad():
        wanted = theirs(ROW).logits
    torch.testing.assert_close(logits(load_pretrained(folder)), wanted, **CLOSE)
    theirs_has = {n.removeprefix("base_model.model.model.").removesuffix(".lora_A")
                  for n, _ in theirs.named_modules() if n.endswith(".lora_A")}
    assert adapters(load_adapter(load_pretrained(base), folder).model).keys() == theirs_has


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("saved", [None, ["score"]])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_reward_model_made_by_peft_scores_the_same_here(family, saved, world):
    kind = {"target_modules": "all-linear", "modules_to_save": saved}
    theirs, folder, base = world(family, "SequenceClassification", **kind)
    with torch.no_grad():
        wanted = theirs(ROW).logits[:, 0]
    model = load_reward_model(folder)
    torch.testing.assert_close(model(ROW, LENGTHS), wanted, **CLOSE)
    assert stored_head(folder) == "score" and stored_head(base) is None
    fresh = load_adapter(RewardModel(load_pretrained(base)), folder, trainable=False)
    torch.testing.assert_close(fresh(ROW, LENGTHS), wanted, **CLOSE)
    assert not any(p.requires_grad for p in fresh.parameters())


# ---- to peft -------------------------------------------------------------------------------------


def ours(folder, wrap=lambda lm: lm, **kind):
    model = wrap(load_pretrained(folder))
    return shake(add_lora(model, 3, 8.0, **kind))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [{}, {"rslora": True}, {"dora": True}], ids=["lora", "rs", "dora"])
@pytest.mark.parametrize("targets", [("all",), ("attention",), ("q_proj", "*.0.mlp.down_proj")])
@pytest.mark.parametrize("family", EACH_FAMILY)
def test_peft_computes_the_same_of_an_adapter_of_ours(family, targets, kind, peft, peer, tmp_path):
    _, base = peer(family)
    lm = ours(base, targets=targets, **kind)
    save_adapter(lm, tmp_path, str(base))
    theirs = peft.PeftModel.from_pretrained(make_peer(family, "CausalLM"), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ROW).logits, logits(lm), **CLOSE)
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()  # finds the base
    with torch.no_grad():
        torch.testing.assert_close(auto(ROW).logits, logits(lm), **CLOSE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_transformers_scores_the_same_by_an_adapter_of_ours(family, peft, peer, tmp_path):
    import transformers

    _, base = peer(family)
    model = ours(base, lambda lm: initialize_score(RewardModel(lm, unread=1), generator(0, "s")))
    save_adapter(model, tmp_path, str(base), pad_token_id=1)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["score"]
    scorer = transformers.AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, pad_token_id=1)
    theirs = peft.PeftModel.from_pretrained(scorer, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ROW).logits[:, 0], model(ROW, LENGTHS), **CLOSE)


# ---- here and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [{}, {"rslora": True}, {"dora": True}], ids=["lora", "rs", "dora"])
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_an_adapter_comes_back_bit_for_bit(family, kind, dtype, peer, tmp_path):
    # GPT-2's three adapters too: one with a block-diagonal B in the file, and split again.
    _, base = peer(family)
    lm = shake(add_lora(load_pretrained(base, dtype), 3, 8.0, **kind))
    save_adapter(lm, tmp_path, str(base))
    again = load_adapter(load_pretrained(base, dtype), tmp_path)
    was, now = lm.state_dict(), again.state_dict()
    assert was.keys() == now.keys() and all(torch.equal(was[n], now[n]) for n in was)
    assert torch.equal(logits(again), logits(lm))
    trained = {n for n, p in again.named_parameters() if p.requires_grad}
    assert trained == {n for n in was if ".lora_" in n or ".magnitude" in n}
    save_adapter(again, tmp_path / "twice", str(base))
    assert (tmp_path / TENSORS).read_bytes() == (tmp_path / "twice" / TENSORS).read_bytes()
    one, two = (json.loads((tmp_path / f"{sub}adapter_config.json").read_text())
                for sub in ("", "twice/"))
    assert one.pop("lora_alpha") == pytest.approx(two.pop("lora_alpha"), rel=1e-15)
    alphas = one.pop("alpha_pattern"), two.pop("alpha_pattern")
    assert alphas[0] == pytest.approx(alphas[1], rel=1e-15)
    assert one == two


def test_a_shared_a_of_gpt2_is_written_once(peer, tmp_path):
    _, base = peer("gpt2")
    lm = ours(base, targets=("q_proj", "k_proj", "v_proj"))
    attention = lm.model.layers[0].self_attn
    with torch.no_grad():
        for layer in (attention.k_proj, attention.v_proj):
            layer.lora_A.copy_(attention.q_proj.lora_A)
    save_adapter(lm, tmp_path, str(base))
    kept = load_file(tmp_path / TENSORS)
    ranks = [len(tensor) for name, tensor in sorted(kept.items()) if "lora_A" in name]
    assert ranks == [3, 9]
    torch.testing.assert_close(logits(load_pretrained(tmp_path)), logits(lm), **CLOSE)


def test_a_merged_model_is_rounded_once(peer, tmp_path):
    # Adapters are merged in float32 although base and adapter are read in bfloat16.
    _, base = peer("llama")
    lm = shake(add_lora(load_pretrained(base), 3, 8.0))
    save_adapter(lm, tmp_path, str(base))
    with torch.no_grad():
        for layer in adapters(lm).values():
            layer.base.weight.copy_(layer.base.weight.bfloat16())
    wanted = merge_lora(lm).model.layers[0].mlp.up_proj.weight.bfloat16()
    got = load_pretrained(tmp_path, torch.bfloat16).model.layers[0].mlp.up_proj.weight
    assert torch.equal(got, wanted)


def test_an_adapter_that_would_lose_digits_is_told_of(peer, tmp_path):
    _, base = peer("llama")
    save_pretrained(load_pretrained(base, torch.bfloat16), tmp_path / "base")
    lm = shake(add_lora(load_pretrained(tmp_path / "base", torch.float32), 3, 8.0))
    save_adapter(lm, tmp_path / "adapter", "../base")
    assert remarks([tmp_path / "base"], torch.bfloat16) == []
    assert remarks([tmp_path / "adapter"], torch.float32) == []
    (line,) = remarks([tmp_path / "adapter"], torch.bfloat16)
    assert line.startswith(f"{tmp_path / 'adapter'}: weights are rounded to bfloat16")


def test_an_ensemble_that_is_normalised_comes_back(peer, tmp_path):
    _, base = peer("llama")
    model = RewardModel(load_pretrained(base), unread=1, heads=3, lcb_coef=0.5)
    initialize_score(model, *(generator(i, "score") for i in range(3)))
    model.whole = False
    shake(add_lora(normalize_scores(model, 0.7, 2.0), 3, 8.0))
    save_adapter(model, tmp_path, str(base), pad_token_id=1)
    unmerged = RewardModel(load_pretrained(base), heads=3)
    for again in (load_reward_model(tmp_path), load_adapter(unmerged, tmp_path)):
        torch.testing.assert_close(again(ROW, LENGTHS), model(ROW, LENGTHS), **CLOSE)
        assert (again.unread, again.whole, again.lcb_coef) == (1, False, 0.5)
        assert again.reward_mean == model.reward_mean
    save_pretrained(load_reward_model(tmp_path), tmp_path / "merged", pad_token_id=1)
    again = load_reward_model(tmp_path / "merged")
    torch.testing.assert_close(again(ROW, LENGTHS), model(ROW, LENGTHS), **CLOSE)


def test_a_critic_is_left_out(peer, tmp_path):
    _, base = peer("llama")
    model = ours(base, ValueHeadModel)
    save_adapter(model, tmp_path, str(base))
    torch.testing.assert_close(logits(load_pretrained(tmp_path)), logits(model.lm), **CLOSE)
    critic = load_adapter(ValueHeadModel(load_pretrained(base)), tmp_path)
    assert critic.v_head.weight.requires_grad and not critic.lm.unembedding.requires_grad


def test_what_the_files_say(peer, tmp_path):
    _, base = peer("llama")
    save_adapter(ours(base, targets=("attention",)), tmp_path, "models/base", dropout=0.1)
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "models/base",
        "revision": None, "inference_mode": True, "r": 3, "lora_alpha": 8, "lora_dropout": 0.1,
        "target_modules": ["k_proj", "o_proj", "q_proj", "v_proj"], "rank_pattern": {},
        "alpha_pattern": {}, "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True,
        "layers_pattern": None, "layers_to_transform": None, "modules_to_save": None,
        "use_rslora": False, "use_dora": False,
    }
    with safe_open(tmp_path / TENSORS, "pt") as file:
        names = sorted(file.keys())
        assert file.metadata() == {
            "format": "pt", "base_fingerprint": fingerprint(load_pretrained(base))}
    assert names[:2] == [f"base_model.model.model.layers.0.self_attn.k_proj.lora_{x}.weight"
                         for x in "AB"]
    assert len(names) == 2 * 4 * 2


def test_save_adapter_refuses_a_model_without(peer, tmp_path):
    lm = load_pretrained(peer("llama")[1])
    with pytest.raises(ValueError, match="has no adapters: call add_lora first"):
        save_adapter(lm, tmp_path, "base")


def test_save_adapter_refuses_numbers_that_are_not_finite(peer, tmp_path):
    lm = ours(peer("llama")[1])
    lm.model.layers[0].mlp.up_proj.lora_B.data[0, 0] = torch.nan
    with pytest.raises(UserError, match="1 numbers of 144 that are not finite"):
        save_adapter(lm, tmp_path / "out", "base")
    assert not (tmp_path / "out").exists()


# ---- fingerprints --------------------------------------------------------------------------------


def fingerprint(model):
    return prints.fingerprint(trunk_of(model))


def test_fingerprint_is_of_the_base_in_any_dtype(peer):
    _, base = peer("llama")
    lm = load_pretrained(base)
    known = fingerprint(lm)
    assert fingerprint(load_pretrained(base, torch.bfloat16)) == known
    assert fingerprint(ValueHeadModel(lm)) == fingerprint(RewardModel(lm)) == known
    shake(add_lora(lm, 3, 8.0))
    assert fingerprint(lm) == known
    assert fingerprint(merge_lora(lm)) != known


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("bits", [8, 4])
def test_fingerprint_is_of_the_weights_before_they_are_packed(bits, family, peer, tmp_path):
    _, base = peer(family)
    lm = load_pretrained(base, trunk_bits=bits)
    later = load_pretrained(base)
    quantize_trunk(later, bits)
    known = fingerprint(load_pretrained(base))
    assert fingerprint(lm) == fingerprint(later) == known
    save_adapter(shake(add_lora(lm, 3, 8.0)), tmp_path, str(base))
    again = load_adapter(load_pretrained(base, trunk_bits=bits), tmp_path)
    assert torch.equal(logits(again), logits(lm)) and fingerprint(again) == known
    wide = load_pretrained(tmp_path)  # on the weights themselves, as other tools would use it
    assert fingerprint(merge_lora(again)) != fingerprint(wide)
    packed = load_pretrained(tmp_path, trunk_bits=bits)  # packed after it is merged
    torch.testing.assert_close(logits(packed), logits(wide), rtol=0, atol=0.5 if bits == 8 else 6.0)


@pytest.mark.parametrize("name", ["embed_tokens.weight", "layers.1.mlp.up_proj.weight"])
def test_fingerprint_sees_one_weight(name, peer):
    lm = load_pretrained(peer("llama")[1])
    known = fingerprint(lm)
    lm.model.get_parameter(name).data[0, 0] += 1
    assert fingerprint(lm) != known


# ---- where the base is ---------------------------------------------------------------------------


@pytest.fixture
def kept(peer, tmp_path):
    """An adapter of ours in tmp_path/run/adapter whose base is tmp_path/models/base."""
    shutil.copytree(peer("llama")[1], tmp_path / "models" / "base")
    lm = ours(tmp_path / "models" / "base")
    save_adapter(lm, tmp_path / "run" / "adapter", "models/base")
    return tmp_path, logits(lm)


@pytest.mark.parametrize("name, where", [
    ("../../models/base", "elsewhere"), ("models/base", "."), ("models/base", "elsewhere"),
    ("base", "models"),
], ids=["adapter", "working directory", "around the adapter", "below"])
def test_a_base_is_found(name, where, kept, monkeypatch):
    root, wanted = kept
    (root / "elsewhere").mkdir()
    monkeypatch.chdir(root / where)
    change_json(root / "run/adapter/adapter_config.json", base_model_name_or_path=name)
    folder = resolve(root / "run/adapter")
    assert folder.base.resolve() == root / "models/base"
    torch.testing.assert_close(logits(load_pretrained(folder)), wanted, **CLOSE)
    torch.testing.assert_close(logits(load_pretrained(root / "run/adapter")), wanted, **CLOSE)


def test_a_base_that_is_given_is_taken(kept):
    root, wanted = kept
    change_json(root / "run/adapter/adapter_config.json", base_model_name_or_path="gone")
    folder = resolve(root / "run/adapter", base=root / "models/base")
    assert folder == root / "run/adapter" and folder.base == root / "models/base"
    torch.testing.assert_close(logits(load_pretrained(folder)), wanted, **CLOSE)


@pytest.mark.parametrize("name, message", [
    ("gone", r"adapter: its base gone: no such folder: give the base's folder with --base"),
    (None, r"adapter_config.json: base_model_name_or_path: is None: name the base with --base"),
    (["a"], r"is \['a'\]: name the base with --base"),
    ("", "is '': name the base with --base"),
    ("a\0b", r"is 'a\\x00b': name the base"),
    ("x" * 999, "no such folder|too long"),
    (".", "is an adapter itself: merge that into its own base first"),
], ids=["gone", "none", "list", "empty", "nul", "long", "itself"])
def test_a_base_that_is_not_found_is_refused(name, message, kept):
    root, _ = kept
    change_json(root / "run/adapter/adapter_config.json", base_model_name_or_path=name)
    with pytest.raises(UserError, match=message):
        resolve(root / "run/adapter")


def test_a_base_of_a_revision_is_refused(kept):
    root, _ = kept
    change_json(root / "run/adapter/adapter_config.json", base_model_name_or_path="o/gone",
                revision="v2")
    with pytest.raises(UserError, match="is of revision 'v2' of o/gone: download that, and give"):
        resolve(root / "run/adapter")


# ---- refused -------------------------------------------------------------------------------------

REFUSED = [
    ({"peft_type": "IA3"}, r"adapter: holds an adapter \(IA3\), which is not read: merge it into"),
    ({"peft_type": "PREFIX_TUNING"}, r"adapter \(PREFIX_TUNING\), which is not read"),
    ({"peft_type": None}, r"adapter \(None\), which is not read"),
    ({"target_parameters": ["mlp.w"]}, r"target_parameters: is \['mlp.w'\], which is not read: me"),
    ({"trainable_token_indices": [3]}, "trainable_token_indices: is "),
    ({"bias": "all"}, "bias: is 'all', which is not read"),
    ({"lora_bias": True}, "lora_bias: is True, which is not read"),
    ({"use_qalora": True}, "use_qalora: is True, which is not read"),
    ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication: is "),
    ({"init_lora_weights": "pissa"}, "is 'pissa', which changes the base's weights too: merge it"),
    ({"init_lora_weights": "olora"}, "is 'olora', which changes the base's weights too"),
    ({"modules_to_save": ["lm_head"]}, r"modules_to_save: is \['lm_head'\], which is not read"),
    ({"use_rslora": 1}, "use_rslora: is 1: must be true or false"),
    ({"r": 4}, r"lora_A.weight' is \(3, 48\), its base and rank 4 ask for \(4, 48\)"),
    ({"r": 0}, "r: is 0: must be a whole number above 0, at most 32,768"),
    ({"r": 2.0}, "r: is 2.0: must be a whole number"),
    ({"lora_alpha": -1}, "lora_alpha: is -1: must be a number above 0"),
    ({"lora_alpha": "8"}, "lora_alpha: is '8': must be a number"),
    ({"alpha_pattern": []}, None),
    ({"alpha_pattern": [8]}, r"alpha_pattern: is \[8\]: must be an object"),
    ({"alpha_pattern": {"q_proj": True}}, "alpha_pattern: is True for 'q_proj': must be a number"),
    ({"rank_pattern": {"(a+)+b": 3}}, r"rank_pattern: has the pattern '\(a\+\)\+b': write names"),
    ({"rank_pattern": {".*.*.*a": 3}}, "has the pattern"),
    ({"rank_pattern": {"(": 3}}, r"has the pattern '\('"),
    ({"rank_pattern": {"q_proj": 2}}, "its base and rank 2 ask for"),
    ({"use_dora": True}, r"lacks '.*lora_magnitude_vector': adapter_config.json says use_dora is "),
]


@pytest.mark.parametrize("changes, message", REFUSED, ids=lambda x: str(x)[:40])
def test_an_adapter_of_another_kind_is_refused(changes, message, kept):
    root, _ = kept
    change_json(root / "run/adapter/adapter_config.json", **changes)
    if message is None:
        load_pretrained(root / "run/adapter", torch.float32)
        return
    with pytest.raises(UserError, match=message):
        without_weights(root / "run/adapter")
    with pytest.raises(UserError, match=message):
        load_adapter(load_pretrained(root / "models/base"), root / "run/adapter")


UP = "base_model.model.model.layers.0.mlp.up_proj.lora_"
NAN = torch.full((3, 32), torch.nan)
SPOILT = [
    ({f"{UP}A.weight": None}, "lacks '.*up_proj.lora_A.weight'"),
    ({f"{UP}A.weight": None, f"{UP}B.weight": None}, "lacks '.*up_proj.lora_A.weight', which adap"),
    ({f"{UP}A.weight": NAN}, "up_proj.lora_A.weight' holds numbers that are not finite: the train"),
    ({f"{UP}A.weight": torch.zeros(3, 31)}, r"\(3, 31\), its base and rank 3 ask for \(3, 32\): g"),
    ({f"{UP}B.weight": torch.zeros(47, 3)}, r"\(47, 3\), its base and rank 3 ask for \(48, 3\)"),
    ({f"{UP}A.weight": torch.zeros(96)}, r"\(96,\), its base"),
    ({f"{UP}A.weight": torch.zeros(3, 32, dtype=torch.int8)}, "int8: floating-point"),
    ({f"{UP}magnitude_vector": torch.ones(48)}, "has '.*magnitude_vector': .* use_dora is false"),
    ({"base_model.model.lm_head.lora_A.weight": torch.zeros(3, 32),
      "base_model.model.lm_head.lora_B.weight": torch.zeros(99, 3)},
     "adapts 'lm_head', which its base lacks"),
    ({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(3, 99)},
     "embed_tokens.lora_embedding_A', which is no adapter of a linear layer: merge it"),
    ({"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.zeros(3, 32),
      "base_model.model.model.layers.9.mlp.up_proj.lora_B.weight": torch.zeros(48, 3)},
     "adapts 'model.layers.9.mlp.up_proj', which its base lacks"),
    ({"base_model.model.score.weight": torch.zeros(1, 32)}, "is a reward model's adapter, not a"),
]


@pytest.mark.parametrize("changes, message", SPOILT, ids=lambda x: str(x)[:40])
def test_tensors_that_do_not_fit_are_refused(changes, message, kept):
    root, _ = kept
    path = root / "run/adapter" / TENSORS
    tensors = load_file(path) | changes
    save_file({n: t for n, t in tensors.items() if t is not None}, path)
    for look in (without_weights, load_pretrained):
        with pytest.raises(UserError, match=message):
            look(root / "run/adapter")
    with pytest.raises(UserError, match=message):
        load_adapter(load_pretrained(root / "models/base"), root / "run/adapter")


def test_a_truncated_adapter_is_refused(kept):
    path = kept[0] / "run/adapter" / TENSORS
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match="not a whole safetensors file: 5 bytes shorter"):
        load_pretrained(kept[0] / "run/adapter")


def test_pickles_are_refused(kept):
    path = kept[0] / "run/adapter" / TENSORS
    path.rename(path.with_name("adapter_model.bin"))
    match = "adapter_model.bin: pickle files are not read: peft writes adapter_model.safetensors"
    with pytest.raises(UserError, match=match):
        load_pretrained(kept[0] / "run/adapter")


def test_an_adapter_without_tensors_is_refused(kept):
    (kept[0] / "run/adapter" / TENSORS).unlink()
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors: incomplete"):
        load_pretrained(kept[0] / "run/adapter")


def test_another_base_is_refused_by_its_fingerprint(kept):
    root, _ = kept
    lm = load_pretrained(root / "models/base")
    lm.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    save_pretrained(lm, root / "models/base")
    match = "adapter: was trained on another base: the weights of this one differ: give the base"
    with pytest.raises(UserError, match=match):
        load_pretrained(root / "run/adapter")


def test_a_reward_model_is_not_made_without_its_head(kept):
    root, _ = kept
    match = "is an adapter without 'score.weight': the head of its reward model would be random"
    with pytest.raises(UserError, match=match):
        load_reward_model(root / "run/adapter")
    with pytest.raises(UserError, match=match):
        load_adapter(RewardModel(load_pretrained(root / "models/base")), root / "run/adapter")


@pytest.mark.parametrize("header", ['{"mean', '[1]', '{"trust_remote_code": true}'])
def test_a_header_that_is_not_ours_is_refused(header, peer, tmp_path):
    _, base = peer("llama")
    model = ours(base, lambda lm: RewardModel(lm, unread=1))
    save_adapter(model, tmp_path, str(base), pad_token_id=1)
    save_file(load_file(tmp_path / TENSORS), tmp_path / TENSORS, {"reward": header})
    with pytest.raises(UserError, match=re.escape(TENSORS)):
        read_config(tmp_path)


def test_a_second_adapter_is_refused(kept):
    root, _ = kept
    lm = load_adapter(load_pretrained(root / "models/base"), root / "run/adapter")
    with pytest.raises(ValueError, match="has adapters already: call merge_lora"):
        load_adapter(lm, root / "run/adapter")
