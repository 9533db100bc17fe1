"""The gate of a family: ids, arithmetic, adapters, quantized weights and plans equal those of transformers and PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, BitsAndBytesConfig

from finetune import load_config
from finetune.config.command_options import MergeOptions
from finetune.config.schema import QuantConfig
from finetune.data.batch import build_batch
from finetune.data.encoded import IGNORE_INDEX
from finetune.data.formats.messages import Conversation, Message
from finetune.data.template.chat import ChatTemplate
from finetune.distill.stream import StreamedModel
from finetune.export.merge.merge import merge
from finetune.losses.cross_entropy import CrossEntropy
from finetune.losses.hidden_states import target_states
from finetune.models.adapters.attach import attach_lora
from finetune.models.families import FAMILIES, shape_of
from finetune.models.families.proven import PROVEN
from finetune.models.fused import fuse_layers
from finetune.models.load import load_base
from finetune.planning.activations import kept_bytes
from finetune.planning.inputs import plan_inputs
from finetune.planning.static_memory import module_names, parameters_of
from tests.families.tiny import CPU, TinyFamily, logits
from tests.models import random_model
from tests.parity.test_cross_entropy import documents
from tests.unit.planning.test_activations import saved_bytes

Get = Callable[[str], TinyFamily]
TURNS = [("user", "Say 3 items, bitte: é 世"), ("assistant", "one two\nthree"), ("user", "and?"), ("assistant", "four")]


@pytest.mark.parametrize("name", PROVEN["chat template"])
def test_ids_are_those_of_the_template(name: str, tiny: Get):
    tokenizer = AutoTokenizer.from_pretrained(tiny(name).folder)
    chat = ChatTemplate(tokenizer)
    turns = [{"role": role, "content": text} for role, text in TURNS]
    row = Conversation(tuple(Message(role, text) for role, text in TURNS))
    [encoded] = chat.encode([row], "last")
    assert encoded.ids.tolist() == tokenizer.apply_chat_template(turns, return_dict=False)
    prompt = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=False)
    assert chat.prompt_ids(row.messages[:-1]) == prompt == encoded.ids[: len(prompt)].tolist()
    assert not encoded.trained[: len(prompt)].any()
    end = tokenizer.convert_tokens_to_ids(FAMILIES[name].end_of_turn)
    assert chat.turn_end_id == end and end in encoded.ids[encoded.trained]


@pytest.mark.parametrize("name", PROVEN["chat template"])
def test_a_raw_text_begins_as_the_tokenizer_begins_it(name: str, tiny: Get):
    tokenizer = AutoTokenizer.from_pretrained(tiny(name).folder)
    chat = ChatTemplate(tokenizer)
    [ids] = chat.encode_texts(["one two"])
    assert [*chat.text_start, *ids] == tokenizer("one two")["input_ids"]
    assert bool(chat.text_start) == (name in ("llama", "mistral"))


@pytest.mark.parametrize("name", PROVEN["fused layers"])
def test_loss_and_gradients_of_a_pack_are_those_of_peft_for_each_document_alone(name: str, tiny: Get):
    rows = documents([5, 70, 2, 64, 9])
    stock = tiny(name).adapted(tiny(name).stock(attn_implementation="eager")).train()
    expected = torch.zeros(())
    for row in rows:
        found = stock(input_ids=torch.tensor(row.ids[None].astype("int64"))).logits[0]
        expected = expected + F.cross_entropy(
            found, torch.tensor(row.labels.astype("int64")), ignore_index=IGNORE_INDEX, reduction="sum"
        )
    expected.backward()
    ours = tiny(name).adapted(tiny(name).ours()).train()
    fused = fuse_layers(ours)
    assert (fused.fused, fused.layers, fused.unfused) == (2, 2, {})
    loss = CrossEntropy(ours)(build_batch(rows))
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    wanted = {key: each.grad for key, each in stock.named_parameters() if each.grad is not None}
    gradients = {key: each.grad for key, each in ours.named_parameters() if each.grad is not None}
    assert gradients.keys() == wanted.keys() and len(wanted) == 2 * 7 * 2
    for key, gradient in gradients.items():
        distance = (gradient - wanted[key]).abs().max() / wanted[key].abs().max()
        assert distance < 1e-4, f"{key}: {distance:.1e}"


@pytest.mark.parametrize("name", PROVEN["4-bit base"])
def test_a_4_bit_base_has_the_bits_of_transformers(name: str, tiny: Get):
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", *(tower.module for tower in FAMILIES[name].towers.values())],
    )
    theirs = tiny(name).stock(quantization_config=settings, device_map={"": "cpu"}).state_dict()
    ours = load_base(tiny(name).config(), QuantConfig(), CPU).state_dict()
    assert ours.keys() == theirs.keys() and sum(".quant_state." in key for key in ours) == 2 * 7
    assert [key for key, tensor in ours.items() if not torch.equal(tensor, theirs[key])] == []


@pytest.mark.parametrize("name", PROVEN["distillation"])
def test_a_streamed_teacher_of_the_same_weights_says_what_the_student_says(name: str, tiny: Get):
    student = attach_lora(tiny(name).ours(), load_config("lora.yaml", [], needs_data=False).lora)
    assert fuse_layers(student).fused == 2
    batch = build_batch(documents([40, 90, 5]))
    [teacher] = StreamedModel(tiny(name).config(), CPU).hidden_states([batch])
    with torch.no_grad():
        assert torch.equal(teacher, target_states(student.eval(), batch).hidden_ND)


@pytest.mark.parametrize("name", PROVEN["merge"])
def test_a_merged_model_computes_what_the_adapter_computes(name: str, tiny: Get, tmp_path: Path):
    trained = tiny(name).adapted(tiny(name).stock()).eval()
    trained.save_pretrained(tmp_path / "adapter")
    merge(
        MergeOptions(
            adapter=str(tmp_path / "adapter"),
            model=str(tiny(name).folder),
            out=str(tmp_path / "merged"),
            dtype="float32",
        ),
        log=lambda text: None,
    )
    ids = list(range(3, 60))
    wanted = logits(trained, ids)
    with trained.disable_adapter():
        assert (logits(trained, ids) - wanted).abs().max() > 1e-2
    found = logits(tiny(name).stock(tmp_path / "merged"), ids)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PROVEN["planner"])
def test_the_plan_counts_the_decoder_of_the_model(name: str, tiny: Get):
    shape = shape_of(str(tiny(name).folder))
    assert shape is not None
    model = tiny(name).ours()
    towers = tuple(f"{tower.module}." for tower in FAMILIES[name].towers.values())
    decoder = {key: tensor for key, tensor in model.named_parameters() if not key.startswith(towers)}
    assert parameters_of(shape) == sum(tensor.numel() for tensor in decoder.values())
    modules = {key.rpartition(".")[0] for key in decoder}
    assert modules <= module_names(shape)
    cfg = load_config("lora.yaml", ["quant.type=none", "model.dtype=float32"], needs_data=False)
    parts = plan_inputs(cfg, shape, device_type="cpu").static.parts
    base = sum(size for part, size in parts.items() if part not in ("adapter", "gradients", "optimizer"))
    assert base == sum(tensor.nbytes for tensor in decoder.values())


@pytest.mark.parametrize("kernels", ["fused", "peft"])
@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_the_plan_of_activations_is_what_autograd_saves(name: str, kernels: str, tiny: Get):
    model = tiny(name).adapted(random_model(name, dtype=torch.bfloat16).requires_grad_(False)).train()
    if kernels == "fused":
        fuse_layers(model)
    words = ["quant.type=none", "data.max_length=640", f"train.kernels={kernels}"]
    cfg = load_config("lora.yaml", [*words, "lora.target_modules=all-linear", "lora.rank=4"], needs_data=False)
    shape = shape_of(str(tiny(name).folder)) or {}
    inputs = plan_inputs(cfg, shape, device_type="cpu").with_rows(320, 1.0)
    measured = saved_bytes(model, build_batch(documents([320, 320])))[1] / 640
    assert sum(kept_bytes(inputs, inputs.adapted[1]).values()) == pytest.approx(measured, rel=0.1)
