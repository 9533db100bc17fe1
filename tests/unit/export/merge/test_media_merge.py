"""Adapters of models that read media are merged into their whole checkpoint, whatever names its tensors have there."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from finetune.config.command_options import MergeOptions
from finetune.config.overrides import read_options
from finetune.config.schema import LoraConfig, ModelConfig, QuantConfig
from finetune.export.merge.merge import MergeReport, merge
from finetune.models.adapters.attach import attach_lora
from finetune.models.adapters.files import load_adapter, save_adapter
from finetune.models.families import FAMILIES
from finetune.models.load import load_base
from finetune.models.tokenizer import quiet
from finetune.system.errors import ConfigError
from tests.media_models import LAYOUTS, MediaDocuments, family_of_layout, media_words, picture, save_media_base
from tests.unit.export.conftest import no_progress


def base_of(folder: Path, quant: str = "none") -> Any:
    model = ModelConfig(name=str(folder), dtype="float32", attention="sdpa")
    return load_base(model, QuantConfig(type=quant, compute_dtype="float32", double=quant == "nf4"), device="cpu")


def save_random_adapter(base: Path, folder: Path, *, towers: bool, quant: str = "none", **lora: Any) -> Path:
    """Save an adapter with random weights, as a run saves it."""
    model = base_of(base, quant)
    family = FAMILIES[json.loads((base / "config.json").read_text())["model_type"]]
    torch.manual_seed(1)
    settings = {"rank": 4, "alpha": 8.0, "towers": list(family.towers) if towers else [], **lora}
    words = media_words("qwen2_5_vl" if family.model_type == "qwen2_5_vl" else "qwen2_5_omni")
    adapted = attach_lora(model, LoraConfig(**settings), words)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    folder.mkdir()
    save_adapter(adapted, folder, words)
    return folder


def run(adapter: Path, out: Path, *words: str, log: list[str] | None = None) -> MergeReport:
    words = words if any(word.startswith("kl_check") for word in words) else ("kl_check.num_examples=0", *words)
    options = read_options(MergeOptions, [f"adapter={adapter}", f"out={out}", *words], "finetune merge")
    return merge(options, (log if log is not None else []).append, no_progress)


def opened(folder: Path) -> Any:
    """Open a checkpoint with transformers' own class of all its tensors; return the part that reads."""
    family = FAMILIES[json.loads((folder / "config.json").read_text())["model_type"]]
    opener: Any = getattr(transformers, family.opened_by)
    settings = {"dtype": torch.float32, "local_files_only": True}
    with quiet():
        if family.companions:  # this class returns no report
            return opener.from_pretrained(folder, **settings).thinker.eval()
        model, report = opener.from_pretrained(folder, output_loading_info=True, **settings)
    assert not any(report.values()), report
    return model.eval()


@torch.no_grad()
def logits_of(model: Any, layout: str, folder: Path) -> list[Tensor]:
    """Return the logits of documents with each kind of media, and of one without."""
    documents = MediaDocuments(family_of_layout(layout), folder)
    kinds = [["image"], ["image", "video"], []] + ([["audio", "image"]] if "Omni" in layout else [])
    rows = [documents.build(each, 10 * number) for number, each in enumerate(kinds)]
    return [model(**documents.inputs(row), use_cache=False).logits[0] for row in rows]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_merged_checkpoint_computes_what_was_trained(layout: str, tmp_path: Path) -> None:
    base = save_media_base(layout, tmp_path / "base")
    adapter = save_random_adapter(base, tmp_path / "adapter", towers=True)
    report = run(adapter, tmp_path / "out", "dtype=fp32")
    expected = logits_of(load_adapter(base_of(base), adapter), layout, tmp_path)
    found = logits_of(opened(tmp_path / "out"), layout, tmp_path)
    plain = logits_of(base_of(base), layout, tmp_path)
    for ours, theirs, before in zip(found, expected, plain, strict=True):
        assert (ours - theirs).abs().max() <= 1e-4
        assert (theirs - before).abs().max() > 0.01, "the adapter changes nothing: this proves nothing"
    merged, source = tensors_of(tmp_path / "out"), tensors_of(base)
    assert merged.keys() == source.keys()
    changed = {name for name in source if not torch.equal(merged[name], source[name])}
    assert len(changed) == report.changed
    assert any("visual" in name for name in changed)
    assert not any(name.startswith(("talker", "token2wav")) for name in changed)


@pytest.mark.parametrize(
    "kind", [{"new_tokens": [f"<{i}>" for i in range(5)]}, {"dora": True, "rslora": True}], ids=str
)
def test_a_tied_head_stays_tied_under_other_names(kind: dict[str, Any], tmp_path: Path) -> None:
    base = save_media_base(LAYOUTS[0], tmp_path / "base", tied=True)
    adapter = save_random_adapter(base, tmp_path / "adapter", towers=True, **kind)
    run(adapter, tmp_path / "out", "dtype=fp32")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    assert tensors_of(tmp_path / "out").keys() == tensors_of(base).keys() and "lm_head.weight" not in tensors_of(base)
    expected = logits_of(load_adapter(base_of(base), adapter), LAYOUTS[0], tmp_path)
    found = logits_of(opened(tmp_path / "out"), LAYOUTS[0], tmp_path)
    assert all((ours - theirs).abs().max() <= 1e-4 for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS[1:4:2])
def test_only_layers_that_were_quantized_are_dequantized(layout: str, tmp_path: Path) -> None:
    base = save_media_base(layout, tmp_path / "base")
    adapter = save_random_adapter(base, tmp_path / "adapter", towers=True, quant="nf4")
    (adapter / "config.yaml").write_text(
        f"model: {{name: {base}, dtype: float32}}\nquant: {{compute_dtype: float32}}\ndata: {{train: [{{path: x}}]}}\n"
    )
    run(adapter, tmp_path / "out", "dtype=fp32", "base=dequantized")
    expected = logits_of(load_adapter(base_of(base, "nf4"), adapter), layout, tmp_path)
    found = logits_of(opened(tmp_path / "out"), layout, tmp_path)
    unquantized = logits_of(load_adapter(base_of(base), adapter), layout, tmp_path)
    for ours, theirs, exact in zip(found, expected, unquantized, strict=True):
        assert (ours - theirs).abs().max() <= 1e-4
        assert (exact - theirs).abs().max() > 1e-3, "quantizing changes nothing here"
    merged, source = tensors_of(tmp_path / "out"), tensors_of(base)
    assert all(torch.equal(merged[name], source[name]) for name in source if "merger" in name or "talker" in name)


def test_parts_that_were_not_loaded_keep_their_bytes_in_another_dtype(tmp_path: Path) -> None:
    base = save_media_base("whole Omni", tmp_path / "base", max_shard_size="300KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    adapter = save_random_adapter(base, tmp_path / "adapter", towers=False)
    assert run(adapter, tmp_path / "out", "dtype=bf16", "shard_size=200KB").dtype == "bfloat16"
    merged, source = tensors_of(tmp_path / "out"), tensors_of(base)
    kept = {name for name, tensor in merged.items() if tensor.dtype == torch.float32}
    assert kept == {name for name in source if name.startswith(("talker.", "token2wav."))}
    assert all(torch.equal(merged[name], source[name]) for name in kept)
    assert (tmp_path / "out" / "spk_dict.pt").read_bytes() == (base / "spk_dict.pt").read_bytes()


def test_config_json_changes_only_where_the_adapter_changed_something(tmp_path: Path) -> None:
    base = save_media_base("whole Omni", tmp_path / "base")
    adapter = save_random_adapter(base, tmp_path / "adapter", towers=False, new_tokens=[f"<{i}>" for i in range(5)])
    run(adapter, tmp_path / "out")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "out"))
    assert after["thinker_config"]["text_config"].pop("vocab_size") == 104
    assert before["thinker_config"]["text_config"].pop("vocab_size") == 100
    assert after == before
    model = opened(tmp_path / "out")
    assert model.get_input_embeddings().weight.shape == model.lm_head.weight.shape == (104, 64)


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        (LAYOUTS[0], ["AutoModelForImageTextToText", "image-text-to-text"]),
        (LAYOUTS[2], ["Qwen2_5OmniThinkerForConditionalGeneration", "any-to-any"]),
        (LAYOUTS[3], ["Qwen2_5OmniForConditionalGeneration", "any-to-any"]),
    ],
)
def test_the_folder_holds_what_a_processor_reads_and_says_which_class_opens_it(
    layout: str, names: list[str], tmp_path: Path
) -> None:
    base = save_media_base(layout, tmp_path / "base")
    (base / "chat_template.json").write_text("{}")
    run(save_random_adapter(base, tmp_path / "adapter", towers=False), tmp_path / "out")
    out = tmp_path / "out"
    assert (out / "preprocessor_config.json").read_bytes() == (base / "preprocessor_config.json").read_bytes()
    assert (out / "chat_template.jinja").is_file()
    assert not (out / "chat_template.json").exists(), "an older template beside the adapter's own"
    card = (out / "README.md").read_text()
    assert all(name in card for name in [*names, "AutoProcessor"]) and "AutoTokenizer" not in card


@pytest.mark.parametrize("known", [True, False], ids=["by its base", "by its tensors"])
def test_a_checkpoint_of_another_model_is_refused(known: bool, tmp_path: Path) -> None:
    # Language layers of both have the same names and shapes, as have those of VL-7B and Omni-7B.
    thinker = save_media_base("Omni's thinker", tmp_path / "thinker")
    adapter = save_random_adapter(thinker, tmp_path / "adapter", towers=not known)
    other = save_media_base("VL in Qwen's names", tmp_path / "vl")
    says = r"was trained on Qwen2\.5-Omni, found Qwen2\.5-VL"
    if not known:
        shutil.rmtree(thinker)
        says = r"cannot be merged into this base[\s\S]*model\.audio_tower\.layers\.0"
    with pytest.raises(ConfigError, match=says):
        run(adapter, tmp_path / "out", f"model={other}")
    assert not list(tmp_path.glob("*out*"))


def test_a_thinker_s_adapter_fits_the_whole_checkpoint(tmp_path: Path) -> None:
    thinker = save_media_base("Omni's thinker", tmp_path / "thinker")
    whole = save_media_base("whole Omni", tmp_path / "whole")
    adapter = save_random_adapter(thinker, tmp_path / "adapter", towers=True)
    run(adapter, tmp_path / "out", f"model={whole}")
    expected = logits_of(load_adapter(base_of(thinker), adapter), "whole Omni", tmp_path)
    found = logits_of(opened(tmp_path / "out"), "whole Omni", tmp_path)
    assert all((ours - theirs).abs().max() <= 1e-4 for ours, theirs in zip(found, expected, strict=True))


def test_missing_files_of_the_talker_are_named(tmp_path: Path) -> None:
    base = save_media_base("whole Omni", tmp_path / "base", max_shard_size="100KB")
    adapter = save_random_adapter(base, tmp_path / "adapter", towers=False)
    (base / "spk_dict.pt").unlink()
    log: list[str] = []
    run(adapter, tmp_path / "out", log=log)
    assert any("spk_dict.pt" in line for line in log)
    index = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    shard = next(file for name, file in index.items() if name.startswith("talker."))
    (base / shard).unlink()
    with pytest.raises(ConfigError, match=re.escape(shard)):
        run(adapter, tmp_path / "again")
    assert not list(tmp_path.glob("*again*"))


@pytest.mark.parametrize("towers", [False, True], ids=["frozen towers", "adapted towers"])
def test_the_kl_check_reads_the_media_of_its_rows(
    towers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    base = save_media_base("VL in Qwen's names", tmp_path / "base")
    adapter = save_random_adapter(base, tmp_path / "adapter", towers=towers)
    picture(tmp_path / "a.png", 1)
    turns = [{"role": "user", "content": "t5 <image> t6"}, {"role": "assistant", "content": "t7 t8 t9 t10"}]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": turns, "images": ["a.png"]}) + "\n")
    (adapter / "config.yaml").write_text(
        f"model: {{name: {base}, dtype: float32}}\nquant: {{type: none}}\n"
        f"data: {{train: [{{path: gone.jsonl}}], eval: [{{path: {rows}}}]}}\n"
    )
    (near,) = run(adapter, tmp_path / "near", "dtype=fp32", "kl_check.num_examples=8").kl_checks
    (far,) = run(adapter, tmp_path / "far", "dtype=bf16", "kl_check.num_examples=8").kl_checks
    assert near.tokens == 5 and near.kl < 1e-6 < far.kl
    assert bool(list((tmp_path / "cache").rglob("embeddings/*/*/*.safetensors"))) == (not towers)
    picture(tmp_path / "a.png", 2)
    (other,) = run(adapter, tmp_path / "other", "dtype=fp32", "kl_check.num_examples=8").kl_checks
    assert other.perplexity_trained != near.perplexity_trained, "the picture changes nothing"
