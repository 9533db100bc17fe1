"""Clipping and noise of a party's update."""

from __future__ import annotations

import math

import pytest
import torch

from finetune.federation.clip import clip_update, gaussian, trained_names, update_norm

A, B, NORM = "q.lora_A.weight", "q.lora_B.weight", "norm.weight"


def adapter(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(size, generator=generator) for name, size in ((A, (2, 7)), (B, (5, 2)), (NORM, (6,)))}


START, AFTER = adapter(0), adapter(1) | {A: adapter(0)[A]}
NAMES = [B, NORM]


def clipped(max_norm: float, noise: float = 0.0, seed: bytes = b"1"):
    return clip_update(AFTER, START, NAMES, max_norm=max_norm, noise=noise, seed=seed)


def test_a_large_update_gets_the_norm_and_keeps_its_direction():
    found = clipped(0.25)
    assert found.norm_after == pytest.approx(0.25, rel=1e-6)
    factor = 0.25 / found.norm
    for name in NAMES:
        moved, whole = (t[name].double() - START[name].double() for t in (found.tensors, AFTER))
        torch.testing.assert_close(moved, whole * factor, rtol=0, atol=1e-6)
    assert torch.equal(found.tensors[A], START[A])


def test_a_small_update_keeps_its_bits():
    found = clipped(update_norm(AFTER, START, NAMES) * 1.01)
    assert all(torch.equal(found.tensors[name], AFTER[name]) for name in AFTER)


def test_a_missing_start_is_zero():
    found = clip_update({B: AFTER[B]}, {}, [B], max_norm=0.5, noise=0, seed=b"")
    torch.testing.assert_close(found.tensors[B], AFTER[B] * (0.5 / AFTER[B].norm()))


def test_noise_repeats_with_its_seed_and_leaves_frozen_tensors_alone():
    first, again, other = clipped(0.25, 2.0), clipped(0.25, 2.0), clipped(0.25, 2.0, b"2")
    assert all(torch.equal(first.tensors[name], again.tensors[name]) for name in AFTER)
    assert all(not torch.equal(first.tensors[name], other.tensors[name]) for name in NAMES)
    assert torch.equal(first.tensors[A], START[A])
    quiet = clipped(0.25)
    for name in NAMES:
        drawn = (first.tensors[name].double() - quiet.tensors[name].double()) / (2.0 * 0.25)
        torch.testing.assert_close(drawn, gaussian(AFTER[name].shape, b"1", name), rtol=0, atol=1e-5)


def test_noise_is_normal_and_independent_between_tensors():
    drawn = gaussian((400, 500), b"seed", "a")
    assert abs(float(drawn.mean())) < 0.01
    assert float(drawn.std()) == pytest.approx(1, abs=0.01)
    for limit in (0.5, 1.0, 2.0, 3.0):
        expected = math.erfc(limit / math.sqrt(2))
        assert float((drawn.abs() > limit).double().mean()) == pytest.approx(expected, abs=0.004)
    other = gaussian((400, 500), b"seed", "b")
    assert abs(float((drawn * other).mean())) < 0.01
    assert abs(float((drawn.flatten()[:-1] * drawn.flatten()[1:]).mean())) < 0.01
    half = drawn.numel() // 2
    assert abs(float((drawn.flatten()[:half] * drawn.flatten()[half:]).mean())) < 0.01


def test_a_seed_uses_all_of_its_bits():
    assert not torch.equal(gaussian((8,), b"1", "a"), gaussian((8,), b"1\x00", "a"))
    assert not torch.equal(gaussian((8,), str(1).encode(), "a"), gaussian((8,), str(1 + 2**32).encode(), "a"))


def test_a_is_trained_where_it_differs_from_the_start():
    assert trained_names(AFTER, START) == NAMES
    assert trained_names(AFTER | {A: AFTER[A] + 1}, START) == [A, *NAMES]
    assert trained_names(AFTER, None) == NAMES
