"""Load the frozen base in 4 bit one tensor at a time, so that the full 16-bit model is never in memory.

transformers keeps every file mapped until the end and quantizes each matrix with several fp32 copies. Here each tensor
is read, quantized and put into a model without storage before the next one; or its quantized form comes from the cache.
Values and attributes are bit-identical to `from_pretrained`. Some layers may be in 8 or 16 bit (`quant.int8`,
`quant.skip_modules`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from finetune.config.schema import ModelConfig, QuantConfig
from finetune.models.decoder import family_in
from finetune.models.digest import identity, weights_digest
from finetune.models.embedding import HostEmbedding
from finetune.models.hub import TensorFile
from finetune.models.quant.cache import Log, QuantizedCache
from finetune.models.quant.eight_bit import put_rows, quantize_rows, replace_eight_bit_linears, rows_of
from finetune.models.quant.quantize import quantization_config, quantized_layers, storage_in
from finetune.models.safetensors_index import read_tensor
from finetune.models.skeleton import build_skeleton, fill_plain, holds_all
from finetune.system.errors import ResourceError
from finetune.system.format import format_bytes
from finetune.system.machine import malloc_trim
from finetune.system.resources import cache_home

# Elements quantized at once on a CPU, with several fp32 copies that stay in cache. A multiple of every block size.
_CHUNK = 1 << 16


def load_four_bit(
    folder: Path,
    files: Mapping[str, TensorFile],
    *,
    model: ModelConfig,
    quant: QuantConfig,
    attention: str,
    device: torch.device,
    host_embedding: bool,
    mapped: bool,
    log: Log,
) -> PreTrainedModel | None:
    """Load the base in 4 bit and eval mode, bit-identical to `from_pretrained`.

    files: of each tensor, by its name in the model. attention: name of the attention kernel in transformers.
    host_embedding: keep the input embedding in main memory. mapped: quantize into the cache, and leave every tensor in
    its file. log: called with a line if the cache cannot be used.
    Returns: None if the files do not hold exactly the tensors of config.json. transformers may know their old names, or
    reports what is wrong.
    Raises: ResourceError with `mapped` if the cache cannot be used.
    """
    base = build_skeleton(folder, getattr(torch, model.dtype), attention)
    if not holds_all(files, base):
        return None
    storage = storage_in(base, quant)
    place = torch.device("cpu") if mapped else device
    quantizer = replace_linears(base, quant, storage, place)
    plain = dict(files)
    if host_embedding:  # it never is on the device
        table = read_tensor(*plain.pop(f"{family_in(base).decoder}.embed_tokens.weight"))
        base.set_input_embeddings(HostEmbedding(table.to(base.dtype), device))
    fill_plain(base, plain, place)
    originals = {tensor.file for tensor in files.values()}
    cache = cache_of(originals, model, quant, storage, device, log=log)
    if mapped:
        _map_quantized(base, files, cache, device)
    else:
        _fill_quantized(base, files, cache, device)
    base.hf_quantizer = quantizer
    quantizer.postprocess_model(base)
    return base.eval()


def replace_linears(base: PreTrainedModel, quant: QuantConfig, storage: Mapping[str, str], device: torch.device) -> Any:
    """Replace the linear layers of a skeleton by those of bitsandbytes; return the quantizer of transformers.

    storage: from `storage_of`. transformers supports one type per model, so the 8-bit layers are replaced afterwards.
    """
    settings: Any = quantization_config(quant, storage)
    quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    placement = {"": device}
    quantizer.validate_environment(device_map=placement)
    base.config.quantization_config = settings
    quantizer.preprocess_model(model=base, dtype=base.dtype, device_map=placement, checkpoint_files=[])
    replace_eight_bit_linears(base, [name for name, kind in storage.items() if kind == "int8"])
    return quantizer


def resident_bytes(base: nn.Module) -> int:
    """Return the bytes that `keep_resident` needs."""
    layers = [layer for _, layer in quantized_layers(base, "nf4")]
    return sum(layer.weight.quant_state.shape.numel() * layer.compute_dtype.itemsize for layer in layers)


def keep_resident(base: nn.Module) -> None:
    """Store the dequantized weight of each 4-bit layer as `resident_weight` [out, in], in its compute dtype.

    It is neither parameter nor buffer: it is not saved, counted or moved.
    """
    from bitsandbytes.functional import dequantize_4bit

    for _, module in quantized_layers(base, "nf4"):
        # Dequantized to the dtype of the matmul, like the forward of bitsandbytes.
        state = copy(module.weight.quant_state)
        state.dtype = module.compute_dtype
        module.resident_weight = dequantize_4bit(module.weight.data, state)


def quantize(weight: Tensor, like: Any, each: Callable[..., Iterable[Any]] = map) -> tuple[Tensor, Any]:
    """Quantize a matrix [out, in] to 4 bit: packed uint8 [n, 1] and the QuantState of bitsandbytes.

    On a CPU this works in pieces. Blocks are independent, so the bits are the same at a fraction of the memory. A GPU
    kernel needs no copies and takes the whole matrix.

    like: the Params4bit with the options. each: applies a function to pieces, like `map`.
    """
    from bitsandbytes.functional import quantize_4bit, quantize_blockwise

    options = {"blocksize": like.blocksize, "quant_type": like.quant_type, "quant_storage": like.quant_storage}
    if weight.device.type != "cpu":
        return quantize_4bit(weight.contiguous(), compress_statistics=like.compress_statistics, **options)
    pieces = weight.reshape(-1).split(_CHUNK)
    first, state = quantize_4bit(pieces[0], compress_statistics=False, **options)
    # Each piece is copied into the result at once. A list of small pieces fragments the heap: a matrix of a 7B took
    # 740 MB instead of 220 (measured).
    packed = torch.empty(-(-weight.numel() // (2 * first.itemsize)), 1, dtype=first.dtype)
    absmax = torch.empty(-(-weight.numel() // like.blocksize), dtype=state.absmax.dtype)

    def fill(number: int) -> None:
        part, its = quantize_4bit(pieces[number], compress_statistics=False, **options)
        start = number * _CHUNK
        packed[start // (2 * first.itemsize) :][: len(part)] = part
        absmax[start // like.blocksize :][: len(its.absmax)] = its.absmax

    for _ in each(fill, range(len(pieces))):
        pass
    state.shape, state.absmax = weight.shape, absmax
    if like.compress_statistics:
        # Like bitsandbytes.functional.quantize_4bit.
        state.offset = state.absmax.mean()
        state.absmax, state.state2 = quantize_blockwise(state.absmax - state.offset, blocksize=256)
        state.nested = True
    return packed, state


@contextmanager
def quantizing_workers() -> Iterator[ThreadPoolExecutor]:
    """Yield as many workers as torch has threads, each with one torch thread.

    Pieces are short. On a busy machine, torch's own threads wait for each other after every operation, which is several
    times slower (benchmarks/NOTES.md).
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as workers:
            yield workers
    finally:
        # The setting of a worker also holds for all threads started later.
        torch.set_num_threads(threads)
        # glibc keeps the memory that the ended threads freed (40 to 170 MB measured).
        malloc_trim()


def _fill_quantized(
    base: PreTrainedModel, files: Mapping[str, TensorFile], cache: QuantizedCache | None, device: torch.device
) -> None:
    stored = None if cache is None else cache.find()
    if cache is not None and stored is None:
        originals = sorted({place.file for place in files.values()})
        before = [identity(file) for file in originals]
        with cache.claim() as mine:
            stored = cache.find()  # another process may have written it meanwhile
            if stored is None and mine:
                _quantize_all(base, files, device)
                if before == [identity(file) for file in originals]:
                    cache.write(_states(base), _quantized_bytes(base))
                return
    if stored is None:
        _quantize_all(base, files, device)
    else:
        _use(base, stored, device)


def _map_quantized(
    base: PreTrainedModel, files: Mapping[str, TensorFile], cache: QuantizedCache | None, device: torch.device
) -> None:
    """Put the tensors of the cache into the model as mapped files, written first if needed, one layer at a time."""
    stored = None if cache is None else cache.find()
    if cache is not None and stored is None:
        with cache.claim() as mine:
            stored = cache.find()
            if stored is None and mine:
                cache.write(_states_one_by_one(base, files, device), _quantized_bytes(base))
                stored = cache.find()
    if stored is None:
        raise ResourceError(
            "parallel.shard: each rank reads its part of the base from the cache of quantized weights, which cannot be "
            f"used\nhelp: free {format_bytes(_quantized_bytes(base))} there, set FINETUNE_CACHE to another folder, or "
            "set parallel.shard=none"
        )
    _use(base, stored, torch.device("cpu"))


def _quantized_bytes(base: PreTrainedModel) -> int:
    """Return about the bytes of the quantized weights of a model, and of their scales."""
    bits = {"nf4": 4.13, "int8": 8.01}
    return sum(
        round(layer.in_features * layer.out_features * bits[kind] / 8)
        for kind in bits
        for _, layer in quantized_layers(base, kind)
    )


def _states_one_by_one(
    base: PreTrainedModel, files: Mapping[str, TensorFile], device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of each 4-bit layer, as `_states`, while one of them is in memory."""
    with quantizing_workers() as workers:
        for name, module in quantized_layers(base, "nf4"):
            weight = read_tensor(*files[f"{name}.weight"]).to(device=device, dtype=base.dtype)
            packed, state = quantize(weight, module.weight, workers.map)
            yield _state(name, packed, state)


def _quantize_all(base: PreTrainedModel, files: Mapping[str, TensorFile], device: torch.device) -> None:
    import bitsandbytes as bnb

    with quantizing_workers() as workers:
        for name, module in quantized_layers(base, "nf4"):
            # Each tensor has its own file mapping, which is freed with it.
            weight = read_tensor(*files[f"{name}.weight"]).to(device=device, dtype=base.dtype)
            packed, state = quantize(weight, module.weight, workers.map)
            options: dict[str, Any] = {**module.weight.__dict__, "quant_state": state, "bnb_quantized": True}
            module.weight = bnb.nn.Params4bit(packed, requires_grad=False, **options)
            module.quant_state = state
        for name, module in quantized_layers(base, "int8"):
            weight = read_tensor(*files[f"{name}.weight"]).to(device=device, dtype=base.dtype)
            put_rows(module, *quantize_rows(weight, workers.map))


def _states(base: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of each quantized layer under their state-dict names; `SCB` follows its weight."""
    for name, module in quantized_layers(base, "nf4"):
        yield _state(name, module.weight.data, module.weight.quant_state)
    for name, module in quantized_layers(base, "int8"):
        codes, largest = rows_of(module)
        yield {f"{name}.weight": codes, f"{name}.weight.SCB": largest}


def _state(name: str, packed: Tensor, state: Any) -> dict[str, Tensor]:
    parts = state.as_dict(packed=True)
    return {f"{name}.weight": packed, **{f"{name}.weight.{key}": part for key, part in parts.items()}}


def _use(base: PreTrainedModel, stored: dict[str, dict[str, Tensor]], device: torch.device) -> None:
    """Put cached tensors into the model; on a CPU they stay mapped files."""
    import bitsandbytes as bnb

    for name, module in quantized_layers(base, "nf4"):
        state = stored[name]
        module.weight = bnb.nn.Params4bit.from_prequantized(
            state.pop(""), state, requires_grad=False, device=device, module=module
        )
    for name, module in quantized_layers(base, "int8"):
        put_rows(module, stored[name][""].to(device), stored[name]["SCB"].to(device))


def cache_of(
    files: Iterable[Path],
    model: ModelConfig,
    quant: QuantConfig,
    storage: Mapping[str, str],
    device: torch.device,
    *,
    log: Log,
) -> QuantizedCache | None:
    """Return the cache entry of a model; None if the cache is off or unusable. storage: from `storage_of`."""
    if not quant.cache:
        return None
    import bitsandbytes as bnb

    folder = cache_home("quantized")
    try:
        digest = weights_digest(sorted(set(files)), folder / "digests")
    except (OSError, RuntimeError) as error:
        log(f"quant.cache: {folder} cannot be used ({error}); quantizing without it")
        return None
    made_from = {
        "weights": digest,
        "dtype": model.dtype,
        "type": quant.type,
        "double": quant.double,
        "keep": sorted(name for name, kind in storage.items() if kind == "none"),
        # Kernels of other devices or versions may round differently.
        "device": device.type,
        "bitsandbytes": bnb.__version__,
    }
    if eight := sorted(name for name, kind in storage.items() if kind == "int8"):
        made_from["int8"] = eight
    return QuantizedCache(folder, made_from, log)
