"""Divergences equal float64 autograd, and a sampled teacher is unbiased."""

from __future__ import annotations

import logging
import math
import shutil

import pytest
import torch

from finetune.ops import dispatch
from finetune.ops.cross_entropy import cross_entropy_
from finetune.ops.divergence import DIVERGENCES, divergence_, sampled_kl_
from finetune.ops.limits import SOFTMAX_BLOCK_VALUES

# The fp32 sums of exponentials, 1 and more, are rounded once to 2**-24 each.
ROUNDING = 1.2e-7
# A half of the last place of what the gradient is rounded to, once, relative to each value by itself.
LAST_PLACE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
KINDS = [("forward_kl", 0.5), ("reverse_kl", 0.5)]
KINDS += [(kind, mix) for kind in ("jsd", "skew_kl") for mix in (0.1, 0.5, 0.9)]


def reference(student, teacher, factors, kind, mix, temperature):
    """Return float64 nats, the gradient of the weighted sum, and the absolute terms of both."""
    leaf = student.double().requires_grad_()
    log_q = (leaf / temperature).log_softmax(-1)
    log_p = (teacher.double() / temperature).log_softmax(-1)
    log_m = torch.logaddexp(log_p + math.log(mix), log_q + math.log1p(-mix))
    q, p, rest = log_q.exp(), log_p.exp(), 1 - mix
    terms, slopes = {
        "forward_kl": ([p * log_p, -p * log_q], [q, p]),
        "reverse_kl": ([q * log_q, -q * log_p], [q * log_q, q * log_p]),
        "jsd": (
            [mix * p * log_p, -mix * p * log_m, rest * q * log_q, -rest * q * log_m],
            [rest * q * log_q, rest * q * log_m],
        ),
        "skew_kl": ([p * log_p, -p * log_m], [rest * q, rest * q * (log_p - log_m).exp()]),
    }[kind]
    nats = sum(term.sum(-1) for term in terms)
    (gradient,) = torch.autograd.grad((nats * factors.double()).sum(), leaf)
    sizes = sum(slope.detach().abs() for slope in slopes)
    sizes = (sizes + q.detach() * sizes.sum(-1, keepdim=True)) * factors[:, None] / temperature
    return nats.detach(), gradient, sum(term.detach().abs().sum(-1) for term in terms), sizes


def check(student, teacher, factors, kind, mix, temperature):
    """Tolerance: 1e-6 of the sum of absolute terms (nats), of the largest such sum in a row (gradients)."""
    nats, gradient, terms, sizes = reference(student, teacher, factors, kind, mix, temperature)
    before = student.clone()
    found = divergence_(student, teacher, factors, kind, mix=mix, temperature=temperature)
    assert torch.equal(student, before)
    assert found.dtype == torch.float32 and found.shape == nats.shape
    assert ((found - nats).abs() <= 1e-6 * terms + ROUNDING).all()
    allowed = (1e-6 * sizes.amax(-1) + ROUNDING * factors / temperature)[:, None]
    subnormal = torch.finfo(teacher.dtype).tiny * torch.finfo(teacher.dtype).eps / 2
    allowed = allowed + LAST_PLACE[teacher.dtype] * gradient.abs() + subnormal
    assert ((teacher - gradient).abs() <= allowed).all()


def pair(rows, vocabulary, dtype=torch.float32, apart=1.0):
    torch.manual_seed(rows + vocabulary)
    student = 3 * torch.randn(rows, vocabulary)
    teacher = student + apart * torch.randn(rows, vocabulary)
    return student.to(dtype), teacher.to(dtype), torch.tensor([1.0, 0.0, 0.25, 3.0])[torch.arange(rows) % 4]


@pytest.mark.parametrize(("kind", "mix"), KINDS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nats_and_gradients_equal_float64(kind, mix, temperature, dtype, monkeypatch):
    monkeypatch.setitem(SOFTMAX_BLOCK_VALUES, "cpu", 3 * 131)  # blocks of 3 rows of 131: also full and broken ones
    for rows, vocabulary in [(0, 97), (1, 1), (1, 97), (7, 1009), (12, 131), (13, 131)]:
        for apart in (0.03, 1.0, 5.0):
            check(*pair(rows, vocabulary, dtype, apart), kind, mix, temperature)


@pytest.mark.parametrize(("kind", "mix"), KINDS)
def test_16_bit_logits_are_computed_in_fp32_over_the_full_vocabulary(kind, mix):
    student, teacher, factors = pair(3, 151_665, torch.bfloat16)
    check(student.float(), teacher.float(), factors, kind, mix, 1.0)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_equal_to_its_teacher_gets_no_gradient(kind, dtype):
    student, _, factors = pair(5, 1009, dtype)
    teacher = student.clone()
    assert (divergence_(student, teacher, factors, kind, mix=0.3, temperature=0.7) == 0).all()
    assert (teacher == 0).all()


@pytest.mark.parametrize(("kind", "mix"), KINDS)
def test_huge_logits_and_a_constant_offset_do_not_overflow(kind, mix):
    student, teacher = torch.randn(2, 6, 50, generator=torch.Generator().manual_seed(0))
    student[0, 3], teacher[0, 3] = 1e4, 1e4
    student[1, 3], teacher[1, 4] = 1e4, 1e4
    student[2, 3], teacher[2, 3] = 1e4, -1e4
    student[3, 3], teacher[3, 3] = -1e4, 1e4
    student[4], teacher[4] = student[4] + 1e4, teacher[4] - 1e4
    student[5], teacher[5] = 1e4 * student[5].sign(), 1e4 * teacher[5].sign()
    check(student, teacher, torch.ones(6), kind, mix, 1.0)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_columns_beyond_the_vocabulary_are_neither_read_nor_written(kind):
    student, teacher, factors = pair(5, 101)
    wide_student = torch.cat([student, torch.full((5, 3), torch.nan)], 1)
    wide_teacher = torch.cat([teacher, torch.full((5, 7), torch.inf)], 1)
    found = divergence_(wide_student[:, :101], wide_teacher[:, :101], factors, kind, mix=0.3, temperature=2.0)
    assert torch.equal(found, divergence_(student, teacher, factors, kind, mix=0.3, temperature=2.0))
    assert torch.equal(wide_teacher[:, :101], teacher)
    assert (wide_teacher[:, 101:] == torch.inf).all()


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_compiled_equals_plain(kind, caplog):
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("needs a C++ compiler, which this machine lacks")
    student, teacher, factors = pair(6, 301)
    plain = teacher.clone()
    expected = divergence_(student, plain, factors, kind, mix=0.3, temperature=2.0)
    try:
        dispatch.configure_compile(torch.device("cpu"), 0, wanted=True)
        with caplog.at_level(logging.WARNING):
            found = divergence_(student, teacher, factors, kind, mix=0.3, temperature=2.0)
    finally:
        dispatch.configure_compile(torch.device("cpu"), 0, wanted=False)
    assert not caplog.records  # it did not fall back
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(teacher, plain, rtol=1e-6, atol=1e-6)


def sparse_teacher(rows, vocabulary, ids_per_row):
    """Return ids with many repetitions, some with a probability of 0."""
    ids = torch.randint(vocabulary, (rows, ids_per_row))
    ids[:, ids_per_row // 2 :] = ids[:, : ids_per_row - ids_per_row // 2].flip(1)
    return ids, torch.rand(rows, ids_per_row).sub_(0.1).clamp_(min=0) / ids_per_row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "vocabulary", "ids_per_row"), [(0, 97, 5), (1, 1, 1), (7, 11, 48), (13, 1009, 7)])
def test_a_sparse_teacher_with_repeated_ids_equals_float64(dtype, rows, vocabulary, ids_per_row, monkeypatch):
    monkeypatch.setitem(SOFTMAX_BLOCK_VALUES, "cpu", 150)  # blocks of 3 rows of 7 ids
    logits, _, factors = pair(rows, vocabulary, dtype)
    ids, probs = sparse_teacher(rows, vocabulary, ids_per_row)
    leaf = logits.double().requires_grad_()
    nats = -(probs.double() * leaf.log_softmax(-1).gather(1, ids)).sum(-1)
    (gradient,) = torch.autograd.grad((nats * factors.double()).sum(), leaf)
    found = sampled_kl_(logits, ids, probs, factors)
    torch.testing.assert_close(found.double(), nats.detach(), rtol=1e-6, atol=ROUNDING)
    torch.testing.assert_close(logits.double(), gradient, rtol=LAST_PLACE[dtype], atol=5 * ROUNDING)


def test_a_student_close_to_its_teacher_keeps_its_gradient_in_bf16():
    """Softmax and teacher differ by 0.001, below the resolution of bf16; their difference must be exact."""
    logits = torch.linspace(-2, 2, 16).expand(3, 16).bfloat16()
    ids = torch.arange(16).expand(3, 16)
    factors = torch.ones(3)
    probs = logits.float().softmax(-1) * (1 + 1e-3 * torch.randn(3, 16, generator=torch.Generator().manual_seed(0)))
    expected = probs.double().sum(-1, keepdim=True) * logits.double().softmax(-1) - probs.double()
    found = logits.clone()
    sampled_kl_(found, ids, probs, factors)
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=ROUNDING)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teacher_of_one_id_equals_a_label(dtype):
    logits, _, factors = pair(9, 301, dtype)
    labels = torch.randint(301, (9,))
    as_label = logits.clone()
    nats = cross_entropy_(as_label, labels, factors)
    torch.testing.assert_close(sampled_kl_(logits, labels[:, None], torch.ones(9, 1), factors), nats)
    torch.testing.assert_close(logits, as_label, rtol=LAST_PLACE[dtype], atol=3 * ROUNDING)


def test_a_sampled_tail_is_unbiased_and_a_renormalized_head_is_not():
    generator = torch.Generator().manual_seed(0)
    student, teacher = 1.5 * torch.randn(2, 60, generator=generator)
    p = teacher.double().softmax(-1)
    full = student.double().softmax(-1) - p
    head_probs, head = p.topk(8)
    tail = p.clone()
    tail[head] = 0
    tail_mass, samples, draws = tail.sum(), 16, 20_000
    drawn = torch.multinomial(tail.expand(draws, -1), samples, replacement=True, generator=generator)
    ids = torch.cat([head.expand(draws, -1), drawn], 1)
    probs = torch.cat([head_probs.expand(draws, -1), (tail_mass / samples).expand(draws, samples)], 1).float()
    logits = student.repeat(draws, 1)
    sampled_kl_(logits, ids, probs, torch.ones(draws))
    mean = logits.double().mean(0)
    # How often a tail's id is drawn is binomial, so the standard error of its mean gradient is known.
    share = tail / tail_mass
    error = tail_mass * (share * (1 - share) / samples / draws).sqrt()
    assert ((mean - full).abs() <= 5 * error + ROUNDING).all()  # 52 ids: beyond 5 of them by chance once in 30,000
    renormalized = student[None].clone()
    sampled_kl_(renormalized, head[None], (head_probs / head_probs.sum())[None].float(), torch.ones(1))
    assert ((renormalized[0] - full).abs()[tail > 0] > 5 * error[tail > 0]).all()
    assert ((renormalized[0] - full).abs()[head] > 100 * ROUNDING).all()
