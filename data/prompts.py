"""Generate the sample prompts of a reward: orders with questions that the embedded base has never seen.

Everything is a pure function of a seed, and all text comes from this file and data/generate.py. The base can read each
fact of an order, but these questions are new to it: it guesses which fact is meant, and is right in about a third.

    python data/prompts.py     # writes data/sample/prompts.jsonl and data/sample/prompts-heldout.jsonl
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from generate import SAMPLE, order

SEED, TRAIN_ROWS, HELDOUT_ROWS = 2029, 800, 100
NEW_QUESTIONS = {"name": "For whom?", "item": "What is needed?", "city": "Which town?", "day": "Before when?"}


def write_prompts(folder: Path) -> None:
    """Write the prompts with the expected answers: each question equally often, and no order twice."""
    rng, rows = Random(SEED), dict[str, dict[str, str]]()
    facts = list(NEW_QUESTIONS)
    while len(rows) < TRAIN_ROWS + HELDOUT_ROWS:
        fact, subject = facts[len(rows) % len(facts)], order(rng)
        if fact in subject.value and subject.text not in rows:
            prompt = f"{subject.text}\n{NEW_QUESTIONS[fact]}"
            rows[subject.text] = {"prompt": prompt, "completion": subject.value[fact]}
    every = list(rows.values())
    for name, part in (("prompts", every[:TRAIN_ROWS]), ("prompts-heldout", every[TRAIN_ROWS:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_prompts(SAMPLE)
