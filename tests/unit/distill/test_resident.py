"""A resident teacher gives transformers' numbers and shares equal tables with the student."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from finetune.config.schema import ModelConfig, QuantConfig
from finetune.data.batch import build_batch
from finetune.data.encoded import IGNORE_INDEX
from finetune.distill.resident import ResidentTeacher, load_resident
from finetune.losses.hidden_states import base_of
from finetune.models.fused import FusedDecoderLayer
from finetune.models.load import load_base
from tests.models import random_qwen2
from tests.unit.losses.test_distillation import documents

CPU = torch.device("cpu")


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    # Large enough a table to stay mapped where it is not shared.
    config = Qwen2Config(
        vocab_size=9000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=request.param,
    )
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def cfg(folder: Path, dtype: str = "bfloat16") -> ModelConfig:
    return ModelConfig(name=str(folder), dtype=dtype)


def tables(model) -> list[int]:
    base = base_of(model)
    return [base.get_input_embeddings().weight.data_ptr(), base.get_output_embeddings().weight.data_ptr()]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_it_equals_transformers_own_model(folder, dtype):
    teacher = load_resident(cfg(folder, dtype), None, CPU)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    docs = documents([12, 30, 5])
    for doc, targets in zip(docs, teacher.targets_for([build_batch([doc]) for doc in docs]), strict=True):
        with torch.no_grad():
            states = plain.model(torch.tensor(doc.ids[None].astype("int64"))).last_hidden_state[0]
        expected = states[torch.tensor(doc.labels != IGNORE_INDEX)]
        # bf16 sums of other kernels: 2**-8 of values up to 4. fp32: 2**-24 times a hundred roundings.
        tolerance = 0.03 if dtype == "bfloat16" else 1e-5
        torch.testing.assert_close(targets.hidden_ND, expected, rtol=tolerance, atol=tolerance)
        assert torch.equal(targets.head.weight, plain.lm_head.weight)


def test_a_student_of_the_same_base_and_type_shares_its_tables(folder):
    student = load_base(cfg(folder), QuantConfig(cache=False), CPU)
    teacher = load_resident(cfg(folder), None, CPU, student)
    assert tables(teacher.model) == tables(student)
    other_type = load_resident(cfg(folder, "float32"), None, CPU, student)
    assert not set(tables(other_type.model)) & set(tables(student))
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert {p.dtype for p in teacher.model.parameters()} == {torch.bfloat16}
    assert all(isinstance(layer, FusedDecoderLayer) for layer in base_of(teacher.model).model.layers)


def test_other_tensors_are_mapped_from_the_files(folder):
    """A large tensor is no copy: its pages belong to the system's page cache."""
    before = _anonymous_bytes()
    teacher = load_resident(cfg(folder), None, CPU)
    assert _anonymous_bytes() - before < tables_bytes(teacher) / 2


def tables_bytes(teacher: ResidentTeacher) -> int:
    base = base_of(teacher.model)
    weights = {
        w.data_ptr(): w.nbytes for w in (base.get_input_embeddings().weight, base.get_output_embeddings().weight)
    }
    return sum(weights.values())


def _anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:"))


def test_files_with_other_tensor_names_are_loaded_by_transformers(folder):
    file = folder / "model.safetensors"
    save_file({name.removeprefix("model."): t for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
    teacher = load_resident(cfg(folder), None, CPU)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(
        base_of(teacher.model).model.layers[1].mlp.up_proj.weight, plain.model.layers[1].mlp.up_proj.weight
    )


def test_a_request_leaves_no_graph_and_no_mode_behind():
    model = random_qwen2().eval()
    [targets] = ResidentTeacher(model, CPU).targets_for([build_batch(documents([9]))])
    assert not targets.hidden_ND.requires_grad and not model.training
