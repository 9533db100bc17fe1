"""Names of an adapter's tensors, as PEFT writes them and as other programs do."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from finetune.system.errors import IntegrityError

PREFIX = "base_model.model."  # of every tensor in an adapter file
# A model's own state dict holds the adapter's name: `lora_A.default.weight`. PEFT leaves it out of its files.
_NAMED = re.compile(
    r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|modules_to_save|trainable_tokens_delta)"
    r"\.(?!(?:weight|bias)$)([^.]+)(?=\.(?:weight|bias)$|$)"
)
# Wrappers of torch.
_WRAPPERS = re.compile(r"(?<![^.])(?:module|_orig_mod)\.")


def is_factor(name: str) -> bool:
    """Return whether a tensor is A or B of an adapter, trained or frozen."""
    return ".lora_A." in name or ".lora_B." in name


def as_peft_names(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Return the tensors of an adapter under the names of a PEFT file; those of PEFT stay as they are.

    In a model's state dict, tensors without the adapter's name are those of the base and are left out.

    Raises:
        IntegrityError: two tensors get one name, or the file holds several adapters.
    """
    adapters = {match[2] for name in tensors if (match := _NAMED.search(name))}
    if len(adapters) > 1:
        raise IntegrityError(f"{where}: holds several adapters ({', '.join(sorted(adapters))}); save one of them")
    kept = [name for name in tensors if not adapters or _NAMED.search(name)]
    named = {_peft_name(name): tensors[name] for name in kept}
    if len(named) < len(kept):
        raise IntegrityError(f"{where}: two tensors have one name without their prefixes; save the adapter again")
    return named


def _peft_name(name: str) -> str:
    name = _WRAPPERS.sub("", name)
    match = _NAMED.search(name)
    if match and match[1] == "modules_to_save":
        name = name[: match.start()] + name[match.end() :]
    elif match:
        name = name[: match.start(2) - 1] + name[match.end(2) :]
    while name.startswith(PREFIX):
        name = name.removeprefix(PREFIX)
    return f"{PREFIX}{name}"
