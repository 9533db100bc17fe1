"""Fused layers in TRL's SFTTrainer and the Trainer of transformers: the same results as without them."""

from __future__ import annotations

import socket
from collections import Counter
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from safetensors import safe_open
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from finetune import attach_lora, fuse_layers, load_base
from finetune.config.schema import LoraConfig, ModelConfig, QuantConfig
from finetune.models.fused import FusedLayers
from tests.models import random_qwen2

ROWS = [{"prompt": f"Say {i}", "completion": f"{i} is a number{' and so on' * (i % 4)}."} for i in range(24)]
STEPS = 3
# Kernel calls of one pass over the two layers.
PASS = Counter({"project": 4, "swiglu_mlp": 2, "rms_norm": 4})
IDS = torch.arange(24).reshape(2, 12)
COMMON: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.5,
    "optim": "sgd",  # its step is proportional to the gradient; Adam's would magnify the rounding of a small one
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
}
Results = tuple[list[float], dict[str, torch.Tensor]]


def stock_base(base: Path, nf4: bool, dtype: torch.dtype = torch.float32) -> Any:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, quantization_config=quantization if nf4 else None)
    for module in model.modules():
        if isinstance(module, Linear4bit):  # else it computes in bf16 without gradients, on processors that can
            module.support_avx512bf16_for_cpu = False
    return model


def lora_config(**lora: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora})


def stock_model(base: Path, nf4: bool, dtype: torch.dtype = torch.float32, **lora: Any) -> peft.PeftModel:
    """Load the base and attach an adapter as the documentation of transformers and PEFT does."""
    torch.manual_seed(3)
    model = peft.get_peft_model(stock_base(base, nf4, dtype), lora_config(**lora))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def sft_trainer(model: Any, base: Path, output: Path, config: Any = None, **settings: Any) -> SFTTrainer:
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(output), **{**COMMON, "max_length": 64, **settings}),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS[:4]),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=config,
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # SFTTrainer casts the adapter of a 4-bit base to bf16
            parameter.data = parameter.data.float()
    return trainer


def results(trainer: Trainer) -> Results:
    """Train; return the losses and the trained weights."""
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def check_equal(found: Results, expected: Results) -> None:
    assert len(expected[0]) == STEPS
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(expected[0]), rtol=1e-5, atol=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, weight in expected[1].items():
        distance = (found[1][name] - weight).abs().max() / weight.abs().max()
        assert distance <= 1e-5, f"{name}: {distance:.1e}"


SETTINGS: dict[str, dict[str, Any]] = {
    "padded": {},
    "packed": {"packing": True},
    "checkpointed": {"gradient_checkpointing": True},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "dropout": {},
}


@pytest.mark.parametrize("nf4", [True, False])
@pytest.mark.parametrize("kind", SETTINGS)
def test_sft_trainer_gives_the_same_losses_and_weights(
    base: Path, tmp_path: Path, kernel_calls: Counter[str], kind: str, nf4: bool
):
    def trained(fused: bool) -> Results:
        model = stock_model(base, nf4, lora_dropout=0.2 if kind == "dropout" else 0.0)
        if fused:
            assert fuse_layers(model) == FusedLayers(2, 2, {})
        return results(sft_trainer(model, base, tmp_path, **SETTINGS[kind]))

    expected = trained(False)
    assert not kernel_calls
    check_equal(trained(True), expected)
    passes = 2 if kind in ("checkpointed", "reentrant", "accumulated") else 1
    assert kernel_calls == {name: passes * STEPS * calls for name, calls in PASS.items()}


def test_a_base_may_get_its_adapter_from_the_trainer(base: Path, tmp_path: Path, kernel_calls: Counter[str]):
    def trained(fused: bool) -> Results:
        model = stock_base(base, nf4=False)
        if fused:
            found = fuse_layers(model)
            assert found.fused == 2 and set(found.unfused.values()) == {"trained weights"}
        return results(sft_trainer(model, base, tmp_path, lora_config(init_lora_weights="orthogonal")))

    expected = trained(False)
    check_equal(trained(True), expected)
    assert kernel_calls["project"] == STEPS * PASS["project"]


@pytest.mark.parametrize("loader", ["stock", "ours"])
def test_after_training_the_model_is_what_peft_makes(base: Path, tmp_path: Path, loader: str):
    def trained(fused: bool) -> tuple[Trainer, Results]:
        if loader == "stock":
            model = stock_model(base, nf4=True)
        else:
            torch.manual_seed(3)
            quant = QuantConfig(compute_dtype="float32", cache=False)
            loaded = load_base(ModelConfig(name=str(base), dtype="float32"), quant, "cpu")
            model = attach_lora(loaded, LoraConfig(rank=4, target_modules="all-linear"))
        if fused:
            assert fuse_layers(model) == FusedLayers(2, 2, {})
        data = Dataset.from_list([{"input_ids": row.tolist(), "labels": row.tolist()} for row in IDS])
        arguments = TrainingArguments(output_dir=str(tmp_path), **COMMON)
        trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
        return trainer, results(trainer)

    (plain, expected), (fused, found) = trained(False), trained(True)
    check_equal(found, expected)
    assert fused.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)
    models = [trainer.model.eval() for trainer in (plain, fused)]
    words = [model.generate(input_ids=IDS, max_new_tokens=5, do_sample=False, pad_token_id=0) for model in models]
    assert torch.equal(*words)
    for name, trainer in (("plain", plain), ("fused", fused)):
        trainer.save_model(str(tmp_path / name))
    keys = [set(safe_open(tmp_path / name / "adapter_model.safetensors", "pt").keys()) for name in ("plain", "fused")]
    assert keys[0] == keys[1]
    logits = models[1](input_ids=IDS).logits
    reloaded = peft.PeftModel.from_pretrained(stock_base(base, nf4=True), str(tmp_path / "fused"))
    torch.testing.assert_close(reloaded(input_ids=IDS).logits, logits, rtol=1e-4, atol=1e-4)
    merged = [model.merge_and_unload()(input_ids=IDS).logits for model in models]
    torch.testing.assert_close(merged[1], merged[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("nf4", [True, False])
@pytest.mark.parametrize("hidden", ["float32", "bfloat16", "kbit"])
def test_autocast_is_as_close_to_fp32_as_without(base: Path, kernel_calls: Counter[str], nf4: bool, hidden: str):
    """No reference is exact: fused layers may be at most 25 % further from fp32 arithmetic than PEFT."""

    def gradients(dtype: torch.dtype, autocast: bool, fused: bool) -> dict[str, torch.Tensor]:
        model = stock_model(base, nf4, dtype)
        if hidden == "kbit":
            peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("lora_" in name)
        if fused:
            fuse_layers(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model.train()(input_ids=IDS, labels=IDS).loss
        loss.backward()
        return {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}

    dtype = torch.float32 if hidden == "float32" else torch.bfloat16
    exact = gradients(torch.float32, autocast=False, fused=False)
    peers = gradients(dtype, autocast=True, fused=False)
    assert not kernel_calls
    ours = gradients(dtype, autocast=True, fused=True)
    assert kernel_calls == PASS

    def distance(found: dict[str, torch.Tensor]) -> float:
        squares = [((g - exact[n]).square().sum() / exact[n].square().sum()).item() for n, g in found.items()]
        return (sum(squares) / len(squares)) ** 0.5

    assert ours.keys() == peers.keys() and distance(ours) <= 1.25 * distance(peers)


def test_what_the_kernels_do_not_support_is_left_and_reported(base: Path):
    prefix = "base_model.model.model.layers.{}.self_attn.{}_proj".format
    dora = fuse_layers(stock_model(base, nf4=False, use_dora=True, target_modules=["v_proj"]))
    reasons = {"q": "v_proj: DoRA", "k": "v_proj: DoRA", "v": "DoRA"}
    assert dora == FusedLayers(2, 2, {prefix(n, part): why for n in (0, 1) for part, why in reasons.items()})
    assert "layers=2 of 2" in str(dora) and "modules=4 (v_proj: DoRA)" in str(dora)

    kbit = peft.prepare_model_for_kbit_training(stock_model(base, True, torch.bfloat16), False)
    for parameter in kbit.parameters():
        parameter.requires_grad_(False)
    assert len(fuse_layers(kbit).unfused) == 14

    model = stock_model(base, nf4=True)
    layers = model.get_base_model().model.layers
    weight = layers[0].self_attn.o_proj.base_layer.weight
    weight.quant_state.packing_format_for_cpu = True  # as bitsandbytes leaves it after an evaluation with AVX512-BF16
    assert set(fuse_layers(model).unfused) == {prefix(0, "o")}

    hooked = stock_model(base, nf4=False)
    add_hook_to_module(hooked.get_base_model().model.layers[1].mlp, AlignDevicesHook())
    found = fuse_layers(hooked)
    assert found.fused == 1 and set(found.unfused) == {"base_model.model.model.layers.1"}

    assert fuse_layers(random_qwen2(attention_dropout=0.1)).unfused.keys() == {"model.layers.0", "model.layers.1"}


def test_attention_weights_and_hidden_states_can_be_read():
    plain, fused = random_qwen2("eager"), random_qwen2("eager")
    fuse_layers(fused)
    wanted = {"output_attentions": True, "output_hidden_states": True}
    found, expected = fused(input_ids=IDS, **wanted), plain(input_ids=IDS, **wanted)
    assert len(found.attentions) == 2 and len(found.hidden_states) == 3
    torch.testing.assert_close(found.attentions, expected.attentions)
    torch.testing.assert_close(found.hidden_states, expected.hidden_states)


def ranks_gradients(rank: int, port: int, base: Path, output: Path) -> None:
    """Save the gradients of one of two ranks, each with one row."""
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = stock_model(base, nf4=True)
    fuse_layers(model)
    row = IDS[rank : rank + 1]
    parallel = DistributedDataParallel(model)
    parallel(input_ids=row, labels=row).loss.backward()
    torch.save({n: p.grad for n, p in model.named_parameters() if p.requires_grad}, output / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_equal_one_without_fused_layers(base: Path, tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(ranks_gradients, (port, base, tmp_path), nprocs=2)
    model = stock_model(base, nf4=True).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    for rank in (0, 1):
        for name, gradient in torch.load(tmp_path / f"{rank}.pt").items():
            distance = (gradient - expected[name]).abs().max() / expected[name].abs().max()
            assert distance <= 2e-5, f"{name}: {distance:.1e}"


def test_the_example_of_the_documentation_runs(tmp_path: Path, repo_root: Path, monkeypatch, capsys):
    section = (repo_root / "docs" / "speed.md").read_text().partition("## Fused layers in TRL's SFTTrainer")[2]
    code = section.partition("```python\n")[2].partition("```")[0]
    folder, steps = 'output_dir="outputs/trl"', "max_steps=10"
    assert folder in code and steps in code
    monkeypatch.chdir(repo_root)
    code = code.replace(folder, f'output_dir="{tmp_path}", report_to=[]').replace(steps, "max_steps=1")
    exec(code, {})  # noqa: S102 - our own documentation
    assert "fused layers=4 of 4\n" in capsys.readouterr().out
    assert (tmp_path / "adapter_model.safetensors").exists()
