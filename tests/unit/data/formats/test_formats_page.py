"""docs/formats.md shows every format; its rows are read or refused as marked."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from finetune.config.schema import SourceConfig
from finetune.data.formats.conversations import METADATA_KEYS, ROLE_NAMES
from finetune.data.formats.detection import resolve_format
from finetune.data.formats.messages import Conversation
from finetune.data.formats.parser import FORMATS, RowParser
from finetune.system.errors import DataError

FENCE = re.compile(r'^```(json title="refused"|json|yaml)\n(.*?)^```$|^#+ ([^\n]+)$', re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def page(repo_root) -> str:
    return (repo_root / "docs/formats.md").read_text(encoding="utf-8")


def examples(page: str):
    """Yield (heading, source, row, refused) of every row on the page; settings of a source apply to the next row."""
    heading, source = "", {}
    for language, block, title in FENCE.findall(page):
        if title:
            heading = title
        elif language == "yaml":
            source = yaml.safe_load(block)
        else:
            yield heading, SourceConfig(**{"path": "rows.jsonl", **source}), json.loads(block), "refused" in language
            source = {}


def test_every_row_on_the_page_is_read_or_refused_as_marked(page):
    for heading, source, row, refused in examples(page):
        objective = "reward" if heading == "prompt" else "none"
        parser = RowParser(source, resolve_format(source, row, "the page", objective), file=source.path)
        if heading in FORMATS:
            assert parser.format == heading
        if refused:
            with pytest.raises(DataError):
                parser.parse(row)
        else:
            example = parser.parse(row)
            has_media = isinstance(example, Conversation) and any(message.media for message in example.messages)
            assert has_media == (heading == "Images, audio and video")


def test_every_format_has_an_example_and_refusals_are_shown(page):
    shown = [(heading, refused) for heading, _, _, refused in examples(page)]
    assert {heading for heading, _ in shown} >= set(FORMATS)
    assert sum(refused for _, refused in shown) == page.count('```json title="refused"') >= 5
    assert len(shown) == page.count("```json")


def test_the_page_names_every_column_role_and_ignored_key(page):
    columns = {column for fmt in FORMATS.values() for column in fmt.columns} - {"position_ids", "seq_lengths"}
    named = {word for words in re.findall(r"`([^`\n]+)`", page) for word in re.findall(r"\w+", words)}
    assert (columns | METADATA_KEYS | set(ROLE_NAMES)) - named == set()
