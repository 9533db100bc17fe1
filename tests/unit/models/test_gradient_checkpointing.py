"""Gradient checkpointing recomputes the configured layers, changes no gradient, and does no needless work."""

from __future__ import annotations

import weakref
from collections import Counter

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from finetune.data.batch import Batch, build_batch
from finetune.losses.chunked import chunked_logits
from finetune.losses.cross_entropy import CrossEntropy
from finetune.models.fused import fuse_layers
from finetune.models.gradient_checkpointing import apply_gradient_checkpointing, checkpointed_layers
from finetune.models.offload import HostOffload
from finetune.ops import attention
from finetune.ops.limits import LOGITS_VALUES
from finetune.system.errors import ConfigError
from tests.parity.test_cross_entropy import documents

LAYERS = 4


def adapted(layers: list[int] | None = None, dropout: float = 0.0) -> PeftModel:
    """Build a random model of four layers with adapters on q and v, in train mode."""
    attention.register()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=attention.SEGMENTED,
    )
    lora = LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=layers,
        lora_dropout=dropout,
        init_lora_weights=False,
    )
    return get_peft_model(Qwen2ForCausalLM(config).requires_grad_(False), lora).train()


@pytest.fixture
def batch() -> Batch:
    return build_batch(documents([5, 70, 2, 9]))


def gradients(model: PeftModel, batch: Batch) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    CrossEntropy(model)(batch).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def runs_of(model: PeftModel, module: str) -> Counter[int]:
    """Count how often `module` of each layer runs from now on."""
    counts: Counter[int] = Counter()
    for number, layer in enumerate(model.get_base_model().model.layers):
        layer.get_submodule(module).register_forward_pre_hook(
            lambda *_, number=number: counts.update([number])  # type: ignore[misc]
        )
    return counts


@pytest.mark.parametrize(
    ("setting", "expected"),
    [("none", []), (1, [0]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), ("all", [0, 1, 2]), ("offload", [0, 1, 2])],
)
def test_the_first_layers_are_recomputed_and_the_last_one_only_if_the_number_includes_it(setting, expected, batch):
    model = adapted()
    assert list(apply_gradient_checkpointing(model, setting)) == expected
    counts = runs_of(model, "self_attn.q_proj")
    gradients(model, batch)
    assert counts == {number: 1 + (number in expected) for number in range(LAYERS)}


@pytest.mark.parametrize(("setting", "expected"), [("all", [2]), (1, [2]), (2, [2, 3]), (4, [2, 3]), ("none", [])])
def test_layers_below_the_first_adapter_build_no_graph_and_run_once(setting, expected, batch):
    model = adapted([2, 3])
    assert list(apply_gradient_checkpointing(model, setting)) == expected
    counts = runs_of(model, "self_attn.q_proj")
    inputs = []
    for layer in model.get_base_model().model.layers:
        layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0].requires_grad))
    gradients(model, batch)
    # transformers 5.17 also calls the hooks of a layer that it recomputes.
    assert inputs[:LAYERS] == [False, False, False, True]
    assert counts == {number: 1 + (number in expected) for number in range(LAYERS)}


def test_more_layers_than_the_model_has_are_an_error():
    with pytest.raises(ConfigError, match=r"train\.gradient_checkpointing: .*4 layers, found 5"):
        apply_gradient_checkpointing(adapted(), 5)


def test_a_trained_embedding_comes_before_all_layers_and_a_trained_head_after():
    model = adapted([3])
    model.get_input_embeddings().weight.requires_grad_()
    assert list(apply_gradient_checkpointing(model, "all")) == [0, 1, 2]
    model = adapted([3])
    model.get_base_model().lm_head.weight.requires_grad_()
    assert list(apply_gradient_checkpointing(model, 4)) == [3]


def test_a_single_layer_in_backward_is_recomputed_only_if_the_setting_is_a_number():
    assert list(checkpointed_layers("all", 4, first=3)) == []
    assert list(checkpointed_layers(4, 4, first=3)) == [3]
    assert list(checkpointed_layers("all", 4, first=4)) == []


@pytest.mark.parametrize("storage", ["nf4", "none"])
def test_a_frozen_down_proj_is_not_recomputed(storage, load, batch):
    """A frozen torch linear saves its weight before it multiplies, so there the test counts matrix products."""
    model = get_peft_model(load(storage), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).train()
    apply_gradient_checkpointing(model, 2)
    if storage == "nf4":
        counts = runs_of(model, "mlp.down_proj")
        gradients(model, batch)
        assert counts == {0: 1, 1: 1}
        return
    down = model.get_base_model().model.layers[0].mlp.down_proj
    products = CountProducts(down.weight)
    with products:
        loss = CrossEntropy(model)(batch)
    assert products.count == 1
    with products:
        loss.backward()
    assert products.count == 2, "backward multiplies with it once, for the gradient of its input"


def test_a_fused_layer_does_not_recompute_a_frozen_down_proj(batch):
    model = adapted()
    fuse_layers(model)
    apply_gradient_checkpointing(model, LAYERS)
    products = CountProducts(model.get_base_model().model.layers[1].mlp.down_proj.weight)
    with products:
        CrossEntropy(model)(batch).backward()
    assert products.count == 2


@pytest.mark.parametrize("setting", [2, "all", "offload"])
def test_gradients_of_fused_layers_are_bit_identical_with_dropout(setting, batch):
    kept, recomputed = adapted(dropout=0.3), adapted(dropout=0.3)
    for model, how in ((kept, "none"), (recomputed, setting)):
        fuse_layers(model)
        apply_gradient_checkpointing(model, how)
    expected = gradients(kept, batch)
    for name, gradient in gradients(recomputed, batch).items():
        assert torch.equal(gradient, expected[name]), name


class CountProducts(torch.utils._python_dispatch.TorchDispatchMode):
    """Count the matrix products that read the memory of a tensor."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.place, self.count = weight.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.linear):
            self.count += any(arg.untyped_storage().data_ptr() == self.place for arg in args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("setting", [1, 4, "all", "offload"])
def test_gradients_are_bit_identical_with_dropout(setting, batch):
    kept, recomputed = adapted(dropout=0.3), adapted(dropout=0.3)
    apply_gradient_checkpointing(kept, "none")
    apply_gradient_checkpointing(recomputed, setting)
    expected = gradients(kept, batch)
    assert len(expected) == 4 * LAYERS
    for name, gradient in gradients(recomputed, batch).items():
        assert torch.equal(gradient, expected[name]), name


def test_evaluation_recomputes_nothing(batch):
    model = adapted()
    apply_gradient_checkpointing(model, 4)
    counts = runs_of(model, "self_attn.q_proj")
    gradients(model.eval(), batch)
    assert counts == dict.fromkeys(range(LAYERS), 1)


def test_offloading_stores_only_the_input_of_each_recomputed_layer(batch, monkeypatch):
    """torch's checkpoint passes its inputs through the hooks around it, and nothing that a layer saves.

    torch 2.11 also passes an empty tensor.
    """
    stored = []
    store = HostOffload._store
    monkeypatch.setattr(HostOffload, "_store", lambda self, tensor: stored.append(tensor.shape) or store(self, tensor))
    monkeypatch.setattr("finetune.models.gradient_checkpointing._on_gpu", lambda model: True)
    model, kept = adapted(dropout=0.3), adapted(dropout=0.3)
    apply_gradient_checkpointing(model, "offload")
    found = gradients(model, batch)
    assert [shape for shape in stored if shape.numel()] == [(1, attention.round_up(batch.rows), 64)] * (LAYERS - 1)
    for name, expected in gradients(kept, batch).items():
        assert torch.equal(found[name], expected), name


def test_switching_it_off_frees_what_offloading_holds(monkeypatch):
    monkeypatch.setattr("finetune.models.gradient_checkpointing._on_gpu", lambda model: True)
    made = []
    init = HostOffload.__init__
    monkeypatch.setattr(
        HostOffload, "__init__", lambda self, tensors: made.append((weakref.ref(self), tensors)) or init(self, tensors)
    )
    model = adapted()
    apply_gradient_checkpointing(model, "offload")
    [(offload, tensors)] = made
    assert tensors == LAYERS - 1 and offload() is not None
    apply_gradient_checkpointing(model, "none")
    assert offload() is None


@pytest.mark.parametrize("on_gpu", [True, False])
def test_a_gpu_run_that_recomputes_all_layers_has_fewer_logits_at_a_time(monkeypatch, on_gpu: bool):
    monkeypatch.setattr("finetune.models.gradient_checkpointing._on_gpu", lambda model: on_gpu)
    model = adapted()
    head, vocabulary = model.get_output_embeddings(), model.config.vocab_size
    monkeypatch.setitem(LOGITS_VALUES, "offload", 2 * vocabulary)
    monkeypatch.setitem(LOGITS_VALUES, "all", 3 * vocabulary)
    states = torch.ones(5, model.config.hidden_size, dtype=head.weight.dtype)
    rows: dict[str | int, list[int]] = {}
    for setting in ("offload", "all", 2, "none"):
        apply_gradient_checkpointing(model, setting)
        rows[setting] = [len(logits) for logits, _ in chunked_logits(states, head, vocabulary)]
    assert rows[2] == rows["none"] == [5]
    assert (rows["all"], rows["offload"]) == (([2, 3], [1, 2, 2]) if on_gpu else ([5], [5]))
