"""Attach an adapter to a model on the meta device: only the adapter's tensors are in memory."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import peft
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from finetune.models.adapters.files import CONFIG_FILE, TENSOR_FILE, check_adapter
from finetune.models.hub import read_json
from finetune.system.errors import ConfigError, IntegrityError

_RESIDENT = "\nhelp: set distill.teacher.placement=resident"
# Inits that keep the base as it is. The others (PiSSA, OLoRA, …) subtract a part from it.
_PLAIN_INITS = (True, False, "gaussian", "orthogonal")


def attach_adapter(base: PreTrainedModel, folder: Path, device: torch.device) -> None:
    """Attach a frozen adapter to the decoder layers of a model on the meta device, in place."""
    where = f"adapter {folder}"
    config = read_json(folder / CONFIG_FILE, where)
    if config.get("peft_type") != "LORA":
        raise ConfigError(f"{where}: expected a LoRA adapter, found {config.get('peft_type')}")
    check_adapter(folder, trained=False)
    tensors = load_file(folder / TENSOR_FILE)
    if outside := [name for name in tensors if not re.search(r"\.layers\.\d+\.", name)]:
        raise ConfigError(
            f"{where}: changes more than decoder layers ({', '.join(sorted(outside)[:3])}), which a streamed teacher "
            f"does not keep in memory{_RESIDENT}"
        )
    if config.get("init_lora_weights", True) not in _PLAIN_INITS or config.get("layer_replication"):
        raise ConfigError(f"{where}: changes the base's weights or layers, which are not in memory{_RESIDENT}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        settings = peft.PeftConfig.from_pretrained(str(folder))
        settings.inference_mode = True
        model = peft.PeftModel(base, settings)
    # PEFT puts the adapter of a meta weight on the meta device too, where copying has no effect.
    places = {
        id(parameter): (module, key)
        for module in model.modules()
        for key, parameter in module.named_parameters(recurse=False)
    }
    named = dict(model.named_parameters(remove_duplicate=False))
    expected = get_peft_model_state_dict(model, state_dict=named, save_embedding_layers=False)
    shapes = {name: parameter.shape for name, parameter in expected.items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if wrong := sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name)):
        raise IntegrityError(f"{where}: does not fit the teacher, first at {', '.join(wrong[:5])}")
    for name, parameter in expected.items():
        module, key = places[id(parameter)]
        setattr(module, key, nn.Parameter(tensors[name].to(device, parameter.dtype), requires_grad=False))
