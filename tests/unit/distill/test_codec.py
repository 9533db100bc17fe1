"""A distribution in 180 bytes decodes exactly, and is right on average for the drawn tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from finetune.distill.codec import MOST_IDS, draw, encode_top, teacher_samples, teacher_top_k
from finetune.distill.fingerprint import KEY_BYTES
from finetune.distill.shards import open_folder
from finetune.losses.chunked import chunked_loss
from finetune.losses.distillation import (
    DistillLossWeights,
    TeacherHidden,
    TeacherSamples,
    TeacherTargets,
    distillation_loss,
)

CPU = torch.device("cpu")
# Half a step of a log-probability in 16 bit, and half a step of fp32 there.
ROUNDING = 24 / 65535 / 2 + 1e-6
# A probability is off by that in its own code, and by as much in the sum that it is divided by.
RELATIVE = 2.01 * ROUNDING
QWEN = 151_665


def drawn(logits_NV: Tensor, head: int = 32, samples: int = 16, seed: int = 0) -> TeacherSamples:
    """Encode and decode the distribution of these logits."""
    uniforms_NS = np.random.default_rng(seed).random((len(logits_NV), samples))
    columns = draw(TeacherHidden(logits_NV, nn.Identity()), logits_NV.shape[1], head, uniforms_NS)
    return teacher_samples(columns, CPU)


def random_logits(n: int, vocabulary: int, scale: float = 2.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(n, vocabulary, generator=torch.Generator().manual_seed(seed))


def dense(targets: TeacherSamples, vocabulary: int) -> Tensor:
    """The distributions that a draw stands for, [N, V] in float64."""
    probs_NV = torch.zeros(len(targets.ids_NK), vocabulary, dtype=torch.float64)
    return probs_NV.scatter_add_(1, targets.ids_NK, targets.probs_NK.double())


@pytest.mark.parametrize("kept", [1, 2, 3, 4, 5, 48, 255])
@pytest.mark.parametrize("n", [0, 1, 7])
def test_ids_and_log_probabilities_come_back(n, kept):
    rng = np.random.default_rng(kept)
    ids_NK = rng.integers(0, MOST_IDS, (n, kept))
    ids_NK[:, 0] = MOST_IDS - 1
    log_probs_NK = rng.uniform(-24, 0, (n, kept)).astype(np.float32)
    targets = teacher_top_k(encode_top(ids_NK, log_probs_NK), CPU)
    assert targets.ids_NK.dtype == torch.int64 and (targets.ids_NK.numpy() == ids_NK).all()
    assert targets.log_probs_NK.dtype == torch.float32 and targets.log_probs_NK.shape == (n, kept)
    assert np.abs(targets.log_probs_NK.double().numpy() - log_probs_NK).max(initial=0) <= ROUNDING


def test_probabilities_below_the_lowest_code_are_stored_as_it():
    log_probs_NK = np.array([[0.0, -24.0, -24.1, -100.0, -np.inf, 1e-7]], dtype=np.float32)
    back = teacher_top_k(encode_top(np.arange(6)[None], log_probs_NK), CPU).log_probs_NK
    assert back.tolist() == [[0.0, -24.0, -24.0, -24.0, -24.0, 0.0]]


def test_a_target_takes_at_most_180_bytes_of_disk(tmp_path):
    targets = TeacherHidden(random_logits(32, QWEN), nn.Identity())
    columns = draw(targets, QWEN, 32, np.random.default_rng(0).random((32, 16)))
    with open_folder(tmp_path / "cache", {"kept": "sampled"}) as writer:
        for i in range(64):
            writer.add(i.to_bytes(KEY_BYTES), columns)
        writer.finish()
    size_bytes = sum(file.stat().st_size for file in (tmp_path / "cache").iterdir())
    assert size_bytes / (64 * 32) <= 180


@pytest.mark.parametrize(
    ("n", "vocabulary", "scale"), [(20, 997, 2.0), (5, QWEN, 3.0), (5, QWEN, 0.01), (3, 997, 12.0)]
)
def test_the_head_is_the_most_probable_tokens_and_all_adds_up_to_one(n, vocabulary, scale):
    logits_NV = random_logits(n, vocabulary, scale)
    targets = drawn(logits_NV)
    probs_NV = logits_NV.double().softmax(-1)
    top = probs_NV.topk(32)
    torch.testing.assert_close(targets.probs_NK.double().sum(1), torch.ones(n).double(), rtol=0, atol=1e-6)
    assert (targets.probs_NK > 0).all()
    assert (targets.ids_NK[:, :32].sort().values == top.indices.sort().values).all()
    head_NH = probs_NV.gather(1, targets.ids_NK[:, :32])
    assert (head_NH.diff(dim=1) <= 1e-6 * head_NH[:, 1:]).all(), "most probable first"
    # A token below the lowest code is kept as it: exp(-24), and not more than that is added to each sum.
    error = (targets.probs_NK[:, :32].double() - head_NH).abs()
    assert (error <= RELATIVE * head_NH + 1e-6 * head_NH + np.exp(-24)).all()
    tail = 1 - top.values.sum(1)
    kept = targets.probs_NK[:, 32:].double().sum(1)
    assert ((kept - tail).abs() <= RELATIVE * tail + 1e-6 * tail + 40 * np.exp(-24)).all()
    assert not (targets.ids_NK[:, 32:, None] == targets.ids_NK[:, None, :32]).any(), (
        "the others are drawn from the rest"
    )
    entropy = -(probs_NV * probs_NV.log()).sum(1)
    torch.testing.assert_close(targets.entropy_N.double(), entropy, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("vocabulary", [1, 5, 31, 32, 33])
def test_a_vocabulary_no_larger_than_the_head_is_kept_whole(vocabulary):
    logits_NV = random_logits(6, vocabulary)
    targets = drawn(logits_NV)
    assert targets.top_k == min(32, vocabulary) and targets.ids_NK.shape == (6, targets.top_k + 16)
    assert (targets.ids_NK < vocabulary).all()
    torch.testing.assert_close(
        dense(targets, vocabulary), logits_NV.double().softmax(-1), rtol=RELATIVE + 1e-6, atol=np.exp(-24)
    )


def test_an_almost_certain_teacher():
    vocabulary, rest = 997, 1e-9
    logits_NV = torch.zeros(1, vocabulary)
    logits_NV[0, 500] = np.log((1 - rest) / (rest / (vocabulary - 1)))
    targets = drawn(logits_NV)
    assert targets.ids_NK[0, 0] == 500 and targets.probs_NK[0, 0] == 1.0 and targets.probs_NK.isfinite().all()
    # 31 tokens of 1e-12 are kept as exp(-24); the mass of all others is exact within its code.
    assert (targets.probs_NK[0, 1:32] <= np.exp(-24) * 1.001).all()
    tail = targets.probs_NK[0, 32:].double().sum().item()
    assert tail == pytest.approx(rest * (vocabulary - 32) / (vocabulary - 1), rel=1e-3)
    assert 0 < targets.entropy_N[0] < 1e-7


def test_a_repeated_draw_counts_each_time():
    probs = torch.tensor([[0.5, 0.25, 0.25 - 1e-12, 1e-12]], dtype=torch.float64)
    targets = drawn(probs.log().float(), head=2)
    assert targets.ids_NK[0, 2:].tolist() == [2] * 16
    torch.testing.assert_close(dense(targets, 4), probs, rtol=RELATIVE, atol=1e-6)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-40])
def test_any_uniform_number_draws_a_possible_token_outside_the_head(uniform):
    logits_NV = random_logits(8, 50)
    logits_NV[:, [0, 49]] = 9.0  # the head holds both ends of the vocabulary
    logits_NV[:4, [1, 48]] = -1000.0
    columns = draw(TeacherHidden(logits_NV, nn.Identity()), 50, 4, np.full((8, 16), uniform))
    tail_NS = teacher_samples(columns, CPU).ids_NK[:, 4:]
    left = logits_NV.scatter(1, logits_NV.topk(4).indices, -1000.0)
    assert (left.gather(1, tail_NS) > -1000).all()
    # In order: a draw in each of 16 parts of the tail's mass.
    assert (tail_NS.diff(dim=1) >= 0).all()


def test_zero_targets_encode_and_decode_to_zero_entries():
    one, none = (draw(TeacherHidden(random_logits(n, 99), nn.Identity()), 99, 32, np.zeros((n, 16))) for n in (1, 0))
    assert {name: (column.dtype, column.shape[1:]) for name, column in none.items()} == {
        name: (column.dtype, column.shape[1:]) for name, column in one.items()
    }
    targets = teacher_samples(none, CPU)
    assert targets.ids_NK.shape == targets.probs_NK.shape == (0, 48) and targets.entropy_N.shape == (0,)


# The estimator's law, on a small vocabulary of which the head is a small part.

VOCABULARY, WIDTH, HEAD, SAMPLES, TARGETS, DRAWS = 199, 24, 8, 4, 5, 4000


@pytest.fixture(scope="module")
def teacher_NV() -> Tensor:
    return random_logits(TARGETS, VOCABULARY, scale=1.0, seed=3)


@pytest.fixture(scope="module")
def draws(teacher_NV) -> TeacherSamples:
    """DRAWS of each target; the draws of a target lie side by side."""
    return drawn(teacher_NV.repeat_interleave(DRAWS, 0), HEAD, SAMPLES, seed=4)


def tail_of(teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
    """The mass [N, 1] of what is not in the head, and each token's share of it [N, V], in float64."""
    probs_NV = teacher_NV.double().softmax(-1)
    tail_NV = probs_NV.scatter(1, probs_NV.topk(HEAD).indices, 0.0)
    mass_N1 = tail_NV.sum(1, keepdim=True)
    return mass_N1, tail_NV / mass_N1


def test_the_mean_of_the_draws_is_the_teachers_distribution(teacher_NV, draws):
    probs_NV = teacher_NV.double().softmax(-1)
    mean_NV = dense(draws, VOCABULARY).unflatten(0, (TARGETS, DRAWS)).mean(1)
    mass_N1, share_NV = tail_of(teacher_NV)
    # Independent draws of a token that has a share q of the tail vary by this; drawing by strata varies less.
    deviation_NV = mass_N1 * (share_NV * (1 - share_NV) / (SAMPLES * DRAWS)).sqrt()
    assert ((mean_NV - probs_NV).abs() <= RELATIVE * probs_NV + 1e-6 + 5 * deviation_NV).all()


class Student:
    """A head and hidden states, and what a signal costs them: mean nats, and gradients [targets, draws, D]."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False).requires_grad_(False)
        self.head.weight.normal_()
        self.hidden_ND = 0.3 * torch.randn(TARGETS, WIDTH)

    def losses(self, targets: TeacherTargets, draws: int) -> tuple[Tensor, Tensor]:
        hidden_ND = self.hidden_ND.repeat_interleave(draws, 0).requires_grad_()
        rows = len(hidden_ND)
        loss = distillation_loss(
            targets,
            DistillLossWeights(),
            torch.zeros(rows, dtype=torch.int64),
            kl_weight_N=torch.ones(rows),
            ce_weight_N=torch.zeros(rows),
            vocabulary=VOCABULARY,
        )
        total = chunked_loss(hidden_ND, self.head, VOCABULARY, loss)
        (gradient_ND,) = torch.autograd.grad(total, hidden_ND)
        return total.detach() / draws, gradient_ND.unflatten(0, (TARGETS, draws))


def test_forward_kl_and_its_gradient_are_right_on_average_and_the_rescaled_head_is_not(teacher_NV, draws):
    student = Student()
    # What rounding the probabilities can do to a gradient W^T (q - p), and to a divergence of log q.
    log_q = (student.hidden_ND @ student.head.weight.T).log_softmax(-1)
    gradient_slack = RELATIVE * student.head.weight.abs().max()
    kl_slack = TARGETS * RELATIVE * log_q.abs().max()

    exact_kl, exact_ND = student.losses(TeacherHidden(teacher_NV, nn.Identity()), 1)
    mean_kl, gradients_NRD = student.losses(draws, DRAWS)
    deviation_ND = gradients_NRD.std(1) / DRAWS**0.5
    error_ND = (gradients_NRD.mean(1) - exact_ND[:, 0]).abs()
    assert (error_ND <= 5 * deviation_ND + gradient_slack).all()
    # What independent draws of the tail's log q vary by, times its mass; drawing by strata varies less.
    mass_N1, share_NV = tail_of(teacher_NV)
    spread_NV = log_q - (share_NV * log_q).sum(1, keepdim=True)
    kl_deviation = (mass_N1**2 * share_NV * spread_NV**2 / (SAMPLES * DRAWS)).sum().sqrt()
    assert abs(mean_kl - exact_kl) <= 5 * kl_deviation + kl_slack

    head_NK = draws.probs_NK[::DRAWS, :HEAD]
    rescaled = TeacherSamples(
        draws.ids_NK[::DRAWS, :HEAD], head_NK / head_NK.sum(1, keepdim=True), draws.entropy_N[::DRAWS], HEAD
    )
    biased_kl, biased_ND = student.losses(rescaled, 1)
    assert (biased_ND - exact_ND).norm() > 5 * (5 * deviation_ND + gradient_slack).norm()
    assert abs(biased_kl - exact_kl) > 5 * (5 * kl_deviation + kl_slack)
