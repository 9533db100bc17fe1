"""Generate the sample data, and the instruction text for pretraining the embedded base.

Everything is a pure function of a seed, and all text comes from this file. A subject is drawn first, such as a list of
words or the text of an order. Each of its tasks then gives an instruction and its only correct answer.

    python data/generate.py     # writes data/sample/train.jsonl and data/sample/heldout.jsonl
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

SAMPLE = Path(__file__).parent / "sample"
SAMPLE_SEED, TRAIN_ROWS, HELDOUT_ROWS = 2025, 2400, 240

NAMES = "Ana Ben Carla Dan Eva Finn Gina Hugo Iris Jack Kate Liam Mia Noah Olga Paul".split()
ITEMS = (
    "lamp chair table desk cup plate bowl spoon fork pillow mirror clock candle bottle kettle towel sofa bed tent boot"
).split()
COLOURS = "red blue green black white yellow orange brown grey pink".split()
CITIES = "Oslo Lima Rome Paris Cairo Delhi Tokyo Berlin".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
ANIMALS = "cat dog cow fox owl bear wolf goat duck horse".split()
FRUITS = "apple pear plum fig lemon cherry mango peach grape melon".split()
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
KINDS = {"animal": ANIMALS, "fruit": FRUITS, "colour": COLOURS, "thing": ITEMS}
WORDS = ITEMS + COLOURS + ANIMALS + FRUITS
ORDINALS = "first second third fourth fifth".split()
# Each fact of an order has two key names, so that the model reads the key from the prompt.
KEYS = {
    "name": ("name", "customer"),
    "count": ("count", "quantity"),
    "colour": ("colour", "shade"),
    "item": ("item", "product"),
    "day": ("day", "due"),
    "city": ("city", "place"),
}
ORDER_LINES = (
    "{name} wants {count} {colour} {item} by {day}.",
    "{name} in {city} wants {count} {colour} {item} by {day}.",
    "Please send {count} {colour} {item} to {name} by {day}.",
    "Please send {count} {colour} {item} to {name} in {city}.",
    "Hi, {name} here. I need {count} {item} in {colour} before {day}.",
    "Hi, {name} from {city} here. Can I get {count} {colour} {item}?",
    "On {day} {name} needs {count} {colour} {item} in {city}.",
    "{count} {item} in {colour} for {name}, due {day}, thanks!",
    "{city}: {name} ordered {count} {item}, all {colour}, for {day}.",
    "Could you get {name} {count} {colour} {item} before {day}?",
)
DATED_LINES = tuple(line for line in ORDER_LINES if "{day}" in line)
DATED_FACTS = ("name", "count", "colour", "item", "day")
QUESTIONS = {
    "name": ("Who is it for?", "What is the name?"),
    "count": ("How many?", "What is the count?"),
    "colour": ("Which colour?", "What is the colour?"),
    "item": ("Which item?", "What is the item?"),
    "day": ("Which day?", "When is it due?"),
    "city": ("Which city?", "What is the place?"),
}
Record = dict[str, str | int]
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Subject:
    """A text, and its content: words, numbers or facts."""

    text: str
    value: Any


Task = Callable[[Random, Subject], tuple[str, str]]
"""Return an instruction and its answer; only the first turn contains the text of the subject."""


def listed(items: list) -> str:
    return ", ".join(str(item) for item in items)


# --- subjects


def some_words(rng: Random) -> Subject:
    words = rng.sample(WORDS, rng.randint(2, 5))
    return Subject(listed(words), words)


def some_numbers(rng: Random) -> Subject:
    numbers = rng.sample(range(100), rng.randint(2, 3))
    return Subject(listed(numbers), numbers)


def one_word(rng: Random) -> Subject:
    kind = rng.choice(list(KINDS))
    word = rng.choice(KINDS[kind])
    return Subject(word, {"word": word, "kind": kind})


def mixed_kinds(rng: Random) -> Subject:
    """Draw words of different kinds, one of each."""
    words = {kind: rng.choice(KINDS[kind]) for kind in rng.sample(list(KINDS), rng.randint(2, 4))}
    return Subject(listed(list(words.values())), words)


def small_sum(rng: Random) -> Subject:
    a, b = rng.randint(0, 12), rng.randint(0, 12)
    return Subject(f"{a} + {b}", (a, b))


def order(rng: Random, lines: tuple[str, ...] = ORDER_LINES) -> Subject:
    """Draw the text of an order, with its facts in the order of the text."""
    count = rng.randint(2, 12)
    facts: Record = {"name": rng.choice(NAMES), "count": count, "colour": rng.choice(COLOURS)}
    facts |= {"item": rng.choice(ITEMS), "day": rng.choice(DAYS), "city": rng.choice(CITIES)}
    template = rng.choice(lines)
    line = template.format_map(facts | {"item": f"{facts['item']}s", "count": rng.choice((count, NUMBERS[count]))})
    places = {fact: template.find(f"{{{fact}}}") for fact in facts}
    given = sorted((fact for fact in facts if places[fact] >= 0), key=places.__getitem__)
    return Subject(line[0].upper() + line[1:], {fact: facts[fact] for fact in given})


def as_lines(record: Record) -> str:
    return "\n".join(f"{key}: {value}" for key, value in record.items())


def as_pairs(record: Record) -> str:
    return "; ".join(f"{key} = {value}" for key, value in record.items())


FORMATS: dict[str, Callable[[Record], str]] = {"JSON": json.dumps, "lines": as_lines, "pairs": as_pairs}


def some_keys(rng: Random, facts: Record, most: int = 6) -> Record:
    """Draw some of the facts in random order, each with one of its key names."""
    fields = rng.sample(list(facts), rng.randint(1, min(most, len(facts))))
    return {rng.choice(KEYS[field]): facts[field] for field in fields}


def record(rng: Random) -> Subject:
    drawn = some_keys(rng, order(rng).value)
    return Subject(rng.choice(list(FORMATS.values()))(drawn), drawn)


# --- tasks on any text and on lists


def repeat(rng: Random, subject: Subject) -> tuple[str, str]:
    return rng.choice(("Repeat.", "Say this again.", "Copy the text.")), subject.text


def reverse(rng: Random, subject: Subject) -> tuple[str, str]:
    return rng.choice(("Reverse.", "Turn the list around.", "List them backwards.")), listed(subject.value[::-1])


def in_order(rng: Random, subject: Subject) -> tuple[str, str]:
    return rng.choice(("Sort.", "Put them in order.", "Sort the list.")), listed(sorted(subject.value))


def pick(rng: Random, subject: Subject) -> tuple[str, str]:
    at = rng.randrange(len(subject.value))
    where = "last" if at == len(subject.value) - 1 and rng.random() < 0.5 else ORDINALS[at]
    return rng.choice(("Which is the {}?", "Give me the {} one.", "The {}?")).format(where), str(subject.value[at])


def remove(rng: Random, subject: Subject) -> tuple[str, str]:
    gone = rng.choice(subject.value)
    instruction = rng.choice(("Remove {}.", "List them without {}.", "Leave out {}.")).format(gone)
    return instruction, listed([word for word in subject.value if word != gone])


def replace(rng: Random, subject: Subject) -> tuple[str, str]:
    old, new = rng.choice(subject.value), rng.choice(WORDS)
    instruction = rng.choice(("Replace {0} with {1}.", "Write {1} instead of {0}.")).format(old, new)
    return instruction, listed([new if word == old else word for word in subject.value])


def size(rng: Random, subject: Subject) -> tuple[str, str]:
    return rng.choice(("How many are there?", "Count them.", "How long is the list?")), str(len(subject.value))


def member(rng: Random, subject: Subject) -> tuple[str, str]:
    word = rng.choice(subject.value) if rng.random() < 0.5 else rng.choice(WORDS)
    instruction = rng.choice(("Is {} in the list?", "Do you see {}?")).format(word)
    return instruction, "yes" if word in subject.value else "no"


def largest(rng: Random, subject: Subject) -> tuple[str, str]:
    return rng.choice(("Which is the largest?", "The largest number?")), str(max(subject.value))


def smallest(rng: Random, subject: Subject) -> tuple[str, str]:
    return rng.choice(("Which is the smallest?", "The smallest number?")), str(min(subject.value))


def find_kind(rng: Random, subject: Subject) -> tuple[str, str]:
    kind = rng.choice(list(subject.value))
    return rng.choice(("Which one is a {}?", "Find the {}.")).format(kind), subject.value[kind]


# --- tasks on a word, a number, a day


def capitals(rng: Random, subject: Subject) -> tuple[str, str]:
    return rng.choice(("Write it in capitals.", "Upper case, please.")), subject.value["word"].upper()


def spell(rng: Random, subject: Subject) -> tuple[str, str]:
    return rng.choice(("Spell it.", "Letter by letter, please.")), " ".join(subject.value["word"])


def kind_of(rng: Random, subject: Subject) -> tuple[str, str]:
    return rng.choice(("What is it?", "Which kind of word?")), subject.value["kind"]


def add(rng: Random, subject: Subject) -> tuple[str, str]:
    return rng.choice(("Add.", "What is the sum?")), str(sum(subject.value))


def other_day(rng: Random, subject: Subject) -> tuple[str, str]:
    step = rng.choice((1, -1))
    instruction = f"Which day comes {'after' if step == 1 else 'before'}?"
    return instruction, DAYS[(DAYS.index(subject.text) + step) % 7]


def other_form(rng: Random, subject: Subject) -> tuple[str, str]:
    word, number = NUMBERS[subject.value], str(subject.value)
    return ("In digits, please.", number) if subject.text == word else ("As a word, please.", word)


# --- tasks on orders and records


def question(rng: Random, subject: Subject) -> tuple[str, str]:
    fact = rng.choice(list(subject.value))
    return rng.choice(QUESTIONS[fact]), str(subject.value[fact])


def check(rng: Random, subject: Subject) -> tuple[str, str]:
    fact = rng.choice(list(subject.value))
    value = order(rng).value.get(fact) if rng.random() < 0.55 else None
    shown = subject.value[fact] if value is None else value
    return f"Is the {rng.choice(KEYS[fact])} {shown}?", "yes" if shown == subject.value[fact] else "no"


def keyed(rng: Random, subject: Subject) -> tuple[str, str]:
    """Return a record with only the keys of the instruction."""
    kind, drawn = rng.choice(("JSON", "JSON", "lines", "pairs")), some_keys(rng, subject.value)
    instruction = rng.choice(("As {} with {}.", "Write {} with {}.")).format(kind, listed(list(drawn)))
    return instruction, FORMATS[kind](drawn)


def all_facts(rng: Random, subject: Subject) -> tuple[str, str]:
    """Return every fact, in the order of the text."""
    kind = rng.choice(("JSON", "JSON", "lines", "pairs"))
    return rng.choice(("Everything as {}.", "All facts as {}.")).format(kind), FORMATS[kind](subject.value)


def fact_names(rng: Random, subject: Subject) -> tuple[str, str]:
    return rng.choice(("Which facts are given?", "Name the facts.")), listed(list(subject.value))


def lookup(rng: Random, subject: Subject) -> tuple[str, str]:
    key = rng.choice(list(subject.value))
    return rng.choice(("What is the {}?", "{}?")).format(key), str(subject.value[key])


def convert(rng: Random, subject: Subject) -> tuple[str, str]:
    kind = rng.choice(list(FORMATS))
    return rng.choice(("As {}, please.", "Write this as {}.")).format(kind), FORMATS[kind](subject.value)


def one_day(rng: Random) -> Subject:
    day = rng.choice(DAYS)
    return Subject(day, day)


def one_number(rng: Random) -> Subject:
    n = rng.randrange(len(NUMBERS))
    return Subject(rng.choice((str(n), NUMBERS[n])), n)


TOPICS: dict[str, tuple[int, Callable[[Random], Subject], dict[str, tuple[Task, int]]]] = {
    "words": (
        8,
        some_words,
        {
            "repeat": (repeat, 2),
            "reverse": (reverse, 2),
            "sort": (in_order, 3),
            "pick": (pick, 2),
            "remove": (remove, 2),
            "replace": (replace, 2),
            "size": (size, 1),
            "member": (member, 1),
        },
    ),
    "numbers": (
        5,
        some_numbers,
        {"sort": (in_order, 2), "largest": (largest, 1), "smallest": (smallest, 1)},
    ),
    "word": (3, one_word, {"capitals": (capitals, 2), "spell": (spell, 2), "kind": (kind_of, 1)}),
    "kinds": (1, mixed_kinds, {"find": (find_kind, 1)}),
    "sum": (2, small_sum, {"add": (add, 1)}),
    "day": (1, one_day, {"next": (other_day, 1)}),
    "number": (1, one_number, {"form": (other_form, 1)}),
    "order": (
        14,
        order,
        {
            "question": (question, 3),
            "check": (check, 2),
            "keyed": (keyed, 4),
            "all": (all_facts, 2),
            "names": (fact_names, 1),
            "repeat": (repeat, 1),
        },
    ),
    "record": (6, record, {"lookup": (lookup, 2), "convert": (convert, 2)}),
}
"""Return topic -> (weight, subject, task -> (function, weight)); weights are for drawing."""
TASKS: dict[str, tuple[Callable[[Random], Subject], Task]] = {
    f"{topic}/{name}": (draw, task) for topic, (_, draw, tasks) in TOPICS.items() for name, (task, _) in tasks.items()
}


# --- conversations


def turn(prompt: str, answer: str) -> Messages:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def first_turn(rng: Random, subject: Subject, task: Task) -> Messages:
    """Put the instruction before or after the text."""
    instruction, answer = task(rng, subject)
    return turn(rng.choice(("{i} {t}", "{i}\n{t}", "{t}\n{i}")).format(i=instruction, t=subject.text), answer)


def on_topic(rng: Random) -> Messages:
    """Draw one to six turns about one subject; only the first contains its text."""
    _, draw, tasks = rng.choices(list(TOPICS.values()), weights=[weight for weight, _, _ in TOPICS.values()])[0]
    functions, weights = zip(*tasks.values(), strict=True)
    subject = draw(rng)
    first, *later = rng.choices(functions, weights=weights, k=rng.randint(1, 6) if len(functions) > 1 else 1)
    return first_turn(rng, subject, first) + [message for task in later for message in turn(*task(rng, subject))]


def under_system(rng: Random) -> Messages:
    """Draw a conversation whose system message lists the keys, and whose turns are only orders."""
    kind, fields = rng.choice(("JSON", "JSON", "lines", "pairs")), rng.sample(DATED_FACTS, rng.randint(1, 5))
    keys = {field: rng.choice(KEYS[field]) for field in fields}
    system = rng.choice(("Answer as {} with {}.", "You write {} with {}.")).format(kind, listed(list(keys.values())))
    rows: Messages = [{"role": "system", "content": system}]
    for _ in range(rng.randint(1, 3)):
        subject = order(rng, DATED_LINES)
        rows += turn(subject.text, FORMATS[kind]({key: subject.value[field] for field, key in keys.items()}))
    return rows


def conversation(rng: Random) -> Messages:
    """Draw one pretraining conversation about one or two subjects."""
    if rng.random() < 0.1:
        return under_system(rng)
    return on_topic(rng) + (on_topic(rng) if rng.random() < 0.5 else [])


# --- the sample data: a skill that the base lacks

HOUSE_KEYS = {"item": "product", "count": "quantity", "colour": "shade", "name": "customer", "day": "due"}


def house_record(rng: Random) -> tuple[str, str]:
    """Draw an order and its JSON record of a fixed form; the prompt names neither the task nor the form."""
    subject = order(rng, DATED_LINES)
    return subject.text, json.dumps({key: subject.value[fact] for fact, key in HOUSE_KEYS.items()})


def sample_rows(seed: int, count: int) -> list[dict[str, Messages]]:
    """Return rows of this task as OpenAI messages, without equal prompts."""
    rng, rows = Random(seed), {}
    while len(rows) < count:
        prompt, answer = house_record(rng)
        rows[prompt] = {"messages": turn(prompt, answer)}
    return list(rows.values())


def write_sample(folder: Path) -> None:
    rows = sample_rows(SAMPLE_SEED, TRAIN_ROWS + HELDOUT_ROWS)
    for name, part in (("train", rows[:TRAIN_ROWS]), ("heldout", rows[TRAIN_ROWS:])):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_sample(SAMPLE)
