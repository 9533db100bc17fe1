"""format=adapter. `served` computes as a server does: from `r`, `lora_alpha` and the factors."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from finetune.config.command_options import ExportOptions
from finetune.config.compose import to_yaml
from finetune.config.schema import DataConfig, LoraConfig, ModelConfig, RunConfig, SourceConfig
from finetune.export import adapter_folder
from finetune.export.adapter_folder import write as to_adapter
from finetune.export.exporter import Exported, ExportRequest
from finetune.models.adapters.files import CONFIG_FILE, TENSOR_FILE, load_adapter
from finetune.models.adapters.names import PREFIX
from finetune.system.errors import ConfigError, IntegrityError
from tests.unit.export.conftest import KINDS

IDS = torch.arange(24)[None] * 7 % 300
UNTOUCHED = ["q,v", "all linears", "one regex", "some layers", "gaussian", "orthogonal", "loftq", "pissa"]
FOLDED = ["rslora", "patterns", "olora, rslora"]
REFUSED = sorted(KINDS.keys() - {*UNTOUCHED, *FOLDED})


def export(source: Path, out: Path, logged: list[str] | None = None, **options: Any) -> Exported:
    out.mkdir()
    settings = {"prompts": 2, "tokens": 6, **options}
    chosen = ExportOptions(format="adapter", out="served/my adapter", **settings)
    return to_adapter(ExportRequest(source, out, chosen, print if logged is None else logged.append))


def served(base: Path, adapter: Path) -> Tensor:
    """Return the logits of the base with the updates that a server computes."""
    config, tensors = settings_of(adapter), load_file(adapter / TENSOR_FILE)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    scale = config["lora_alpha"] / config["r"]
    for name, lora_A in tensors.items():
        if ".lora_A." in name:
            lora_B = tensors[name.replace(".lora_A.", ".lora_B.")]
            assert len(lora_A) == lora_B.shape[1] == config["r"]
            layer = model.get_submodule(name.removeprefix(PREFIX).removesuffix(".lora_A.weight"))
            layer.weight.data += scale * lora_B @ lora_A
    return logits(model)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


def trained(base: Path, adapter: Path) -> Tensor:
    return logits(load_adapter(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter))


def settings_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG_FILE).read_text())


def change_config(folder: Path, **entries: Any) -> None:
    (folder / CONFIG_FILE).write_text(json.dumps(settings_of(folder) | entries))


@pytest.mark.parametrize("kind", [*UNTOUCHED, *FOLDED])
@pytest.mark.parametrize("tied", [True, False])
def test_a_server_with_one_rank_and_one_scale_computes_what_was_trained(
    make_base, make_adapter, tmp_path: Path, kind: str, tied: bool
) -> None:
    base, source = make_base(tied), make_adapter(kind, tied)
    found = export(source, tmp_path / "out")
    expected = trained(base, source)
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))).abs().max() > 0.1
    torch.testing.assert_close(served(base, tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)
    config = settings_of(tmp_path / "out")
    assert not (config["rank_pattern"] or config["alpha_pattern"] or config["use_rslora"])
    assert (len(found.checks), found.checks[0].reader, found.checks[0].same) == (1, "PEFT", 1.0)


@pytest.mark.parametrize("kind", UNTOUCHED)
def test_an_adapter_with_one_rank_and_scale_keeps_every_byte(make_adapter, tmp_path: Path, kind: str) -> None:
    source = make_adapter(kind)
    found = export(source, tmp_path / "out")
    assert (tmp_path / "out" / TENSOR_FILE).read_bytes() == (source / TENSOR_FILE).read_bytes()
    assert settings_of(tmp_path / "out") == settings_of(source)
    assert found.checks[0].largest == 0.0 and not found.notes["folded"]


@pytest.mark.parametrize("kind", FOLDED)
def test_folding_a_power_of_two_changes_no_value(make_adapter, tmp_path: Path, kind: str) -> None:
    """alpha 8 over rank 4 is 2, and 8 over the root of 4 is 4; the patterns' 8/3 and 40/4 are not."""
    source = make_adapter(kind)
    found = export(source, tmp_path / "out")
    before, after = load_file(source / TENSOR_FILE), load_file(tmp_path / "out" / TENSOR_FILE)
    assert before.keys() == after.keys() and found.notes["folded"]
    most = max(len(tensor) for name, tensor in before.items() if ".lora_A." in name)
    settings = settings_of(tmp_path / "out")
    assert settings["r"] == settings["lora_alpha"] == found.notes["rank"] == most
    for name, tensor in before.items():
        if ".lora_A." in name:
            assert after[name][: len(tensor)].equal(tensor) and not after[name][len(tensor) :].any()
        elif kind == "rslora":
            assert after[name].equal(4 * tensor)


def test_patterns_without_effect_are_dropped(make_adapter, tmp_path: Path) -> None:
    source = make_adapter("q,v")
    change_config(source, rank_pattern={"q_proj": 4}, alpha_pattern={"v_proj": 8})
    found = export(source, tmp_path / "out")
    assert not found.notes["folded"] and settings_of(tmp_path / "out")["rank_pattern"] == {}


@pytest.mark.parametrize("kind", REFUSED)
def test_unsupported_adapters_are_refused_with_the_way_out(make_adapter, tmp_path: Path, kind: str) -> None:
    entry = {"dora": "use_dora", "dora on all, rslora": "use_dora", "new": "trainable_token_indices"}
    expected = entry.get(kind) or entry.get(kind.split()[0]) or "modules_to_save"
    with pytest.raises(ConfigError, match=f"(?s){expected}=.*finetune merge"):
        export(make_adapter(kind), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_every_reason_is_listed(make_adapter, tmp_path: Path) -> None:
    source = make_adapter("q,v")
    change_config(source, use_dora=True, bias="all", lora_bias=True, init_lora_weights="pissa", target_parameters=["x"])
    with pytest.raises(ConfigError) as error:
        export(source, tmp_path / "out")
    for reason in ("use_dora=true", "bias=all", "lora_bias=True", "init_lora_weights=pissa", "target_parameters=['x']"):
        assert reason in str(error.value)


def test_other_tensors_are_refused(make_adapter, tmp_path: Path) -> None:
    source = make_adapter("q,v")
    shapes = {"A": (4, 64), "B": (320, 4)}
    head = {f"{PREFIX}lm_head.lora_{side}.weight": torch.ones(shape) for side, shape in shapes.items()}
    save_file({**load_file(source / TENSOR_FILE), **head}, source / TENSOR_FILE)
    with pytest.raises(ConfigError, match=r"as base_model\.model\.lm_head\.lora_A\.weight"):
        export(source, tmp_path / "out")


def test_a_rank_above_the_servers_limit_is_refused(make_adapter, tmp_path: Path) -> None:
    source = make_adapter("q,v")
    change_config(source, r=513)
    wide = {
        name: torch.ones(513, tensor.shape[1]) if ".lora_A." in name else torch.ones(len(tensor), 513)
        for name, tensor in load_file(source / TENSOR_FILE).items()
    }
    save_file(wide, source / TENSOR_FILE)
    with pytest.raises(ConfigError, match=r"rank 513: .* 512"):
        export(source, tmp_path / "out")


@pytest.mark.parametrize(("rank", "most"), [(1, 8), (8, 8), (9, 16), (65, 128), (257, 320), (321, 512), (512, 512)])
def test_the_command_has_the_smallest_allowed_rank(make_adapter, tmp_path: Path, rank: int, most: int) -> None:
    source = make_adapter("q,v")
    resized = {
        name: torch.ones(rank, tensor.shape[1]) if ".lora_A." in name else torch.ones(len(tensor), rank)
        for name, tensor in load_file(source / TENSOR_FILE).items()
    }
    save_file(resized, source / TENSOR_FILE)
    change_config(source, r=rank)
    words = shlex.split(export(source, tmp_path / "out", verify=False).serve[0])
    assert words[words.index("--max-lora-rank") + 1] == str(most)


def test_the_command_serves_the_adapter_over_its_base(make_adapter, make_base, tmp_path: Path) -> None:
    words = shlex.split(export(make_adapter("q,v"), tmp_path / "out").serve[0])
    assert words == [
        "vllm",
        "serve",
        str(make_base()),
        "--enable-lora",
        "--lora-modules",
        "my-adapter=served/my adapter",
        "--max-lora-rank",
        "8",
        "--chat-template",
        "served/my adapter/chat_template.jinja",
    ]


def test_only_the_adapters_files_are_copied(make_adapter, tmp_path: Path) -> None:
    source = make_adapter("q,v")
    (source / "checkpoint-5").mkdir()
    for name in ("metrics.jsonl", "run.json", "optimizer.safetensors", "checkpoint-5/x", "README.md"):
        (source / name).write_text("x")
    before = {file: file.read_bytes() for file in source.rglob("*") if file.is_file()}
    export(source, tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        CONFIG_FILE,
        TENSOR_FILE,
        "README.md",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {file: file.read_bytes() for file in source.rglob("*") if file.is_file()} == before


def test_another_base_is_written_and_compared_with(make_adapter, make_base, tmp_path: Path) -> None:
    source, base = make_adapter("rslora"), make_base(seed=5)
    change_config(source, base_model_name_or_path="someone/base", revision="abc")
    found = export(source, tmp_path / "out", model=str(base))
    config = settings_of(tmp_path / "out")
    assert (config["base_model_name_or_path"], config["revision"]) == (str(base), None)
    assert len(found.checks) == 1 and f"vllm serve {base} --enable-lora" in found.serve[0]


def test_without_a_local_base_nothing_is_compared(make_adapter, tmp_path: Path) -> None:
    source = make_adapter("q,v")
    change_config(source, base_model_name_or_path="someone/base", revision="abc")
    logged: list[str] = []
    found = export(source, tmp_path / "out", logged)
    assert found.checks == [] and "someone/base" in logged[0]
    assert "vllm serve someone/base --revision abc --enable-lora" in found.serve[0]


def test_an_adapter_without_a_tokenizer_uses_that_of_its_base(make_adapter, tmp_path: Path) -> None:
    source = make_adapter("patterns")
    for file in [*source.glob("tokenizer*"), source / "chat_template.jinja"]:
        file.unlink()
    found = export(source, tmp_path / "out")
    assert found.checks[0].same == 1.0 and "--chat-template" not in found.serve[0]


def test_an_adapter_that_compensates_quantization_is_served_in_four_bit(make_adapter, tmp_path: Path) -> None:
    source = make_adapter("loftq")
    cfg = RunConfig(
        model=ModelConfig(name="x"), data=DataConfig(train=[SourceConfig(path="x")]), lora=LoraConfig(init="loftq")
    )
    (source / "config.yaml").write_text(to_yaml(cfg))
    logged: list[str] = []
    assert "--quantization bitsandbytes --enable-lora" in export(source, tmp_path / "out", logged).serve[0]
    assert "4 bit" in logged[0]


@pytest.mark.parametrize(("kind", "wrong"), [("patterns", 1.01), ("rslora", 0.99)])
def test_wrong_folding_is_refused(
    make_adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, wrong: float
) -> None:
    right = adapter_folder.scaling_of
    monkeypatch.setattr(adapter_folder, "scaling_of", lambda *args: wrong * right(*args))
    with pytest.raises(IntegrityError, match="PEFT"):
        export(make_adapter(kind), tmp_path / "out")


def test_a_changed_copy_is_refused(make_adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_adapter("q,v")

    monkeypatch.setattr(adapter_folder, "copy_files", lambda *_: change_config(source, lora_alpha=8.0001))
    with pytest.raises(IntegrityError, match="PEFT"):
        export(source, tmp_path / "out")


def test_corrupt_untrained_and_other_adapters_are_refused(make_adapter, tmp_path: Path) -> None:
    source = make_adapter("q,v")
    tensors = load_file(source / TENSOR_FILE)
    save_file({n: t * 0 if ".lora_B." in n else t for n, t in tensors.items()}, source / TENSOR_FILE)
    with pytest.raises(IntegrityError, match=f"{source}.*lora_B"):
        export(source, tmp_path / "1")
    save_file(dict(list(tensors.items())[1:]), source / TENSOR_FILE)
    with pytest.raises(IntegrityError, match="is missing"):
        export(source, tmp_path / "2")
    change_config(source, peft_type="IA3")
    with pytest.raises(ConfigError, match="LoRA adapter, found IA3"):
        export(source, tmp_path / "3")
