"""Losses on preferences: functions of the summed log-probabilities of answers, in nats.

Shapes: A answers, E pairs of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.config.preference_rules import NEEDS_REFERENCE
from finetune.config.schema import PreferenceConfig
from finetune.data.batch import Batch
from finetune.losses.chunked import target_nats
from finetune.losses.cross_entropy import head_of, vocabulary_rows
from finetune.losses.hidden_states import copy_together, target_states

_DEFAULT_BETA = {"simpo": 2.0}


@dataclass(frozen=True, slots=True)
class Answers:
    """Log-probabilities of answers.

    log_probs_A: sum over the targets of each answer, fp32. reference_A: the same of the reference; 0 without one.
    tokens_A: number of targets, fp32.
    """

    log_probs_A: Tensor
    reference_A: Tensor
    tokens_A: Tensor

    @property
    def log_ratios_A(self) -> Tensor:
        """log(policy / reference) of each answer."""
        return self.log_probs_A - self.reference_A

    @property
    def means_A(self) -> Tensor:
        """The mean log-probability of a target of each answer."""
        return self.log_probs_A / self.tokens_A

    def select(self, which: Tensor) -> Answers:
        """Return the answers with these numbers."""
        return Answers(self.log_probs_A[which], self.reference_A[which], self.tokens_A[which])


# (chosen, rejected, settings) -> loss of each pair [E].
PairLoss = Callable[[Answers, Answers, PreferenceConfig], Tensor]


def beta_of(cfg: PreferenceConfig) -> float:
    """Return `preference.beta`, or the default of the objective."""
    return _DEFAULT_BETA.get(cfg.objective, 0.1) if cfg.beta is None else cfg.beta


def sft_weight_of(cfg: PreferenceConfig) -> float:
    """Return `preference.sft_weight`, or the default of the objective."""
    return float(cfg.objective == "orpo") if cfg.sft_weight is None else cfg.sft_weight


def dpo(chosen: Answers, rejected: Answers, cfg: PreferenceConfig) -> Tensor:
    """Return -log sigmoid(beta * (log ratio of chosen - log ratio of rejected)), with smoothed labels.

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; smoothing: Mitchell 2023, "A note on DPO with noisy
    preferences".
    """
    return _smoothed(beta_of(cfg) * (chosen.log_ratios_A - rejected.log_ratios_A), cfg.label_smoothing)


def ipo(chosen: Answers, rejected: Answers, cfg: PreferenceConfig) -> Tensor:
    """Return (difference of the log ratios per token - 1 / (2 * beta)) ** 2.

    Source: Azar et al. 2023, arXiv:2310.12036, eq. 17; means per token as the authors' results have them.
    """
    chosen_E, rejected_E = (side.log_ratios_A / side.tokens_A for side in (chosen, rejected))
    return (chosen_E - rejected_E - 1 / (2 * beta_of(cfg))).square()


def orpo(chosen: Answers, rejected: Answers, cfg: PreferenceConfig) -> Tensor:
    """Return -beta * log sigmoid(log of the odds ratio) of the means per token; cross-entropy comes from sft_weight.

    Source: Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7.
    """
    chosen_E, rejected_E = (side.means_A - _log1mexp(side.means_A) for side in (chosen, rejected))
    return -beta_of(cfg) * F.logsigmoid(chosen_E - rejected_E)


def simpo(chosen: Answers, rejected: Answers, cfg: PreferenceConfig) -> Tensor:
    """Return -log sigmoid(beta * (difference of the means per token) - gamma), with smoothed labels.

    Source: Meng et al. 2024, arXiv:2405.14734, eq. 6.
    """
    return _smoothed(beta_of(cfg) * (chosen.means_A - rejected.means_A) - cfg.gamma, cfg.label_smoothing)


PAIR_LOSSES: dict[str, PairLoss] = {"dpo": dpo, "ipo": ipo, "orpo": orpo, "simpo": simpo}


def kto(answers: Answers, desirable_A: Tensor, divergence: Tensor, cfg: PreferenceConfig) -> Tensor:
    """Return 1 - sigmoid(beta * (log ratio - divergence)) of desirable answers, with the other sign of the others.

    Args:
        answers: with their reference.
        desirable_A: bool.
        divergence: scalar, estimate of KL(policy || reference), without gradient.
        cfg: with the weights of both kinds.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7 and 8.
    """
    signs_A = torch.where(desirable_A, 1.0, -1.0)
    weights_A = torch.where(desirable_A, cfg.desirable_weight, cfg.undesirable_weight)
    return weights_A * torch.sigmoid(-beta_of(cfg) * signs_A * (answers.log_ratios_A - divergence))


def rewards(answers: Answers, cfg: PreferenceConfig) -> Tensor:
    """Return the reward that the objective gives each answer [A]: beta times its log ratio, or its log-probability."""
    if cfg.objective in NEEDS_REFERENCE:
        return beta_of(cfg) * answers.log_ratios_A
    return beta_of(cfg) * answers.means_A


def answer_log_probs(model: nn.Module, batch: Batch, neftune_alpha: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the summed log-probability and the number of targets of each document of a batch [A], fp32.

    Documents share the computation of equal beginnings, in forward and backward, if the batch was built so.
    """
    states = target_states(model, batch, neftune_alpha)
    vocabulary = vocabulary_rows(model)
    nats_N = target_nats(states.hidden_ND, head_of(model), vocabulary, states.labels_N)
    [counts_A] = copy_together([batch.target_counts], nats_N.device)
    # Sums each document's targets in their order, on every device.
    sums_A = torch.segment_reduce(nats_N, "sum", lengths=counts_A, unsafe=True)
    return -sums_A, counts_A.float()


def _smoothed(margins_E: Tensor, smoothing: float) -> Tensor:
    losses_E = -F.logsigmoid(margins_E) * (1 - smoothing)
    return losses_E - F.logsigmoid(-margins_E) * smoothing if smoothing else losses_E


def _log1mexp(log_probs: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x < 0, exact near 0 and far from it."""
    # Source: Mächler 2012, "Accurately computing log(1 - exp(-|a|))".
    near = log_probs > -0.6931
    safe_near, safe_far = torch.where(near, log_probs, -0.5), torch.where(near, -1.0, log_probs)
    return torch.where(near, (-torch.expm1(safe_near)).log(), torch.log1p(-safe_far.exp()))
