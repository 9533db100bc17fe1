"""From an adapter's files to the changes of its base's tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from finetune.export.merge.deltas import Delta, LowRank, NewRows, Replaced
from finetune.models.adapters.config import other_base, other_updates, scaling_of
from finetune.models.adapters.files import PREFIX, SavedAdapter, token_ids
from finetune.models.safetensors_index import Stored
from finetune.system.errors import ConfigError

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_ROWS = ".token_adapter.trainable_tokens_delta"
_FROZEN = ".base_layer."


def read_deltas(adapter: SavedAdapter, base: Mapping[str, Stored]) -> dict[str, Delta]:
    """What the adapter does to each tensor of its base, by the tensor's name.

    base: every tensor of the model, a tied head among them under its own name.
    Raises: ConfigError with everything that does not fit the base, or that cannot be merged.
    """
    problems = list(other_updates(adapter.config))
    if (init := other_base(adapter.config)) and init != "loftq":  # that one's is the dequantized base
        problems.append(
            f"init_lora_weights={init}: it belongs on other weights than the base's; let PEFT convert it "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    deltas: dict[str, Delta] = {}
    left = {name.removeprefix(PREFIX): tensor for name, tensor in adapter.tensors.items()}
    for name in [name for name in left if name.endswith(".lora_A.weight")]:
        module = name.removesuffix(".lora_A.weight")
        lora_A, lora_B = left.pop(name).float(), left.pop(f"{module}.lora_B.weight").float()
        magnitudes = (f"{module}.lora_magnitude_vector", f"{module}.lora_magnitude_vector.weight")
        magnitude = next((left.pop(key) for key in magnitudes if key in left), None)
        deltas[f"{module}.weight"] = LowRank(
            lora_A,
            lora_B,
            scaling_of(adapter.config, module, len(lora_A)),
            None if magnitude is None else magnitude.float().flatten(),
        )
    ids = token_ids(adapter.config)
    for name in [name for name in left if name.endswith(_ROWS)]:
        module = name.removesuffix(_ROWS)
        rows = next((rows for key, rows in ids.items() if f".{module}".endswith(f".{key}")), [])
        deltas[f"{module}.weight"] = NewRows(torch.tensor(rows, dtype=torch.int64), left.pop(name))
    for name in [name for name in left if _FROZEN in name]:
        # PEFT saves an adapted head's own weight beside the factors; a bias it may have trained.
        tensor, plain = left.pop(name), name.replace(_FROZEN, ".")
        if plain not in deltas:
            left[plain] = tensor
    for name in [name for name in left if name in base]:
        deltas[name] = Replaced(left.pop(name))
    problems += [f"{name} belongs to no tensor of the base, or is of a kind that cannot be merged" for name in left]
    problems += _misfits(deltas, base)
    if problems:
        listed = "\n  ".join([*problems[:10], *([f"… {len(problems)} in all"] if len(problems) > 10 else [])])
        raise ConfigError(f"adapter={adapter.name} cannot be merged into this base:\n  {listed}")
    return deltas


def _misfits(deltas: Mapping[str, Delta], base: Mapping[str, Stored]) -> Iterator[str]:
    for name, delta in deltas.items():
        if name not in base:
            yield f"{name} is not there"
        elif (wanted := _shape(delta)) and (wanted[1:] != base[name].shape[1:] or _shorter(delta, base[name])):
            yield f"{name} is {list(base[name].shape)} there, the adapter is for {list(wanted)}"


def _shape(delta: Delta) -> tuple[int, ...] | None:
    if isinstance(delta, LowRank):
        return (len(delta.lora_B), delta.lora_A.shape[1])
    if isinstance(delta, Replaced):
        return tuple(delta.tensor.shape)
    if isinstance(delta, NewRows):
        return (delta.rows, delta.values.shape[1])
    return None


def _shorter(delta: Delta, stored: Stored) -> bool:
    """Whether the change is for a matrix of other rows; tables of tokens may grow."""
    if isinstance(delta, LowRank):
        return len(delta.lora_B) != stored.shape[0]
    return isinstance(delta, Replaced) and len(delta.tensor) < stored.shape[0]


def untie(deltas: dict[str, Delta], tied: bool) -> bool:
    """Whether the head has to become a tensor of its own: it was tied, and the adapter changed it alone.

    Where both were changed alike, which is how PEFT saves tied modules, the head's change is dropped.
    """
    if not tied or HEAD not in deltas:
        return False
    head, embedding = deltas[HEAD], deltas.get(EMBEDDING)
    if embedding is not None and _equal(head, embedding):
        del deltas[HEAD]
        return False
    return True


def _equal(one: Delta, other: Delta) -> bool:
    if isinstance(one, Replaced) and isinstance(other, Replaced):
        return _same(one.tensor, other.tensor)
    if isinstance(one, NewRows) and isinstance(other, NewRows):
        return _same(one.ids, other.ids) and _same(one.values, other.values)
    return False


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)
