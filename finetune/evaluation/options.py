"""Checks of the options of `finetune eval` that need no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from finetune.config.command_options import EvalOptions
from finetune.data.early_checks import check_source
from finetune.data.sources.paths import check_each
from finetune.models.adapters.folder import CONFIG_FILE, find_adapter
from finetune.models.hub import find_texts
from finetune.system.errors import ConfigError


def check_options(options: EvalOptions) -> None:
    """Check the options and the folders that they name, before torch is imported.

    Raises:
        ConfigError: the contradictions between options, one per line, or a folder that does not exist.
        DataError: the problem of each source.
    """
    if problems := list(contradictions(options)):
        raise ConfigError("\n".join(problems))
    find_source(options)
    check_each({"data": options.data or [], "forgetting": options.forgetting}, check_source)


def contradictions(options: EvalOptions) -> Iterator[str]:
    """Yield the options that contradict one another."""
    if (options.adapter is None) == (options.model is None):
        found = "both" if options.adapter is not None else "neither"
        yield f"adapter, model: exactly one is needed, found {found}; an adapter names its base itself"
    if options.model is not None and options.data is None and not options.tasks:
        yield "data: missing, and a model alone has no run; pass data=[{path: heldout.jsonl}]"
    if problem := pattern_problem(options.metric, options.pattern):
        yield problem
    if options.merged is not None and options.adapter is None:
        yield "merged: needs adapter=; evaluate a merged model alone with model=DIR"
    if options.merged is not None and options.variants is not None and "merged" not in options.variants:
        yield "merged: not in variants; add it there, or drop merged="


def pattern_problem(metric: str, pattern: str | None) -> str | None:
    """Return what is wrong with the pair of options, if anything."""
    if (metric == "regex") == (pattern is not None):
        return None
    return f"pattern: {'missing; metric=regex needs pattern=(.*)' if pattern is None else 'needs metric=regex'}"


def find_source(options: EvalOptions) -> Path:
    """Return the folder of the adapter, or of the text files of the model. Raises: ConfigError if there is none."""
    if options.adapter is not None:
        return find_adapter(options.adapter, "adapter")
    name = str(options.model)
    folder = Path(name).expanduser()
    if (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file():
        raise ConfigError(f"model={name}: is an adapter\nhelp: pass adapter={name}")
    return find_texts(name, None, "model").folder
