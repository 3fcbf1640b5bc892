"""Heads as peers save them. Scores are compared with transformers' hidden states under the head
as the peer's own code applies it: to the last hidden state, with the bias where there is one."""

import json
import re
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from minirlhf.errors import UserError
from minirlhf.models.heads import ValueHeadModel, critic_from_reward_model
from minirlhf.models.pretrained import (
    load_pretrained,
    load_reward_model,
    load_value_head,
    remarks,
    save_pretrained,
    stored_head,
    without_weights,
)
from tests.conftest import EACH_FAMILY, make_peer
from tests.tiny_folders import change_json

ROW, LENGTH = torch.tensor([[5, 98, 0, 41, 7, 7, 63, 12]]), torch.tensor([8])
WEIGHT = torch.linspace(-1, 1, 32)[None]
BIAS = torch.tensor([0.75])
TRL = {"v_head.summary.weight": WEIGHT, "v_head.summary.bias": BIAS}


@pytest.fixture
def saved(peer, tmp_path):
    """saved(family, head, …) -> (transformers' last hidden states of ROW (8, 32); the folder)."""

    def save(family="llama", head=TRL, beside=False, prefix="", keep_lm=True, **config):
        theirs, folder = peer(family)
        folder = shutil.copytree(folder, tmp_path / "peer")
        path = folder / "model.safetensors"
        tensors = {f"{prefix}{name}": t for name, t in load_file(path).items()}
        if not keep_lm:
            tensors.pop("lm_head.weight", None)
        save_file(tensors if beside else tensors | head, path, metadata={"format": "pt"})
        if beside:
            save_file(head, folder / "value_head.safetensors", metadata={"format": "pt"})
        change_json(folder / "config.json", **config)
        with torch.no_grad():
            return theirs(ROW, output_hidden_states=True).hidden_states[-1][0], folder

    return save


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


LAYOUTS = [  # of TRL 0.x and of LLaMA-Factory
    {}, {"prefix": "pretrained_model."}, {"beside": True},
    {"beside": True, "head": {"v_head.summary.weight": WEIGHT}},
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", EACH_FAMILY)
@torch.no_grad()
def test_a_language_model_with_a_value_head_is_read_as_each(family, layout, saved, peer):
    states, folder = saved(family, **layout)
    values = states @ WEIGHT[0] + layout.get("head", TRL).get("v_head.summary.bias", 0.0)
    assert stored_head(folder) == "v_head.summary"
    lm, plain = load_pretrained(folder), load_pretrained(peer(family)[1])
    assert torch.equal(lm.logits(lm(ROW)), plain.logits(plain(ROW)))
    model = load_reward_model(folder)
    close(model(ROW, LENGTH), values[-1:])
    close(model(ROW, torch.tensor([3])), values[2:3])
    critic = ValueHeadModel(lm)
    load_value_head(critic, folder)
    close(critic(ROW)[1][0], values)
    close(critic_from_reward_model(lm, model)(ROW)[1][0], values)
    (told,) = remarks([folder], torch.float32)
    assert told.startswith(f"{folder}: a language model with a value head")


@torch.no_grad()
def test_what_is_saved_of_a_value_head_is_read_again(peer, tmp_path):
    first, again = (ValueHeadModel(load_pretrained(peer("llama")[1])) for _ in range(2))
    first.v_head.weight.copy_(WEIGHT)
    first.v_head.bias.copy_(BIAS)
    save_pretrained(first, tmp_path)
    load_value_head(again, tmp_path)
    assert torch.equal(again(ROW)[1], first(ROW)[1])
    load_value_head(again, peer("llama")[1])  # has none
    assert torch.equal(again(ROW)[1], first(ROW)[1])


OPENRLHF = [  # its head; config.json; (mean, std) of its scores
    ({"value_head.weight": WEIGHT}, {}, (0.0, 1.0)),
    ({"score.weight": WEIGHT}, {"value_head_prefix": "score"}, (0.0, 1.0)),
    ({"rm.weight": WEIGHT}, {"value_head_prefix": "rm"}, (0.0, 1.0)),
    ({"value_head.weight": WEIGHT}, {"normalize_reward": True, "mean": 2, "std": 4.0}, (2.0, 4.0)),
    ({"value_head.weight": WEIGHT}, {"normalize_reward": True}, (0.0, 1.0)),
    ({"value_head.weight": WEIGHT}, {"normalize_reward": False, "mean": 2, "std": 4.0}, (0.0, 1.0)),
]


@pytest.mark.parametrize(("head", "config", "moments"), OPENRLHF)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_a_reward_model_of_openrlhf_scores_alike(family, head, config, moments, saved, tmp_path):
    states, folder = saved(family, head, keep_lm=False, **config)
    mean, std = moments
    model = load_reward_model(folder)
    close(model(ROW, LENGTH), (states[-1:] @ WEIGHT[0] - mean) / std)
    left_out = "mean and std are left out" in "".join(remarks([folder], torch.float32))
    assert left_out == ("mean" in config and not config["normalize_reward"])
    with pytest.raises(UserError, match="is a reward model, not a language model"):
        load_pretrained(folder)
    save_pretrained(model, tmp_path / "out", pad_token_id=98)
    again = load_reward_model(tmp_path / "out")
    assert torch.equal(again(ROW, LENGTH), model(ROW, LENGTH))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not written.keys() & {"normalize_reward", "mean", "std", "value_head_prefix"}


@torch.no_grad()
def test_a_bias_is_kept_and_other_tools_see_scores_without_it(saved, tmp_path):
    states, folder = saved()
    plain = states[-1:] @ WEIGHT[0]
    model = load_reward_model(folder)
    save_pretrained(model, tmp_path / "out", pad_token_id=98)
    close(load_reward_model(tmp_path / "out")(ROW, LENGTH), plain + BIAS)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["reward_mean"] == -0.75
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    close(theirs(ROW).logits[0], plain)


@pytest.mark.parametrize("bias", [None, BIAS])
@torch.no_grad()
def test_what_a_classifier_of_transformers_holds_beside_its_score(bias, tmp_path):
    theirs = make_peer("llama", "SequenceClassification", num_labels=1, pad_token_id=98)
    theirs.save_pretrained(tmp_path)
    more = {"lm_head.weight": torch.ones(99, 32)} | ({} if bias is None else {"score.bias": bias})
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | more, tmp_path / "model.safetensors")
    expected = theirs(ROW).logits[0] + (0.0 if bias is None else bias)
    close(load_reward_model(tmp_path)(ROW, LENGTH), expected)
    (told,) = remarks([tmp_path], torch.float32)
    assert told == f"{tmp_path}: 'lm_head.weight' is left out: scores do not depend on it"


SCORE, NORMALISED = {"value_head.weight": WEIGHT}, {"normalize_reward": True}
REFUSED = [  # head, config.json, what is told
    (TRL | {"score.weight": -WEIGHT}, {}, "holds 'score.weight' and 'v_head.summary.weight': a re"),
    ({"v_head.summary.weight": torch.ones(1, 16)}, {}, "'v_head.summary.weight' is (1, 16), conf"),
    ({"v_head.summary.weight": WEIGHT.repeat(2, 1)}, {}, "weight' is (2, 32), config.json asks"),
    ({"v_head.summary.weight": WEIGHT.int()}, {}, "'v_head.summary.weight' is torch.int32: incomp"),
    ({"value_head.weight": WEIGHT[0]}, {}, "'value_head.weight' is (32,), config.json asks for"),
    ({"value_head.weight": WEIGHT.repeat(2, 1)}, {}, "is (2, 32): a reward model has one output"),
    (TRL | {"v_head.summary.bias": torch.ones(2)}, {}, "bias' is (2,), torch.float32: a single nu"),
    (TRL | {"v_head.summary.bias": torch.ones(1).int()}, {}, "bias' is (1,), torch.int32: a singl"),
    (TRL | {"v_head.summary.bias": torch.tensor([torch.inf])}, {}, "bias' is inf: the training d"),
    (TRL | {"pretrained_model.v_head.summary.weight": -WEIGHT}, {}, "with and without 'pretraine"),
    (SCORE, {"normalize_reward": 1}, "normalize_reward: is 1: must be true or false"),
    (SCORE, NORMALISED | {"mean": "0"}, "config.json: mean: is '0': needs a finite number"),
    (SCORE, NORMALISED | {"std": 0}, "config.json: std: is 0: needs a number above 0"),
    ({"lm_head.weight": WEIGHT}, {"value_head_prefix": "lm_head"}, "has no 'score.weight'"),
    ({"rm.weight": WEIGHT}, {"value_head_prefix": ["rm"]}, "has no 'score.weight'"),
]


@pytest.mark.parametrize(("head", "config", "told"), REFUSED, ids=[row[2] for row in REFUSED])
def test_a_head_that_does_not_fit_is_refused(head, config, told, saved):
    _, folder = saved("llama", head, **config)
    for load in (load_reward_model, lambda place: without_weights(place, reward=True)):
        with pytest.raises(UserError, match=re.escape(told)):
            load(folder)
    if "v_head.summary.weight" in head:  # nor is the policy beside it read
        with pytest.raises(UserError, match=re.escape(told)):
            load_pretrained(folder)


def test_a_pickled_value_head_is_refused_where_it_is_needed(peer, tmp_path):
    folder = shutil.copytree(peer("llama")[1], tmp_path / "peer")
    (folder / "value_head.bin").write_bytes(b"PK\3\4")
    load_pretrained(folder)
    with pytest.raises(UserError, match=r"value_head.bin: pickle files are not read: save its ten"):
        load_reward_model(folder)
