"""A header of safetensors is read only if it describes the file."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from finetune.models.safetensors_header import read_header
from finetune.models.safetensors_index import load_tensors
from finetune.system.errors import IntegrityError
from tests.faults.fuzz_folders import stored
from tests.faults.mutations import Mutator

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.empty(0, 3)}


def written(file: Path, header: object) -> Path:
    raw = json.dumps(header).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(24))
    return file


def test_a_right_header_gives_its_entries(tmp_path):
    (tmp_path / "a").write_bytes(save(TENSORS, {"format": "pt"}))
    begin, entries = read_header(tmp_path / "a")
    assert {name: tuple(entry["shape"]) for name, entry in entries.items()} == {"a": (2, 3), "b": (4,), "c": (0, 3)}
    assert begin + max(entry["data_offsets"][1] for entry in entries.values()) == (tmp_path / "a").stat().st_size


ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
WRONG = {
    "unknown dtype": ENTRY | {"dtype": "F33"},
    "dtype of another type": ENTRY | {"dtype": ["F32"]},
    "shape too large": ENTRY | {"shape": [2, 4]},
    "shape with a negative size": ENTRY | {"shape": [-2, -3]},
    "shape that overflows": ENTRY | {"shape": [2**63, 2**63]},
    "shape of fractions": ENTRY | {"shape": [2.0, 3]},
    "shape of truth values": ENTRY | {"shape": [True, 6]},
    "no shape": {"dtype": "F32", "data_offsets": [0, 24]},
    "offsets beyond the file": ENTRY | {"data_offsets": [0, 2**40]},
    "offsets that go back": ENTRY | {"data_offsets": [24, 0]},
    "offsets with a hole": ENTRY | {"data_offsets": [8, 32]},
    "offsets of text": ENTRY | {"data_offsets": "ab"},
    "no entry": 7,
}


@pytest.mark.parametrize("name", WRONG)
def test_an_entry_that_does_not_fit_the_file_is_an_error(tmp_path, name):
    with pytest.raises(IntegrityError, match="not a complete safetensors file"):
        read_header(written(tmp_path / "a", {"x": WRONG[name]}))


def test_tensors_that_share_bytes_are_an_error(tmp_path):
    with pytest.raises(IntegrityError, match="y: F32"):
        read_header(written(tmp_path / "a", {"x": ENTRY, "y": ENTRY}))


@pytest.mark.parametrize("raw", [b"", b"\xff" * 8, (2**62).to_bytes(8, "little"), b'\x06\0\0\0\0\0\0\0{"a":['])
def test_what_is_no_header_is_an_error(tmp_path, raw):
    (tmp_path / "a").write_bytes(raw)
    with pytest.raises(IntegrityError, match="not a complete safetensors file"):
        read_header(tmp_path / "a")


def test_a_header_that_is_too_deep_is_an_error(tmp_path):
    (tmp_path / "a").write_bytes((5_000).to_bytes(8, "little") + b"[" * 5_000)
    with pytest.raises(IntegrityError, match="recursion"):
        read_header(tmp_path / "a")


@settings(max_examples=100)
@given(rng=st.randoms(use_true_random=False))
def test_any_file_is_loaded_or_an_error(rng: random.Random, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "any.safetensors"
    file.write_bytes(stored(TENSORS, Mutator(rng)))
    try:
        load_tensors(file)
    except IntegrityError as error:
        assert "any.safetensors" in str(error)
