from __future__ import annotations

import numpy as np
import pytest
import torch

from finetune.config.command_options import ExportOptions
from finetune.export.exporter import EXPORTERS
from finetune.export.gguf.types import ROUNDED_BY_LLAMA, TYPES, decode, encode, gguf_package, storage_type
from finetune.system.errors import ConfigError, IntegrityError

pytest.importorskip("gguf", reason="needs the export extra")


def numbers(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    rows = torch.randn(33, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    rows[3], rows[4, :32], rows[5, 0] = 0, 0, 9.0  # blocks of zeros, and one with an outlier
    return rows.to(dtype)


def there_and_back(rows: torch.Tensor, name: str) -> torch.Tensor:
    return decode(encode(rows, TYPES[name], "w"), TYPES[name])


@pytest.mark.parametrize("name", TYPES)
def test_a_type_has_its_number_of_bytes_and_reads_back_in_shape(name: str):
    data = encode(numbers(), TYPES[name], "w")
    assert data.dtype == np.uint8 and data.shape == (33, TYPES[name].row_bytes(512))
    assert decode(data, TYPES[name]).shape == (33, 512)


@pytest.mark.parametrize(("name", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16), ("f32", torch.float32)])
def test_types_without_blocks_round_as_torch_does(name: str, dtype: torch.dtype):
    assert torch.equal(there_and_back(numbers(), name), numbers().to(dtype).float())


def test_values_are_rounded_once_from_fp32():
    # In bf16 it would first become 1.0, and with it f16's 1.0.
    assert there_and_back(torch.tensor([[1 + 2.0**-10] * 32]), "f16")[0, 0] == 1 + 2.0**-10


def test_q8_0_rounds_to_the_nearest_step():
    blocks = numbers().view(-1, 32)
    steps = (blocks.abs().amax(1, keepdim=True) / 127).half().float()
    nearest = (blocks[:, None, :] - steps[:, :, None] * torch.arange(-127, 128.0)[None, :, None]).abs().amin(1)
    off = (there_and_back(numbers(), "q8_0").view(-1, 32) - blocks).abs()
    # The step is rounded to f16 after the numbers have been divided by it.
    assert (off <= nearest + blocks.abs() * 2.0**-10 + 1e-7).all()


@pytest.mark.parametrize("name", [name for name, kind in TYPES.items() if kind.block > 1])
def test_types_with_blocks_stay_within_their_error(name: str):
    blocks = numbers(torch.bfloat16).float().view(-1, TYPES[name].block)
    off = (there_and_back(numbers(torch.bfloat16), name).view_as(blocks) - blocks).abs().amax(1)
    largest = blocks.abs().amax(1)
    assert (off <= largest * (TYPES[name].worst + 2.0**-10) + 1e-5).all()
    assert (off[largest == 0] == 0).all()
    assert (off / largest)[largest > 0].max() > TYPES[name].worst / 3  # The bound is tight within a factor of 3.


def q4_0_of(rows: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Scales [B] and numbers [B, 32] of q4_0 by its definition: the value of largest magnitude becomes -8."""
    blocks = rows.numpy().reshape(-1, 32)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
    scales = (largest / np.float32(-8)).astype(np.float32)
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
    numbers = np.minimum(np.floor(blocks.astype(np.float64) * inverse + 8.5), 15) - 8
    return scales[:, 0].astype(np.float16), numbers.astype(np.int8)


def test_q4_0_has_the_bits_of_its_definition():
    """A block is one fp16 scale and 16 bytes: values 0 to 15 in the low halves, 16 to 31 in the high ones."""
    data = encode(numbers(), TYPES["q4_0"], "w").reshape(-1, 18)
    scales, wanted = q4_0_of(numbers())
    assert np.array_equal(data[:, :2].copy().view(np.float16)[:, 0], scales)
    found = np.concatenate([data[:, 2:] & 15, data[:, 2:] >> 4], axis=1).astype(np.int8) - 8
    assert np.array_equal(found, wanted) and found.min() == -8 and found.max() == 7
    read = there_and_back(numbers(), "q4_0").view(-1, 32)
    assert torch.equal(read, torch.from_numpy(scales.astype(np.float32)[:, None] * wanted))


def test_the_error_of_a_row_in_q4_0_has_its_bound():
    """The worst block: one value of 8 steps, and 31 in the middle between two steps."""
    worst = torch.tensor([[8.0] + [0.5 - 1e-3] * 31] * 4) * 0.01
    rows = {"worst": worst, "normal": numbers(), "one sign": numbers().abs(), "bf16": numbers(torch.bfloat16).float()}
    shares = {}
    for name, given in rows.items():
        given = given[given.norm(dim=-1) > 0]
        shares[name] = float(((there_and_back(given, "q4_0") - given).norm(dim=-1) / given.norm(dim=-1)).max())
    limit = ROUNDED_BY_LLAMA["q4_0"].row_error
    assert limit is not None and all(share <= limit for share in shares.values())
    assert limit == pytest.approx((31 / (31 + 256)) ** 0.5, abs=2e-3) and shares["worst"] > 0.99 * limit


def test_every_type_of_the_gguf_package_for_16_bit_models_is_known():
    gguf = gguf_package()
    writable = set()
    for kind in gguf.GGMLQuantizationType:
        try:
            gguf.quants.quantize(np.ones((1, 256), np.float32), kind)
        except RuntimeError:
            continue
        writable.add(kind.name.lower())
    # The ternary types need a model that was trained in them; mxfp4 is for mixtures of experts.
    assert writable - {"tq1_0", "tq2_0", "mxfp4"} == set(TYPES)


def test_an_unknown_type_is_refused_with_the_list():
    options = ExportOptions(format="gguf", out="x", type="q9_k")
    with pytest.raises(ConfigError, match=r"(?s)type: .*q5_0, .*q4_k_m, .*found q9_k"):
        EXPORTERS["gguf"].number_type(options)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused_with_the_tensor(bad: float):
    rows = numbers()
    rows[7, 7] = bad
    with pytest.raises(IntegrityError, match=r"layers\.3\.w: "):
        encode(rows, TYPES["q8_0"], "layers.3.w")


@pytest.mark.parametrize("name", TYPES)
def test_no_value_becomes_infinite(name: str):
    rows = numbers()
    rows[0, 0] = 70_000
    if name in ("f32", "bf16"):
        assert there_and_back(rows, name).isfinite().all()
    else:
        with pytest.raises(ConfigError, match=rf"type={name}: .*70000 in w"):
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
        ("bf16", (8, 48), False, "bf16"),
    ],
)
def test_the_stored_type_of_a_tensor(wanted: str, shape: tuple[int, ...], vocabulary: bool, stored: str):
    assert storage_type(TYPES[wanted], shape, vocabulary).name == stored
