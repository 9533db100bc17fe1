"""Recognize the format of rows: by the columns of the first row of each file."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.config.schema import SourceConfig
from finetune.data.formats.attachments import MEDIA_COLUMNS
from finetune.data.formats.columns import meanings, recognize
from finetune.data.formats.conversations import METADATA_KEYS
from finetune.data.formats.parser import FORMATS, PREFERENCE, PROMPT, VERDICTS, RowParser, require_mapped
from finetune.data.formats.values import kind, listed, printable_name
from finetune.data.sources.readers import RawBatch
from finetune.system.console import log_once
from finetune.system.errors import DataError

# Keys of an entry of LLaMA-Factory's dataset_info.json that hold a path or a name on the hub.
_REGISTRY_KEYS = ("file_name", "hf_hub_url", "ms_hub_url")
_ROW_COLUMNS = frozenset().union(*(fmt.columns for fmt in FORMATS.values()))


def detect_format(
    columns: frozenset[str], source: str, mapped: Mapping[str, str] | None = None, objective: str = "none"
) -> str:
    """Return the one format whose columns are all there, or that other widely used names of them mean.

    `text` is returned only if no other format fits, and `prompt` only for the objective `reward`, before `text`.

    mapped: our names of columns and message keys to the file's; a format must know all of them.
    objective: of the rows, as in `Preparation`.
    Raises: DataError if no format fits, or several do.
    """
    mapped = mapped or {}
    renamed = (columns - set(mapped.values())) | {ours for ours, theirs in mapped.items() if theirs in columns}
    fitting = [name for name, fmt in FORMATS.items() if fmt.is_in(renamed) and set(mapped) <= fmt.columns | fmt.keys]
    if "preference" in fitting:  # pairs often have a column with the prompt or the chosen side as messages
        return "preference"
    prompt_alone = PROMPT in fitting and objective == "reward"
    others = FORMATS.keys() - {PROMPT, "text" if prompt_alone else PROMPT}
    fitting = [name for name in fitting if name in others]
    if len(fitting) > 1:  # many datasets of other formats also have a column of rendered text
        fitting = [name for name in fitting if name != "text"]
    if len(fitting) == 1:
        return fitting[0]
    if "custom_id" in columns and (columns & {"body", "response"}):
        here, found = shlex.quote(source), "requests" if "body" in columns else "answers"
        paths = {"requests": "requests.jsonl", "answers": "answers.jsonl"} | {found: here}
        raise DataError(
            f"{source}: holds {found} of a batch API, not rows\nhelp: join requests and answers, as finetune data "
            f"convert path={paths['requests']} answers={paths['answers']} out=rows.jsonl"
        )
    found = f"{source}: rows with the columns {listed(columns)}"
    if fitting:
        raise DataError(f"{found} fit several formats; set format to {' or '.join(fitting)}")
    if "chosen" in renamed:
        raise DataError(
            f"{found}: chosen has no rejected beside it; map that column, as columns: {{rejected: other}}. To train on "
            "the chosen answers alone set columns: {completion: chosen}, or {messages: chosen} for whole conversations"
        )
    if not (mapped.keys() & _ROW_COLUMNS) - MEDIA_COLUMNS.keys():
        of_others = [reading for reading in recognize(columns) if reading.format in others]
        mappable = {name: FORMATS[name].keys | (MEDIA_COLUMNS.keys() & FORMATS[name].columns) for name in others}
        readings = [reading for reading in of_others if set(mapped) <= mappable[reading.format]]
        if len(readings) > 1:
            raise DataError(f"{source}: {meanings(columns)}")
        if readings:
            return readings[0].format
    if prompt_alone:
        return PROMPT
    usual = {name: fmt for name, fmt in FORMATS.items() if name != PROMPT or objective == "reward"}
    known = "; ".join(f"{name}: {', '.join(fmt.required)}" for name, fmt in usual.items())
    raise DataError(f"{found} fit no format ({known}); map them, as columns: {{prompt: question, completion: answer}}")


def resolve_format(cfg: SourceConfig, first_value: Any, source: str, objective: str = "none") -> str:
    """Return the format of a file: the configured one, or the one that its first row fits.

    source: the file's name in messages.
    objective: of the rows, as in `Preparation`.

    Raises: DataError if no format or several fit, or if `columns` or `roles` name something that the format lacks.
    """
    if cfg.format == "auto" and not isinstance(first_value, Mapping):
        raise DataError(f"{source}: its first row must be an object, found {kind(first_value)}")
    candidates = FORMATS if cfg.format == "auto" else {cfg.format: FORMATS[cfg.format]}
    known = frozenset().union(*(fmt.columns | fmt.keys for fmt in candidates.values()))
    if unknown := cfg.columns.keys() - known:
        raise DataError(
            f"{source}: columns maps {listed(unknown)}, which {' or '.join(candidates)} rows do not have; map one "
            f"of {listed(known - METADATA_KEYS)}"
        )
    if isinstance(first_value, Mapping):
        _refuse_no_row(first_value, source)
    if cfg.format != "auto":
        return cfg.format
    require_mapped({ours: theirs for ours, theirs in cfg.columns.items() if ours in _ROW_COLUMNS}, first_value, source)
    columns = frozenset(map(str, first_value))
    name = detect_format(columns, source, cfg.columns, objective)
    if cfg.roles and not FORMATS[name].keys:
        raise DataError(f"{source}: rows of the format {name} have no roles; remove roles")
    if (reading := RowParser(cfg, name).reading(columns)) is not None:
        read = {*reading.columns.values(), *cfg.columns.values()}
        used = {*FORMATS[name].columns, *FORMATS[name].aliases.values(), *read, *VERDICTS}
        ignored = columns - used
        log_once(f"{cfg.path}: read with {reading}" + (f"; ignored: {listed(ignored)}" if ignored else ""))
    return name


def with_formats(
    source: SourceConfig, batches: Iterable[RawBatch], usual: str | None = None, objective: str = "none"
) -> Iterator[RawBatch]:
    """Set the format of each batch: the source's, or the one that the first readable row of its file fits.

    objective: of the rows, as in `Preparation`.
    usual: the format of a file whose first row fits none, so that only the row is bad; None: that of the first file.
    Raises: DataError from `resolve_format`, if there is no usual format.
    """
    file, name, waiting = None, None, list[RawBatch]()
    for batch in batches:
        if batch.file != file:
            yield from waiting  # a file without a readable row
            file, name, waiting = batch.file, None, []
        first = next((row.value for row in batch.rows() if isinstance(row.value, dict)), None) if name is None else None
        if first is not None:
            try:
                name = resolve_format(source, first, batch.file, objective)
            except DataError:
                if usual is None:
                    raise
                name = usual
            usual = usual or name
        waiting.append(batch)
        if name is not None:
            yield from (replace(read, format=name) for read in waiting)
            waiting = []
    yield from waiting


def check_serves(batch: RawBatch, objective: str) -> None:
    """Raise DataError if a run cannot learn from rows like those of the first batch of a source.

    objective: `RunConfig.row_objective`.
    """
    values = [row.value for row in batch.rows() if isinstance(row.value, Mapping)]
    if not values:  # each row has its own error
        return
    is_pair, found = batch.format == "preference", f"{batch.file}: {batch.format} rows"
    has_verdict = any(value.get(column) is not None for value in values for column in VERDICTS)
    if objective in ("none", "reward") and is_pair:
        raise DataError(f"{batch.file}: {PREFERENCE}")
    if objective in ("none", "reward") or is_pair:
        return
    alone = "to learn from answers alone, use a config without preference.objective, such as lora.yaml"
    if objective != "kto":
        labels = "rows with a label fit preference.objective=kto; " if has_verdict else ""
        text = f"{found} have no chosen and rejected answers, which preference.objective={objective} needs"
        raise DataError(f"{text}\nhelp: {labels}{alone}")
    if batch.format in ("text", "tokens") or not has_verdict:
        text = f"{found} have no {' or '.join(VERDICTS)} and no rejected answers; preference.objective=kto needs one"
        raise DataError(f"{text}\nhelp: {alone}")


def _refuse_no_row(value: Mapping[str, Any], source: str) -> None:
    """Raise DataError for files of other tools that hold one object, but no rows."""
    values = list(value.values())
    by_index = [isinstance(item, Mapping) and "0" in item for item in values]
    texts = [isinstance(item, list) and len(item) > 0 and all(isinstance(x, str) for x in item) for item in values]
    if values and (all(by_index) or (len(values) > 1 and all(texts))):
        code = f'import pandas; pandas.read_json({source!r}).to_json("rows.jsonl", orient="records", lines=True)'
        raise DataError(f"{source}: holds a table by columns, not by rows\nhelp: python -c {shlex.quote(code)}")
    if is_registry(value):
        path = next(item[key] for item in values for key in _REGISTRY_KEYS if key in item)
        file = Path(source).parent / printable_name(path)
        raise DataError(
            f"{source}: is LLaMA-Factory's list of datasets ({listed(value)}), not rows\n"
            f"help: for all of them, finetune migrate {shlex.quote(source)} out=datasets.yaml\n"
            f"help: for the first one, data.train={shlex.quote(str(file if file.exists() else path))}"
        )


def is_registry(value: Mapping[str, Any]) -> bool:
    """Return whether an object is LLaMA-Factory's dataset_info.json: every value describes a dataset."""
    known = [isinstance(item, Mapping) and any(key in item for key in _REGISTRY_KEYS) for item in value.values()]
    return bool(known) and all(known)
