"""Read an adapter's tensors as deltas of its base's tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from finetune.export.merge.deltas import Delta, LowRank, NewRows, Replaced
from finetune.models.adapters.files import PREFIX, SavedAdapter, other_base, other_updates, scaling_of, token_ids
from finetune.models.safetensors_index import Stored
from finetune.system.errors import ConfigError

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"
_FROZEN = ".base_layer."
_LISTED_PROBLEMS = 10


def read_deltas(adapter: SavedAdapter, base: Mapping[str, Stored]) -> dict[str, Delta]:
    """Return the delta of each tensor that the adapter changes; `base` lists a tied head under its own name.

    Raises:
        ConfigError: lists everything that does not fit the base or cannot be merged.
    """
    problems = list(other_updates(adapter.config))
    if (init := other_base(adapter.config)) and init != "loftq":  # LoftQ's other base is the dequantized one.
        problems.append(
            f"init_lora_weights={init}: the adapter needs other base weights; let PEFT convert it "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    deltas: dict[str, Delta] = {}
    left = {name.removeprefix(PREFIX): tensor for name, tensor in adapter.tensors.items()}
    for name in [name for name in left if name.endswith(".lora_A.weight")]:
        module = name.removesuffix(".lora_A.weight")
        lora_A, lora_B = left.pop(name).float(), left.pop(f"{module}.lora_B.weight").float()
        magnitudes = (f"{module}.lora_magnitude_vector", f"{module}.lora_magnitude_vector.weight")
        magnitude = next((left.pop(key).float().flatten() for key in magnitudes if key in left), None)
        deltas[f"{module}.weight"] = LowRank(lora_A, lora_B, scaling_of(adapter.config, module, len(lora_A)), magnitude)
    ids = token_ids(adapter.config)
    for name in [name for name in left if name.endswith(_TOKEN_ROWS)]:
        module = name.removesuffix(_TOKEN_ROWS)
        rows = next((rows for key, rows in ids.items() if f".{module}".endswith(f".{key}")), [])
        deltas[f"{module}.weight"] = NewRows(torch.tensor(rows, dtype=torch.int64), left.pop(name))
    for name in [name for name in left if _FROZEN in name]:
        # PEFT saves the frozen weight of an adapted head, and the bias, which it may have trained.
        tensor, plain = left.pop(name), name.replace(_FROZEN, ".")
        if plain not in deltas:
            left[plain] = tensor
    for name in [name for name in left if name in base]:
        deltas[name] = Replaced(left.pop(name))
    problems += [f"{name}: the base has no such tensor, or its kind cannot be merged" for name in left]
    problems += _misfits(deltas, base)
    if problems:
        listed = problems[:_LISTED_PROBLEMS]
        if len(problems) > _LISTED_PROBLEMS:
            listed.append(f"… {len(problems)} problems in total")
        raise ConfigError(f"adapter={adapter.name}: cannot be merged into this base:\n  " + "\n  ".join(listed))
    return deltas


def _misfits(deltas: Mapping[str, Delta], base: Mapping[str, Stored]) -> Iterator[str]:
    for name, delta in deltas.items():
        if name not in base:
            yield f"{name}: the base has no such tensor"
            continue
        shape = base[name].shape
        match delta:
            case LowRank():
                wanted = (len(delta.lora_B), delta.lora_A.shape[1])
                fits = wanted == shape
            case Replaced():
                wanted = tuple(delta.tensor.shape)
                fits = wanted[1:] == shape[1:] and wanted[0] >= shape[0]  # Tables of tokens may grow.
            case NewRows():
                wanted = (delta.rows, delta.values.shape[1])
                fits = wanted[1:] == shape[1:]
            case _:
                continue
        if not fits:
            yield f"{name}: the base has shape {list(shape)}, the adapter needs {list(wanted)}"


def untie(deltas: dict[str, Delta], tied: bool) -> bool:
    """Return whether the adapter changed a tied head alone, so that the head becomes a tensor of its own.

    PEFT saves equal deltas of the head and the embedding for tied modules; the head's delta is then dropped.
    """
    if not tied or HEAD not in deltas:
        return False
    if _equal(deltas[HEAD], deltas.get(EMBEDDING)):
        del deltas[HEAD]
        return False
    return True


def _equal(one: Delta, other: Delta | None) -> bool:
    if isinstance(one, Replaced) and isinstance(other, Replaced):
        return torch.equal(one.tensor, other.tensor)
    if isinstance(one, NewRows) and isinstance(other, NewRows):
        return torch.equal(one.ids, other.ids) and torch.equal(one.values, other.values)
    return False
