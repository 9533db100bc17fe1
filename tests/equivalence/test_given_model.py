"""A base that the caller loaded trains the adapter of a base that the run loads; any other base is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finetune import load_base, train
from finetune.system.errors import ConfigError
from tests.models import random_qwen2
from tests.runs import adapter, reference_run, small_run


def test_a_base_in_memory_trains_the_same_bits_and_serves_one_run(tmp_path: Path):
    cfg = small_run(tmp_path / "given")
    base = load_base(cfg.model, cfg.quant)
    torch.rand(3)  # the caller's random state decides nothing
    train(cfg, model=base)
    expected = adapter(reference_run())
    found = adapter(tmp_path / "given")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(ConfigError, match="adapters"):
        train(small_run(tmp_path / "again"), model=base)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (["quant.compute_dtype=float32"], "quant.compute_dtype"),
        (["quant.double=false"], "quant.double"),
        (["model.attention=sdpa"], "model.attention"),
    ],
)
def test_a_base_loaded_otherwise_is_refused_by_key(tmp_path: Path, settings: list[str], key: str):
    cfg = small_run(tmp_path / "run")
    base = load_base(cfg.model, cfg.quant)
    with pytest.raises(ConfigError, match=key):
        train(small_run(tmp_path / "run", *settings), model=base)
    assert not (tmp_path / "run").exists()


def test_weights_that_changed_on_disk_or_came_from_elsewhere_are_refused(tmp_path: Path):
    cfg = small_run(tmp_path / "run")
    base = load_base(cfg.model, cfg.quant)
    base.loaded_as["weights"] = "of another file"
    with pytest.raises(ConfigError, match="weights"):
        train(cfg, model=base)
    with pytest.raises(ConfigError, match="load_base"):
        train(cfg, model=random_qwen2())
