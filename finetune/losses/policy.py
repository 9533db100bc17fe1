"""Losses on the log-probabilities of sampled answers: policy gradients with advantages within a group.

Shapes: N target tokens, A answers, G answers to one prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from finetune.config.schema import RewardConfig
from finetune.data.batch import Batch
from finetune.losses.chunked import target_nats
from finetune.losses.cross_entropy import head_of, vocabulary_rows
from finetune.losses.hidden_states import target_states

# TRL adds the same to the standard deviation of a group's rewards.
_EPSILON = 1e-4


def group_advantages(rewards_AG: np.ndarray, loss: str) -> np.ndarray:
    """Return how much better than its group each answer is, float64: over the standard deviation, but for dr_grpo.

    Args:
        rewards_AG: float64, the rewards of the answers to one prompt in a row.
        loss: `reward.loss`.

    Source: Shao et al. 2024, arXiv:2402.03300, section 4.1.2; without deviation: Liu et al. 2025, arXiv:2503.20783.
    """
    differences = rewards_AG - rewards_AG.mean(1, keepdims=True)
    if loss == "dr_grpo":
        return differences
    return differences / (rewards_AG.std(1, ddof=1, keepdims=True) + _EPSILON)


@dataclass(frozen=True, slots=True)
class PolicyTokens:
    """The tokens [N] fp32 of sampled answers.

    log_probs_N: of the policy in training. old_N: of the policy that wrote the answers; reference_N: of the reference,
    None without one. advantages_N: of each token's answer.
    """

    log_probs_N: Tensor
    old_N: Tensor
    advantages_N: Tensor
    reference_N: Tensor | None = None


def policy_losses(tokens: PolicyTokens, cfg: RewardConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of each token [N], whether its ratio was clipped [N], and its divergence from the reference [N].

    -min(ratio * advantage, clip(ratio) * advantage) + beta * (exp(d) - d - 1), d = log(reference / policy).

    Source: Shao et al. 2024, arXiv:2402.03300, eq. 3 and 4; two bounds: Yu et al. 2025, arXiv:2503.14476 (DAPO), eq. 8.
    """
    ratio_N = (tokens.log_probs_N - tokens.old_N).exp()
    low, high = 1 - cfg.clip_low, 1 + (cfg.clip_low if cfg.clip_high is None else cfg.clip_high)
    gains_N = ratio_N * tokens.advantages_N
    bounded_N = ratio_N.clamp(low, high) * tokens.advantages_N
    clipped_N = bounded_N < gains_N
    losses_N = -torch.minimum(gains_N, bounded_N)
    if tokens.reference_N is None:
        return losses_N, clipped_N, torch.zeros_like(losses_N)
    d_N = tokens.reference_N - tokens.log_probs_N
    divergence_N = d_N.exp() - d_N - 1
    return losses_N + cfg.beta * divergence_N, clipped_N, divergence_N


def normalization(lengths_A: np.ndarray, cfg: RewardConfig) -> float:
    """Return what the summed loss of a step is divided by, for answers of all ranks with these lengths in tokens.

    Every token of an answer counts alike under dr_grpo and dapo; under grpo every answer does, see `token_weights`.
    """
    if cfg.loss == "grpo":
        return len(lengths_A)
    return len(lengths_A) * cfg.max_new_tokens if cfg.loss == "dr_grpo" else max(1, int(lengths_A.sum()))


def token_weights(lengths_A: Tensor, cfg: RewardConfig) -> Tensor:
    """Return the weight of each token [N] in the summed loss: one over its answer's length under grpo, otherwise 1."""
    weights_A = 1 / lengths_A.float() if cfg.loss == "grpo" else torch.ones(len(lengths_A), device=lengths_A.device)
    return weights_A.repeat_interleave(lengths_A)


def token_log_probs(model: nn.Module, batch: Batch, temperature: float = 1.0) -> Tensor:
    """Return the log-probability of each target [N] of a batch, fp32, when tokens are sampled at this temperature.

    Documents share the computation of equal beginnings, in forward and backward, if the batch was built so.
    """
    states = target_states(model, batch)
    # The head has no bias: logits of a scaled state are scaled logits.
    hidden_ND = states.hidden_ND if temperature == 1 else states.hidden_ND / temperature
    return -target_nats(hidden_ND, head_of(model), vocabulary_rows(model), states.labels_N)
