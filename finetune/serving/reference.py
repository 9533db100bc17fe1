"""What a trained model computes on a few rows: recorded by its run, or computed now as training computes it."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from finetune.config.command_options import ServeOptions
from finetune.config.schema import RunConfig
from finetune.data.early_checks import check_source
from finetune.data.formats.messages import Message
from finetune.data.sources.paths import check_each
from finetune.data.template.chat import ChatTemplate
from finetune.evaluation.probe import (
    Comparison,
    Probe,
    Row,
    Scorer,
    compare,
    measure,
    read_probe,
    require_close,
    row_of_ids,
    text_rows,
)
from finetune.export.merge.kl_check import data_section, load_examples
from finetune.export.verify import PROMPTS
from finetune.models.adapters.base_config import find_base_config
from finetune.models.adapters.files import load_adapter
from finetune.models.adapters.folder import find_adapter
from finetune.models.load import load_base
from finetune.models.tokenizer import load_adapter_tokenizer, load_tokenizer
from finetune.system.console import log
from finetune.system.errors import ConfigError, DataError, InputError

# Rows to read for one that is kept: media, bad rows.
_READ = 8


def references(config: RunConfig, options: ServeOptions, adapters: Mapping[str, Path], base: str) -> dict[str, Probe]:
    """Return what every adapter, or a base without adapters, must answer, by the name of the model.

    Args:
        config: of the base.
        adapters: folders by name.
        base: name of the base.

    Raises:
        ConfigError: serve.check names no adapter, or one for several.
    """
    settings = options.serve
    if settings.check_rows == 0:
        return {}
    folders: Mapping[str, Path | None] = adapters or {base: None}
    model = options.model
    if settings.check is not None:
        if len(folders) > 1:
            raise ConfigError(f"serve.check: compares one model, found {len(folders)}\nhelp: remove it")
        # The run's own base: that of the server may be a merged model.
        run = find_adapter(settings.check, "serve.check")
        folders, model = dict.fromkeys(folders, run), None
    return {name: reference(config, folder, model, settings.check_rows) for name, folder in folders.items()}


def reference(config: RunConfig, adapter: Path | None, model: str | None, count: int) -> Probe:
    """Return what an adapter on its base, or the base of a config, computes on `count` rows.

    Args:
        model: replaces the base of the adapter's run.
    """
    if adapter is not None:
        if (probe := recorded(adapter, count)) is not None:
            return probe
        config = find_base_config("finetune serve", None, model, adapter, ())
    rows, source = _rows(config, adapter, count)
    base = load_base(config.model, config.quant)
    scores = measure(base if adapter is None else load_adapter(base, adapter), rows)
    del base
    gc.collect()
    return Probe(rows, scores, f"computed on {source}")


def recorded(adapter: Path, count: int) -> Probe | None:
    """Return the first `count` rows of what the run of an adapter recorded; None if there is no record."""
    if (probe := read_probe(adapter)) is None:
        return None
    return replace(probe, rows=probe.rows[:count], scores=probe.scores[:count], source=f"recorded on {probe.source}")


def _rows(config: RunConfig, adapter: Path | None, count: int) -> tuple[list[Row], str]:
    """Return rows of the run if its files are there, else of built-in texts."""
    tokenizer = load_tokenizer(config.model) if adapter is None else load_adapter_tokenizer(config.model, adapter)
    kind, sources = ("held-out", config.data.eval) if config.data.eval else ("training", config.data.train)
    if adapter is not None and sources:
        most = count * _READ
        first = [sources[0].model_copy(update={"limit": min(most, sources[0].limit or most)})]
        try:
            check_each({"data": first}, check_source)
            rows = text_rows(
                load_examples(data_section(config, first), tokenizer, str(adapter), config).documents, count
            )
            if rows:
                return rows, f"{kind} rows of the run"
        except InputError as error:
            log(f"check: the rows of the run cannot be read: {str(error).splitlines()[0]}")
    try:
        chat = ChatTemplate(tokenizer)
        texts = [chat.prompt_ids([Message("user", text)]) for text in PROMPTS[:count]]
    except DataError:  # a base without a template
        texts = [tokenizer(text)["input_ids"] for text in PROMPTS[:count]]
    return [row_of_ids(ids) for ids in texts if len(ids) > 1], "built-in texts"


def check_served(probes: Mapping[str, Probe], scorers: Mapping[str, Scorer], max_kl: float) -> dict[str, Comparison]:
    """Compare models with their references, print a line for each, and refuse those that are too far away.

    Raises:
        IntegrityError: with the figures of each of them.
    """
    found = {}
    for name, probe in probes.items():
        found[name] = compare(probe, scorers[name])
        log(f"check: model={name}, {found[name].describe()}")
    require_close(found, max_kl)
    return found
