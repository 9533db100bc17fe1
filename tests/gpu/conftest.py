"""A kernel that falls back to plain torch fails the test that ran it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from finetune.ops import dispatch


@pytest.fixture(autouse=True)
def _every_kernel_compiles() -> Iterator[None]:
    before = set(dispatch.STATE.failed)
    yield
    assert dispatch.STATE.failed == before
