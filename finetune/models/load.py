"""The tokenizer and the frozen base model, from a local folder or the hub."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from finetune.config.schema import ModelConfig, QuantConfig
from finetune.models.families import shape_of
from finetune.models.hub import TEXT_FILES, WEIGHT_FILES, fetch, read_config, read_json, weight_files
from finetune.models.quant.cache import Log
from finetune.models.quant.eight_bit import quantize_loaded
from finetune.models.quant.four_bit import build_skeleton, keep_resident, load_four_bit
from finetune.models.quant.quantize import (
    check_quantized,
    keep_weights_trainable_after_eval,
    quantization_config,
    storage_in,
)
from finetune.ops import attention
from finetune.system.errors import ConfigError, IntegrityError, MissingExtra, ResourceError

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")
_log = logging.getLogger(__name__)


def load_tokenizer(cfg: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of `model.name`, or the one that `model.tokenizer` names, with its chat template.

    Raises: ConfigError if it can't be fetched, its files are missing or broken, it names code to run, or it is one for
    other weights.
    """
    own = fetch(cfg.name, cfg.revision, TEXT_FILES, "model.name")
    if cfg.tokenizer is None:
        return _read_tokenizer(own.folder, cfg.name, "model.name")
    given = _read_tokenizer(
        fetch(cfg.tokenizer, None, TEXT_FILES, "model.tokenizer").folder, cfg.tokenizer, "model.tokenizer"
    )
    _check_rows(cfg, given, own.folder)
    return given


def load_adapter_tokenizer(cfg: ModelConfig, adapter: Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved with an adapter, which knows its template and the tokens it added; else the base's."""
    if not (adapter / TOKENIZER_FILES[0]).is_file():
        return load_tokenizer(cfg)
    return load_tokenizer(cfg.model_copy(update={"name": str(adapter), "revision": None, "tokenizer": None}))


def _read_tokenizer(folder: Path, name: str, key: str) -> PreTrainedTokenizerBase:
    for file in TOKENIZER_FILES:
        if "auto_map" in read_json(folder / file, f"{key}={name}"):
            raise ConfigError(f"{key}={name}: its {file} names code to run (auto_map), which is never done")
    with quiet():
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    tokenizer = cast(PreTrainedTokenizerBase, found)
    tokenizer.name_or_path = name
    return tokenizer


def _check_rows(cfg: ModelConfig, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The embedding must have a row for each id, and words that the model's own tokenizer has too, the same ids."""
    shape, last = shape_of(str(folder)), max(tokenizer.get_vocab().values())
    if shape is not None and last >= shape["vocab_size"]:
        raise ConfigError(
            f"model.tokenizer={cfg.tokenizer} has ids up to {last:,}, but the embedding of model.name={cfg.name} ends "
            f"at {shape['vocab_size'] - 1:,}; name a tokenizer of the same vocabulary"
        )
    if all((folder / file).is_file() for file in TOKENIZER_FILES):
        own = _words(_read_tokenizer(folder, cfg.name, "model.name"))
        if moved := [token for token, i in _words(tokenizer).items() if own.get(token, i) != i]:
            raise ConfigError(
                f"model.tokenizer={cfg.tokenizer} is for other weights than model.name={cfg.name}: {len(moved):,} "
                f"tokens have another id there, as {moved[0]!r}; name a tokenizer of the same vocabulary"
            )


def _words(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The vocabulary without added tokens, which transformers may add to."""
    return tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)  # type: ignore[attr-defined]


def load_base(
    model: ModelConfig, quant: QuantConfig, device: torch.device | str | None = None, log: Log = _log.warning
) -> PreTrainedModel:
    """The frozen base model in eval mode, quantized while it loads; nothing is cast to fp32.

    device: default is this rank's GPU (`cuda:LOCAL_RANK`), the CPU where there is none.
    say: told, in a line, what goes wrong with the cache of quantized weights; the model is loaded all the same.
    Returns: an ordinary transformers model; `model.base_revision` is the hub commit it came from, or None. With
    `quant.keep_dequantized`, each 4-bit layer has its 16-bit copy as `resident_weight`.
    Raises: ConfigError (not found, not supported, missing files), IntegrityError (torn files, tensors that are missing,
    superfluous or of another shape), ResourceError (out of memory), MissingExtra (bitsandbytes, flash-attn).
    """
    source = fetch(model.name, model.revision, TEXT_FILES + WEIGHT_FILES, "model.name")
    read_config(source.folder, model.name)
    files = weight_files(source.folder, model.name)
    attention.register()
    kernel = attention.SEGMENTED if model.attention == "auto" else model.attention
    place = default_device() if device is None else torch.device(device)
    with quiet(), _readable_errors(model, quant):
        settings = quantization_of(source.folder, model, quant)
        base: Any = None
        if settings is not None and quant.type == "nf4":
            base = load_four_bit(
                source.folder,
                files,
                model=model,
                quant=quant,
                settings=settings,
                attention=kernel,
                device=place,
                log=log,
            )
        if base is None:
            base = _load_by_transformers(source.folder, model, kernel, settings, place)
            if settings is not None and quant.type == "nf4" and quant.int8:
                eight = [name for name, kind in storage_in(base, quant).items() if kind == "int8"]
                quantize_loaded(base, eight, settings.llm_int8_threshold)
        base.requires_grad_(False)
        if quant.type != "none":
            keep_weights_trainable_after_eval(base)
        check_quantized(base, quant)
        if quant.keep_dequantized:
            keep_resident(base)
    # What adapter_config.json will name as its base: not this machine's cache folder.
    base.name_or_path = base.config.name_or_path = model.name
    base.base_revision = source.revision
    return base


def _load_by_transformers(
    folder: Path, model: ModelConfig, kernel: str, settings: BitsAndBytesConfig | None, device: torch.device
) -> PreTrainedModel:
    """Plain and 8-bit weights, and those whose tensors are not called as the model's are."""
    base, found = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, model.dtype),
        quantization_config=settings,
        device_map={"": device},
        attn_implementation=kernel,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        # Reported below with names, not by transformers without.
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    _check_complete(found, model.name)
    return base


def default_device() -> torch.device:
    """This rank's GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and warnings: what matters in them is raised here as an error."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def quantization_of(folder: Path, model: ModelConfig, quant: QuantConfig) -> BitsAndBytesConfig | None:
    """The quantization settings with the names in `quant` resolved on a model without weights."""
    # Names need no attention kernel, which may not be installed: that is for the loading to say.
    skeleton = build_skeleton(folder, getattr(torch, model.dtype), "eager")
    return quantization_config(quant, storage_in(skeleton, quant))


@contextmanager
def _readable_errors(model: ModelConfig, quant: QuantConfig) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"model.name={model.name} does not fit into the GPU's memory with quant.type={quant.type}: choose nf4 or a "
            f"smaller model, or free the GPU ({error})"
        ) from error
    except ImportError as error:
        if model.attention != "flash_attention_2":
            raise
        raise MissingExtra(
            "model.attention=flash_attention_2 needs: pip install flash-attn --no-build-isolation (or set "
            "model.attention=auto)"
        ) from error
    except RuntimeError as error:
        if "allocate memory" in str(error):
            raise ResourceError(f"model.name={model.name} does not fit into this machine's memory: {error}") from error
        if "bitsandbytes" not in str(error):
            raise
        raise MissingExtra(
            f'quant.type={quant.type}: bitsandbytes does not work here: pip install --upgrade "bitsandbytes>=0.49" '
            f"(or set quant.type=none); it says: {error}"
        ) from error


def _check_complete(found: dict[str, Any], name: str) -> None:
    """transformers fills tensors that it does not find with random numbers and drops those it does not know."""
    problems = [
        f"{len(names)} {what}: {', '.join(sorted(map(str, names))[:5])}{' …' if len(names) > 5 else ''}"
        for what, key in (
            ("tensors are missing", "missing_keys"),
            ("tensors are not part of the model", "unexpected_keys"),
            ("tensors have another shape than config.json says", "mismatched_keys"),
        )
        if (names := found[key])
    ]
    if problems:
        raise IntegrityError(f"the weights of model.name={name} differ from its config.json: {'; '.join(problems)}")
