"""The plan's bytes of a teacher, against the tensors that it really has."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from finetune import load_config
from finetune.models.families import QWEN25_SHAPES
from finetune.planning.describe import describe_teacher
from finetune.planning.inputs import PlanInputs, plan_inputs
from finetune.planning.peak_memory import signal_bytes, streamed_bytes, teacher_bytes

SHAPE = QWEN25_SHAPES["7B"]
STREAMED = "distill.teacher.placement=streamed"


def plan(*overrides: str) -> PlanInputs:
    return plan_inputs(load_config("distill.yaml", overrides), SHAPE, device_type="cpu")


def bytes_of_tensors(size: str, *, tables: bool, layers: int | None = None) -> int:
    """bf16 bytes of the matrices of a model of that size, built without storage."""
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**QWEN25_SHAPES[size]))
    wanted = [p for name, p in model.named_parameters() if p.dim() == 2 and (".layers." in name or tables)]
    if layers is not None:
        wanted = [p for name, p in model.named_parameters() if p.dim() == 2 and name.startswith(LAYERS[:layers])]
    return 2 * sum(p.numel() for p in wanted)


LAYERS = tuple(f"model.layers.{i}." for i in range(80))


def test_a_teacher_of_the_same_base_takes_its_layers_alone():
    assert teacher_bytes(plan()) == bytes_of_tensors("7B", tables=False)
    assert teacher_bytes(plan("distill.teacher.dtype=float32")) == 2 * bytes_of_tensors("7B", tables=True)


def test_another_teacher_takes_all_of_it_and_a_streamed_one_two_layers_and_a_head():
    other = plan("distill=teacher", "distill.teacher.name=Qwen/Qwen2.5-14B-Instruct")
    assert teacher_bytes(other) == bytes_of_tensors("14B", tables=True) and streamed_bytes(other) == 0
    streamed = plan("distill=teacher", "distill.teacher.name=Qwen/Qwen2.5-14B-Instruct", STREAMED)
    head = 2 * QWEN25_SHAPES["14B"]["vocab_size"] * QWEN25_SHAPES["14B"]["hidden_size"]
    assert teacher_bytes(streamed) == head
    assert streamed_bytes(streamed) == bytes_of_tensors("14B", tables=False, layers=2)
    own = plan(STREAMED)
    assert teacher_bytes(own) == 0
    assert streamed_bytes(own) == bytes_of_tensors("7B", tables=False, layers=2)


@pytest.mark.parametrize(
    "settings",
    [
        ("distill.objective=none",),
        ("distill.teacher.placement=cached", "distill.cache=folder"),
        ("distill.teacher.placement=server", "distill.cache=folder", "distill.teacher.url=http://host"),
    ],
)
def test_a_teacher_that_is_not_loaded_takes_no_memory(settings):
    assert teacher_bytes(plan(*settings)) == 0


def test_a_guard_needs_a_teacher_too():
    guarded = ("distill.objective=none", "guard.max=0.1", "data.held_out=0.1", "train.eval_every=10")
    assert teacher_bytes(plan(*guarded)) == teacher_bytes(plan())
    assert "itself, in bfloat16, resident" in str(describe_teacher(plan(*guarded)))


def test_cached_hidden_states_need_a_head_where_the_student_has_another():
    cached = ("distill.teacher.placement=cached", "distill.cache=folder", "distill.cache_kind=hidden")
    assert teacher_bytes(plan(*cached)) == 0
    other = teacher_bytes(plan("distill=teacher", "distill.teacher.name=Qwen/Qwen2.5-14B", *cached))
    assert other == 2 * QWEN25_SHAPES["14B"]["vocab_size"] * QWEN25_SHAPES["14B"]["hidden_size"]


def test_a_signal_is_as_wide_as_the_teacher():
    wide = plan("distill=teacher", "distill.teacher.name=Qwen/Qwen2.5-14B")
    assert signal_bytes(plan(), 100) == 100 * 3584 * 2 and signal_bytes(wide, 100) == 100 * 5120 * 2
    sampled = plan("distill.teacher.placement=cached", "distill.cache=folder")
    assert signal_bytes(sampled, 100) == 100 * (32 + 16) * 12


def test_the_plan_names_a_teacher_of_unknown_shape():
    cfg = plan("distill=teacher", "distill.teacher.name=somebody/model")
    assert teacher_bytes(cfg) is None
    assert "somebody/model" in str(describe_teacher(cfg)) and "not planned" in str(describe_teacher(cfg))
