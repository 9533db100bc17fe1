"""format=safetensors: folders that are rounded once or quantized, as transformers reads them."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from finetune.config.command_options import ExportOptions
from finetune.config.schema import ModelConfig, QuantConfig
from finetune.export import safetensors_folder
from finetune.export.exporter import Exported, ExportRequest
from finetune.export.safetensors_folder import PLAIN, TYPES, Storage
from finetune.export.safetensors_folder import write as to_safetensors
from finetune.models.load import load_base
from finetune.system.errors import ConfigError, IntegrityError, MissingExtra
from finetune.system.resources import packaged

IDS = torch.arange(24)[None] * 7 % 300
EIGHT_BIT = ("int8", "fp8")


def export(source: Path, out: Path, kind: str | None, **options: Any) -> Exported:
    if kind in EIGHT_BIT:
        pytest.importorskip("compressed_tensors", reason="int8 and fp8 are compressed-tensors' formats")
    out.mkdir()
    settings = {"prompts": 2, "tokens": 6, "type": kind, **options}
    chosen = ExportOptions(format="safetensors", out="served/my model", **settings)
    return to_safetensors(ExportRequest(source, out, chosen, print))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def is_quantized(name: str) -> bool:
    return name.endswith("_proj.weight")


def changed(source: Path, folder: Path, change) -> Path:
    """Copy a model and apply `change(name, tensor)` to its tensors."""
    shutil.copytree(source, folder)
    tensors = {name: change(name, tensor) for name, tensor in tensors_of(source).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def in_fp32(source: Path, folder: Path) -> Path:
    """Copy a model and fill all bits of its fp32 values."""
    torch.manual_seed(0)
    return changed(source, folder, lambda name, tensor: tensor.float() * (1 + 0.01 * torch.rand(tensor.shape)))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("tied", [True, False])
def test_every_type_writes_a_complete_folder_near_its_source(make_base, tmp_path: Path, kind: str, tied: bool) -> None:
    source, out = make_base(tied), tmp_path / "out"
    found = export(source, out, kind)
    assert found.checks[0].reader == "transformers" and found.checks[0].same >= (1.0 if kind in PLAIN else 0.5)
    assert sorted(file.name for file in out.iterdir()) == sorted(file.name for file in source.iterdir())
    for file in source.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            assert (out / file.name).read_bytes() == file.read_bytes()
    before, after = config_of(source), config_of(out)
    ours = {"dtype", "quantization_config"}
    assert {k: v for k, v in before.items() if k not in ours} == {k: v for k, v in after.items() if k not in ours}
    assert ("quantization_config" in after) == (kind not in PLAIN)
    assert after["dtype"] == str(PLAIN.get(kind, torch.bfloat16)).removeprefix("torch.")
    assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(source).chat_template
    assert shlex.split(found.serve[0]) == ["vllm", "serve", "served/my model", "--served-model-name", "my model"]
    assert found.notes["bytes"] == sum(file.stat().st_size for file in out.glob("*.safetensors"))


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_types_are_the_source_rounded_once(make_base, tmp_path: Path, kind: str) -> None:
    source = in_fp32(make_base(), tmp_path / "source")
    export(source, tmp_path / "out", kind)
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(after[name].equal(tensor.to(PLAIN[kind])) for name, tensor in before.items())


def test_the_default_type_is_bf16(make_base, tmp_path: Path) -> None:
    found = export(make_base(), tmp_path / "out", None)
    assert found.notes["type"] == "bf16" and found.checks[0].largest == 0.0


def test_a_large_tensor_is_rounded_in_blocks(make_base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_folder, "_BLOCK_ELEMENTS", 100)
    export(make_base(), tmp_path / "out", "fp16", verify=False)
    before, after = tensors_of(make_base()), tensors_of(tmp_path / "out")
    assert all(after[name].equal(tensor.half()) for name, tensor in before.items())


@pytest.mark.parametrize("kind", ["bf16", "nf4", "int8"])
def test_shards_keep_the_size_limit(make_base, tmp_path: Path, kind: str) -> None:
    """No shard of the source is left, and each tensor is in the file of the index."""
    source, out = make_base(max_shard_size="60KB"), tmp_path / "out"
    export(source, out, kind, shard_size="50KB")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in out.glob("*.safetensors"))
    assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
    for file in files:
        with safe_open(out / file, "pt") as stored:
            names = list(stored.keys())
            size = sum(stored.get_tensor(name).nbytes for name in names)
        assert size <= 50_000 and all(index["weight_map"][name] == file for name in names)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors_of(out).values())


def test_a_value_above_fp16_is_refused_with_its_tensor(make_base, tmp_path: Path) -> None:
    big = "model.layers.1.mlp.up_proj.weight"
    source = changed(make_base(), tmp_path / "source", lambda name, t: t.clamp(min=7e4) if name == big else t)
    with pytest.raises(ConfigError, match=rf"(?s){big} .*6\.55e\+04.*7\.01e\+04.*type=bf16"):
        export(source, tmp_path / "out", "fp16")
    assert export(source, tmp_path / "other", "bf16", verify=False).checks == []


@pytest.mark.parametrize("source_type", ["bf16", "fp32"])
@pytest.mark.parametrize("tied", [True, False])
def test_nf4_has_the_bits_of_quantizing_while_loading(make_base, tmp_path: Path, source_type: str, tied: bool) -> None:
    source, out = make_base(tied), tmp_path / "out"
    if source_type == "fp32":
        source = in_fp32(source, tmp_path / "source")
    export(source, out, "nf4")
    stored = AutoModelForCausalLM.from_pretrained(out)
    settings = config_of(out)["quantization_config"]
    settings = BitsAndBytesConfig(**{k: v for k, v in settings.items() if k.startswith(("load_in", "bnb", "llm"))})
    while_loading = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, quantization_config=settings)
    ours = load_base(ModelConfig(name=str(source)), QuantConfig(), "cpu")
    for model in (while_loading, ours):
        expected, found = model.state_dict(), stored.state_dict()
        assert found.keys() == expected.keys()
        assert all(found[name].equal(tensor) for name, tensor in expected.items())
    assert sum(name.endswith("quant_state.bitsandbytes__nf4") for name in stored.state_dict()) == 14
    with torch.no_grad():
        assert stored(input_ids=IDS).logits.equal(while_loading(input_ids=IDS).logits)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["nf4", *EIGHT_BIT, "bf16"])
def test_layers_that_training_stored_in_more_bits_stay_bf16(make_base, tmp_path: Path, kind: str, tied: bool) -> None:
    source = Path(shutil.copytree(make_base(tied), tmp_path / "source"))
    plain, eight = "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"
    (source / "merge_report.json").write_text(json.dumps({"kept": {"none": [plain], "int8": [eight]}}))
    notes = export(source, tmp_path / "out", kind).notes
    stays = {"nf4": [plain, eight], "bf16": []}.get(kind, [plain])
    assert notes.get("kept_in_bf16", []) == stays
    found, before = tensors_of(tmp_path / "out"), tensors_of(source)
    assert all(found[f"{name}.weight"].equal(before[f"{name}.weight"]) for name in stays)
    assert notes["quantized_tensors"] == (0 if kind == "bf16" else 14 - len(stays))


@pytest.mark.parametrize("kind", EIGHT_BIT)
@pytest.mark.parametrize("source_type", ["bf16", "fp32"])
def test_eight_bit_weights_are_rounded_to_the_nearest(make_base, tmp_path: Path, kind: str, source_type: str) -> None:
    source = make_base()
    if source_type == "fp32":
        source = in_fp32(source, tmp_path / "source")
    export(source, tmp_path / "out", kind)
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    scales = {name: after.pop(name) for name in list(after) if name.endswith("_scale")}
    assert before.keys() == after.keys() and len(scales) == 14
    for name, tensor in before.items():
        if not is_quantized(name):
            assert after[name].equal(tensor.bfloat16())
            continue
        assert after[name].dtype == {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[kind]
        scale_O1 = scales[f"{name}_scale"]
        assert scale_O1.dtype == torch.bfloat16 and scale_O1.shape == (len(tensor), 1)
        error = (after[name].float() * scale_O1.float() - tensor.float()).abs() / scale_O1.float()
        # Half a step, and of the largest number what rounding the scale to 8 bits lost; fp8 has 3 bits of mantissa.
        step = 1.0 if kind == "int8" else (after[name].float().abs() * 2**-3).clamp(min=2**-9)
        end = 127 if kind == "int8" else 448
        edge = after[name].float().abs() >= end
        assert (error <= 0.5 * step + edge * end * 2**-8 + 1e-3).all()
        assert edge.any(dim=1).all()  # Each row uses the whole range of its scale.


@pytest.mark.parametrize("kind", EIGHT_BIT)
def test_transformers_multiplies_by_the_stored_scales_and_rounds_activations(
    make_base, tmp_path: Path, kind: str
) -> None:
    source, out = make_base(), tmp_path / "out"
    export(source, out, kind)
    stored = tensors_of(out)
    served = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    for name, weight in plain.named_parameters():
        if is_quantized(name):
            weight.data = stored[name].float() * stored[f"{name}_scale"].float()
    with torch.no_grad():
        rounded, exact = served(input_ids=IDS).logits, plain(input_ids=IDS).logits
    assert not rounded.equal(exact) and (rounded - exact).abs().max() < 0.2 * exact.abs().max()
    weights = dict(served.named_parameters())
    assert all(weights[name].equal(weight) for name, weight in plain.named_parameters())


@pytest.mark.parametrize(
    ("kind", "form", "number"), [("int8", "int-quantized", "int"), ("fp8", "float-quantized", "float")]
)
def test_the_config_has_the_keys_that_vllm_reads(make_base, tmp_path: Path, kind: str, form: str, number: str) -> None:
    """Source: vLLM's compressed_tensors.py: a scale per row, and one per token for activations."""
    export(make_base(), tmp_path / "out", kind)
    settings = config_of(tmp_path / "out")["quantization_config"]
    common = {"num_bits": 8, "type": number, "symmetric": True}
    assert settings == {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": form,
                "weights": {**common, "strategy": "channel", "dynamic": False},
                "input_activations": {**common, "strategy": "token", "dynamic": True},
            }
        },
    }


@pytest.mark.parametrize("kind", ["nf4", *EIGHT_BIT])
def test_a_row_of_zeros_stays_zero(make_base, tmp_path: Path, kind: str) -> None:
    source = changed(
        make_base(),
        tmp_path / "source",
        lambda name, t: t.index_fill(0, torch.arange(2), 0.0) if is_quantized(name) else t,
    )
    export(source, tmp_path / "out", kind)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        assert model(input_ids=IDS).logits.isfinite().all()
        layer: Any = model.get_submodule("model.layers.0.mlp.up_proj")
        assert not layer(torch.ones(1, 64))[0, :2].any()


@pytest.mark.parametrize("kind", ["nf4", *EIGHT_BIT])
def test_wrong_weights_are_refused(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = TYPES[kind]

    def spoilt(kept: Sequence[str]) -> Storage:
        storage = right(kept)
        turn = lambda weight: storage.quantize(weight.flip(0))  # noqa: E731
        return Storage(storage.dtype, turn, storage.settings)

    monkeypatch.setitem(TYPES, kind, spoilt)
    with pytest.raises(IntegrityError, match="KL="):
        export(packaged("data") / "tiny-qwen2.5", tmp_path / "out", kind, prompts=4, tokens=16)


def test_unexpected_and_missing_tensors_are_refused(make_base, tmp_path: Path) -> None:
    source = changed(make_base(), tmp_path / "source", lambda name, tensor: tensor)
    tensors = tensors_of(source)
    tensors["model.layers.0.extra.weight"] = torch.ones(3)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match=r"unexpected_keys.*extra"):
        export(source, tmp_path / "out", "bf16")
    del tensors["model.layers.0.extra.weight"], tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match=r"missing: model\.layers\.0\.mlp\.up_proj\.weight"):
        export(source, tmp_path / "other", "nf4")


def test_types_and_sources_that_cannot_be_written_are_refused(
    make_base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="bf16, fp16, fp32, nf4, int8, fp8, found q4"):
        export(make_base(), tmp_path / "0", "q4")
    with pytest.raises(ConfigError, match="shard_size=much"):
        export(make_base(), tmp_path / "1", "bf16", shard_size="much")
    export(make_base(), tmp_path / "2", "nf4", verify=False)
    with pytest.raises(ConfigError, match="already quantized"):
        export(tmp_path / "2", tmp_path / "3", "bf16")
    for name in ("compressed_tensors.compressors", "compressed_tensors"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "4").mkdir()
    request = ExportRequest(
        make_base(), tmp_path / "4", ExportOptions(format="safetensors", out="x", type="int8"), print
    )
    with pytest.raises(MissingExtra, match=r"finetune-qlora\[export\]"):
        to_safetensors(request)


def test_nothing_is_printed(make_base, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """compressed-tensors draws progress bars by default."""
    export(make_base(), tmp_path / "out", "int8")
    assert capfd.readouterr() == ("", "")
