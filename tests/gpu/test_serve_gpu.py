"""The embedded engine on a GPU answers as generate does, with the base and its adapters in one batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.config.command_options import ServeSettings
from finetune.serving.engine.engine import EmbeddedEngine
from finetune.serving.request import Request
from tests.equivalence.test_serving_engine import Collector, generated, model

__all__ = ["model"]
pytestmark = pytest.mark.gpu


def test_base_and_adapters_in_one_batch_answer_as_generate_on_a_gpu(model: tuple[Any, dict[str, Path]]) -> None:
    base, folders = model
    base = base.cuda()
    torch.backends.cuda.matmul.allow_tf32 = False
    generator = torch.Generator().manual_seed(0)
    asked = []
    engine = EmbeddedEngine(base, ServeSettings(window_ms=20, prefill_tokens=7, max_batch=4, cache_tokens=512))
    try:
        for name, folder in folders.items():
            engine.load_adapter(name, str(folder))
        for i, name in enumerate([None, *folders] * 2):
            prompt = torch.randint(97, (3 + 9 * i,), generator=generator).tolist()
            collector = Collector()
            engine.submit(Request(tuple(prompt), 64, name), collector.put)
            asked.append((name, prompt, collector))
        found = [collector.ids for _, _, collector in asked]
    finally:
        engine.close()
    expected = [generated(base, name and folders[name], prompt, 64) for name, prompt, _ in asked]
    assert found == expected
