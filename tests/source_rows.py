"""The rows of a source, for tests of files."""

from __future__ import annotations

from finetune.config.schema import SourceConfig
from finetune.data.sources.paths import resolve_source
from finetune.data.sources.readers import Row


def rows_of(source: SourceConfig) -> list[Row]:
    """Read the rows of a source, at most its limit."""
    return [row for batch in resolve_source(source).batches(source.limit) for row in batch.rows()]
