"""Evaluate each variant of a model on the same data, one in memory at a time, and collect the gap table."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from finetune import __version__
from finetune.config.command_options import EvalOptions
from finetune.config.schema import DataConfig, Dtype, ModelConfig, QuantConfig, RunConfig
from finetune.config.section import SHORT_DTYPES
from finetune.data.loader import load_media_processor
from finetune.data.template.chat import ChatTemplate
from finetune.distill.resident import load_resident
from finetune.evaluation.examples import data_warnings, load_sets
from finetune.evaluation.gap_table import GapTable, ModelFigures, Variant
from finetune.evaluation.generation import dequantize_once
from finetune.evaluation.lm_eval import load_tasks, run_tasks
from finetune.evaluation.measure import Evaluator, Progress, stored_bytes
from finetune.evaluation.metrics import find_metric
from finetune.evaluation.options import check_options
from finetune.losses.hidden_states import base_of
from finetune.models.adapters.files import load_adapter
from finetune.models.adapters.folder import TENSOR_FILE
from finetune.models.adapters.trained import find_trained
from finetune.models.families import text_settings
from finetune.models.fused import fuse_layers
from finetune.models.hub import TEXT_FILES, WEIGHT_FILES, check_window, fetch, read_config
from finetune.models.load import load_base
from finetune.models.tokenizer import load_adapter_tokenizer, load_tokenizer
from finetune.system.accelerator import default_device, device_name
from finetune.system.console import Log
from finetune.system.errors import ConfigError, ResourceError, is_disk_full, os_errors_as
from finetune.system.locks import locked
from finetune.system.machine import use_all_cores
from finetune.system.manifest import sha256_of
from finetune.system.out_of_memory import release_memory
from finetune.towers.towers import build_towers

VARIANTS: tuple[Variant, ...] = ("base", "quantized", "trained", "merged")


@dataclass(frozen=True)
class Variants:
    """The models to compare.

    adapter: its folder; None for a model alone. cfg: config of the adapter's run; None if it has none.
    model: the base, or the model alone, in its own dtype. quant: of the quantized base.
    variants: in the order of the table.
    """

    adapter: Path | None
    cfg: RunConfig | None
    model: ModelConfig
    quant: QuantConfig
    variants: tuple[Variant, ...]

    def name(self, variant: Variant) -> str:
        """Return the name of a variant in tables: bf16 base, NF4 base, NF4 + adapter, merged."""
        plain = SHORT_DTYPES[self.model.dtype]
        stored = "mixed" if self.quant.int8 else self.quant.type.upper()
        what = "model" if self.adapter is None else "base"
        return {
            "base": f"{plain} {what}",
            "quantized": f"{stored} {what}",
            "trained": f"{plain if self.quant.type == 'none' else stored} + adapter",
            "merged": "merged",
        }[variant]

    def load(self, variant: Variant, merged: Path, log: Log) -> nn.Module:
        """Load a variant, frozen, in evaluation mode, on this machine's device. merged: folder of the merged model."""
        device, loaded = default_device(), self.model
        if variant == "merged":
            loaded = ModelConfig(name=str(merged), dtype=own_dtype(str(merged)))
        if variant in ("base", "merged"):
            model = load_resident(loaded, None, device).model
        else:
            model = load_base(loaded, self.quant, device, log)
            if variant == "trained":
                assert self.adapter is not None, "only an adapter is trained"
                model = load_adapter(model, self.adapter)
            fuse_layers(model)
            dequantize_once(model, self.quant)
        data = DataConfig() if self.cfg is None else self.cfg.data
        build_towers(base_of(model), loaded, load_media_processor(self.model, data))
        return model.eval()


def find_variants(options: EvalOptions, log: Log) -> Variants:
    """Find the models named in the options, reading only text files and an adapter.

    Raises: ConfigError if a variant does not exist.
    """
    if options.adapter is not None:
        trained = find_trained([options.adapter], None, log)
        found = Variants(trained.adapters[0].folder, trained.cfg, trained.model, trained.quant, ())
    else:
        name = str(options.model)
        fetch(name, None, TEXT_FILES + WEIGHT_FILES, "model")
        found = Variants(None, None, ModelConfig(name=name, dtype=own_dtype(name)), QuantConfig(type="none"), ())
    quant = found.quant
    if options.quant is not None:
        quant = quant.model_copy(update={"type": options.quant, "int8": []})
    exists = {"base": True, "quantized": quant.type != "none", "trained": found.adapter, "merged": found.adapter}
    available = [variant for variant in VARIANTS if exists[variant]]
    wanted = options.variants or available
    if unknown := [variant for variant in wanted if variant not in available]:
        raise ConfigError(f"variants: found {', '.join(unknown)}, but only {', '.join(available)} exist here")
    return replace(found, quant=quant, variants=tuple(variant for variant in available if variant in wanted))


def own_dtype(name: str) -> Dtype:
    """Return the dtype in a model's config.json; bfloat16 if it has none, or one without compute kernels."""
    config = read_config(fetch(name, None, TEXT_FILES, "model").folder, name)
    named = config.get("dtype") or config.get("torch_dtype")
    return cast(Dtype, named) if named in SHORT_DTYPES else "bfloat16"


_MAX_NEW_TOKENS = 256
_SCRATCH = ".eval-"
Merge = Callable[[str, Path], object]


def evaluate_gap(options: EvalOptions, log: Log, merge: Merge, place: Path | None = None) -> GapTable:
    """Evaluate every variant named in the options.

    Args:
        merge: writes the merged model of `options.adapter` into a new folder.
        place: a folder with room for a merged model; None uses the system's folder for temporary files.

    Raises:
        ConfigError, DataError: before a model is loaded.
        ResourceError: memory or disk space runs out.
    """
    started = time.monotonic()
    use_all_cores(default_device().type)
    check_options(options)
    metric = find_metric(options.metric, options.pattern)
    variants = find_variants(options, log)
    tasks = load_tasks(options.tasks) if options.tasks else None
    base, adapter, cfg = variants.model, variants.adapter, variants.cfg
    tokenizer = load_tokenizer(base) if adapter is None else load_adapter_tokenizer(base, adapter)
    chat = ChatTemplate(tokenizer)
    sets = load_sets(options, cfg, chat, base)
    config = read_config(fetch(base.name, base.revision, TEXT_FILES, "model").folder, base.name)
    longest = max((len(document) for rows in sets for document in rows.documents), default=0)
    if base.attention in ("auto", "segmented"):
        check_window(config, base.name, longest, "data.eval")
    base_rows = int(text_settings(config)["vocab_size"])
    vocabulary = min(len(tokenizer), base_rows)
    if max(tokenizer.get_vocab().values()) >= base_rows:
        variants = _with_new_tokens(variants, log)
    if options.merged is not None and "merged" in variants.variants:
        _check_merged(options.merged, vocabulary)
    for rows in sets:
        log(rows.describe())
    for text in data_warnings(options, cfg, sets):
        log(f"warning: {text}")
    most = options.max_new_tokens or (_MAX_NEW_TOKENS if cfg is None else cfg.generation.max_new_tokens)
    with _scratch_folder(place) as scratch:
        merged = scratch / "merged" if options.merged is None else Path(options.merged).expanduser()
        if "merged" in variants.variants and options.merged is None:
            merge(str(options.adapter), merged)
        evaluator = Evaluator(options, sets, tokenizer, chat, metric, vocabulary, most, scratch)
        models = [
            _evaluate_variant(variants, variant, evaluator, merged=merged, tasks=tasks, log=log)
            for variant in variants.variants
        ]
    return GapTable(
        adapter=options.adapter,
        model=base.name,
        reference="base" if "base" in variants.variants else None,
        metric=metric.name if any(rows.conversations for rows in sets) else None,
        resamples=options.resamples,
        seed=options.seed,
        seconds=round(time.monotonic() - started, 1),
        made_with=_made_with(),
        models=models,
        adapter_files={} if adapter is None else {TENSOR_FILE: sha256_of(adapter / TENSOR_FILE)},
    )


def _evaluate_variant(
    variants: Variants, variant: Variant, evaluator: Evaluator, *, merged: Path, tasks: Any, log: Log
) -> ModelFigures:
    name, started = variants.name(variant), time.monotonic()
    with _explain_out_of_memory(name, variant, variants.variants):
        model = variants.load(variant, merged, log)
        sets = evaluator.evaluate(model, is_reference=variant == "base", progress=Progress(name, log))
        task_figures = [] if tasks is None else run_tasks(model, evaluator.tokenizer, tasks, evaluator.options)
        figures = ModelFigures(variant, name, stored_bytes(model), sets, task_figures)
    del model
    release_memory()
    log(f"{name}: measured in {time.monotonic() - started:.1f} s")
    return figures


@contextmanager
def _explain_out_of_memory(name: str, variant: Variant, variants: tuple[Variant, ...]) -> Iterator[None]:
    """Turn an error of full memory or disk into a ResourceError with help."""
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            raise ResourceError(
                f"{name}: the disk is full ({error})\nhelp: free space, or name a folder on another disk with out=DIR"
            ) from error
        if isinstance(error, torch.OutOfMemoryError | MemoryError | ResourceError) or "allocate memory" in str(error):
            others = ",".join(other for other in variants if other != variant)
            without = f", or leave it out with 'variants=[{others}]'" if others else ""
            raise ResourceError(f"{name}: not enough memory ({error})\nhelp: lower batch_size{without}") from error
        raise


def _with_new_tokens(variants: Variants, log: Log) -> Variants:
    """Leave out the variants without embeddings for tokens that the adapter added."""
    kept: tuple[Variant, ...] = tuple(v for v in variants.variants if v in ("trained", "merged"))
    if not kept:
        raise ConfigError("variants: only trained and merged have the tokens that the adapter added")
    if kept != variants.variants:
        log(f"variants: {','.join(kept)} (the others lack the tokens that the adapter added)")
    return replace(variants, variants=kept)


def _check_merged(word: str, vocabulary: int) -> None:
    """Raise ConfigError if the folder is not a model, or lacks tokens of the base."""
    folder = Path(word).expanduser()
    if not (folder / "config.json").is_file():
        problem = "has no config.json" if folder.is_dir() else "does not exist"
        raise ConfigError(f"merged={word}: the folder {problem}\nhelp: finetune merge writes a merged model")
    rows = int(read_config(folder, word).get("vocab_size", 0))
    if rows < vocabulary:
        raise ConfigError(
            f"merged={word}: not merged from this base, found {rows:,} tokens where the base has {vocabulary:,}"
        )


@contextmanager
def _scratch_folder(place: Path | None) -> Iterator[Path]:
    """A locked temporary folder in `place`. Folders of killed processes are removed too."""
    with os_errors_as(ConfigError, f"{place or 'temporary files'}: cannot be written to"):
        for left in place.glob(f"{_SCRATCH}*") if place is not None else ():
            with suppress(OSError), locked(left / ".lock", 0) as abandoned:
                if abandoned:
                    shutil.rmtree(left)
        made = tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=place)
    with made as folder, locked(Path(folder) / ".lock", 0):
        yield Path(folder)


def _made_with() -> dict[str, str]:
    return {
        "finetune": __version__,
        "torch": torch.__version__,
        "device": device_name(default_device()),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
