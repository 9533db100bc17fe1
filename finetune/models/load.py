"""Load the frozen base model, from a local folder or the hub."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from finetune.config.schema import ModelConfig, QuantConfig
from finetune.models.decoder import family_in
from finetune.models.digest import base_fingerprint, check_downloads
from finetune.models.embedding import move_embedding_to_host
from finetune.models.families import FAMILIES, text_settings
from finetune.models.hub import TEXT_FILES, WEIGHT_FILES, TensorFile, fetch, named_in_model, read_config, weight_files
from finetune.models.quant.cache import Log
from finetune.models.quant.eight_bit import quantize_loaded
from finetune.models.quant.four_bit import keep_resident, load_four_bit
from finetune.models.quant.quantize import (
    check_quantized,
    keep_weights_trainable_after_eval,
    quantization_config,
    storage_in,
)
from finetune.models.skeleton import attention_of, build_skeleton, load_plain, model_class
from finetune.models.tokenizer import quiet
from finetune.ops import attention
from finetune.system.accelerator import default_device, on_gpu
from finetune.system.errors import ConfigError, IntegrityError, MissingExtra, ResourceError
from finetune.system.resources import cache_home

_log = logging.getLogger(__name__)


def load_base(
    model: ModelConfig,
    quant: QuantConfig,
    device: torch.device | str | None = None,
    log: Log = _log.warning,
    mapped: bool = False,
) -> PreTrainedModel:
    """Load the frozen base model in eval mode, quantized while loading; nothing is cast to fp32.

    Args:
        model, quant: sections of the config.
        device: default is this rank's GPU (`cuda:LOCAL_RANK`), or the CPU without one.
        log: called with a line if the cache of quantized weights cannot be used; the model is loaded in any case.
        mapped: leave the weights in their files, on the CPU, for `shard_base`; `device` quantizes those that no cache
            holds. Needs nf4 or unquantized weights.

    Returns:
        A transformers model. `model.base_revision` is its hub commit or None. With `quant.keep_dequantized`, each 4-bit
        layer has a 16-bit copy `resident_weight`.

    Raises:
        ConfigError: not found, unsupported, or files are missing; model.embedding=host with a tied head.
        IntegrityError: files are corrupt, or tensors are missing, superfluous or of another shape.
        ResourceError: out of memory, or with `mapped` no room for the cache.
        MissingExtra: bitsandbytes or flash-attn is missing.
    """
    source = fetch(model.name, model.revision, TEXT_FILES + WEIGHT_FILES, "model.name")
    config = read_config(source.folder, model.name)
    files = named_in_model(weight_files(source.folder, model.name), FAMILIES[config["model_type"]])
    attention.register()
    kernel = attention.SEGMENTED if model.attention == "auto" else model.attention
    place = default_device() if device is None else torch.device(device)
    on_host = model.embedding == "host" and on_gpu(place)
    if on_host and text_settings(config).get("tie_word_embeddings"):
        raise ConfigError(
            f"model.embedding=host: {model.name} uses its embedding as output head, which a GPU must hold\n"
            "help: set model.embedding=auto"
        )
    check_downloads((place.file for place in files.values()), cache_home("quantized") / "digests")
    with quiet(), _readable_errors(model, quant):
        where: dict[str, Any] = {"device": place, "host_embedding": on_host, "mapped": mapped}
        base: Any = _load(source.folder, files, model, quant, attention=kernel, log=log, **where)
        base.requires_grad_(False)
        if on_host:
            move_embedding_to_host(base)
        if quant.type != "none":
            keep_weights_trainable_after_eval(base)
        check_quantized(base, quant)
        if quant.keep_dequantized:
            keep_resident(base)
    # The base in adapter_config.json: not the local cache folder.
    base.name_or_path = base.config.name_or_path = model.name
    base.base_revision = source.revision
    base.loaded_as = _identity(model, quant, source.revision)
    return base


def _load(
    folder: Path,
    files: Mapping[str, TensorFile],
    model: ModelConfig,
    quant: QuantConfig,
    *,
    device: torch.device,
    attention: str,
    host_embedding: bool,
    mapped: bool,
    log: Log,
) -> PreTrainedModel:
    """Load tensor by tensor if the files allow it, otherwise by transformers."""
    base: PreTrainedModel | None = None
    if quant.type == "none" and mapped:
        base = load_plain(folder, files, model=model, attention=attention)
    if quant.type == "nf4":
        where: dict[str, Any] = {"device": device, "host_embedding": host_embedding, "mapped": mapped}
        base = load_four_bit(folder, files, model=model, quant=quant, attention=attention, log=log, **where)
    if base is None and mapped:
        raise ConfigError(
            f"model.name={model.name}: its files hold other tensors than config.json names, so they cannot be sharded\n"
            "help: save the model again with transformers, or set parallel.shard=none"
        )
    return base or _load_by_transformers(folder, model, quant, attention, device)


def check_loaded(base: PreTrainedModel, model: ModelConfig, quant: QuantConfig, device: torch.device) -> None:
    """Check that a base in memory is what `load_base` would load now: same files, settings, device, and no adapter.

    Raises:
        ConfigError: lists every difference.
    """
    found = getattr(base, "loaded_as", None)
    if not isinstance(base, PreTrainedModel) or found is None:
        raise ConfigError(f"model: expected a base from load_base, found {type(base).__name__}\nhelp: leave it out")
    revision = fetch(model.name, model.revision, TEXT_FILES, "model.name").revision
    wanted = _identity(model, quant, revision)
    device = torch.empty(0, device=device).device  # with the number of the GPU
    adapters = sum(isinstance(module, BaseTunerLayer) for module in base.modules())
    wanted, found = {**wanted, "device": device, "adapters": 0}, {**found, "device": base.device, "adapters": adapters}
    differing = [
        f"{key}: {wanted[key]} in the config, {found[key]} in memory" for key in wanted if wanted[key] != found[key]
    ]
    if differing:
        help_line = "help: load the base again with load_base(cfg.model, cfg.quant), or leave it out"
        raise ConfigError("\n".join(["model: the base differs from the config:", *differing, help_line]))


def _identity(model: ModelConfig, quant: QuantConfig, revision: str | None) -> dict[str, Any]:
    """Return what decides the weights and arithmetic of a loaded base, by key of the config."""
    unrelated = {"tokenizer", "revision", "embedding"}
    settings = {f"model.{key}": value for key, value in model.model_dump(exclude=unrelated).items()}
    settings |= {f"quant.{key}": value for key, value in quant.model_dump(exclude={"cache"}).items()}
    return settings | {"model.revision": revision, "weights": base_fingerprint(model.name)}


def _load_by_transformers(
    folder: Path, model: ModelConfig, quant: QuantConfig, kernel: str, device: torch.device
) -> PreTrainedModel:
    """Load plain or 8-bit weights, or files whose tensor names differ from those of the model."""
    # "eager": the configured attention kernel may not be installed, which `from_pretrained` reports.
    skeleton = build_skeleton(folder, getattr(torch, model.dtype), "eager")
    storage = storage_in(skeleton, quant)
    family = family_in(skeleton)
    base, found = model_class(family).from_pretrained(
        folder,
        config=skeleton.config,
        dtype=getattr(torch, model.dtype),
        quantization_config=quantization_config(quant, storage),
        device_map={"": device},
        attn_implementation=attention_of(family, kernel),
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        # Reported below with tensor names, which transformers does not give.
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    # transformers fills missing tensors with random values and drops unknown ones. Where it quantizes, version 5.17
    # keeps tensors of another shape and reports none.
    found["mismatched_keys"] = found["mismatched_keys"] or _misshapen(base, skeleton)
    found["unexpected_keys"] = [name for name in found["unexpected_keys"] if family.name_in_model(name) is not None]
    problems = [
        f"{len(names)} {what}: {', '.join(sorted(map(str, names))[:5])}{' …' if len(names) > 5 else ''}"
        for what, key in (
            ("tensors are missing", "missing_keys"),
            ("tensors are not part of the model", "unexpected_keys"),
            ("tensors have another shape than in config.json", "mismatched_keys"),
        )
        if (names := found[key])
    ]
    if problems:
        raise IntegrityError(f"model.name={model.name}: weights do not match config.json: {'; '.join(problems)}")
    if quant.type == "nf4":
        quantize_loaded(base, [name for name, kind in storage.items() if kind == "int8"])
    return base


def _misshapen(base: PreTrainedModel, skeleton: PreTrainedModel) -> list[str]:
    """Return the names of parameters whose shape, before quantization, differs from that of the skeleton."""
    expected = {name: parameter.shape for name, parameter in skeleton.named_parameters()}
    states = {name: getattr(parameter, "quant_state", None) or parameter for name, parameter in base.named_parameters()}
    return [name for name, state in states.items() if state.shape != expected.get(name, state.shape)]


@contextmanager
def _readable_errors(model: ModelConfig, quant: QuantConfig) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"model.name={model.name}: does not fit into GPU memory with quant.type={quant.type} ({error})\n"
            "help: set quant.type=nf4, choose a smaller model, or free the GPU"
        ) from error
    except ImportError as error:
        if model.attention != "flash_attention_2":
            raise
        raise MissingExtra(
            "model.attention=flash_attention_2 needs flash-attn\n"
            "help: pip install flash-attn --no-build-isolation, or set model.attention=auto"
        ) from error
    except RuntimeError as error:
        if "allocate memory" in str(error):
            raise ResourceError(f"model.name={model.name}: does not fit into main memory ({error})") from error
        if "bitsandbytes" not in str(error):
            raise
        raise MissingExtra(
            f"quant.type={quant.type}: bitsandbytes does not work here ({error})\n"
            'help: pip install --upgrade "bitsandbytes>=0.49", or set quant.type=none'
        ) from error
