"""The plan of towers equals what transformers' towers hold and compute, and follows the media of rows."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from finetune import load_config
from finetune.data.media.media import Media
from finetune.models.adapters.attach import attach_lora
from finetune.models.adapters.inits import freeze_a
from finetune.models.families import FAMILIES, shape_of, text_settings
from finetune.models.families.known import complete_shape
from finetune.planning.describe import describe_start
from finetune.planning.inputs import PlanInputs, plan_inputs
from finetune.planning.media import measured_media, most_tokens
from finetune.planning.peak_memory import predict_peak
from finetune.planning.static_memory import trained_in_tower
from finetune.planning.tower_shapes import tower_shapes
from finetune.planning.towers import _forward_bytes, cached_bytes, first_passes, kept_per_unit, step_passes
from tests.media_models import _TEXT, random_media_model

VISION = {"depth": 4, "hidden_size": 96, "num_heads": 3, "intermediate_size": 224, "out_hidden_size": 64}
VISION |= {"fullatt_block_indexes": [1, 3]}
AUDIO = {"d_model": 96, "encoder_layers": 4, "encoder_attention_heads": 3, "encoder_ffn_dim": 224, "output_dim": 64}
GRID = (1, 32, 40)
COLUMNS = 1600
TOWERS = [("qwen2_5_vl", "vision"), ("qwen2_5_omni_thinker", "vision"), ("qwen2_5_omni_thinker", "audio")]
HUB_IDS = [f"Qwen/Qwen2.5-VL-{size}-Instruct" for size in ("3B", "7B", "32B", "72B")]
HUB_IDS += ["Qwen/Qwen2.5-Omni-3B", "Qwen/Qwen2.5-Omni-7B"]


def build(family: str, vision: dict[str, Any], audio: dict[str, Any], text: dict[str, Any]) -> Any:
    if family == "qwen2_5_vl":
        return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    config = Qwen2_5OmniThinkerConfig(text_config=text, vision_config=vision, audio_config=audio)
    return Qwen2_5OmniThinkerForConditionalGeneration(config)


def tower_model(family: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    return build(family, dict(VISION), dict(AUDIO), dict(_TEXT)).to(dtype).requires_grad_(False).eval()


def shape_in(model: PreTrainedModel) -> dict[str, Any]:
    shape = complete_shape(text_settings(model.config.to_dict()))
    assert shape is not None
    return shape


def inputs_for(shape: dict[str, Any], *overrides: str) -> PlanInputs:
    return plan_inputs(load_config("lora.yaml", [*overrides], needs_data=False), shape, device_type="cpu")


def run_tower(model: Any, name: str) -> tuple[int, Callable[[], Tensor]]:
    """Return the units of a file, and a function that computes its embeddings."""
    if name == "audio":
        mel, mask = torch.randn(1, 128, COLUMNS), torch.ones(1, COLUMNS, dtype=torch.long)

        def hear() -> Tensor:
            rounded = mel.to(model.dtype, copy=True)
            return model.model.get_audio_features(rounded, feature_attention_mask=mask).last_hidden_state

        return COLUMNS, hear
    pixels, grid = torch.randn(GRID[1] * GRID[2], 1176), torch.tensor([GRID])
    return len(pixels), lambda: torch.cat(list(model.model.get_image_features(pixels.clone(), grid).pooler_output))


class Alive(TorchDispatchMode):
    """The bytes of storages that operations return, without parameters."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.parameters = {p.untyped_storage()._cdata for p in model.parameters()}
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.see, result)
        return result

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes and key not in self.parameters:
            self.sizes[key] = storage.nbytes()
            weakref.finalize(storage, self.sizes.pop, key, None)
            self.peak = max(self.peak, sum(self.sizes.values()))


@pytest.mark.parametrize("hub_id", HUB_IDS)
def test_published_towers_have_the_parameters_of_the_class(hub_id):
    shape = shape_of(hub_id)
    assert shape is not None
    sizes = shape["towers"]
    with torch.device("meta"):
        model = build(shape["model_type"], dict(sizes["vision"]), dict(sizes.get("audio", {})), dict(_TEXT))
    family = FAMILIES[shape["model_type"]]
    for name, tower in tower_shapes(shape).items():
        assert tower.parameters == sum(p.numel() for p in model.get_submodule(family.towers[name].module).parameters())


def test_published_models_have_the_parameters_of_their_model_cards():
    counts = [inputs_for(dict(shape_of(hub_id) or {})).static.parameters for hub_id in (HUB_IDS[1], HUB_IDS[0])]
    assert counts == [8_292_166_656, 3_754_622_976]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_5_omni_thinker"])
def test_parameters_and_adapters_are_those_of_a_loaded_model(family):
    model = random_media_model("qwen2_5_vl" if family == "qwen2_5_vl" else "qwen2_5_omni")
    shape = shape_in(model)
    inputs = inputs_for(shape, "quant.type=none", "model.dtype=float32", "lora.towers=[vision]", "lora.rank=4")
    assert inputs.static.parameters == model.num_parameters()
    of_towers = sum(inputs.static.parts[part] for part in inputs.tower_bytes)
    towers = [model.get_submodule(tower.module) for tower in inputs.family.towers.values()]
    assert of_towers == sum(p.nbytes for tower in towers for p in tower.parameters())
    trained = {n: p.numel() for n, p in attach_lora(model, inputs.lora).named_parameters() if p.requires_grad}
    assert inputs.static.trained == sum(trained.values())
    in_vision = sum(count for name, count in trained.items() if ".visual." in name)
    assert trained_in_tower(inputs.towers["vision"], inputs.lora) == in_vision > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("family", "name"), TOWERS)
def test_a_pass_without_gradients_holds_the_predicted_bytes(family, name, dtype):
    model = tower_model(family, getattr(torch, dtype))
    units, compute = run_tower(model, name)
    alive = Alive(model)
    with torch.no_grad(), alive:
        compute()
    inputs = replace(inputs_for(shape_in(model), f"model.dtype={dtype}"), device_type="cuda")  # without reading files
    assert units * _forward_bytes(inputs, inputs.towers[name]) == pytest.approx(alive.peak, rel=0.05)


@pytest.mark.parametrize(
    "settings",
    [(), ("lora.dropout=0.1",), ("model.dtype=float32", "quant.type=none"), ("lora.freeze_a=true",)],
)
@pytest.mark.parametrize(("family", "name"), TOWERS)
def test_a_tower_with_adapters_keeps_the_predicted_bytes(family, name, settings):
    inputs = inputs_for(shape_in(tower_model(family, torch.bfloat16)), *settings, "lora.rank=8")
    model = tower_model(family, getattr(torch, inputs.model.dtype))
    tower = inputs.towers[name]
    targets = [f"{tower.blocks}.{layer}.{linear}" for layer in range(tower.layers) for linear in tower.linears]
    adapted: Any = get_peft_model(
        model, LoraConfig(r=8, target_modules=targets, lora_dropout=inputs.lora.dropout)
    ).train()
    if inputs.lora.freeze_a:
        freeze_a(adapted)
    parameters = {p.untyped_storage().data_ptr() for p in adapted.parameters()}
    kept: dict[int, tuple[Tensor, int]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = tensor, storage.nbytes()
        return tensor

    units, compute = run_tower(model, name)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compute()
    measured = sum(size for _, size in kept.values())
    assert units * kept_per_unit(inputs, tower) == pytest.approx(measured, rel=0.06)


@pytest.mark.parametrize(("family", "name"), TOWERS)
def test_operations_are_those_that_torch_counts(family, name):
    model = tower_model(family, torch.float32)
    for part in ("vision_config", "audio_config"):
        getattr(model.config, part, model.config)._attn_implementation = "eager"  # counted as products
    units, compute = run_tower(model, name)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        compute()
    tower = inputs_for(shape_in(model)).towers[name]
    planned = units * (tower.products_per_unit() + tower.attention_per_unit(units))
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.03)


def picture(tokens: int, number: int) -> Media:
    return Media("image", bytes([number] * 16), f"{number}.png", tokens, (1, 2, 2 * tokens))


def test_frozen_towers_are_gone_during_training_unless_they_run_in_each_step():
    shape = shape_of("Qwen/Qwen2.5-VL-7B-Instruct") or {}
    frozen = predict_peak(inputs_for(shape), 1, 0).moments
    assert "vision tower" in frozen["media in towers"]
    assert "tower workspace" in frozen["media in towers"]
    assert not any("vision tower" in parts for name, parts in frozen.items() if "training" in name)
    streamed = ("data.stream_rows=9", "train.max_steps=1")
    for settings in (("data.media_cache=false",), streamed, ("lora.towers=[vision]",)):
        moments = predict_peak(inputs_for(shape, *settings), 1, 0).moments
        assert all("vision tower" in parts for parts in moments.values()), settings


def test_a_large_image_makes_the_towers_the_peak():
    shape = shape_of("Qwen/Qwen2.5-VL-3B-Instruct") or {}
    inputs = inputs_for(shape, "data.max_length=256", "data.image.max_pixels=12845056")
    large = replace(inputs, media=measured_media(inputs.towers, [(200, ())], [picture(16384, 0)]))
    assert predict_peak(large, 1, 0).moment == "media in towers"


def test_trained_towers_keep_what_the_rows_hold():
    shape = shape_of("Qwen/Qwen2.5-VL-3B-Instruct") or {}
    trained = inputs_for(shape, "lora.towers=[vision]", "data.max_length=512")
    kept = []
    for tokens in (40, 80):
        rows = [(100, [picture(tokens, number)]) for number in range(9)]
        inputs = replace(trained, media=measured_media(trained.towers, rows, ()))
        kept.append(predict_peak(inputs, 1, 0).activations.media)
    assert kept[1] == pytest.approx(2 * kept[0])
    worst = predict_peak(trained, 1, 0).activations.media  # all tokens
    assert worst == pytest.approx(kept[1] / 0.8)
    assert trained.first_trained_layer == 0  # backward goes through all layers to the tower


def test_unknown_rows_hold_the_largest_files_that_the_limits_allow():
    cfg = load_config("lora.yaml", ["data.max_length=2000", "data.audio.max_seconds=60"], needs_data=False)
    assert most_tokens(("vision", "audio"), cfg.data) == {"image": 1280, "video": 2000, "audio": 1500}


def test_each_file_goes_through_frozen_towers_once_and_through_others_in_each_step():
    shape = shape_of("Qwen/Qwen2.5-VL-3B-Instruct") or {}
    inputs = inputs_for(shape, "data.max_length=1000")
    rows = [(100, [picture(50, number % 2)]) for number in range(10)]
    known = replace(inputs, media=measured_media(inputs.towers, rows, ()))
    [once] = first_passes(known, None)
    assert cached_bytes(known, None) == 2 * 50 * shape["hidden_size"] * 2
    assert step_passes(known) == []
    uncached = known.with_settings(data={"media_cache": False})
    [step] = step_passes(uncached)
    assert step.flops == pytest.approx(once.flops * uncached.step_sequences * 500 / 100)
    assert first_passes(uncached, None) == []
    assert cached_bytes(uncached, None) == 0


def test_the_log_of_a_run_names_its_towers():
    shape = shape_of("Qwen/Qwen2.5-Omni-7B") or {}
    lines = describe_start(inputs_for(shape, "lora.towers=[audio]")).splitlines()
    line = next(line for line in lines if line.startswith("media: "))
    assert "vision tower 676,550,144 parameters (frozen)" in line
    assert "audio tower 639,647,232 parameters (adapter " in line
    assert line.endswith("run in each step")
