"""Convert an adapter that another program saved as a pickle."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from finetune.export.staging import MODEL_COPIES, copy_files, staged
from finetune.models.adapters.files import check_adapter
from finetune.models.adapters.folder import CONFIG_FILE, TENSOR_FILE, read_adapter_config
from finetune.models.adapters.names import as_peft_names
from finetune.models.safetensors_index import save_tensors
from finetune.system.atomic import write_text
from finetune.system.errors import InputError


def convert_pickle(file: Path, out: Path) -> None:
    """Write the adapter in `file`, with the config beside it, to the new folder `out`.

    torch.load runs no code of the pickle (weights_only).

    Raises:
        ConfigError: `out` exists, or there is no config.
        InputError: the file cannot be read, or holds more than tensors.
        IntegrityError: the adapter is incomplete.
    """
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle makes the loader fail anywhere, with errors of every kind
        reason = str(error).partition("\n")[0] or "it is empty"
        raise InputError(f"{file}: holds code or is damaged, so nothing is loaded ({reason})") from error
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise InputError(f"{file}: expected named tensors, found {type(found).__name__}")
    if odd := [name for name in found if not isinstance(name, str) or not name.isprintable()]:
        raise InputError(f"{file}: the name of a tensor is no printable text, found {str(odd[0])[:80]!r}")
    config = read_adapter_config(file.parent, str(file))
    tensors = {name: tensor.contiguous() for name, tensor in as_peft_names(found, str(file)).items()}
    with staged(out, sum(tensor.nbytes for tensor in tensors.values())) as folder:
        save_tensors(tensors, folder / TENSOR_FILE, metadata={"format": "pt"})
        write_text(folder / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")
        copy_files(file.parent, folder, MODEL_COPIES)
        check_adapter(folder, trained=False)
