"""The frozen base in 4 bit, loaded one tensor at a time: the 16-bit model is never in memory as a whole.

transformers' own loading keeps every file mapped until the end, and quantizes each matrix with several fp32 copies of
it. Here a model without storage is built, and each tensor is read, quantized and put in its place before the next; or
its quantized form is taken from the cache. Values and attributes are those of `from_pretrained`, bit for bit. Some
layers may be in 8 or 16 bit beside the 4-bit ones (`quant.int8`, `quant.skip_modules`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from finetune.config.schema import ModelConfig, QuantConfig
from finetune.models.digest import identity, weights_digest
from finetune.models.hub import read_tensor
from finetune.models.quant.cache import Log, QuantizedCache, cache_folder
from finetune.models.quant.eight_bit import (
    eight_bit_modules,
    put_rows,
    quantize_rows,
    replace_eight_bit_linears,
    rows_of,
)
from finetune.models.quant.quantize import storage_in
from finetune.system import heap

# Elements quantized at once on CPU, where it is done in fp32 with several copies: they stay in the processor's cache.
# A multiple of every block size, so that blocks are those of the whole matrix.
_CHUNK = 1 << 16
# Smaller tensors are copied: one that stays mapped holds pages of its neighbors.
_WORTH_MAPPING_BYTES = 1 << 20


def load_four_bit(
    folder: Path,
    files: Mapping[str, Path],
    model: ModelConfig,
    attention: str,
    quant: QuantConfig,
    settings: BitsAndBytesConfig,
    device: torch.device,
    log: Log,
) -> PreTrainedModel | None:
    """The base as `from_pretrained` gives it, in eval mode.

    files: where each tensor lies. attention: transformers' name of the kernel. settings: from `quantization_config`.
    Returns: None if the files do not hold exactly the tensors that config.json promises; transformers may know what
    they were called in other days, and otherwise says what is wrong with them.
    """
    base = build_skeleton(folder, getattr(torch, model.dtype), attention)
    if not holds_all(files, base):
        return None
    storage = storage_in(base, quant)
    quantizer = replace_linears(base, settings, storage, device)
    fill_plain(base, files, device)
    _fill_quantized(base, files, cache_of(files, model, quant, storage, device, log), device)
    base.hf_quantizer = quantizer
    quantizer.postprocess_model(base)
    return base.eval()


def replace_linears(
    base: PreTrainedModel, settings: BitsAndBytesConfig, storage: Mapping[str, str], device: torch.device
) -> Any:
    """Put bitsandbytes' layers into a skeleton, as transformers does, whose quantizer is returned.

    storage: from `storage_of`; transformers itself knows one type in a model, so the 8-bit layers come after it.
    """
    quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    placement = {"": device}
    quantizer.validate_environment(device_map=placement)
    base.config.quantization_config = settings
    quantizer.preprocess_model(model=base, dtype=base.dtype, device_map=placement, checkpoint_files=[])
    eight = [name for name, kind in storage.items() if kind == "int8"]
    replace_eight_bit_linears(base, eight, settings.llm_int8_threshold)
    return quantizer


def build_skeleton(folder: Path, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The model that a folder's config.json describes, with shapes and no storage."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        base: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    with suppress(OSError):  # there is none: the one it has was made from its config
        base.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return base


def quantized_modules(base: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every 4-bit layer, with its full name."""
    import bitsandbytes as bnb

    for name, module in base.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            yield name, module


def resident_bytes(base: nn.Module) -> int:
    """What `keep_resident` would take."""
    return sum(
        module.weight.quant_state.shape.numel() * module.compute_dtype.itemsize for _, module in quantized_modules(base)
    )


def keep_resident(base: nn.Module) -> None:
    """Give each 4-bit layer its dequantized weight as well, `resident_weight` [out, in], in the type it computes in.

    No parameter and no buffer: it is not saved, counted or moved. Its values are those that dequantizing gives.
    """
    from bitsandbytes.functional import dequantize_4bit

    for _, module in quantized_modules(base):
        # Straight into the type of the product, as bitsandbytes' own forward does.
        state = copy(module.weight.quant_state)
        state.dtype = module.compute_dtype
        module.resident_weight = dequantize_4bit(module.weight.data, state)


def quantize(weight: Tensor, like: Any, each: Callable[..., Iterable[Any]] = map) -> tuple[Tensor, Any]:
    """A matrix [out, in] in 4 bit, packed as uint8 [n, 1], and bitsandbytes' state of it.

    like: the Params4bit whose options are meant. each: applies a function to pieces, as `map` does.
    On CPU a piece at a time: blocks are independent of each other, so the bits are those of the whole, at a fraction of
    its memory. A GPU's kernel needs no copies and takes the matrix as it is.
    """
    from bitsandbytes.functional import quantize_4bit, quantize_blockwise

    options = {"blocksize": like.blocksize, "quant_type": like.quant_type, "quant_storage": like.quant_storage}
    if weight.device.type != "cpu":
        return quantize_4bit(weight.contiguous(), compress_statistics=like.compress_statistics, **options)
    pieces = weight.reshape(-1).split(_CHUNK)
    first, state = quantize_4bit(pieces[0], compress_statistics=False, **options)
    # Each piece is put where it belongs as it comes. Kept in a list, a thousand small ones lie scattered over what the
    # allocator took for their temporaries, and a matrix of a 7B took 740 MB instead of 220 (measured).
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
        # As bitsandbytes.functional.quantize_4bit does it.
        state.offset = state.absmax.mean()
        state.absmax, state.state2 = quantize_blockwise(state.absmax - state.offset, blocksize=256)
        state.nested = True
    return packed, state


@contextmanager
def quantizing_workers() -> Iterator[ThreadPoolExecutor]:
    """As many as torch uses threads, each with one thread for itself.

    Pieces are short: where other programs want the cores too, torch's threads wait for each other at the end of every
    operation on one, and quantizing takes several times as long (benchmarks/NOTES.md).
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as workers:
            yield workers
    finally:
        # What a worker sets holds for itself and for all threads that begin later.
        torch.set_num_threads(threads)
        # glibc keeps what each thread freed for that thread, of which there is none any more (40 to 170 MB measured).
        heap.malloc_trim()


def holds_all(files: Mapping[str, Path], base: PreTrainedModel) -> bool:
    """Whether these are the model's tensors and no others, each of the right shape."""
    # A tied weight counts once, under the name that files have it by.
    wanted = {name: tuple(parameter.shape) for name, parameter in base.named_parameters()}
    for tied in base.all_tied_weights_keys:
        wanted.pop(tied, None)
    if wanted.keys() != files.keys():
        return False
    found = {}
    for file in set(files.values()):
        with safe_open(file, framework="pt") as tensors:
            found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return found == wanted


def fill_plain(base: PreTrainedModel, files: Mapping[str, Path], device: torch.device) -> None:
    """Everything that is not quantized, from the original files; on CPU large tensors stay mapped.

    The cache of quantized weights holds no second copy of it: an embedding alone would double its size at 0.5B, and
    reading it here costs the same.
    """
    quantized = {f"{name}.weight" for name, _ in (*quantized_modules(base), *eight_bit_modules(base))}
    for name in files.keys() - quantized:
        stored = read_tensor(files[name], name)
        tensor = stored.to(device=device, dtype=base.dtype)
        if tensor is stored and tensor.nbytes < _WORTH_MAPPING_BYTES:
            tensor = tensor.clone()
        _put(base, name, nn.Parameter(tensor, requires_grad=False))
    for name, module in list(base.named_modules()):
        # Tables that follow from the config, as the rotary frequencies; computed on CPU on whatever device they serve.
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            owner: Any = type(module)
            base.set_submodule(name, owner(base.config).to(device))
    base.tie_weights()


def _fill_quantized(
    base: PreTrainedModel, files: Mapping[str, Path], cache: QuantizedCache | None, device: torch.device
) -> None:
    if cache is None:
        _quantize_all(base, files, device)
    elif (stored := cache.find()) is not None:
        _use(base, stored, device)
    else:
        before = [identity(file) for file in sorted(set(files.values()))]
        with cache.claim() as mine:
            # Another process may have made it before the claim was granted, or while this one waited.
            stored = cache.find()
            if stored is None and mine:
                _quantize_all(base, files, device)
                if before == [identity(file) for file in sorted(set(files.values()))]:
                    states = dict(_states(base))
                    size_bytes = sum(tensor.nbytes for tensors in states.values() for tensor in tensors.values())
                    cache.write(states.values(), size_bytes)
        if stored is not None:
            _use(base, stored, device)
        elif not mine:
            _quantize_all(base, files, device)


def _quantize_all(base: PreTrainedModel, files: Mapping[str, Path], device: torch.device) -> None:
    import bitsandbytes as bnb

    with quantizing_workers() as workers:
        for name, module in quantized_modules(base):
            # Each tensor is read through a mapping of its own, which ends with it: what was read leaves memory.
            weight = read_tensor(files[f"{name}.weight"], f"{name}.weight").to(device=device, dtype=base.dtype)
            packed, state = quantize(weight, module.weight, workers.map)
            options: dict[str, Any] = {**module.weight.__dict__, "quant_state": state, "bnb_quantized": True}
            module.weight = bnb.nn.Params4bit(packed, requires_grad=False, **options)
            module.quant_state = state
        for name, module in eight_bit_modules(base):
            weight = read_tensor(files[f"{name}.weight"], f"{name}.weight").to(device=device, dtype=base.dtype)
            put_rows(module, *quantize_rows(weight, workers.map))


def _states(base: PreTrainedModel) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """What each quantized layer consists of, under the names that a state dict has for it; `SCB` goes by its weight."""
    for name, module in quantized_modules(base):
        parts = module.weight.quant_state.as_dict(packed=True)
        yield name, {f"{name}.weight": module.weight.data, **{f"{name}.weight.{key}": v for key, v in parts.items()}}
    for name, module in eight_bit_modules(base):
        codes, largest = rows_of(module)
        yield name, {f"{name}.weight": codes, f"{name}.weight.SCB": largest}


def _use(base: PreTrainedModel, stored: dict[str, Tensor], device: torch.device) -> None:
    """Put cached tensors in their places; on CPU they stay mapped files."""
    import bitsandbytes as bnb

    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in stored.items():
        owner, _, key = name.partition(".weight")
        parts.setdefault(owner, {})[key.removeprefix(".")] = tensor
    for name, module in quantized_modules(base):
        state = parts[name]
        module.weight = bnb.nn.Params4bit.from_prequantized(
            state.pop(""), state, requires_grad=False, device=device, module=module
        )
    for name, module in eight_bit_modules(base):
        put_rows(module, parts[name][""].to(device), parts[name]["SCB"].to(device))


def cache_of(
    files: Mapping[str, Path],
    model: ModelConfig,
    quant: QuantConfig,
    storage: Mapping[str, str],
    device: torch.device,
    log: Log,
) -> QuantizedCache | None:
    """The cache entry of this model under these options; None where there is to be none, or can be none.

    storage: from `storage_of`.
    """
    if not quant.cache:
        return None
    import bitsandbytes as bnb

    folder = cache_folder()
    try:
        digest = weights_digest(sorted(set(files.values())), folder / "digests")
    except (OSError, RuntimeError) as error:
        log(f"quant.cache: {folder} cannot be used ({error}); quantizing without it")
        return None
    made_from = {
        "weights": digest,
        "dtype": model.dtype,
        "type": quant.type,
        "double": quant.double,
        "keep": sorted(name for name, kind in storage.items() if kind == "none"),
        # Kernels of another kind or version may round otherwise.
        "device": device.type,
        "bitsandbytes": bnb.__version__,
    }
    if eight := sorted(name for name, kind in storage.items() if kind == "int8"):
        made_from["int8"] = eight
    return QuantizedCache(folder, made_from, log)


def _put(base: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, key = name.rpartition(".")
    setattr(base.get_submodule(owner), key, parameter)
