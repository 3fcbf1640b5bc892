"""Heads on a language model's hidden states: a value of each state, a score of each row; and a
reward model's keys of config.json.

Shapes: B rows, T tokens, D hidden size.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minirlhf.errors import UserError, printable
from minirlhf.models.alignment import response_states
from minirlhf.models.dropout import Dropout
from minirlhf.models.families import LARGEST
from minirlhf.models.logprobs import widened
from minirlhf.models.parallel import over_ranks
from minirlhf.models.stored_heads import Head
from minirlhf.models.transformer import CausalLM, Decoder

# Of config.json: ours, and OpenRLHF's, which an export folds into them.
REWARD_KEYS = ("reward_heads", "reward_lcb_coef", "reward_mean", "reward_std",
               "value_head_prefix", "normalize_reward", "mean", "std")
POSITIONS = ("end_of_text", "end_of_turn")  # score_position may be


class ValueHeadModel(nn.Module):
    """Policy and critic: `model(tokens)` -> (hidden (B, T, D) of the policy, values (B, T)).

    With `lengths` (B,) nothing is computed for padding, as in `Decoder`. The critic is a head on
    the policy's hidden states. It starts at zero, and so do the values. Or the critic has a decoder
    of its own, as `critic_from_reward_model` gives it.
    """

    def __init__(self, lm: CausalLM, critic: Decoder | None = None):
        super().__init__()
        self.lm = lm
        self.critic = critic
        trunk = lm.model if critic is None else critic
        self.v_head = nn.Linear(trunk.config.hidden_size, 1).to(trunk.embed_tokens.weight)
        nn.init.zeros_(self.v_head.weight)
        nn.init.zeros_(self.v_head.bias)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        hidden = self.lm(tokens, lengths=lengths)
        states = hidden if self.critic is None else self.critic(tokens, lengths=lengths)
        wide = widened(states.dtype)
        weight, bias = self.v_head.weight.to(wide), self.v_head.bias.to(wide)
        return hidden, F.linear(states.to(wide), weight, bias).squeeze(-1)

    def gradient_groups(self) -> list[nn.Module]:
        """Modules whose gradients are clipped by norms of their own: a critic with its own trunk
        is another model."""
        if self.critic is None:
            return [self]
        return [self.lm, nn.ModuleList([self.critic, self.v_head])]

    def value_parameters(self) -> list[nn.Parameter]:
        """The critic's own parameters: its head, and its decoder where it has one."""
        trunk = [] if self.critic is None else list(self.critic.parameters())
        return [*self.v_head.parameters(), *trunk]


class RewardModel(nn.Module):
    """A decoder with a scalar head on the last token of a row: `model(tokens, lengths)` -> (B,).

    It is saved as Hugging Face's `…ForSequenceClassification` with one label, whose score is read
    at the last token that is not the pad token. Where a tokenizer has no token to spare for
    padding, that is its eos. So `unread` is the id that a row to score must not end with.

    Messages are scored at the end of their rendered text (`whole`) or, if config.json says so, at
    their end of turn, behind which many chat templates write a line end.

    Several heads on the trunk are an ensemble, whose score is a lower confidence bound: texts on
    which the heads disagree are scored lower, since there a policy finds what only looks good.
    Coste et al. 2023 (arXiv:2310.02743) penalise the variance; the deviation has the scores' unit.

        score = (mean - lcb_coef · std - reward_mean) / reward_std
        mean, std of the heads' scores, of the population; reward_mean, reward_std as stored

    Args:
        unread: a pad token's id, or None.
        heads: >= 1.
        lcb_coef: >= 0 standard deviations; 0 for a single head.
    """

    def __init__(
        self, lm: CausalLM, unread: int | None = None, heads: int = 1, lcb_coef: float = 0.0
    ):
        super().__init__()
        if heads < 1 or lcb_coef < 0 or (heads == 1 and lcb_coef):
            raise ValueError(
                f"heads is {heads} and lcb_coef {lcb_coef}: at least 1 head and a lcb_coef of 0 "
                "or more are legal, 0 for a single head, which disagrees with nobody"
            )
        self.config = lm.config
        self.unread, self.whole = unread, True
        self.heads, self.lcb_coef = heads, lcb_coef
        self.reward_mean, self.reward_std = 0.0, 1.0
        self.model = lm.model
        self.score = nn.Linear(lm.config.hidden_size, heads, bias=False).to(lm.unembedding)

    @over_ranks
    def head_scores(
        self, tokens: Tensor, lengths: Tensor, dropout: Dropout | None = None
    ) -> Tensor:
        """What each head says of each row's last token, (B, heads), not normalised.

        Args:
            tokens: (B, T) left-aligned.
            lengths: (B,) in 1..T.
            dropout: of adapters, in training.
        """
        if lengths.shape != tokens.shape[:1]:
            raise ValueError(
                f"lengths is {tuple(lengths.shape)}, tokens is {tuple(tokens.shape)}: "
                "give one length a row"
            )
        hidden = self.model(tokens, lengths=lengths, dropout=dropout)
        last = response_states(hidden, lengths, 1)[:, 0]  # (B, D): index length - 1
        wide = widened(hidden.dtype)
        return F.linear(last.to(wide), self.score.weight.to(wide))

    def combine(self, each: Tensor) -> Tensor:
        """(B, heads) -> scores (B,)."""
        if self.heads == 1:
            score = each.squeeze(-1)
        else:
            score = each.mean(1) - self.lcb_coef * each.std(1, correction=0)
        return (score - self.reward_mean) / self.reward_std

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        return self.combine(self.head_scores(tokens, lengths))


def initialize_score(model: RewardModel, *rngs: torch.Generator) -> RewardModel:
    """Draws the heads from N(0, 1/(D + 1)), each with a generator of its own; same model.

    Stiennon et al. 2020 (arXiv:2009.01325).

    Raises:
        ValueError: not as many generators as heads.
    """
    if len(rngs) != model.heads:
        raise ValueError(f"rngs are {len(rngs)}, heads are {model.heads}: give one generator each")
    std = (model.config.hidden_size + 1) ** -0.5
    with torch.no_grad():
        for head, rng in zip(model.score.weight, rngs, strict=True):
            head.normal_(0.0, std, generator=rng)
    return model


def normalize_scores(model: RewardModel, mean: float, std: float) -> RewardModel:
    """Gives scores of this mean and standard deviation the mean 0 and deviation 1; same model.

    As Ziegler et al. 2019 (arXiv:1909.08593): then a policy meets the same scale, whatever the
    reward model. The scale goes into the heads' weights, where other tools see it too. A head has
    no bias, so the mean is kept beside it.

    Raises:
        ValueError: std is not above 0.
    """
    if not std > 0:
        raise ValueError(f"std is {std}: scores that are all alike cannot be normalised")
    scale = model.reward_std * std
    with torch.no_grad():
        model.score.weight.div_(scale)
    model.reward_mean = (model.reward_mean + mean * model.reward_std) / scale
    model.reward_std = 1.0
    return model


def critic_from_reward_model(lm: CausalLM, reward_model: RewardModel) -> ValueHeadModel:
    """A critic with a decoder of its own, the reward model's (arXiv:2403.17031, detail 22).

    Its value of a state is at first the score of the text so far: a guess at the final score that a
    head from zero would have to learn. The mean of an ensemble and what normalises a score are
    linear, so they go into the one head.

    Args:
        lm: the policy.
        reward_model: of the same tokenizer. Its decoder is not copied: it learns as the critic's,
            unless its parameters are frozen.
    Raises:
        UserError: the score is the lower bound of an ensemble, which is not linear in the state.
    """
    if reward_model.lcb_coef:
        what = f"is an ensemble with a lcb_coef of {reward_model.lcb_coef}, a critic has one head"
        raise UserError("critic", what, "give a reward model of one head, or of lcb_coef 0")
    policy = ValueHeadModel(lm, reward_model.model)
    policy.v_head.to(reward_model.score.weight)
    with torch.no_grad():
        head = reward_model.score.weight.mean(0, keepdim=True)
        policy.v_head.weight.copy_(head / reward_model.reward_std)
        policy.v_head.bias.fill_(-reward_model.reward_mean / reward_model.reward_std)
    return policy


def reward_model_of(lm: CausalLM, head: Head, folder: Path) -> RewardModel:
    """The reward model, without its weights, that config.json and the head's shape describe.

    What normalises a score stands in our keys, or in OpenRLHF's where its `normalize_reward` asks
    for it. A bias shifts all scores alike, so it is kept as their mean, negated.

    Args:
        folder: named by every error.
    Raises:
        UserError: several labels that are no ensemble; a key that does not fit.
    """
    source, where = lm.config.source, folder / "config.json"
    heads = source.get("reward_heads", 1)
    if type(heads) is not int or heads < 1:
        raise UserError(
            f"{where}: reward_heads", f"is {printable(repr(heads), 80)}", "needs an integer from 1"
        )
    if len(head.weight) != heads:
        legal = "one output: shape (1, hidden_size)" if heads == 1 else f"{heads} outputs"
        what = f"'{head.name}.weight' is {tuple(head.weight.shape)}"
        raise UserError(folder, what, f"a reward model has {legal}")
    theirs = source.get("normalize_reward")
    if type(theirs) not in (bool, type(None)):
        got = f"is {printable(repr(theirs), 80)}"
        raise UserError(f"{where}: normalize_reward", got, "must be true or false")
    mean_key, std_key = ("mean", "std") if theirs else ("reward_mean", "reward_std")
    numbers = {"reward_lcb_coef": 0.0, mean_key: 0.0, std_key: 1.0}
    for key, default in numbers.items():
        value = numbers[key] = source.get(key, default)
        got = f"is {printable(repr(value), 80)}"
        if type(value) not in (int, float) or not abs(value) <= LARGEST:
            raise UserError(f"{where}: {key}", got, "needs a finite number")
    lcb_coef, mean, std = numbers.values()
    if lcb_coef < 0 or (lcb_coef and heads == 1):
        legal = "0 for a single head, else 0 or more"
        raise UserError(f"{where}: reward_lcb_coef", f"is {lcb_coef}", legal)
    if not std > 0:
        raise UserError(f"{where}: {std_key}", f"is {std}", "needs a number above 0")
    # Without a key of ours the head of transformers is read as there: at no pad token.
    pad = source.get("pad_token_id") if head.name == "score" else None
    unread = pad if type(pad) is int and source.get("read_before_eos", True) else None
    model = RewardModel(lm, unread, heads, float(lcb_coef))
    model.whole = reads_whole(source, where)
    model.reward_mean, model.reward_std = float(mean) - head.bias, float(std)
    return model


def reads_whole(source: dict, where: Path) -> bool:
    """Whether a reward model, by its config.json, is read at the end of the rendered text; it is
    where the file does not say, since other tools read it there."""
    position = source.get("score_position", "end_of_text")
    if position not in POSITIONS:
        got = f"is {printable(repr(position), 80)}"
        raise UserError(f"{where}: score_position", got, f"legal: {', '.join(POSITIONS)}")
    return position == "end_of_text"


def reward_keys(model: RewardModel) -> dict:
    """What config.json says of a reward model; a single head that is not normalised needs no key
    of ours."""
    labels = [f"LABEL_{head}" for head in range(model.heads)]
    keys = {
        "id2label": {str(head): label for head, label in enumerate(labels)},
        "label2id": {label: head for head, label in enumerate(labels)},
        "problem_type": "regression",  # else vLLM puts a sigmoid on the score
        "read_before_eos": model.unread is not None,
        "score_position": "end_of_text" if model.whole else "end_of_turn",
    }
    if model.heads > 1:  # other tools see that many numbers for a text, and no reward
        keys |= {"reward_heads": model.heads, "reward_lcb_coef": model.lcb_coef}
    if (model.reward_mean, model.reward_std) != (0.0, 1.0):
        keys |= {"reward_mean": model.reward_mean, "reward_std": model.reward_std}
    return keys
