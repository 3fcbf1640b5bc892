"""Policy, reference, reward model and critic over one set of weights are what four models are."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from minirlhf.cli import main
from minirlhf.errors import BAD_INPUT, OK
from minirlhf.files.folders import resolve
from minirlhf.models import pretrained
from minirlhf.models.heads import RewardModel, ValueHeadModel, initialize_score
from minirlhf.models.lora import adapters, add_lora
from minirlhf.models.peft_files import save_adapter
from minirlhf.recipes import ppo as recipe
from minirlhf.setup import roles
from minirlhf.setup.ppo import ppo_optimizer
from tests import tiny_ppo
from tests.tiny_folders import timeless, write_lines
from tests.tiny_ppo import command

world = tiny_ppo.world


def shaken(model, seed: int):
    """Moves what an adapter's folder holds away from where it starts."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapters(model).values():
            layer.lora_B.normal_(0, 0.1, generator=rng)
    return model


@pytest.fixture(scope="module")
def adapted(world):
    """The world with two adapters of its policy: sft, a language model's, and scorer."""
    base = world / "policy"
    lm = shaken(add_lora(pretrained.load_pretrained(base), 2, 8.0, 1), 5)
    scorer = RewardModel(pretrained.load_pretrained(base))
    initialize_score(scorer, torch.Generator().manual_seed(7))
    shaken(add_lora(scorer, 3, 8.0, 2), 6)
    for name, model in ("sft", lm), ("scorer", scorer):
        save_adapter(model, world / name, str(base), pad_token_id=1)
        for file in base.glob("*"):
            if file.name not in ("config.json", "model.safetensors"):
                shutil.copy(file, world / name)
    return world


def run_of(world, out, **settings):
    # with a small epsilon Adam makes a step of the learning rate out of a gradient of 1e-8
    return command(world, out, lora_rank=2, log_every=1, adam_epsilon=1e-2,
                   reward=world / "scorer", **settings)


@pytest.mark.parametrize("settings", [
    {"model": "policy"}, {"model": "sft"}, {"model": "sft", "ref": "policy"},
    {"model": "sft", "critic": "scorer", "no-train-critic": None},
], ids=["base", "adapter", "adapter, base as reference", "critic"])
def test_one_trunk_computes_what_four_models_do(settings, adapted, tmp_path, monkeypatch):
    flags = [f"--{name}" for name, value in settings.items() if value is None]
    places = {name: adapted / value for name, value in settings.items() if value is not None}
    argv = run_of(adapted, tmp_path / "one", **places)
    assert main([*argv, *flags]) == OK
    one = timeless(tmp_path / "one")
    if "ref" not in settings:
        assert one[0]["objective/kl"] == 0  # exactly: the reference is what the policy starts from
    else:
        assert one[0]["objective/kl"] > 1e-4
    monkeypatch.setattr(roles, "shares_trunk", lambda *_, **__: False)
    monkeypatch.setattr("minirlhf.setup.policy.shares_trunk", lambda *_, **__: False)
    if settings["model"] == "sft":  # a merged reference is rounded apart from the policy
        monkeypatch.setattr("minirlhf.evaluation.invariants.check_start", lambda *_: None)
    argv = run_of(adapted, tmp_path / "four", **places)
    assert main([*argv, *flags]) == OK
    four = timeless(tmp_path / "four")
    assert len(one) == len(four) == 4
    for ours, theirs in zip(one, four, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert value == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name


def test_all_roles_lie_over_one_set_of_weights(adapted, tmp_path, monkeypatch, capsys):
    scorers, found, score, start = [], {}, roles.load_scorer, recipe.load_run

    def load_scorer(*arguments, **settings):
        scorers.append(score(*arguments, **settings))
        return scorers[-1]

    def load_run(config):
        run = start(config)
        policy = run.state.model
        found.update(policy=policy.lm.model, ref=run.ref.model, critic=policy.critic,
                     reward=scorers[0].model)
        frozen = [{id(p) for p in decoder.parameters() if not p.requires_grad}
                  for decoder in found.values()]
        # in 2 layers 7 linears and 2 norms; the embedding and the last norm
        assert len(set.intersection(*frozen)) == 2 * 9 + 2
        return run

    monkeypatch.setattr("minirlhf.setup.policy.load_scorer", load_scorer)
    monkeypatch.setattr(recipe, "load_run", load_run)
    argv = run_of(adapted, tmp_path / "run", model=adapted / "sft", critic=adapted / "scorer")
    assert main(argv) == OK
    assert "policy, reference, reward model, critic" in capsys.readouterr().out
    # None of them has changed the weights below, nor what the frozen ones add.
    plain = {n.replace(".base.", "."): t for n, t in found["ref"].state_dict().items()}
    before = pretrained.load_pretrained(adapted / "policy").model.state_dict()
    assert all(torch.equal(plain[name], tensor) for name, tensor in before.items())
    for name, folder in ("ref", "sft"), ("reward", "scorer"):
        tensors = load_file(adapted / folder / "adapter_model.safetensors")
        up = tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]
        assert torch.equal(found[name].layers[1].mlp.up_proj.lora_B, up)
    # The critic's are its own, and were trained.
    assert not torch.allclose(found["critic"].layers[1].mlp.up_proj.lora_B, up, atol=1e-4)


def test_a_reward_model_of_another_base_is_a_model_of_its_own(adapted):
    config = recipe.PPOConfig(lora_rank=2)
    policy, other = resolve(adapted / "sft"), resolve(adapted / "other")
    assert roles.shares_trunk(config, policy, resolve(adapted / "policy"))
    assert roles.shares_trunk(config, policy, resolve(adapted / "scorer"), reward=True)
    assert not roles.shares_trunk(config, policy, other)
    # what a reward model's own folder holds was trained in full
    assert not roles.shares_trunk(config, policy, resolve(adapted / "policy"), reward=True)
    assert not roles.shares_trunk(recipe.PPOConfig(), policy, resolve(adapted / "policy"))


def test_adapters_of_another_rank_are_refused(adapted, tmp_path, capsys):
    argv = command(adapted, tmp_path / "run", model=adapted / "sft", lora_rank=4)
    assert main(argv) == BAD_INPUT
    told = f"--lora-rank: is 4, the adapter {adapted / 'sft'} has 2: give --lora-rank 2"
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_sft_tells_that_the_adapters_of_a_folder_go_on(adapted, tmp_path, capsys):
    write_lines(tmp_path / "texts.jsonl", [{"text": "The film is good."}])
    argv = ["sft", "--model", str(adapted / "sft"), "--data", str(tmp_path / "texts.jsonl"),
            "--out", str(tmp_path / "run"), "--steps", "1", "--lora-rank", "2"]
    assert main(argv) == OK
    told = f"those of {adapted / 'sft'} are trained on, with their own alpha and layers"
    assert told in capsys.readouterr().out


@pytest.mark.parametrize(("flag", "words"), [
    ("--lora-targets", ["mlp"]), ("--rslora", []), ("--dora", []),
])
def test_adapters_of_another_kind_are_refused(flag, words, adapted, tmp_path, capsys):
    argv = command(adapted, tmp_path / "run", model=adapted / "sft", lora_rank=2)
    assert main([*argv, flag, *words]) == BAD_INPUT
    told = f"{flag}: goes with new adapters; those of {adapted / 'sft'} are trained on as they are"
    assert told in capsys.readouterr().err


def test_without_a_rank_an_adapter_is_merged_and_trained_in_full(adapted, tmp_path):
    argv = command(adapted, tmp_path / "run", model=adapted / "sft", log_every=1)
    assert main(argv) == OK
    assert timeless(tmp_path / "run")[0]["objective/kl"] == 0


@pytest.mark.parametrize(("settings", "scale"), [
    ({}, 10.0), ({"lora_rank": 2}, 1.0), ({"critic": "another"}, 1.0),
    ({"lora_rank": 2, "learning_rate": 1e-3, "critic_learning_rate": 4e-3}, 4.0),
])
def test_a_value_head_learns_at_ten_times_the_rate_of_weights_which_is_that_of_adapters(
    settings, scale
):
    policy = ValueHeadModel(tiny_ppo.tiny_lm())
    if "lora_rank" in settings:
        add_lora(policy, 2, 8.0)
    optimizer = ppo_optimizer(policy, recipe.PPOConfig(**settings))
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert scales.pop(id(policy.v_head.weight)) == scales.pop(id(policy.v_head.bias)) == scale
    assert set(scales.values()) == {1.0}
