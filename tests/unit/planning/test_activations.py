"""The arithmetic of activations is what autograd really saves; no more is recomputed than memory asks for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from finetune import load_config
from finetune.config.schema import RunConfig
from finetune.data.batch import Batch, build_batch
from finetune.data.documents import Document
from finetune.data.encoded import IGNORE_INDEX
from finetune.losses.hidden_states import target_states
from finetune.models.adapters.inits import freeze_a
from finetune.models.families import QWEN25_SHAPES
from finetune.models.fused import fuse_layers
from finetune.models.gradient_checkpointing import apply_gradient_checkpointing
from finetune.ops import attention
from finetune.planning.activations import (
    ActivationPlan,
    elementwise_kernels,
    kept_bytes,
    loss_bytes,
    plan_activations,
)
from finetune.planning.inputs import PlanInputs, plan_inputs
from tests.parity.test_cross_entropy import documents

SHAPE: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 224,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": True,
}


def run(*overrides: str) -> RunConfig:
    return load_config("quickstart.yaml", ["quant.type=none", "data.max_length=640", *overrides])


def inputs_of(*overrides: str, shape: dict[str, Any] = SHAPE, device_type: str = "cpu") -> PlanInputs:
    return plan_inputs(run(*overrides), shape, device_type=device_type)


def model_of(cfg: RunConfig) -> nn.Module:
    attention.register()
    torch.manual_seed(0)
    found = attention.SEGMENTED if cfg.model.attention == "auto" else cfg.model.attention
    base = Qwen2ForCausalLM(Qwen2Config(**SHAPE, attn_implementation=found)).to(getattr(torch, cfg.model.dtype))
    targets = cfg.lora.target_modules
    model = get_peft_model(
        base.requires_grad_(False),
        LoraConfig(
            r=cfg.lora.rank,
            target_modules=targets,
            lora_dropout=cfg.lora.dropout,
            use_dora=cfg.lora.dora,
        ),
    )
    if cfg.lora.freeze_a:
        freeze_a(model)  # type: ignore[arg-type]
    if cfg.train.kernels == "fused":
        fuse_layers(model)
    return model.train()


def saved_bytes(model: nn.Module, batch: Batch) -> list[int]:
    """Bytes of memory that autograd keeps for each layer, weights not counted, nothing counted twice."""
    seen = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    alive, layers = [], model.get_base_model().model.layers  # type: ignore[operator]
    sums, current = [0] * len(layers), -1

    def enter(number: int) -> None:
        nonlocal current
        current = number

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if current >= 0 and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            alive.append(tensor)  # so that no other tensor comes to lie where it lies
            sums[current] += storage.nbytes()
        return tensor

    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, number=number: enter(number))
        layer.register_forward_hook(lambda *_: enter(-1))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        target_states(model, batch)
    return sums


ALL = "lora.target_modules=all-linear"


@pytest.mark.parametrize("lengths", [[320, 320], [64] * 10])
@pytest.mark.parametrize("kernels", ["fused", "peft"])
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        (ALL,),
        ("lora.dropout=0.1",),
        (ALL, "lora.dropout=0.1", "lora.rank=16"),
        ("model.dtype=float32",),
        ("lora.target_modules=[q_proj,up_proj]",),
        ("lora.target_modules=[o_proj,down_proj]",),
        ("lora.dora=true",),
        (ALL, "lora.dora=true"),
        ("lora.freeze_a=true",),
        (ALL, "lora.freeze_a=true"),
        (ALL, "lora.freeze_a=true", "lora.dropout=0.1", "lora.rank=16"),
    ],
    ids=lambda overrides: " ".join(overrides) or "q,v",
)
def test_what_a_layer_keeps_is_within_a_tenth_of_what_autograd_saves(overrides, kernels, lengths):
    cfg = run(f"train.kernels={kernels}", *overrides)
    targets = cfg.lora.target_modules
    model = model_of(cfg)
    measured = saved_bytes(model, build_batch(documents(lengths)))[1] / sum(
        lengths
    )  # the first layer's input needs no gradient
    inputs = plan_inputs(cfg, SHAPE, device_type="cpu").with_rows(lengths[0], 1.0)
    terms = kept_bytes(inputs, inputs.adapted[1])
    assert sum(terms.values()) == pytest.approx(measured, rel=0.1), (terms, targets)


DPO, GRPO = ("preference.objective=dpo",), ("reward.loss=grpo", "reward.functions={exact: 1}")


def sharing(count: int, prompt: int, answer: int) -> Batch:
    """Answers to one prompt, which is computed once."""
    start, *rows = documents([prompt, *[answer] * count])
    joined = [replace(row, ids=np.concatenate([start.ids, row.ids]), labels=_after(prompt, row)) for row in rows]
    return build_batch(joined, share_prefixes=True)


def _after(prompt: int, row: Document) -> np.ndarray:
    return np.concatenate([np.full(prompt, IGNORE_INDEX, dtype=np.int32), row.labels])


@pytest.mark.parametrize(
    "overrides", [(), (ALL,), ("model.dtype=float32",)], ids=lambda words: " ".join(words) or "q,v"
)
@pytest.mark.parametrize(
    ("settings", "rows", "batch"),
    [
        (DPO, (640, 160 / 320), (2, 160, 160)),
        (DPO, (640, 32 / 320), (2, 288, 32)),
        ((*GRPO, "reward.max_new_tokens=64"), (128, 1.0), (8, 128, 64)),
        ((*GRPO, "reward.max_new_tokens=24"), (448, 1.0), (8, 448, 24)),
        # A group of four answers that fill a sequence with their prompt: eight do not fit.
        ((*GRPO, "reward.max_new_tokens=128"), (128, 1.0), (4, 128, 128)),
    ],
)
def test_answers_keep_their_prompt_once_and_attention_keeps_it_for_each(settings, rows, batch, overrides):
    cfg, sample = run(*settings, *overrides), sharing(*batch)
    inputs = plan_inputs(cfg, SHAPE, device_type="cpu").with_rows(*rows)
    assert inputs.sequence.rows == pytest.approx(sample.rows, rel=0.02)  # the last token of an answer needs no row
    assert inputs.sequence.places == pytest.approx(sample.tokens, rel=0.02)
    measured = saved_bytes(model_of(cfg), sample)[1] / sample.rows
    assert sum(kept_bytes(inputs, inputs.adapted[1]).values()) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_transformers_own_attention_is_counted_too(kind):
    cfg = run("train.kernels=peft", f"model.attention={kind}")
    measured = saved_bytes(model_of(cfg), build_batch(documents([320, 320])))[1] / 640
    inputs = plan_inputs(cfg, SHAPE, device_type="cpu").with_rows(320, 1.0)
    planned = sum(kept_bytes(inputs, inputs.adapted[1]).values())
    assert planned == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("kernels", ["fused", "peft"])
def test_a_recomputed_layer_keeps_its_input_alone(kernels):
    model = model_of(cfg := run(f"train.kernels={kernels}"))
    apply_gradient_checkpointing(model, "all")
    plan = plan_activations(plan_inputs(cfg, SHAPE, device_type="cpu"), 1)
    measured = saved_bytes(model, build_batch(documents([320, 320])))
    assert measured[0] <= plan.input and measured[1] == plan.input
    assert measured[2] > 5 * plan.input


def test_the_peak_falls_with_every_layer_recomputed_but_the_last():
    plan = ActivationPlan(kept=(10.0,) * 4, input=1.0, head=3.0, work=5.0, layers=4)
    assert [plan.peak_bytes(count) for count in range(5)] == [45, 36, 27, 18, 19]
    assert plan.peak_bytes(3, offload=True) == 17


@pytest.mark.parametrize(("budget", "layers"), [(45, 0), (44.9, 1), (27, 2), (18, 3), (17, 3), (0, 3)])
def test_as_many_layers_keep_their_activations_as_the_budget_allows(budget, layers):
    plan = ActivationPlan(kept=(10.0,) * 4, input=1.0, head=3.0, work=5.0, layers=4)
    assert plan.fewest(budget) == layers


def test_layers_that_build_no_graph_keep_nothing():
    inputs = plan_inputs(run("lora.layers_to_transform=[2]"), SHAPE, device_type="cpu")
    plan = plan_activations(inputs, 1)
    assert inputs.first_trained_layer == 2 and len(plan.kept) == 1
    assert inputs_of("lora.layers_to_transform=[2]", "lora.new_tokens=['<a>']").first_trained_layer == 0


def test_bytes_grow_with_the_tokens_and_fused_layers_keep_less():
    shape = QWEN25_SHAPES["7B"]
    inputs = inputs_of("data.max_length=2048", shape=shape, device_type="cuda")
    small, large = (plan_activations(inputs, n) for n in (1, 4))
    assert large.kept[0] == 4 * small.kept[0] and large.head < 4 * small.head
    plain = plan_activations(inputs.with_settings(train={"kernels": "peft"}), 1)
    assert plain.kept[0] > 1.4 * small.kept[0]


def test_holes_last_until_the_forward_pass_is_done_and_garbage_while_layers_run_again():
    plan = ActivationPlan(kept=(10.0,) * 4, input=1.0, head=0.0, work=5.0, layers=4, hole=2.0, garbage=7.0)
    assert plan.peak_bytes(0) == 40 + 4 * 2  # as the forward pass ends: more than backward's 45
    assert plan.peak_bytes(3) == 3 + 10 + 5 + 7


def test_a_gpu_has_no_holes_and_large_blocks_leave_none():
    shape = QWEN25_SHAPES["0.5B"]
    plans = [
        plan_activations(inputs_of("data.max_length=512", shape=shape, device_type=kind), 1) for kind in ("cpu", "cuda")
    ]
    assert plans[0].hole == 512 * shape["intermediate_size"] * 2 and plans[1].hole == plans[1].garbage == 0
    # An MLP takes 2,048 rows at a time: 20 MB of a 0.5B, and 45 MB of a 3B, which glibc maps.
    long, large = (inputs_of("data.max_length=4096", shape=QWEN25_SHAPES[size]) for size in ("0.5B", "3B"))
    assert plan_activations(long, 1).hole == 2048 * shape["intermediate_size"] * 2
    assert plan_activations(large, 1).hole == 0


def test_kernels_are_compiled_where_training_compiles_them():
    for settings, kernels in (
        (("train.max_steps=1",), "plain torch"),
        (("train.max_steps=100000",), "compiled"),
        (("train.max_steps=1", "train.compile=true"), "compiled"),
        (("train.kernels=peft",), "peft"),
    ):
        assert elementwise_kernels(inputs_of(*settings, shape=QWEN25_SHAPES["0.5B"])) == kernels


def test_plain_kernels_on_a_gpu_take_a_block_more_than_compiled_ones():
    shape = QWEN25_SHAPES["7B"]
    compiled, plain = (
        plan_activations(
            inputs_of("data.max_length=8192", f"train.compile={on}", shape=shape, device_type="cuda"), 1
        ).peak_bytes(28)
        for on in ("true", "false")
    )
    assert 0 < plain - compiled <= 2**22 * 34


def test_a_teacher_in_memory_doubles_the_logits_and_a_sample_of_it_does_not():
    shape = QWEN25_SHAPES["0.5B"]
    cached = ("distill=recover", "distill.teacher.placement=cached", "distill.cache=folder")
    runs = [inputs_of(*words, shape=shape) for words in ((), ("distill=recover",), cached)]
    sizes = [loss_bytes(inputs, 4096, inputs.has_teacher) for inputs in runs]
    assert sizes[1] > 2 * 2**26 > sizes[0] == sizes[2]
