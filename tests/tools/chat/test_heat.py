"""What each token is worth, against the same numbers by plain torch and by hand."""

import re
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minirlhf.cli import main
from minirlhf.data.pieces import Piece, pieces
from minirlhf.data.tokenizer import load_tokenizer, train_tokenizer
from minirlhf.models.heads import RewardModel, ValueHeadModel, initialize_score
from minirlhf.models.pretrained import load_pretrained, load_reward_model
from minirlhf.rewards.model import model_reward
from minirlhf.rewards.source import Completions, Scores
from minirlhf.setup.ppo_settings import PPOConfig
from minirlhf.tools.chat.heat import Gauge
from minirlhf.tools.chat.load import Run
from tests.tiny_folders import change_json, random_lm
from tests.tools.chat.conftest import END
from tests.tools.conftest import TINY, save_reward_model

PROMPT, IDS = [5, 6, 7], [9, 30, 8, 0]  # the last is eos
ROW = torch.tensor([PROMPT + IDS])
CONFIG = PPOConfig(
    model="-", data="-", out="-", reward=("-",), gamma=0.9, lam=0.8, kl_coef=0.5, temperature=2.0
)
EACH = [Piece(t, t + 1, "x") for t in range(4)]
ANSWER = Completions(["p"], [PROMPT], ["text"], [IDS], ["eos"], {})


def scores(value: float) -> Scores:
    return Scores(torch.tensor([value]), {"r": torch.tensor([value])})


@pytest.fixture
def gauge(files):
    """gauge(kind) -> one of random models in float64; its policy has a critic."""
    tokenizer = load_tokenizer(files["LM"])
    lm, ref = (random_lm(TINY, seed, vocab_size=tokenizer.vocab_size).double() for seed in (3, 4))
    policy = ValueHeadModel(lm)
    with torch.no_grad():
        policy.v_head.weight.normal_(generator=torch.Generator().manual_seed(5))
        policy.v_head.bias.fill_(0.25)
    return lambda kind: Gauge(kind, lm, tokenizer, CONFIG, policy, ref)


def logprobs(lm) -> torch.Tensor:
    """(4,) of the response at temperature 2: the state before a token is the last one read."""
    with torch.no_grad():
        every = (lm(ROW) @ lm.unembedding.T / 2.0).log_softmax(-1)
    return torch.stack([every[0, len(PROMPT) - 1 + t, id] for t, id in enumerate(IDS)])


def values(policy) -> torch.Tensor:
    with torch.no_grad():
        every = policy.lm(ROW) @ policy.v_head.weight[0] + policy.v_head.bias
    return every[0, len(PROMPT) - 1 : -1]


def near(found: list[float], expected) -> bool:
    return found == pytest.approx([float(x) for x in expected], rel=0, abs=1e-6)


def test_logprob_and_kl_are_those_of_the_softmax(gauge):
    g = gauge("logprob")
    assert near(g.read(ANSWER, None, EACH), logprobs(g.lm))
    assert near(gauge("kl").read(ANSWER, None, EACH), logprobs(g.lm) - logprobs(g.ref))


def test_value_is_of_the_state_before_the_token(gauge):
    assert near(gauge("value").read(ANSWER, None, EACH), values(gauge("value").policy))


def test_advantage_is_gae_of_the_kl_penalty_and_the_score(gauge):
    """A_t = delta_t + gamma lam A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t, where r_t is
    -kl_coef kl_t, at the last token with the score of 1.5, and V is 0 behind it."""
    g = gauge("advantage")
    kl, v = (logprobs(g.lm) - logprobs(g.ref)).tolist(), [*values(g.policy).tolist(), 0.0]
    expected, after = [], 0.0
    for t in reversed(range(4)):
        reward = -0.5 * kl[t] + (1.5 if t == 3 else 0.0)
        after = reward + 0.9 * v[t + 1] - v[t] + 0.9 * 0.8 * after
        expected.insert(0, after)
    assert near(g.read(ANSWER, scores(1.5), EACH), expected)
    # of a truncated one the penalty of 0.75 is subtracted first: 0.75 is left
    cut = ANSWER._replace(finish_reasons=["length"])
    g = replace(g, config=replace(CONFIG, missing_eos_penalty=0.75, whiten_advantages=True))
    lower = [x - (0.9 * 0.8) ** (3 - t) * 0.75 for t, x in enumerate(expected)]
    assert near(g.read(cut, scores(1.5), EACH), lower)


def test_several_tokens_of_a_piece_add_up_or_are_their_mean(gauge):
    two = [Piece(0, 2, "奖"), Piece(2, 4, "x")]
    for kind, share in (("logprob", 1), ("kl", 1), ("value", 2), ("advantage", 2)):
        one = gauge(kind).read(ANSWER, scores(1.5), EACH)
        found = gauge(kind).read(ANSWER, scores(1.5), two)
        assert near(found, [(one[0] + one[1]) / share, (one[2] + one[3]) / share])


def test_reward_is_what_a_token_adds_to_the_score_of_the_text_so_far(files):
    tokenizer = load_tokenizer(files["LM"])
    lm = random_lm(TINY, 3, vocab_size=tokenizer.vocab_size).double()
    scorer = RewardModel(random_lm(TINY, 6, vocab_size=tokenizer.vocab_size))
    initialize_score(scorer.double(), torch.Generator().manual_seed(1))
    source = model_reward(scorer, tokenizer, 4096)
    g = Gauge("reward", lm, tokenizer, CONFIG, reward=source)
    with torch.no_grad():  # the prompt alone, then with one token more each time
        so_far = [float(scorer(ROW[:, :n], torch.tensor([n]))) for n in range(3, 8)]
    found = g.read(ANSWER, None, EACH)
    expected = [after - before for before, after in pairwise(so_far)]
    assert found == pytest.approx(expected, rel=0, abs=1e-5)  # scores are float32
    assert sum(found) == pytest.approx(so_far[-1] - so_far[0], abs=1e-5)
    halves = g.read(ANSWER, None, [Piece(0, 3, "x"), Piece(3, 4, "y")])
    assert halves == pytest.approx([sum(found[:3]), found[3]], abs=1e-5)


# ---- a run ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    """A run of PPO of two steps, in whose folder its models are named from where it began."""
    place = tmp_path_factory.mktemp("runs")
    for name, source in (("start", "TALKER"), ("scorer", "RM")):
        (place / name).symlink_to(Path(files[source]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        words = f"ppo --model start --data {files['CHAT']} --reward 2*scorer --out ppo --steps 2"
        words += " --batch-size 2 --micro-batch-size 2 --max-new-tokens 4 --learning-rate 0.01"
        words += " --kl-coef 0.3 --temperature 0.9"
        assert main(words.split()) == 0
    return place / "ppo"


def listed(said: str, kind: str) -> list[tuple[str, float]]:
    """(piece, number) of the line that lists them."""
    (line,) = [line for line in said.splitlines() if line.startswith(f"{kind} (")]
    pairs = (pair.rpartition(":") for pair in line.partition(")  ")[2].split("  "))
    return [(text, float(x)) for text, _, x in pairs]


def test_a_run_brings_its_critic_its_reference_and_its_reward(run, talk):
    """From another working folder than that in which it began."""
    words = [run, "--temperature", 0, "--max-new-tokens", 6]
    said = {kind: talk("so\n", *words, "--heat", kind)
            for kind in ("value", "kl", "logprob", "reward", "advantage")}
    found = {kind: listed(text, kind) for kind, text in said.items()}
    assert len({tuple(text for text, _ in each) for each in found.values()}) == 1
    tokenizer, lm = load_tokenizer(run / "model"), load_pretrained(run / "model")
    weights = load_file(run / "checkpoints" / "step-00000002" / "model.safetensors")
    prompt, ids, each = tokenizer.encode_marked(f"user> so{END}assistant> "), [], []
    while len(ids) < 6 and ids[-1:] != [0]:  # greedily; 0 is eos
        with torch.no_grad():
            state = lm(torch.tensor([prompt + ids]))[0, -1]
            best = (lm.logits(state) / 0.9).log_softmax(-1).max(0)
        value = state @ weights["v_head.weight"][0] + weights["v_head.bias"][0]
        ids.append(int(best.indices))
        each.append((float(value), float(best.values)))
    of = [[each[t] for t in range(piece.start, piece.end)]
          for piece in pieces(tokenizer, prompt, ids)]
    mean_values = [sum(value for value, _ in some) / len(some) for some in of]
    logprobs = [sum(logprob for _, logprob in some) for some in of]
    assert [x for _, x in found["value"]] == pytest.approx(mean_values, abs=0.0051)
    assert [x for _, x in found["logprob"]] == pytest.approx(logprobs, abs=0.0051)
    assert any(abs(x) > 0.005 for _, x in found["kl"])  # the policy has moved
    assert "advantage (GAE, gamma 1, lambda 0.95, kl_coef 0.3; not whitened)" in said["advantage"]
    assert "logprob (log pi, nats, at temperature 0.9 as in the run)" in said["logprob"]
    assert "\nscore " in said["reward"] and "\nscore " not in said["kl"]


def test_advantages_have_the_coefficient_that_a_run_had_adapted(run, talk, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    names = {name: str(run.parent / name) for name in ("start", "scorer")}
    changes = {"model": names["start"], "reward": [names["scorer"]], "kl_coef": 0.7}
    words = [other, "--heat", "advantage", "--max-new-tokens", 2]
    for target, coef in ((None, 0.7), (0.1, 0.3)):  # 0.3 is in the checkpoint
        change_json(other / "run.json",
                    settings=Run(str(run)).values | changes | {"kl_target": target})
        assert f"kl_coef {coef}; not whitened" in talk("so\n", *words)


def test_the_model_of_a_run_is_as_good_as_its_folder(run, talk):
    words = ["--heat", "kl", "--temperature", 0, "--max-new-tokens", 4]
    assert talk("so\n", run / "model", *words) == talk("so\n", run, *words)


def test_what_a_run_names_is_found_around_it_or_as_it_is_given(run):
    place = run.parent
    assert Run(str(run)).start() == str(place / "start")
    assert Run(str(run)).rewards() == (f"2.0*{place / 'scorer'}",)
    assert Run(str(run)).near("owner/name") == "owner/name"


def test_code_that_a_run_names_is_not_run_unasked(run, talk, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "model").symlink_to(run / "model")
    (other / "run.json").write_text((run / "run.json").read_text())
    values = Run(str(other)).values
    change_json(other / "run.json", settings=values | {"reward": ["evil.py:score"]})
    talk("so\n", other, "--heat", "reward", code=2)
    assert "--heat reward: needs a reward: give --reward SOURCE" in talk.told
    talk("so\n", other, "--heat", "value", code=2)
    assert "holds no checkpoint, and its critic is nowhere else" in talk.told
    change_json(other / "run.json", settings=values | {"kl_coef": "much"})
    talk("so\n", other, "--heat", "value", code=2)
    assert "kl_coef: got 'much', must be a finite number" in talk.told
    (other / "run.json").write_text("[]")
    talk("so\n", other, code=2)
    assert "run.json: is not of a run" in talk.told


def test_pieces_of_a_listed_answer_are_words(says, talk):
    said = talk("a\n", says("so 奖\n"), "--temperature", 0, "--heat", "logprob")
    assert [re.sub("oz?", "o", text) for text, _ in listed(said, "logprob")][-3:] == [
        "奖", "⏎", "<|endoftext|>"]
    assert all(x <= 0 for _, x in listed(said, "logprob"))


def test_a_reward_model_with_another_tokenizer_scores_texts(files, says, talk, tmp_path):
    other = train_tokenizer(["good film"], 262, tmp_path / "tokenizer")
    folder = save_reward_model(tmp_path / "rm", other)
    words = [says("so bad"), "--temperature", 0, "--reward", folder, "--heat", "reward"]
    said = talk("a\n", *words)
    # of the user's turn alone, and with the whole answer as its template ends it
    texts = ["user: a\nassistant: ", f"user: a\nassistant: so bad{END}\n"]
    first, last = ([*other.encode_marked(text)] for text in texts)
    model = load_reward_model(folder)
    with torch.no_grad():
        before, after = (float(model(torch.tensor([ids]), torch.tensor([len(ids)])))
                         for ids in (first, last))
    assert f"\nscore {after:.3f}\n" in said
    assert sum(x for _, x in listed(said, "reward")) == pytest.approx(after - before, abs=0.04)
