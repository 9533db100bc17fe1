"""Adapters in Flower's records: the bytes of the tensors, as they are in the file."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from federated.adapters import Adapter, Tensor

_FORMAT = "safetensors"


def put_adapter(content: RecordDict, adapter: Adapter | None) -> None:
    """Add an adapter to a message; None adds nothing."""
    if adapter is not None:
        content["tensors"] = ArrayRecord(
            {
                name: Array(dtype=tensor.dtype, shape=tensor.shape, stype=_FORMAT, data=tensor.data)
                for name, tensor in adapter.tensors.items()
            }
        )
        content["texts"] = ConfigRecord(dict(adapter.texts))


def adapter_of(content: RecordDict) -> Adapter | None:
    """Return the adapter of a message, or None."""
    if "tensors" not in content.array_records:
        return None
    arrays, texts = content.array_records["tensors"], content.config_records.get("texts", {})
    tensors = {name: Tensor(array.dtype, tuple(array.shape), array.data) for name, array in arrays.items()}
    return Adapter(tensors, {name: str(text) for name, text in texts.items()})
