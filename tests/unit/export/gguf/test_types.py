from __future__ import annotations

import numpy as np
import pytest
import torch

from finetune.export.gguf.types import TYPES, decode, encode, fitting_type, gguf_package, number_type
from finetune.system.errors import ConfigError, IntegrityError

pytest.importorskip("gguf", reason="needs the gguf extra")


def numbers(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    rows = torch.randn(33, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    rows[3], rows[4, :32], rows[5, 0] = 0, 0, 9.0  # blocks of nothing, and one with an outlier
    return rows.to(dtype)


def there_and_back(rows: torch.Tensor, name: str) -> torch.Tensor:
    return decode(encode(rows, TYPES[name], "w"), TYPES[name])


@pytest.mark.parametrize("name", TYPES)
def test_a_type_takes_the_bytes_it_says_and_reads_back_in_shape(name: str):
    data = encode(numbers(), TYPES[name], "w")
    assert data.dtype == np.uint8 and data.shape == (33, TYPES[name].row_bytes(512))
    assert decode(data, TYPES[name]).shape == (33, 512)


@pytest.mark.parametrize(("name", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16), ("f32", torch.float32)])
def test_plain_types_round_as_torch_does(name: str, dtype: torch.dtype):
    assert torch.equal(there_and_back(numbers(), name), numbers().to(dtype).float())


def test_numbers_are_rounded_once_from_fp32():
    # In bf16 it would first become 1.0, and with it f16's 1.0.
    assert there_and_back(torch.tensor([[1 + 2.0**-10] * 32]), "f16")[0, 0] == 1 + 2.0**-10


def test_q8_0_takes_the_nearest_of_its_steps():
    blocks = numbers().view(-1, 32)
    steps = (blocks.abs().amax(1, keepdim=True) / 127).half().float()
    nearest = (blocks[:, None, :] - steps[:, :, None] * torch.arange(-127, 128.0)[None, :, None]).abs().amin(1)
    off = (there_and_back(numbers(), "q8_0").view(-1, 32) - blocks).abs()
    # The step is rounded to f16 after the numbers have been divided by it.
    assert (off <= nearest + blocks.abs() * 2.0**-10 + 1e-7).all()


@pytest.mark.parametrize("name", [name for name, kind in TYPES.items() if kind.block > 1])
def test_block_types_err_by_no_more_than_they_say(name: str):
    blocks = numbers(torch.bfloat16).float().view(-1, TYPES[name].block)
    off = (there_and_back(numbers(torch.bfloat16), name).view_as(blocks) - blocks).abs().amax(1)
    largest = blocks.abs().amax(1)
    assert (off <= largest * (TYPES[name].worst + 2.0**-10) + 1e-5).all()
    assert (off[largest == 0] == 0).all()
    assert (off / largest)[largest > 0].max() > TYPES[name].worst / 3  # the bound is no empty one


def test_all_types_of_the_gguf_package_are_here():
    gguf = gguf_package()
    writable = set()
    for kind in gguf.GGMLQuantizationType:
        try:
            gguf.quants.quantize(np.ones((1, 256), np.float32), kind)
        except RuntimeError:
            continue
        writable.add(kind.name.lower())
    assert writable == set(TYPES)


def test_another_type_is_refused_with_the_list():
    with pytest.raises(ConfigError, match=r"type=q4_k_m: .* f32, f16, bf16, q8_0, q5_1, q5_0, .*llama-quantize"):
        number_type("q4_k_m")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_tensor_is_refused_by_name(bad: float):
    rows = numbers()
    rows[7, 7] = bad
    with pytest.raises(IntegrityError, match=r"layers\.3\.w holds NaN or infinity"):
        encode(rows, TYPES["q8_0"], "layers.3.w")


@pytest.mark.parametrize("name", TYPES)
def test_no_number_becomes_infinite(name: str):
    rows = numbers()
    rows[0, 0] = 70_000
    if name in ("f32", "bf16"):
        assert there_and_back(rows, name).isfinite().all()
    else:
        with pytest.raises(ConfigError, match=rf"type={name}: w holds 70000"):
            encode(rows, TYPES[name], "w")


@pytest.mark.parametrize(
    ("wanted", "shape", "vocabulary", "stored"),
    [
        ("q4_0", (64,), False, "f32"),
        ("bf16", (64,), False, "f32"),
        ("q4_0", (8, 64), False, "q4_0"),
        ("q4_0", (8, 64), True, "q8_0"),
        ("q8_0", (8, 64), True, "q8_0"),
        ("f16", (8, 64), True, "f16"),
        ("q8_0", (8, 48), False, "f16"),
        ("q4_0", (8, 48), True, "f16"),
        ("tq1_0", (8, 64), False, "f16"),
        ("tq1_0", (8, 256), False, "tq1_0"),
        ("bf16", (8, 48), False, "bf16"),
    ],
)
def test_what_a_tensor_is_stored_as(wanted: str, shape: tuple[int, ...], vocabulary: bool, stored: str):
    assert fitting_type(TYPES[wanted], shape, vocabulary).name == stored
