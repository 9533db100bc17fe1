"""Generate the sample rows of a classification: messages to a shop, each with its intent.

Everything is a pure function of a seed, and all text comes from this file and data/generate.py.

    python data/labels.py     # writes data/sample/labels.jsonl
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from generate import CITIES, COLOURS, DAYS, ITEMS, NAMES, SAMPLE

SEED, ROWS = 2026, 600
LINES = {
    "order": (
        "{name} here, I would like {count} {colour} {item}s.",
        "Please send {count} {item}s in {colour} to {city}.",
        "Can I get {count} {colour} {item}s by {day}?",
        "We need {count} more {item}s, the {colour} ones.",
    ),
    "change": (
        "Could you make it {count} {item}s, not {other}?",
        "Please send the {item}s to {city} instead.",
        "I ordered {colour} {item}s, can they be {colour2}?",
        "{name} again: {day} is too early for the {item}s, can it be {day2}?",
    ),
    "cancel": (
        "Please stop the order of {count} {item}s for {name}.",
        "We do not want the {colour} {item}s any more.",
        "No {item}s after all, sorry. {name}",
        "I take back what I ordered for {city}, all {count} {item}s.",
    ),
    "complaint": (
        "The {item}s for {city} are still not here.",
        "Two of the {count} {item}s are broken.",
        "{name} got {colour} {item}s, but wanted {colour2} ones.",
        "It is {day} and there is no {item}. When does it come?",
    ),
}


def row(rng: Random) -> tuple[str, str]:
    """Draw a message and its label."""
    label = rng.choice(list(LINES))
    count, other = rng.sample(range(2, 13), 2)
    colour, colour2 = rng.sample(COLOURS, 2)
    day, day2 = rng.sample(DAYS, 2)
    words = {"name": rng.choice(NAMES), "item": rng.choice(ITEMS), "city": rng.choice(CITIES)}
    numbers = {"count": count, "other": other}
    return rng.choice(LINES[label]).format(
        **words, **numbers, colour=colour, colour2=colour2, day=day, day2=day2
    ), label


def write_labels(folder: Path) -> None:
    """Write the rows, without equal messages."""
    rng, rows = Random(SEED), dict[str, str]()
    while len(rows) < ROWS:
        message, label = row(rng)
        rows[message] = label
    text = "".join(json.dumps({"prompt": message, "completion": label}) + "\n" for message, label in rows.items())
    (folder / "labels.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_labels(SAMPLE)
