"""A merged model computes what the adapter computes over the same base, for every kind of adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.config.command_options import MergeOptions
from finetune.config.overrides import read_options
from finetune.config.schema import ModelConfig, QuantConfig
from finetune.export import shards
from finetune.export.merge import merge as merging
from finetune.export.merge import weights
from finetune.export.merge.merge import merge
from finetune.models.adapters.files import load_adapter
from finetune.models.load import load_base
from finetune.system.errors import ConfigError, IntegrityError
from tests.unit.export.conftest import KINDS, no_progress

IDS = torch.arange(48).reshape(2, 24) * 6 % 300


def options(adapter: Path | list[Path], out: Path, *words: str) -> MergeOptions:
    named = f"adapter={adapter}" if isinstance(adapter, Path) else f"adapter=[{','.join(map(repr, map(str, adapter)))}]"
    return read_options(MergeOptions, [named, f"out={out}", "kl_check.num_examples=0", *words], "finetune merge")


def run(*words, **kwargs) -> Path:
    chosen = options(*words, **kwargs)
    merge(chosen, lambda text: None, no_progress)
    return Path(chosen.out)


def logits_of(folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the logits of plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    with torch.no_grad():
        return model(IDS).logits


def adapted_logits(base: Path, adapter: Path, quant: str = "none") -> Tensor:
    """Return the logits of the adapter over its base, computed in fp32."""
    model = load_base(
        ModelConfig(name=str(base), dtype="float32", attention="sdpa"),
        QuantConfig(type=quant, compute_dtype="float32", double=True),
        device="cpu",
    )
    with torch.no_grad():
        return load_adapter(model, adapter)(IDS).logits


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_fp32_merge_computes_what_the_adapter_computes_over_the_same_base(
    kind, tied, make_base, make_adapter, tmp_path
):
    adapter = make_adapter(kind, tied)
    merged = run(adapter, tmp_path / "out", "dtype=fp32", "base=original")
    expected = adapted_logits(make_base(tied), adapter)
    found = logits_of(merged)
    assert (found - expected).abs().max() <= 1e-4
    plain = logits_of(make_base(tied))
    assert (expected[..., :300] - plain[..., :300]).abs().max() > 0.01, (
        "the adapter changes nothing: this proves nothing"
    )


@pytest.mark.parametrize("kind", [kind for kind, made in KINDS.items() if made.quant != "none"])
def test_a_merge_into_dequantized_weights_computes_what_was_trained(kind, make_base, make_adapter, tmp_path):
    adapter = make_adapter(kind)
    (adapter / "config.yaml").write_text(
        f"model: {{name: {make_base()}}}\n"
        f"quant: {{type: {KINDS[kind].quant}, compute_dtype: float32}}\ndata: {{train: [{{path: x.jsonl}}]}}\n"
    )
    merged = run(adapter, tmp_path / "out", "dtype=fp32", "base=dequantized")
    expected = adapted_logits(make_base(), adapter, KINDS[kind].quant)
    assert (logits_of(merged) - expected).abs().max() <= 1e-4
    assert (adapted_logits(make_base(), adapter) - expected).abs().max() > 1e-3, "quantizing changes nothing here"


@pytest.mark.parametrize("kind", ["q,v", "all linears", "rslora", "dora", "patterns"])
def test_fp32_keeps_the_whole_update_and_bf16_rounds_it_once(kind, make_base, make_adapter, tmp_path):
    adapter, base = make_adapter(kind), tensors_of(make_base())
    exact = exact_merge(make_base(), adapter)
    wide = tensors_of(run(adapter, tmp_path / "wide", "dtype=fp32"))
    narrow = tensors_of(run(adapter, tmp_path / "narrow", "dtype=bf16"))
    changed = [name for name in base if not torch.equal(exact[name], base[name].double())]
    assert changed
    for name in changed:
        update = exact[name] - base[name].double()
        share = ((wide[name].double() - base[name].double()) * update).sum() / (update * update).sum()
        assert abs(share - 1) <= 1e-3
        # bf16 keeps 8 bits: half a unit in the last of them, and what fp32 lost before.
        half_unit = torch.ldexp(torch.ones_like(exact[name]), torch.frexp(exact[name]).exponent - 9)
        assert ((narrow[name].double() - exact[name]).abs() <= half_unit + 1e-7).all()
    for name in base.keys() - set(changed):
        assert torch.equal(narrow[name], base[name])


def exact_merge(base: Path, adapter: Path) -> dict[str, Tensor]:
    """Return the tensors of PEFT's own merge in float64."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    adapted = peft.PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=False).double()
    return {name: tensor for name, tensor in adapted.merge_and_unload().state_dict().items()}


@pytest.mark.parametrize("by_system", [True, False])
def test_unchanged_tensors_keep_their_bytes_from_shards_into_shards(
    by_system, make_base, make_adapter, tmp_path, monkeypatch
):
    if not by_system:  # as between file systems
        monkeypatch.setattr(shards, "_copy_range", lambda *_: 0)
    base = make_base(False, "60KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    adapter = make_adapter("q,v", False, base=base)
    merged = run(adapter, tmp_path / "out", "shard_size=40KB")
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name in load_file(merged / file)
    whole = tensors_of(run(adapter, tmp_path / "whole"))
    found, source = tensors_of(merged), tensors_of(base)
    assert (tmp_path / "whole" / "model.safetensors").is_file()
    assert found.keys() == whole.keys() == source.keys()
    assert all(torch.equal(found[name], whole[name]) for name in found)
    same = [name for name in source if torch.equal(found[name], source[name])]
    assert len(source) - len(same) == 4
    assert torch.equal(logits_of(merged, torch.bfloat16), logits_of(tmp_path / "whole", torch.bfloat16))


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        ("dora on all, rslora", "original"),
        ("new tokens beyond the table", "original"),
        ("all linears", "dequantized"),
    ],
)
def test_the_block_size_does_not_change_the_result(kind, base, make_adapter, tmp_path, monkeypatch):
    adapter = make_adapter(kind)
    whole = tensors_of(run(adapter, tmp_path / "whole", "dtype=fp32", f"base={base}"))
    monkeypatch.setattr(weights, "_BLOCK", 500)  # 7 rows of 64, and in 4 bit as many as end with a scale
    parts = tensors_of(run(adapter, tmp_path / "parts", "dtype=fp32", f"base={base}"))
    assert all(torch.allclose(parts[name], whole[name], rtol=0, atol=1e-6) for name in whole)


@pytest.mark.parametrize("kind", ["embedding in full", "new tokens"])
def test_a_tied_head_stays_tied(kind, make_adapter, tmp_path):
    merged = run(make_adapter(kind), tmp_path / "out")
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in tensors_of(merged)


def test_the_folder_is_complete_and_loads_offline(make_base, make_adapter, tmp_path):
    adapter = make_adapter("new tokens beyond the table")
    merged = run(adapter, tmp_path / "out")
    words = AutoTokenizer.from_pretrained(merged, local_files_only=True)
    assert words("<29>")["input_ids"] == [329]
    assert words.chat_template == AutoTokenizer.from_pretrained(adapter).chat_template
    config = json.loads((merged / "config.json").read_text())
    assert config["vocab_size"] == 330
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert (merged / "generation_config.json").is_file()
    assert "adapter" in (merged / "README.md").read_text()
    assert json.loads((merged / "merge_report.json").read_text())["base"] == "original"


def test_a_tied_head_that_an_adapter_changed_alone_becomes_a_tensor_of_its_own(make_base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_base(True), dtype=torch.float32)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head", "q_proj"], r=4))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted.eval()(IDS).logits
    merged = run(tmp_path / "adapter", tmp_path / "out", "dtype=fp32", f"model={make_base(True)}")
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is False
    assert (logits_of(merged) - expected).abs().max() <= 1e-4


def test_several_adapters_are_summed_with_their_weights(make_base, make_adapter, tmp_path):
    one, two = make_adapter("q,v", name="one"), make_adapter("dora on all, rslora", name="two", seed=2)
    base = tensors_of(make_base())
    both = tensors_of(run([one, two], tmp_path / "both", "weights=[0.7, -0.4]", "dtype=fp32"))
    first, second = exact_merge(make_base(), one), exact_merge(make_base(), two)
    for name, tensor in both.items():
        start = base[name].double()
        assert torch.allclose(
            tensor.double(), start + 0.7 * (first[name] - start) - 0.4 * (second[name] - start), atol=1e-6
        )


def test_ties_keeps_the_largest_values_of_each_update_and_the_sign_of_their_sum(make_base, make_adapter, tmp_path):
    one, two = make_adapter("q,v", name="one"), make_adapter("q,v", name="two", seed=2)
    base = tensors_of(make_base())
    merged = tensors_of(run([one, two], tmp_path / "out", "combination=ties", "density=0.25", "dtype=fp32"))
    firsts, seconds = exact_merge(make_base(), one), exact_merge(make_base(), two)
    name = "model.layers.0.self_attn.q_proj.weight"
    start = base[name].double()
    updates = torch.stack([firsts[name] - start, seconds[name] - start])
    kept = torch.stack([keep_largest(update, 0.25) for update in updates])
    agrees = kept.sign() == kept.sum(0).sign()
    expected = (kept * agrees).sum(0) / ((kept != 0) & agrees).sum(0).clamp(min=1)
    assert torch.allclose(merged[name].double(), start + expected, atol=1e-6)


def keep_largest(update: Tensor, share: float) -> Tensor:
    count = int(share * update.numel())
    least = update.abs().flatten().topk(count).values.min()
    return update * (update.abs() >= least)


def test_dare_depends_on_its_seed_alone(make_base, make_adapter, tmp_path):
    adapters = [make_adapter("q,v", name="one"), make_adapter("q,v", name="two", seed=2)]

    def merged(name: str, *words: str) -> dict[str, Tensor]:
        return tensors_of(run(adapters, tmp_path / name, "combination=dare_linear", "density=0.5", *words))

    first, again, other = merged("a"), merged("b"), merged("c", "seed=1")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


def refusal(adapter, out: Path, *words: str, error=ConfigError) -> str:
    with pytest.raises(error) as caught:
        run(adapter, out, *words)
    assert not out.exists()
    assert not list(out.parent.glob(f".{out.name}*"))
    return str(caught.value)


def test_an_adapter_of_another_base_is_refused_with_every_misfit(make_base, make_adapter, tmp_path):
    adapter = make_adapter("q,v")
    other = tmp_path / "other"
    shutil.copytree(make_base(), other)
    config = json.loads((other / "config.json").read_text())
    tensors = load_file(other / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name] = tensors[name][:, :32].contiguous()
    del tensors["model.layers.0.self_attn.v_proj.weight"]
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    (other / "config.json").write_text(json.dumps(config))
    message = refusal(adapter, tmp_path / "out", f"model={other}")
    assert f"{name}: the base has shape [64, 32], the adapter needs [64, 64]" in message
    assert "model.layers.0.self_attn.v_proj.weight: the base has no such tensor" in message


def test_changed_base_weights_are_refused_unless_model_names_them(make_base, make_adapter, tmp_path):
    from finetune.models.digest import base_fingerprint

    adapter = make_adapter("q,v")
    (adapter / "run.json").write_text(json.dumps({"base": {"fingerprint": base_fingerprint(str(make_base(seed=9)))}}))
    assert "other weights" in refusal(adapter, tmp_path / "out")
    run(adapter, tmp_path / "out", f"model={make_base()}")


def test_a_missing_shard_is_named(make_base, make_adapter, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(make_base(False, "60KB"), base)
    adapter = make_adapter("q,v", False, base=base)
    (base / "model-00002-of-00004.safetensors").unlink(missing_ok=True)
    gone = sorted(base.glob("model-*.safetensors"))[-1]
    gone.unlink()
    assert gone.name in refusal(adapter, tmp_path / "out")


def test_nan_in_an_adapter_is_refused(make_adapter, tmp_path):
    adapter = make_adapter("q,v")
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, adapter / "adapter_model.safetensors")
    message = refusal(adapter, tmp_path / "out", error=IntegrityError)
    assert "NaN" in message and name in message


def test_an_existing_folder_is_left_alone(make_adapter, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    with pytest.raises(ConfigError, match="out="):
        run(make_adapter("q,v"), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious.txt"]


def test_values_beyond_fp16_are_refused(make_adapter, tmp_path):
    adapter = make_adapter("norms in full")
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.model.norm.weight"][0] = 1e5
    save_file(tensors, adapter / "adapter_model.safetensors")
    assert "dtype=fp16" in refusal(adapter, tmp_path / "out", "dtype=fp16")


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["weights=[1, 2]"], "weights: "),
        (["combination=ties"], "density: "),
        (["density=0.5"], "density: "),
        (["shard_size=4 apples"], "shard_size=4 apples"),
        (["base=dequantized"], "quant.type=none"),
    ],
)
def test_contradicting_options_are_refused(words, key, make_base, make_adapter, tmp_path):
    adapter = make_adapter("pissa")
    (adapter / "config.yaml").write_text(
        f"model: {{name: {make_base()}}}\nquant: {{type: none}}\ndata: {{train: [{{path: x.jsonl}}]}}\n"
    )
    assert key in refusal(adapter, tmp_path / "out", *words)


def test_an_interrupted_merge_continues_after_its_last_complete_shard(make_base, make_adapter, tmp_path, monkeypatch):
    adapter = make_adapter("all linears")
    expected = tensors_of(run(adapter, tmp_path / "unbroken", "shard_size=40KB"))
    write, written = merging.write_shard, []

    def stop_at_third(file, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(file)
        write(file, *rest)

    monkeypatch.setattr(merging, "write_shard", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        run(adapter, tmp_path / "out", "shard_size=40KB")
    assert not (tmp_path / "out").exists()
    again = []
    monkeypatch.setattr(merging, "write_shard", lambda file, *rest: (again.append(file.name), write(file, *rest)))
    found = tensors_of(run(adapter, tmp_path / "out", "shard_size=40KB"))
    assert not {file.name for file in written} & set(again)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("other", ["adapter", "its alpha", "base=dequantized", "dtype=fp32"])
def test_shards_of_another_merge_are_not_reused(other, make_adapter, tmp_path, monkeypatch):
    one = make_adapter("q,v", name="one")
    two = make_adapter("q,v", name="two", seed=2) if other == "adapter" else one
    words = [other] if "=" in other else []
    write = merging.write_metadata
    monkeypatch.setattr(merging, "write_metadata", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(one, tmp_path / "out")
    monkeypatch.setattr(merging, "write_metadata", write)
    if other == "its alpha":
        settings = json.loads((two / "adapter_config.json").read_text())
        (two / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 99}))
    found = tensors_of(run(two, tmp_path / "out", *words))
    expected = tensors_of(run(two, tmp_path / "fresh", *words))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
