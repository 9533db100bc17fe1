"""A GPU is found by its name, however it is written, and by the name of its driver."""

from __future__ import annotations

import pytest

from finetune.planning.gpus import find_gpu, peak_of
from finetune.system.errors import InputError


@pytest.mark.parametrize(
    "word", ["4090", "rtx4090", "RTX 4090", "NVIDIA GeForce RTX 4090", "rtx-4090", "4090-24", "4090 24GB"]
)
def test_spellings_of_a_name_are_one_gpu(word: str):
    assert find_gpu(word) == find_gpu("4090")


@pytest.mark.parametrize("word", ["a100", "v100", "a100-48", "t4-80", "l40", "a10000", "4", "", "h100h100"])
def test_a_name_of_several_or_of_no_gpus_is_refused(word: str):
    with pytest.raises(InputError, match="help: gpu"):
        find_gpu(word)


@pytest.mark.parametrize(
    ("driver", "word"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("Tesla V100-SXM2-16GB", "v100-16"),
    ],
)
def test_the_name_of_a_driver_has_the_peak_of_its_card(driver: str, word: str):
    assert peak_of(driver) == find_gpu(word).flops_per_second
    assert peak_of("unheard of") is None and peak_of(None) is None
