"""Generate the sample pairs of a preference: a record of an order, and the same record with one wrong fact.

Everything is a pure function of a seed, and all text comes from data/generate.py. Both answers have the same form, so
neither length nor style tells them apart: only the order does.

    python data/pairs.py     # writes data/sample/pairs.jsonl and data/sample/pairs-heldout.jsonl
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from generate import COLOURS, DATED_LINES, DAYS, HOUSE_KEYS, ITEMS, NAMES, SAMPLE, order

SEED, TRAIN_ROWS, HELDOUT_ROWS = 2027, 1200, 120
OTHERS = {"item": ITEMS, "count": range(2, 13), "colour": COLOURS, "name": NAMES, "day": DAYS}


def pair(rng: Random) -> dict[str, str]:
    """Draw an order with its record, and a record in which one fact is another one of its kind."""
    subject = order(rng, DATED_LINES)
    wrong = rng.choice(list(HOUSE_KEYS))
    other = rng.choice([value for value in OTHERS[wrong] if value != subject.value[wrong]])
    records = (
        json.dumps({key: facts[fact] for fact, key in HOUSE_KEYS.items()})
        for facts in (subject.value, {**subject.value, wrong: other})
    )
    return dict(zip(("prompt", "chosen", "rejected"), (subject.text, *records), strict=True))


def write_pairs(folder: Path) -> None:
    """Write the pairs, without equal prompts."""
    rng, rows = Random(SEED), dict[str, dict[str, str]]()
    while len(rows) < TRAIN_ROWS + HELDOUT_ROWS:
        row = pair(rng)
        rows[row["prompt"]] = row
    every = list(rows.values())
    for name, part in (("pairs", every[:TRAIN_ROWS]), ("pairs-heldout", every[TRAIN_ROWS:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_pairs(SAMPLE)
