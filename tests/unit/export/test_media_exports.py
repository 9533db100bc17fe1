"""Models that read media, and their adapters, are exported to what their readers open; the rest is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.config.command_options import ExportOptions
from finetune.config.overrides import read_options
from finetune.export.export import export_model
from finetune.export.exporter import Exported, check_export
from finetune.models.adapters.names import PREFIX
from finetune.system.errors import ConfigError
from tests.media_models import LAYOUTS, save_media_base
from tests.unit.export.conftest import no_progress
from tests.unit.export.merge.test_media_merge import logits_of, opened, save_random_adapter, tensors_of


def options(*words: str) -> ExportOptions:
    return read_options(ExportOptions, ["prompts=2", "tokens=4", *words], "finetune export")


def run(*words: str) -> Exported:
    return export_model(options(*words), lambda text: None, no_progress)


@pytest.mark.parametrize(
    ("layout", "layer"),
    [(LAYOUTS[0], "model.language_model.layers.0"), (LAYOUTS[3], "thinker.model.layers.0")],
)
def test_an_adapter_has_the_names_that_vllm_maps(layout: str, layer: str, tmp_path: Path) -> None:
    base = save_media_base(layout, tmp_path / "base")
    adapter = save_random_adapter(base, tmp_path / "adapter", towers=False)
    exported = run("format=adapter", f"adapter={adapter}", f"out={tmp_path / 'out'}")
    names = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert f"{PREFIX}{layer}.self_attn.q_proj.lora_A.weight" in names and len(names) == 8
    (check,) = exported.checks
    assert (check.reader, check.same, check.largest) == ("PEFT", 1, 0)
    assert "--enable-tower-connector-lora" not in exported.serve[0]
    assert not list((tmp_path / "out").glob(".*"))


def test_an_adapter_of_towers_is_served_where_vllm_adapts_towers(tmp_path: Path) -> None:
    base = save_media_base(LAYOUTS[0], tmp_path / "vl")
    adapter = save_random_adapter(base, tmp_path / "vl-adapter", towers=True, rank_pattern={"qkv": 2})
    exported = run("format=adapter", f"adapter={adapter}", f"out={tmp_path / 'out'}")
    assert "--enable-tower-connector-lora" in exported.serve[0].split()
    assert exported.checks[0].same == 1
    thinker = save_media_base(LAYOUTS[2], tmp_path / "omni")
    adapter = save_random_adapter(thinker, tmp_path / "omni-adapter", towers=True)
    with pytest.raises(ConfigError, match=r"lora\.towers: vLLM has no adapters of the towers"):
        run("format=adapter", f"adapter={adapter}", f"out={tmp_path / 'other'}")


@pytest.mark.parametrize("layout", [LAYOUTS[1], LAYOUTS[3]])
def test_a_merged_model_is_written_as_safetensors(layout: str, tmp_path: Path) -> None:
    base = save_media_base(layout, tmp_path / "base")
    adapter = save_random_adapter(base, tmp_path / "adapter", towers=True)
    exported = run("format=safetensors", "type=fp32", f"adapter={adapter}", f"out={tmp_path / 'out'}")
    assert exported.checks[0].same == 1 and exported.checks[0].largest < 1e-4
    model = opened(tmp_path / "out")
    assert all(logits.isfinite().all() for logits in logits_of(model, layout, tmp_path))
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
    half = run("format=safetensors", "type=bf16", f"model={tmp_path / 'out'}", f"out={tmp_path / 'half'}")
    assert half.checks
    found, source = tensors_of(tmp_path / "half"), tensors_of(base)
    assert found.keys() == source.keys()
    for name, tensor in found.items():
        spoken = name.startswith(("talker.", "token2wav."))
        assert tensor.dtype == (torch.float32 if spoken else torch.bfloat16)
        assert not spoken or torch.equal(tensor, source[name])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["format=gguf"], "format=gguf: "),
        (["format=gguf", "merge=false"], "format=gguf: "),
        (["format=ollama"], "format=ollama: "),
        (["format=onnx"], "format=onnx: "),
        (["format=safetensors", "type=nf4"], "type=nf4: "),
        (["format=safetensors", "type=fp8"], "type=fp8: "),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS[::3])
def test_formats_without_a_reader_of_towers_are_refused_before_a_merge(
    layout: str, words: list[str], says: str, tmp_path: Path
) -> None:
    base = save_media_base(layout, tmp_path / "base")
    adapter = save_random_adapter(base, tmp_path / "adapter", towers=False)
    with pytest.raises(ConfigError, match=says):
        check_export(options(f"adapter={adapter}", f"out={tmp_path / 'out'}", *words))
    if "merge=false" not in words:
        with pytest.raises(ConfigError, match=says):
            check_export(options(f"model={base}", f"out={tmp_path / 'out'}", *words))
