"""Fixtures of the parity tests."""

from __future__ import annotations

from collections import Counter

import pytest

from finetune.models import fused


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the calls of each kernel."""
    calls: Counter[str] = Counter()
    for name in ("project", "swiglu_mlp", "attend", "rms_norm"):
        real = getattr(fused, name)
        monkeypatch.setattr(fused, name, lambda *a, real=real, name=name, **k: (calls.update([name]), real(*a, **k))[1])
    return calls
