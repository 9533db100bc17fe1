"""Evaluate each variant of a model on the same data, one in memory at a time, and collect the gap table."""

from __future__ import annotations

import functools
import gc
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from finetune import __version__
from finetune.config.command_options import EvalOptions
from finetune.data.template.chat import ChatTemplate
from finetune.evaluation.examples import RowSet, data_warnings, load_sets
from finetune.evaluation.gap_table import GapTable, ModelFigures, Variant
from finetune.evaluation.intervals import Bootstrap
from finetune.evaluation.lm_eval import load_tasks, run_tasks
from finetune.evaluation.measure import Evaluator, Progress, stored_bytes
from finetune.evaluation.metrics import Metric, find_metric
from finetune.evaluation.variants import Variants, find_variants, option_problems
from finetune.models.adapters.files import TENSOR_FILE
from finetune.models.digest import sha256_of
from finetune.models.hub import TEXT_FILES, fetch, read_config
from finetune.models.load import default_device, load_adapter_tokenizer, load_tokenizer
from finetune.system.atomic import is_disk_full
from finetune.system.console import Log
from finetune.system.errors import ConfigError, ResourceError
from finetune.system.locks import locked
from finetune.system.machine import use_all_cores

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
    metric = _check_options(options)
    variants = find_variants(options, log)
    tasks = load_tasks(options.tasks) if options.tasks else None
    tokenizer = _load_tokenizer(variants)
    chat = ChatTemplate(tokenizer)
    sets = load_sets(options, variants.cfg, chat)
    base_rows = _base_rows(variants)
    if max(tokenizer.get_vocab().values()) >= base_rows:
        variants = _with_new_tokens(variants, log)
    vocabulary = min(len(tokenizer), base_rows)
    if options.merged is not None and "merged" in variants.variants:
        _check_merged(options.merged, vocabulary)
    for line in (*map(_describe, sets), *(f"warning: {text}" for text in data_warnings(options, variants.cfg, sets))):
        log(line)
    resample = functools.partial(Bootstrap, resamples=options.resamples, seed=options.seed)
    with _scratch_folder(place) as scratch:
        merged = _merged_folder(options, variants, scratch, merge)
        max_new_tokens = _MAX_NEW_TOKENS if variants.cfg is None else variants.cfg.generation.max_new_tokens
        evaluator = Evaluator(
            sets=sets,
            tokenizer=tokenizer,
            chat=chat,
            metric=metric,
            vocabulary=vocabulary,
            max_new_tokens=options.max_new_tokens or max_new_tokens,
            batch_size=options.batch_size,
            bootstraps=[resample(rows.rows) for rows in sets],
            answer_bootstraps=[resample(max(1, len(rows.conversations))) for rows in sets],
            scratch=scratch,
        )
        models = [
            _evaluate_variant(variants, variant, evaluator, options=options, merged=merged, tasks=tasks, log=log)
            for variant in variants.variants
        ]
    return GapTable(
        adapter=options.adapter,
        model=variants.model.name,
        reference="base" if "base" in variants.variants else None,
        metric=metric.name if any(rows.conversations for rows in sets) else None,
        resamples=options.resamples,
        seed=options.seed,
        seconds=round(time.monotonic() - started, 1),
        made_with=_made_with(),
        models=models,
        adapter_files={} if variants.adapter is None else {TENSOR_FILE: sha256_of(variants.adapter / TENSOR_FILE)},
    )


def _evaluate_variant(
    variants: Variants,
    variant: Variant,
    evaluator: Evaluator,
    *,
    options: EvalOptions,
    merged: Path | None,
    tasks: Any,
    log: Log,
) -> ModelFigures:
    name = variants.name(variant)
    started = time.monotonic()
    with _explain_out_of_memory(name, variant, variants.variants):
        model = variants.load(variant, merged, log)
        sets = evaluator.evaluate(model, is_reference=variant == "base", progress=Progress(name, log))
        task_figures = []
        if tasks is not None:
            task_figures = run_tasks(
                model,
                evaluator.tokenizer,
                tasks,
                limit=options.limit,
                batch_size=options.batch_size,
                as_chat=options.tasks_as_chat,
            )
        figures = ModelFigures(variant, name, stored_bytes(model), sets, task_figures)
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
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


def _check_options(options: EvalOptions) -> Metric:
    """Return the metric. Raises: ConfigError with all problems of the options."""
    problems, metric = option_problems(options), None
    try:
        metric = find_metric(options.metric, options.pattern)
    except ConfigError as error:
        problems.append(str(error))
    if problems or metric is None:
        raise ConfigError("\n".join(problems))
    return metric


def _load_tokenizer(variants: Variants) -> PreTrainedTokenizerBase:
    if variants.adapter is None:
        return load_tokenizer(variants.model)
    return load_adapter_tokenizer(variants.model, variants.adapter)


def _with_new_tokens(variants: Variants, log: Log) -> Variants:
    """Leave out the variants without embeddings for tokens that the adapter added."""
    kept: tuple[Variant, ...] = tuple(v for v in variants.variants if v in ("trained", "merged"))
    if not kept:
        raise ConfigError("variants: only trained and merged have the tokens that the adapter added")
    if kept != variants.variants:
        log(f"variants: {','.join(kept)} (the others lack the tokens that the adapter added)")
    return replace(variants, variants=kept)


def _base_rows(variants: Variants) -> int:
    """Rows of the base's embedding."""
    model = variants.model
    return int(read_config(fetch(model.name, model.revision, TEXT_FILES, "model").folder, model.name)["vocab_size"])


def _merged_folder(options: EvalOptions, variants: Variants, scratch: Path, merge: Merge) -> Path | None:
    """The folder of the merged model, merged into `scratch` unless the user has one."""
    if "merged" not in variants.variants:
        return None
    if options.merged is not None:
        return Path(options.merged).expanduser()
    assert options.adapter is not None, "only an adapter has a merged model"
    out = scratch / "merged"
    merge(options.adapter, out)
    return out


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
    try:
        for left in place.glob(f"{_SCRATCH}*") if place is not None else ():
            with suppress(OSError), locked(left / ".lock", 0) as abandoned:
                if abandoned:
                    shutil.rmtree(left)
        made = tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=place)
    except OSError as error:
        raise ConfigError(f"{place or 'temporary files'}: cannot be written to: {error.strerror}") from error
    with made as folder, locked(Path(folder) / ".lock", 0):
        yield Path(folder)


def _describe(rows: RowSet) -> str:
    forgetting = ", forgetting=true" if rows.forgetting else ""
    targets = int(rows.documents.targets.sum())
    return f"{rows.name}: rows={rows.rows:,}, answered={len(rows.conversations):,}, targets={targets:,}{forgetting}"


def _made_with() -> dict[str, str]:
    device = default_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, threads={torch.get_num_threads()}"
    return {
        "finetune": __version__,
        "torch": torch.__version__,
        "device": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
