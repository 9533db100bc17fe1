"""Which scripts a source's texts are written in: a look at its languages that needs no model."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache

from finetune.data.formats.messages import TokenRow
from finetune.data.sources.paths import resolve_source
from finetune.data.tokens.encode import texts_of
from finetune.data.tokens.prepare import Preparation
from finetune.report.dataset.statistics import Part, evenly_spaced
from finetune.system.errors import DataError

SAMPLED_ROWS = 2000
_SCRIPTS = frozenset(
    """arabic armenian bengali bopomofo cherokee cyrillic devanagari ethiopic georgian greek gujarati gurmukhi hangul
    hebrew javanese kannada khmer lao latin malayalam mongolian myanmar oriya sinhala syriac tamil telugu thaana thai
    tibetan""".split()
)
_NAMES = {"cjk": "Han", "hiragana": "Kana", "katakana": "Kana", "katakana-hiragana": "Kana"}


def sample_scripts(
    part: Part, preparation: Preparation, decode: Callable[[Sequence[int]], str]
) -> tuple[Counter[str], int]:
    """Letters by script in what evenly spaced rows say, and how many rows those are.

    The rows are read from their files again: tokens hold the template's own words too. decode: for rows of tokens.
    """
    store, config = part.source.store, part.source.config
    wanted = {int(store.indices[part.rows[i]]) for i in evenly_spaced(len(part.rows), SAMPLED_ROWS)}
    encoder = preparation.encoder(config, store.format)
    scripts: Counter[str] = Counter()
    for batch in resolve_source(config).batches(config.limit):
        for row in batch.rows():
            if row.index in wanted and not isinstance(example := encoder.parse(row.value), DataError):
                given = isinstance(example, TokenRow)
                scripts += count_scripts([decode(example.input_ids)] if given else texts_of(example))
    return scripts, len(wanted)


def count_scripts(texts: Iterable[str]) -> Counter[str]:
    """Letters by script: Latin, Han, Cyrillic …; whatever is no letter does not count."""
    characters: Counter[str] = Counter()
    for text in texts:
        characters.update(text)
    scripts: Counter[str] = Counter()
    for character, count in characters.items():
        if character.isalpha():
            scripts[_script(character)] += count
    return scripts


@cache
def _script(letter: str) -> str:
    """By the name that Unicode gives the letter: `CYRILLIC SMALL LETTER A`."""
    words = unicodedata.name(letter, "").lower().split()
    for word in words[:2]:  # FULLWIDTH LATIN CAPITAL LETTER A
        if word in _NAMES:
            return _NAMES[word]
        if word in _SCRIPTS:
            return word.title()
    return "other"
