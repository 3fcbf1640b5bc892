"""Supervised fine-tuning: what counts in the loss, and that a run is what it says."""

import json
import math

import pytest
import torch

from minirlhf.batches.demonstrations import collate_texts, count_tokens, target_stats
from minirlhf.cli import main
from minirlhf.data.batching import epoch_batches
from minirlhf.data.examples import Text
from minirlhf.data.tokenizer import load_tokenizer, train_tokenizer
from minirlhf.errors import UserError
from minirlhf.models.pretrained import load_pretrained, save_pretrained
from minirlhf.models.transformer import CausalLM
from minirlhf.recipes.sft import evaluate, sft
from minirlhf.run.checkpoint import TrainState
from minirlhf.setup.sft import load_run
from minirlhf.setup.sft_settings import SFTConfig
from tests.tiny_folders import random_lm, rebuilt_at_each_step, timeless, write_lines

TINY = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 32,
}
V = 11
TEXTS = [
    Text([1, 2, 3, 4, 5], 2, "t:1", {}),
    Text([6, 7, 8], 0, "t:2", {}),
    Text([9, 10, 1, 2, 3, 4, 5, 6], 3, "t:3", {}),
    Text([3, 1], 1, "t:4", {}),
    Text([5, 4, 3, 2], 0, "t:5", {}),
]
SENTENCES = [
    f"film {i % 7} was {('bad, so we left', 'good, so we stayed')[i % 2]}." for i in range(24)
]


def tiny_lm(dtype=torch.float64, **changes) -> CausalLM:
    return random_lm(TINY, **{"vocab_size": V, **changes}).to(dtype)


def config_of(**settings) -> SFTConfig:
    return SFTConfig(**{"model": "m", "data": "d", "out": "o", **settings})


def adam_state(lm: CausalLM) -> TrainState:
    return TrainState(lm, torch.optim.AdamW(lm.parameters(), weight_decay=0.0))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a random model and its own tokenizer, and a file of texts."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer(SENTENCES, 280, folder)
    lm = tiny_lm(torch.float32, vocab_size=tokenizer.vocab_size)
    lm.config.source["eos_token_id"] = 0
    save_pretrained(lm, folder)
    data = write_lines(folder / "data.jsonl", [{"text": text} for text in SENTENCES])
    return folder, data


# ---- the loss ------------------------------------------------------------------------------------


def test_collate_texts_counts_only_tokens_after_the_prompt():
    batch = collate_texts(TEXTS[:2])
    # [1 2 | 3 4 5] has the prompt 1 2; [6 7 8] has none, and nothing stands before its 6
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]]
    assert batch.starts.tolist() == [2, 1]
    assert batch.targets.tolist() == [[3, 4, 5], [7, 8, 0]]
    assert batch.target_mask.tolist() == [[True, True, True], [True, True, False]]


# Of [1 2 | 3 4 | 5 6 | 7 8] the prompt is 1 2, and 5 6 stands in a gap, 2 tokens behind the prompt;
# of [9 1 | 2] nothing does.
GAPPED = [Text([1, 2, 3, 4, 5, 6, 7, 8], 2, "t:1", {}, ((2, 4),)), Text([9, 1, 2], 2, "t:2", {})]


def test_gaps_are_read_and_no_targets():
    batch = collate_texts(GAPPED)
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8], [9, 1, 2, 0, 0, 0, 0, 0]]
    assert batch.target_mask.tolist() == [
        [True, True, False, False, True, True], [True] + [False] * 5
    ]
    assert [x.tolist() for x in count_tokens(GAPPED)] == [[8, 3], [4, 1]]
    with pytest.raises(UserError, match="has no token after the first"):
        count_tokens([Text([1, 2, 3], 2, "t:1", {}, ((0, 1),))])


def test_targets_behind_a_gap_see_all_before_them():
    lm = tiny_lm()
    stats = target_stats(lm, collate_texts(GAPPED))
    tokens = torch.tensor([GAPPED[0].ids])
    logprobs = lm.logits(lm(tokens)).log_softmax(-1)[0]
    # a target at index i is predicted at i - 1: 3, 4 at 1, 2 and 7, 8 at 5, 6
    expected = [logprobs[at - 1, GAPPED[0].ids[at]] for at in (2, 3, 6, 7)]
    assert torch.allclose(stats.logprobs[:4], torch.stack(expected), rtol=0, atol=1e-9)
    assert len(stats.logprobs) == 5


def test_sft_loss_and_entropy_are_log_v_for_a_uniform_model():
    lm = tiny_lm()
    torch.nn.init.zeros_(lm.lm_head.weight)  # all logits 0: each of 11 tokens has 1/11
    step = next(sft(adam_state(lm), TEXTS, config_of(batch_size=5)))
    assert step.metrics["loss"] == pytest.approx(math.log(11), abs=1e-12)
    assert step.metrics["entropy"] == pytest.approx(math.log(11), abs=1e-12)
    # 5 + 3 + 8 + 2 + 4 tokens were read, prompts included
    assert step.metrics["num_tokens"] == 22
    assert step.metrics["epoch"] == 1.0


def bigram_lm() -> CausalLM:
    """Logits that depend on the last token alone: no attention, no MLP, vectors of ±1."""
    lm = tiny_lm(tie_word_embeddings=False)
    with torch.no_grad():
        for layer in lm.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        lm.model.embed_tokens.weight.fill_(1.0)
        lm.model.embed_tokens.weight[2] = -1.0  # token 2 gives -1, any other +1 in every channel
        lm.lm_head.weight.zero_()
        lm.lm_head.weight[3] = math.log(2) / 16  # logit of token 3: ±log 2; of the others 0
    return lm


def test_evaluate_is_the_mean_over_tokens_by_hand():
    lm = bigram_lm()
    texts = [Text([2, 3, 3], 0, "a", {}), Text([1, 2, 5, 1], 2, "b", {})]
    # After 2 the distribution is (1/2 for 3, 1 for the ten others) / 10.5; after any other token
    # (2, 1 …) / 12. Targets: 3 after 2, 3 after 3; 5 after 2, 1 after 5. 2 after 1 is a prompt's.
    losses = [math.log(21), math.log(6), math.log(10.5), math.log(12)]
    # rmsnorm's epsilon of 1e-6 scales the channels by 1 - 5e-7
    result = evaluate(lm, texts)
    assert result["loss"] == pytest.approx(sum(losses) / 4, abs=1e-6)
    assert result["perplexity"] == pytest.approx((21 * 6 * 10.5 * 12) ** 0.25, rel=1e-6)
    # After 2 token 3 is the least likely and all others are as likely; after the others it is the
    # likeliest: 3 after 3 and 5 after 2 are right, 3 after 2 and 1 after 5 are not.
    assert result["mean_token_accuracy"] == 0.5


def test_evaluate_of_a_prompt_ignores_what_the_model_thinks_of_it():
    lm = bigram_lm()
    # the same target, 1 after 5: log 12, whether the prompt was likely (2 3) or not (2 9)
    for first in ([2, 3], [2, 9]):
        result = evaluate(lm, [Text([*first, 5, 1], 3, "a", {})])
        assert result["loss"] == pytest.approx(math.log(12), abs=1e-6)


@pytest.mark.parametrize("tokens", [1, 7, 16])
def test_evaluate_is_the_same_for_any_micro_batch(tokens):
    whole = evaluate(tiny_lm(), TEXTS, 4096)
    assert evaluate(tiny_lm(), TEXTS, tokens) == pytest.approx(whole, abs=1e-12)


def one_sgd_step(**settings) -> torch.Tensor:
    """All parameters after one step of plain gradient descent with rate 1."""
    lm = tiny_lm()
    state = TrainState(lm, torch.optim.SGD(lm.parameters(), lr=1.0))
    next(sft(state, TEXTS, config_of(learning_rate=1.0, max_grad_norm=None, **settings)))
    return torch.cat([p.detach().flatten() for p in lm.parameters()])


@pytest.mark.parametrize("tokens", [1, 7, 16])
def test_sft_step_is_the_same_for_any_micro_batch(tokens):
    whole = one_sgd_step(batch_size=5, micro_batch_tokens=4096)
    split = one_sgd_step(batch_size=5, micro_batch_tokens=tokens)
    torch.testing.assert_close(split, whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("tokens", [1, 12, 4096])
def test_sft_tells_means_over_tokens_for_any_micro_batch(tokens):
    lm, losses, entropies = tiny_lm(), [], []
    for text in TEXTS:
        logs = lm.logits(lm(torch.tensor([text.ids])))[0].log_softmax(-1).detach()
        for t in range(max(text.prompt_length, 1), len(text.ids)):
            losses.append(float(-logs[t - 1, text.ids[t]]))
            entropies.append(float(-(logs[t - 1].exp() * logs[t - 1]).sum()))
    config = config_of(steps=1, batch_size=5, micro_batch_tokens=tokens)
    metrics = next(sft(adam_state(lm), TEXTS, config)).metrics
    assert metrics["loss"] == pytest.approx(sum(losses) / 14, abs=1e-9)
    assert metrics["entropy"] == pytest.approx(sum(entropies) / 14, abs=1e-9)


def test_a_log_window_weighs_steps_by_their_tokens():
    state, counts, losses = adam_state(tiny_lm()), [], []
    for step in sft(state, TEXTS, config_of(epochs=1.0, batch_size=2)):
        losses.append(step.metrics["loss"])
    rows = epoch_batches(count_tokens(TEXTS)[0], 2, 0, 0)
    counts = [int(count_tokens(TEXTS)[1][part].sum()) for part in rows]
    assert sum(counts) == 14 and len(set(counts)) > 1
    expected = sum(n * loss for n, loss in zip(counts, losses, strict=True)) / 14
    assert state.meters.flush()["loss"] == pytest.approx(expected, abs=1e-9)


def test_sft_gradient_is_that_of_the_mean_over_tokens():
    lm = tiny_lm()
    losses = []
    for text in TEXTS:  # row by row, over full logits
        logprobs = lm.logits(lm(torch.tensor([text.ids])))[0].log_softmax(-1)
        first = max(text.prompt_length, 1)
        losses += [-logprobs[t - 1, text.ids[t]] for t in range(first, len(text.ids))]
    assert len(losses) == 3 + 2 + 5 + 1 + 3
    torch.stack(losses).mean().backward()
    expected = torch.cat([(p - p.grad).detach().flatten() for p in lm.parameters()])
    torch.testing.assert_close(one_sgd_step(batch_size=5), expected, rtol=0, atol=1e-10)


def test_sft_learns_a_tiny_set():
    lm = tiny_lm()
    before = evaluate(lm, TEXTS)["loss"]
    steps = list(sft(adam_state(lm), TEXTS, config_of(steps=60, batch_size=5, learning_rate=0.02)))
    assert steps[-1].number == 60
    assert before == pytest.approx(math.log(V), abs=0.1)
    assert evaluate(lm, TEXTS)["loss"] < 0.3


def test_sft_refuses_an_empty_list_of_texts():
    with pytest.raises(ValueError, match="texts is empty: give at least one"):
        next(sft(adam_state(tiny_lm()), [], config_of()))


def test_sft_refuses_a_text_of_one_token():
    texts = [*TEXTS, Text([4], 0, "t.jsonl:6", {})]
    with pytest.raises(UserError, match=r"t\.jsonl:6: has no token after the first: remove"):
        next(sft(adam_state(tiny_lm()), texts, config_of()))


def test_sft_stops_at_a_loss_that_is_not_finite():
    lm = tiny_lm()
    torch.nn.init.constant_(lm.lm_head.weight, math.nan)
    with pytest.raises(UserError, match=r"step 1 \(t:4, t:2, .*\): loss: is nan: ") as error:
        next(sft(adam_state(lm), TEXTS, config_of()))
    assert error.value.code == 3


def test_sft_goes_on_bit_for_bit_from_any_yield(tmp_path):
    config = config_of(steps=6, batch_size=2, learning_rate=0.01, warmup_steps=1)
    whole = adam_state(tiny_lm())
    expected = [step.metrics for step in sft(whole, TEXTS, config)]
    steps, state = rebuilt_at_each_step(
        lambda: adam_state(tiny_lm()), lambda state: sft(state, TEXTS, config), tmp_path
    )
    assert [step.metrics for step in steps] == expected
    assert state.step == 6 and state.samples == whole.samples
    assert state.meters.as_dict() == whole.meters.as_dict()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(state.model.state_dict()[name], tensor), name


# ---- the command line ----------------------------------------------------------------------------


def run_sft(*words) -> int:
    return main(["sft", *map(str, words)])


def weights_of(out) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


def transformers_logits(folder, tokens):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model, model(tokens).logits


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
def test_main_trains_each_family_from_nothing_as_transformers_reads_it(family, base, tmp_path):
    values = TINY | {"model_type": family}
    if family == "gpt2":
        values = {"model_type": family, "n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 32}
    (tmp_path / "init.json").write_text(json.dumps(values), encoding="utf-8")
    out = tmp_path / "run"
    code = run_sft("--init-config", tmp_path / "init.json", "--vocab-size", 280,
                   "--data", base[1], "--out", out, "--steps", 2, "--batch-size", 8,
                   "--learning-rate", 1e-3)
    assert code == 0
    tokenizer = load_tokenizer(out / "model")
    assert tokenizer.vocab_size == 280
    assert tokenizer.fingerprint == load_tokenizer(out / "tokenizer").fingerprint
    tokens = torch.tensor([tokenizer.encode(SENTENCES[0])])
    model, expected = transformers_logits(out / "model", tokens)
    assert model.config.vocab_size == 280
    assert (model.config.bos_token_id, model.config.eos_token_id) == (None, 0)
    assert model.generation_config.eos_token_id == [0]
    assert model.generation_config.pad_token_id == 1
    lm = load_pretrained(out / "model")
    torch.testing.assert_close(lm.logits(lm(tokens)), expected, rtol=0, atol=1e-5)


def test_main_from_nothing_learns_and_evaluates_named_sets(base, tmp_path):
    (tmp_path / "init.json").write_text(json.dumps(TINY | {"vocab_size": 300}), encoding="utf-8")
    out = tmp_path / "run"
    sets, init = [f"seen={base[1]}", base[1]], tmp_path / "init.json"
    code = run_sft("--init-config", init, "--tokenizer", base[0], "--data", base[1],
                   "--eval-data", *sets, "--out", out, "--epochs", 40, "--batch-size", 8,
                   "--learning-rate", 0.01, "--eval-every", 60, "--log-every", 1)
    assert code == 0
    lines = timeless(out)
    assert len(lines) == 121  # before training; then 40 passes over 24 texts, 8 a step
    assert lines[0].keys() == {"step"} | {
        f"eval_{prefix}{name}" for prefix in ("", "seen_")
        for name in ("loss", "perplexity", "entropy", "mean_token_accuracy")
    }
    assert lines[0]["eval_loss"] == pytest.approx(math.log(300), abs=0.2)
    assert lines[1]["loss"] == pytest.approx(math.log(300), abs=0.2)
    assert lines[-1]["loss"] < 1.0
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 60, 120]
    last = lines[-1]
    assert last["eval_seen_loss"] == last["eval_loss"] < 1.0
    assert last["eval_perplexity"] == pytest.approx(math.exp(last["eval_loss"]), rel=1e-12)
    assert {"loss", "entropy", "grad_norm", "learning_rate", "epoch", "num_tokens"} <= last.keys()
    assert json.loads((out / "model/config.json").read_text("utf-8"))["vocab_size"] == 300
    assert not (out / "tokenizer").exists()  # it was given


def test_main_resumed_with_its_own_tokenizer_equals_the_whole_run(base, tmp_path, monkeypatch):
    (tmp_path / "init.json").write_text(json.dumps(TINY), encoding="utf-8")

    def start(out, *more):
        return run_sft("--init-config", tmp_path / "init.json", "--vocab-size", 270,
                       "--data", base[1], "--out", out, "--epochs", 2, "--batch-size", 7,
                       "--log-every", 3, "--save-every", 1, *more)

    assert start(tmp_path / "whole") == 0
    out = tmp_path / "cut"
    taken = []

    def dies(lm, *rest):  # after step 4, before its commit
        taken.append(1)
        if len(taken) == 5:
            raise UserError("the test", "died")
        return clip(lm, *rest)

    from minirlhf.run import optim

    clip = optim.clip_gradients
    monkeypatch.setattr(optim, "clip_gradients", dies)
    assert start(out) == 2
    monkeypatch.undo()
    monkeypatch.setattr("minirlhf.setup.sft.train_tokenizer", None)  # it must be read back
    assert start(out, "--resume") == 0
    assert weights_of(out) == weights_of(tmp_path / "whole")
    assert timeless(out) == timeless(tmp_path / "whole")


def test_main_continues_a_model_and_keeps_its_configs(base, tmp_path):
    folder = tmp_path / "chat"
    tokenizer = load_tokenizer(base[0])
    save_pretrained(load_pretrained(base[0]), folder)
    tokenizer.save(folder)
    ends = {"eos_token_id": [0, 5], "top_p": 0.5, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(ends), encoding="utf-8")
    rows = [{"prompt": f"film {i}", "completion": " was good."} for i in range(6)]
    data, out = write_lines(tmp_path / "d.jsonl", rows), tmp_path / "run"
    assert run_sft("--model", folder, "--data", data, "--out", out, "--steps", 1) == 0
    assert json.loads((out / "model/generation_config.json").read_text("utf-8")) == ends
    assert json.loads((out / "model/config.json").read_text("utf-8"))["eos_token_id"] == [0, 5]
    tokens = torch.tensor([tokenizer.encode(SENTENCES[0])])
    lm = load_pretrained(out / "model")
    expected = transformers_logits(out / "model", tokens)[1]
    torch.testing.assert_close(lm.logits(lm(tokens)), expected, rtol=0, atol=1e-5)


def test_main_with_lora_writes_a_merged_model_that_changed(base, tmp_path):
    out = tmp_path / "run"
    assert run_sft("--model", base[0], "--data", base[1], "--out", out, "--steps", 2,
                   "--lora-rank", 2, "--learning-rate", 0.01) == 0
    before, after = (load_pretrained(f).state_dict() for f in (base[0], out / "model"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert changed and all("_proj" in name for name in changed)


def test_dry_run_counts_the_evaluation_before_training(base, tmp_path):
    config = SFTConfig(model=str(base[0]), data=str(base[1]), eval_data=(str(base[1]),),
                       out=str(tmp_path / "run"), steps=6, eval_every=2, dry_run=True)
    # the held-out texts are one micro-batch; before step 1, after steps 2, 4 and 6
    assert load_run(config).run.evaluations == pytest.approx(4.0, abs=1e-12)
