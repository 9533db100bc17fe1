"""The table of exporters: a new format is one module and one entry."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune.config.command_options import ExportOptions
from finetune.export.export import export_model
from finetune.export.exporter import EXPORTERS, Exported, Exporter, ExportRequest, formats_help
from finetune.export.gguf.quantizer import QUANTIZER_TYPES
from finetune.export.gguf.types import TYPES as GGUF_TYPES
from finetune.export.onnx.model import TYPES as ONNX_TYPES
from finetune.export.safetensors_folder import TYPES as SAFETENSORS_TYPES
from finetune.system.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "types"),
    [
        ("safetensors", SAFETENSORS_TYPES),
        ("gguf", [*GGUF_TYPES, *QUANTIZER_TYPES]),
        ("ollama", [*GGUF_TYPES, *QUANTIZER_TYPES]),
        ("onnx", ONNX_TYPES),
    ],
)
def test_the_table_has_the_number_types_of_each_module(name, types):
    assert set(EXPORTERS[name].types) == set(types)
    assert set(types) <= set(formats_help().replace("=", " ").split())


@pytest.mark.parametrize(
    ("name", "typed", "found"),
    [
        ("gguf", "bfloat16", "bf16"),
        ("gguf", "fp16", "f16"),
        ("onnx", "float32", "fp32"),
        ("safetensors", "f16", "fp16"),
        ("gguf", None, "q8_0"),
        ("gguf", "Q4_K", "q4_k_m"),
        ("ollama", "Q6_K", "q6_k"),
    ],
)
def test_every_spelling_of_a_type_is_accepted(name, typed, found):
    assert EXPORTERS[name].number_type(ExportOptions(format=name, out="x", type=typed)) == found


def test_a_module_and_an_entry_are_a_format(make_base, tmp_path: Path, monkeypatch):
    def write(request: ExportRequest) -> Exported:
        (request.out / "names.json").write_text(json.dumps(sorted(file.name for file in request.source.iterdir())))
        return Exported([], [f"cat {request.final_folder}/names.json"])

    monkeypatch.setitem(sys.modules, "listing", SimpleNamespace(write=write, check_libraries=lambda kind: None))
    entry = Exporter("listing", "the names of the files", types={"text": 0.0})
    monkeypatch.setitem(EXPORTERS, "listing", entry)
    options = ExportOptions(model=str(make_base()), format="listing", out=str(tmp_path / "out"))
    assert export_model(options, log=lambda text: None).serve == [f"cat {tmp_path}/out/names.json"]
    assert "config.json" in json.loads((tmp_path / "out" / "names.json").read_text())
    assert "the names of the files" in formats_help()


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"format": "exe", "model": "x"}, "format"),
        ({"format": "gguf"}, "adapter"),
        ({"format": "adapter", "model": "x"}, "adapter"),
        ({"format": "ollama", "adapter": "x", "merge": False}, "merge"),
        ({"format": "onnx", "adapter": "x", "merge": False}, "merge"),
        ({"format": "gguf", "adapter": "x", "merge": False, "base": "original"}, "base"),
        ({"format": "gguf", "adapter": "x", "type": "q9_k"}, "type"),
        ({"format": "gguf", "adapter": "x", "merge": False, "type": "q4_k_m"}, "type"),
        ({"format": "gguf", "adapter": "x", "merge": False, "imatrix": "x.jsonl"}, "imatrix"),
        ({"format": "gguf", "model": "x", "type": "q4_0", "imatrix": "x.jsonl"}, "imatrix"),
        ({"format": "onnx", "model": "x", "imatrix": "x.jsonl"}, "imatrix"),
        ({"format": "gguf", "model": "x", "type": "iq2_xs"}, "imatrix"),
        ({"format": "adapter", "adapter": "x", "type": "bf16"}, "type"),
        ({"format": "adapter", "adapter": "x", "kl_check": {"max_kl": 0.1}}, r"kl_check\.max_kl"),
        ({"format": "onnx", "model": "x", "kl_check": {"num_examples": 8}}, r"kl_check\.num_examples"),
        ({"format": "onnx", "adapter": "x", "verify": False, "kl_check": {"data": "x.jsonl"}}, r"kl_check\.data"),
        (
            {"format": "gguf", "model": "x", "type": "q4_k_m", "imatrix": "x.jsonl", "kl_check": {"max_kl": 0.1}},
            r"kl_check\.max_kl",
        ),
    ],
)
def test_contradicting_options_are_refused_before_anything_is_written(options, key, tmp_path: Path):
    with pytest.raises(ConfigError, match=rf"^{key}[:=]"):
        export_model(ExportOptions(out=str(tmp_path / "out"), **options), log=lambda text: None)
    assert not list(tmp_path.iterdir())


def test_the_help_of_format_names_every_format():
    described = ExportOptions.model_fields["format"].description or ""
    assert set(EXPORTERS) <= {word.strip(",.") for word in described.split()}
