"""`finetune eval` from its options to a table: one model after the other is loaded, measured and let go."""

from __future__ import annotations

import gc
import os
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
from finetune.evaluation.variants import Log, Variants, contradictions, find_variants
from finetune.models.adapters.files import TENSOR_FILE
from finetune.models.digest import sha256_of
from finetune.models.hub import TEXT_FILES, fetch, read_config
from finetune.models.load import default_device, load_adapter_tokenizer, load_tokenizer
from finetune.system.atomic import is_disk_full
from finetune.system.errors import ConfigError, ResourceError
from finetune.system.locks import locked
from finetune.system.machine import pick_threads, usable_cores

_MAX_NEW_TOKENS = 256
_SCRATCH = ".eval-"
Merge = Callable[[str, Path], object]


def evaluate_gap(options: EvalOptions, log: Log, merge: Merge, place: Path | None = None) -> GapTable:
    """Measure every model that the options name.

    merge: writes the merged model of `options.adapter` into a new folder.
    place: a folder with room for a merged model; None is the system's for temporary files.
    Raises: ConfigError and DataError before a model is loaded; what loading and merging raise.
    """
    started = time.monotonic()
    if default_device().type == "cpu" and (threads := pick_threads(os.environ, usable_cores())):
        torch.set_num_threads(threads)
    metric = _check(options)
    subjects = find_variants(options, log)
    tasks = load_tasks(options.tasks) if options.tasks else None
    tokenizer = _tokenizer(subjects)
    chat = ChatTemplate(tokenizer)
    sets = load_sets(options, subjects.cfg, chat)
    subjects = _with_rows_for(subjects, tokenizer, log)
    if options.merged is not None and "merged" in subjects.variants:
        _check_merged(options.merged, _vocabulary(subjects, tokenizer))
    for rows in sets:
        log(_describe(rows))
    for doubt in data_warnings(options, subjects.cfg, sets):
        log(f"warning: {doubt}")
    with _scratch(place) as scratch:
        merged = _merged_folder(options, subjects, scratch, merge)
        measuring = _measuring(options, subjects, sets, (tokenizer, chat, metric), scratch)
        models = [_measure(options, subjects, variant, merged, measuring, tasks, log) for variant in subjects.variants]
    return GapTable(
        options.adapter,
        subjects.model.name,
        "base" if "base" in subjects.variants else None,
        metric.name if any(rows.conversations for rows in sets) else None,
        options.resamples,
        options.seed,
        round(time.monotonic() - started, 1),
        _made_with(),
        models,
        {} if subjects.adapter is None else {TENSOR_FILE: sha256_of(subjects.adapter / TENSOR_FILE)},
    )


def _measure(
    options: EvalOptions,
    subjects: Variants,
    variant: Variant,
    merged: Path | None,
    measuring: Evaluator,
    tasks: Any,
    log: Log,
) -> ModelFigures:
    name = subjects.name(variant)
    started = time.monotonic()
    with _explain_out_of_memory(name, variant, subjects.variants):
        model = subjects.load(variant, merged, log)
        sets = measuring.measure(model, reference=variant == "base", far=Progress(name, log))
        found = []
        if tasks is not None:
            found = run_tasks(
                model,
                measuring.tokenizer,
                tasks,
                limit=options.limit,
                batch_size=options.batch_size,
                as_chat=options.tasks_as_chat,
            )
        figures = ModelFigures(variant, name, stored_bytes(model), sets, found)
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    log(f"{name}: measured in {time.monotonic() - started:.1f} s")
    return figures


@contextmanager
def _explain_out_of_memory(name: str, variant: Variant, variants: tuple[Variant, ...]) -> Iterator[None]:
    """Says what to do where memory or disk runs out. Raises: ResourceError."""
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            raise ResourceError(
                f"{name}: the disk is full; free space, or name a folder on another one with out=DIR ({error})"
            ) from error
        if isinstance(error, torch.OutOfMemoryError | MemoryError | ResourceError) or "allocate memory" in str(error):
            others = ",".join(other for other in variants if other != variant)
            without = f", or leave it out with 'variants=[{others}]'" if others else ""
            raise ResourceError(f"{name}: not enough memory; lower batch_size{without} ({error})") from error
        raise


def _check(options: EvalOptions) -> Metric:
    """The metric. Raises: ConfigError with everything that shows before anything is read."""
    problems, metric = contradictions(options), None
    try:
        metric = find_metric(options.metric, options.pattern)
    except ConfigError as error:
        problems.append(str(error))
    if problems or metric is None:
        raise ConfigError("\n".join(problems))
    return metric


def _tokenizer(subjects: Variants) -> PreTrainedTokenizerBase:
    if subjects.adapter is None:
        return load_tokenizer(subjects.model)
    return load_adapter_tokenizer(subjects.model, subjects.adapter)


def _with_rows_for(subjects: Variants, tokenizer: PreTrainedTokenizerBase, log: Log) -> Variants:
    """Without the models that have no row for tokens that the adapter added."""
    if max(tokenizer.get_vocab().values()) < _base_rows(subjects):
        return subjects
    kept: tuple[Variant, ...] = tuple(v for v in subjects.variants if v in ("trained", "merged"))
    if not kept:
        raise ConfigError("variants: the adapter added tokens, which only trained and merged have rows for")
    if kept != subjects.variants:
        log("the adapter added tokens that its base has no rows for: only trained and merged models are measured")
    return replace(subjects, variants=kept)


def _base_rows(subjects: Variants) -> int:
    model = subjects.model
    return int(read_config(fetch(model.name, model.revision, TEXT_FILES, "model").folder, model.name)["vocab_size"])


def _vocabulary(subjects: Variants, tokenizer: PreTrainedTokenizerBase) -> int:
    """Ids that all models know."""
    return min(len(tokenizer), _base_rows(subjects))


def _measuring(
    options: EvalOptions,
    subjects: Variants,
    sets: list[RowSet],
    words: tuple[PreTrainedTokenizerBase, ChatTemplate, Metric],
    scratch: Path,
) -> Evaluator:
    tokenizer, chat, metric = words
    own = subjects.cfg.generation.max_new_tokens if subjects.cfg is not None else _MAX_NEW_TOKENS
    return Evaluator(
        sets,
        tokenizer,
        chat,
        metric,
        _vocabulary(subjects, tokenizer),
        options.max_new_tokens or own,
        options.batch_size,
        [Bootstrap(rows.rows, options.resamples, options.seed) for rows in sets],
        [Bootstrap(max(1, len(rows.conversations)), options.resamples, options.seed) for rows in sets],
        scratch,
    )


def _merged_folder(options: EvalOptions, subjects: Variants, scratch: Path, merge: Merge) -> Path | None:
    """The folder that holds the merged model; where the user has none, one that goes with `scratch`."""
    if "merged" not in subjects.variants:
        return None
    if options.merged is not None:
        return Path(options.merged).expanduser()
    assert options.adapter is not None, "only an adapter has a merged model"
    out = scratch / "merged"
    merge(options.adapter, out)
    return out


def _check_merged(word: str, vocabulary: int) -> None:
    """Raises: ConfigError if the folder is no model, or one that does not know the base's tokens."""
    folder = Path(word).expanduser()
    if not (folder / "config.json").is_file():
        found = "is no model's folder: it has no config.json" if folder.is_dir() else "there is no such folder"
        raise ConfigError(f"merged={word}: {found}; finetune merge writes one")
    rows = int(read_config(folder, word).get("vocab_size", 0))
    if rows < vocabulary:
        raise ConfigError(f"merged={word}: knows {rows:,} tokens, the base {vocabulary:,}; it is not merged from it")


@contextmanager
def _scratch(place: Path | None) -> Iterator[Path]:
    """A folder in `place`, gone after the block. Those that killed processes left there go as well."""
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
    answered = f", {len(rows.conversations):,} of them answered" if rows.conversations else ""
    targets = int(rows.documents.targets.sum())
    return f"{rows.name}{' (forgetting)' if rows.forgetting else ''}: {rows.rows:,} rows{answered}, {targets:,} targets"


def _made_with() -> dict[str, str]:
    device = default_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    return {
        "finetune": __version__,
        "torch": torch.__version__,
        "device": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
