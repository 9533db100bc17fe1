"""Checks of a run's inputs before torch, numpy and the tokenizer are loaded."""

from __future__ import annotations

from finetune.config.schema import RunConfig, SourceConfig
from finetune.data.formats.detection import check_serves, with_formats
from finetune.data.sources.paths import by_key, check_each, is_on_hub, resolve_source
from finetune.models.hub import check_model


def check_inputs(cfg: RunConfig) -> None:
    """Check the sources and the model of a run's config, which takes a tenth of the time of importing torch."""
    check_sources(cfg)
    check_model(cfg.model)


def check_sources(cfg: RunConfig, *, download: bool = True) -> None:
    """Check every source of a run's config.

    Args:
        download: also check datasets of the hub.

    Raises: DataError listing the problem of each source.
    """

    def check(source: SourceConfig) -> None:
        if download or not is_on_hub(source):
            check_source(source, cfg.row_objective)

    check_each(by_key(cfg.data), check)


def check_source(source: SourceConfig, objective: str = "none") -> None:
    """Check the path and format of one source, and whether its first rows serve an objective.

    objective: `RunConfig.row_objective`.
    Raises: DataError.
    """
    batches = with_formats(source, resolve_source(source).batches(source.limit), objective=objective)
    check_serves(next(batches), objective)
