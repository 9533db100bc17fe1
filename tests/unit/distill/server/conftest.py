"""A served teacher in this process, its client, and sample documents."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from finetune.distill.server import LogprobServer, TopTokens
from tests.logprob_server import MODEL, LogprobTeacher

KEY = "sk-tests-0123456789"
TOP = 8


@pytest.fixture
def teacher(monkeypatch: pytest.MonkeyPatch) -> Iterator[LogprobTeacher]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with LogprobTeacher() as running:
        yield running


def client(teacher: LogprobTeacher, **settings) -> LogprobServer:
    options = {"timeout_seconds": 30.0, "attempts": 3, "backoff_seconds": 0.001} | settings
    return LogprobServer(
        options.pop("url", teacher.url), options.pop("model", MODEL), options.pop("top", TOP), **options
    )


def document(length: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """ids [T] int32 and some of the positions that have a token after them."""
    rng = np.random.default_rng(seed)
    positions = np.sort(rng.choice(length - 1, size=length // 2, replace=False))
    return rng.integers(50, size=length).astype(np.int32), positions


def assert_right(found: TopTokens, teacher: LogprobTeacher, ids: np.ndarray, positions: np.ndarray, top: int = TOP):
    expected_nV = teacher.table_VV[ids[positions]]
    order = np.argsort(-expected_nV, axis=1)[:, :top]
    assert found.ids.dtype == np.int64
    assert found.log_probs.dtype == np.float32
    np.testing.assert_array_equal(found.ids, order)
    # Decimal text and back is exact in float64; one rounding to float32 is left.
    np.testing.assert_array_equal(found.log_probs, np.take_along_axis(expected_nV, order, axis=1).astype(np.float32))


def positions_of(answer: dict) -> list:
    return answer["choices"][0]["prompt_logprobs"]
