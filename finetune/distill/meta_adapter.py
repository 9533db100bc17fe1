"""An adapter on a model whose own weights are not in memory: PEFT's modules, only the adapter's tensors real."""

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

_RESIDENT = "set distill.teacher.placement=resident"
# Inits that leave the base as it is; the others (PiSSA, OLoRA, …) take a part of it away when PEFT attaches them.
_PLAIN_INITS = (True, False, "gaussian", "orthogonal")


def attach_adapter(base: PreTrainedModel, folder: Path, device: torch.device) -> None:
    """Puts a frozen adapter on the decoder layers of a model on the meta device, in place.

    Raises: ConfigError if there is no LoRA adapter, or it needs more than decoder layers; IntegrityError if it is
    broken or does not fit.
    """
    where = f"adapter {folder}"
    config = read_json(folder / CONFIG_FILE, where)
    if config.get("peft_type") != "LORA":
        raise ConfigError(f"{where} is a {config.get('peft_type')} adapter, not LoRA")
    check_adapter(folder, trained=False)
    tensors = load_file(folder / TENSOR_FILE)
    if outside := [name for name in tensors if not re.search(r"\.layers\.\d+\.", name)]:
        raise ConfigError(
            f"{where} changes more than decoder layers ({', '.join(sorted(outside)[:3])}), which a streamed teacher "
            f"does not keep; {_RESIDENT}"
        )
    if config.get("init_lora_weights", True) not in _PLAIN_INITS or config.get("layer_replication"):
        raise ConfigError(f"{where} changes the base's own weights or layers, which are not in memory; {_RESIDENT}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        settings = peft.PeftConfig.from_pretrained(str(folder))
        settings.inference_mode = True
        model = peft.PeftModel(base, settings)
    # What PEFT makes of a weight on the meta device stays there, and copying into that does nothing.
    places = {
        id(parameter): (module, key)
        for module in model.modules()
        for key, parameter in module.named_parameters(recurse=False)
    }
    named = dict(model.named_parameters(remove_duplicate=False))
    own = get_peft_model_state_dict(model, state_dict=named, save_embedding_layers=False)
    shapes = {name: parameter.shape for name, parameter in own.items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if wrong := sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name)):
        raise IntegrityError(f"{where} does not fit the teacher, first at {', '.join(wrong[:5])}")
    for name, parameter in own.items():
        module, key = places[id(parameter)]
        setattr(module, key, nn.Parameter(tensors[name].to(device, parameter.dtype), requires_grad=False))
