"""What each token of an answer is worth, by the functions that PPO itself runs.

    reward     score of the text up to the token, minus that of the text up to the one before
    value      V(s_t), what the critic expects of the rest before it sees the token
    kl         log pi(a_t | s_t) - log pi_ref(a_t | s_t), nats
    advantage  GAE over the answer's rewards (KL penalty a token, score at the end) and values
    logprob    log pi(a_t | s_t), nats

One row stands for a rollout here, so advantages are not whitened, and scores have their own scale.
Of a piece of several tokens the value and advantage are the mean, all else the sum.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minirlhf.batches.collect import with_scores
from minirlhf.batches.credit import assign_credit
from minirlhf.batches.rollouts import Rollout, RolloutBuffer, lm_pass, measure, policy_pass
from minirlhf.data.pieces import Piece
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.equations.kl import kl_k1
from minirlhf.models.heads import ValueHeadModel
from minirlhf.models.transformer import CausalLM
from minirlhf.rewards.source import Completions, RewardSource, Scores, as_scores
from minirlhf.setup.policy import rule_for_truncated
from minirlhf.setup.ppo_settings import PPOConfig

MEANS = ("value", "advantage")  # of a piece; the others are sums


@dataclass
class Gauge:
    """What measures the answers of a model.

    Attributes:
        kind: one of the five.
        policy: with its critic; None where none is asked for.
        ref, reward: None where none is asked for.
        config: of the run; of a folder that no run made, the defaults of PPO.
    """

    kind: str
    lm: CausalLM
    tokenizer: Tokenizer
    config: PPOConfig
    policy: ValueHeadModel | None = None
    ref: CausalLM | None = None
    reward: RewardSource | None = None

    @property
    def about(self) -> str:
        """What the numbers are, in a line."""
        c = self.config
        at = "" if c.temperature == 1 else f", at temperature {c.temperature:g} as in the run"
        return {
            "reward": "score of the text so far, minus that before the token",
            "value": "what the critic expects before the token",
            "kl": f"log pi - log pi_ref, nats{at}",
            "advantage": f"GAE, gamma {c.gamma:g}, lambda {c.lam:g}, kl_coef {c.kl_coef:g}; "
            "not whitened",
            "logprob": f"log pi, nats{at}",
        }[self.kind]

    def read(
        self, answer: Completions, scores: Scores | None, pieces: Sequence[Piece]
    ) -> list[float]:
        """The number of each piece of an answer.

        Args:
            answer: of one row.
            scores: what the reward said of it; needed for advantages.
        """
        if self.kind == "reward":
            return self._increments(answer, [piece.end for piece in pieces])
        values = self.tokens(answer, scores).tolist()
        spans = [values[piece.start : piece.end] for piece in pieces]
        return [sum(x) / (len(x) if self.kind in MEANS else 1) for x in spans]

    @torch.no_grad()
    def tokens(self, answer: Completions, scores: Scores | None) -> Tensor:
        """(R,) the quantity of each token, the rewards left out."""
        rollout, temperature = self._rollout(answer), self.config.temperature
        if self.kind == "value":
            return policy_pass(self.policy, rollout, temperature).values[0]
        if self.kind == "advantage":
            return self._advantages(rollout, scores)
        logprobs = lm_pass(self.lm, rollout, temperature).logprobs[0]
        if self.kind == "logprob":
            return logprobs
        return kl_k1(logprobs, lm_pass(self.ref, rollout, temperature).logprobs[0])

    def _rollout(self, answer: Completions) -> Rollout:
        (prompt,), (ids,) = answer.prompt_ids, answer.response_ids
        one, device = torch.ones(1), self.lm.unembedding.device
        fields = Rollout(
            rows=torch.zeros(1, dtype=torch.int64), tokens=torch.tensor([prompt + ids]),
            prompt_lengths=torch.tensor([len(prompt)]), scores=0 * one,
            response_mask=torch.ones(1, len(ids), dtype=torch.bool),
            truncated=torch.tensor([answer.finish_reasons == ["length"]]),
        )
        return Rollout(*(None if x is None else x.to(device) for x in fields))

    def _advantages(self, rollout: Rollout, scores: Scores) -> Tensor:
        """What PPO would make of this one response."""
        config = replace(self.config, whiten_rewards=False, whiten_advantages=False, rollout_bits=0)
        end_rule = rule_for_truncated(config)
        total = end_rule(scores.total, rollout.truncated.cpu(), rollout.response_lengths.cpu())
        buffer = RolloutBuffer(1, rollout.tokens.shape[1])
        buffer.add(with_scores(rollout, scores._replace(total=total)))
        full = config.kl_estimator == "full" and config.kl_in == "reward"
        measure(self.policy, self.ref, buffer, config.temperature, full_kl=full)
        assign_credit(buffer, config, config.kl_coef)
        return buffer.flat("advantages")

    def _increments(self, answer: Completions, ends: Sequence[int]) -> list[float]:
        """How much each piece changed the score of the text so far; the prompt alone is the first.
        A text that goes on is scored like one that the length limit ended: where it is."""
        (prompt,), (head,), (ids,) = answer.prompts, answer.prompt_ids, answer.response_ids
        cuts = [0, *ends[:-1]]
        texts = [self.tokenizer.answer_text(prompt, head, ids[:end]) for end in cuts]
        count = len(cuts) + 1
        batch = Completions(
            [prompt] * count, [head] * count, [*texts, *answer.completions],
            [ids[:end] for end in (*cuts, len(ids))],
            ["length"] * len(cuts) + answer.finish_reasons, {},
        )
        scores = as_scores(self.reward(batch), batch, "answer").sums
        return scores.diff().tolist()
