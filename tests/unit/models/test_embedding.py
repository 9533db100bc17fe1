"""An embedding in main memory gives the bits of one on the device, and nothing trains, moves or saves it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from finetune.config.schema import LoraConfig, ModelConfig, QuantConfig
from finetune.data.batch import build_batch
from finetune.data.documents import Document
from finetune.distill.resident import load_resident
from finetune.evaluation.generation import decode
from finetune.losses.cross_entropy import CrossEntropy
from finetune.models import embedding
from finetune.models.adapters.attach import attach_lora
from finetune.models.embedding import HostEmbedding, move_embedding_to_host
from finetune.models.fused import fuse_layers
from finetune.models.load import load_base
from finetune.system.errors import ConfigError
from tests.models import prompts_of, random_qwen2

CPU = torch.device("cpu")


def row(length: int) -> Document:
    ids = np.arange(3, 3 + length, dtype=np.int32)
    return Document(ids, np.roll(ids, -1), f"row of {length}")


BATCH = build_batch([row(9), row(5)])


@pytest.mark.parametrize("shape", [(1, 7), (2, 3), (5,), (1, 0)])
def test_rows_are_those_of_a_plain_embedding_in_any_number_of_copies(monkeypatch, shape):
    table, ids = torch.randn(11, 4).bfloat16(), torch.randint(11, shape)
    expected = torch.nn.functional.embedding(ids, table)
    for copy_bytes in (2**26, 2 * 8, 1):  # all rows, two rows of eight bytes, one row
        monkeypatch.setattr(embedding, "_COPY_BYTES", copy_bytes)
        assert HostEmbedding(table, CPU)(ids).equal(expected)


@pytest.mark.parametrize("attention", ["segmented", "sdpa"])
def test_loss_gradients_and_answers_have_the_same_bits(attention: str):
    found = []
    for on_host in (False, True):
        base = random_qwen2(attention, tie_word_embeddings=False)
        base.requires_grad_(False)
        if on_host:
            move_embedding_to_host(base)
        torch.manual_seed(0)
        model = attach_lora(base, LoraConfig(init="gaussian"))
        fuse_layers(model)
        loss = CrossEntropy(model.train(), neftune_alpha=5.0)(BATCH)
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            answers = decode(model.eval(), prompts_of([[1, 2], [3]]), [4, 4], stop_ids=(), vocabulary=97)
        found.append(([loss, *gradients], answers))
    (plain, answers), (moved, moved_answers) = found
    assert all(a.equal(b) for a, b in zip(plain, moved, strict=True)) and answers == moved_answers


def test_the_table_is_neither_parameter_nor_buffer():
    base = random_qwen2(tie_word_embeddings=False)
    move_embedding_to_host(base)
    moved = base.get_input_embeddings()
    move_embedding_to_host(base)
    assert base.get_input_embeddings() is moved
    assert "model.embed_tokens.weight" not in base.state_dict()
    assert base.to(torch.bfloat16).get_input_embeddings().weight.dtype == torch.float32


def test_a_tied_base_is_refused_on_a_gpu_before_it_is_loaded(make_base):
    model = ModelConfig(name=str(make_base(tied=True)), embedding="host")
    with pytest.raises(ConfigError, match=r"model.embedding=host"):
        load_base(model, QuantConfig(), "cuda")
    assert not isinstance(load_base(model, QuantConfig(), "cpu").get_input_embeddings(), HostEmbedding)


@pytest.mark.parametrize("trained", [{"modules_to_save": ["embed_tokens"]}, {"new_tokens": ["<a>"]}])
def test_an_embedding_in_main_memory_cannot_train(make_base, tokenizer, trained):
    base = load_base(ModelConfig(name=str(make_base(tied=False))), QuantConfig(), "cpu")
    move_embedding_to_host(base)
    with pytest.raises(ConfigError, match=r"model.embedding=device"):
        attach_lora(base, LoraConfig(**trained), tokenizer)


def test_a_resident_teacher_shares_the_table(make_base):
    model = ModelConfig(name=str(make_base(tied=False)))
    student = load_base(model, QuantConfig(), "cpu")
    move_embedding_to_host(student)
    teacher = load_resident(model, None, CPU, student)
    assert teacher.model.get_input_embeddings() is student.get_input_embeddings()
    [found] = teacher.targets_for([BATCH])
    [expected] = load_resident(model, None, CPU).targets_for([BATCH])
    assert found.hidden_ND.equal(expected.hidden_ND)
