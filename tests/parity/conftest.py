"""Fixtures of the parity tests."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from finetune.models import fused
from tests.models import save_tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> Path:
    """A random two-layer Qwen2 in fp32 with the tokenizer of the sample base."""
    tokenizer = AutoTokenizer.from_pretrained(repo_root / "data" / "tiny-qwen2.5")
    folder = tmp_path_factory.mktemp("base")
    save_tiny_base(folder, vocab_size=len(tokenizer), dtype=torch.float32, noise=0.1)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the calls of each kernel."""
    calls: Counter[str] = Counter()
    for name in ("project", "swiglu_mlp", "attend", "rms_norm"):
        real = getattr(fused, name)
        monkeypatch.setattr(fused, name, lambda *a, real=real, name=name, **k: (calls.update([name]), real(*a, **k))[1])
    return calls
