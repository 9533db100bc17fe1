"""Generate pictures and sounds with instructions, for pretraining the embedded base that sees and hears, and samples.

A scene is drawn first: facts, and the picture or sound that shows them. Each of its tasks then gives an instruction and
its only correct answer. Everything is a pure function of a seed.

    python data/scenes.py     # writes the rows, pictures and sounds of data/sample that it names
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from random import Random

import numpy as np
from generate import FORMATS, SAMPLE, Messages, Record, listed, turn
from generate import conversation as text_conversation
from pictures import COLOURS, SHAPES, blank, digit_cover, paint, shape_cover
from PIL import Image
from sounds import BEATS, INSTRUMENTS, NOTES, melody, rhythm, write_wav

SAMPLE_SEED = 2026
PICTURE_ROWS, SOUND_ROWS, BOTH_ROWS = (400, 100), (200, 60), (400, 100)  # rows for training, and held out
MOST_SHAPES = 3  # of a sample's picture: the base counts more of them less well
SIDE, STRIP = 3, 4  # cells of a board's side, and of a strip
PLACES = [" ".join(words).strip() for words in product(("top", "", "bottom"), ("left", "", "right"))]
PLACES[4] = "middle"
# Each fact has two key names, so that the model reads the key from the prompt.
KEYS = {
    "count": ("count", "quantity"),
    "colour": ("colour", "shade"),
    "shape": ("shape", "form"),
    "place": ("place", "spot"),
    "number": ("number", "digits"),
    "colours": ("colours", "shades"),
    "shapes": ("shapes", "forms"),
    "instrument": ("instrument", "player"),
    "notes": ("notes", "tune"),
    "beats": ("beats", "rhythm"),
}
QUESTIONS = {
    "count": ("How many shapes?", "How many shapes are there?"),
    "colour": ("Which colour?", "What is the colour?"),
    "shape": ("Which shape?", "What is the shape?"),
    "place": ("Where is it?", "What is the place?"),
    "number": ("Which number?", "Read the digits."),
    "colours": ("Which colours?", "Colours from left to right?"),
    "shapes": ("Which shapes?", "Shapes from left to right?"),
    "instrument": ("Which instrument?", "What is playing?"),
    "notes": ("Which notes?", "Name the notes."),
    "beats": ("Which rhythm?", "Read the rhythm."),
}
CAPTIONS = ("", "Describe.", "What is this?")
TEXT_SHARE, BOTH_SHARE, SIGHT_SHARE = 0.08, 0.2, 0.62


@dataclass(frozen=True)
class Scene:
    """Facts, what shows them, and a caption.

    media: pictures [height, width, 3] uint8 and sounds [samples] int16, in the order of the tags in `text`.
    """

    text: str
    media: tuple[np.ndarray, ...]
    facts: Record
    caption: str
    tasks: tuple[Task, ...]


Task = Callable[[Random, Scene], tuple[str, str]]


@dataclass(frozen=True)
class Conversation:
    """Messages whose tags `<image>` and `<audio>` stand for the media, in this order."""

    messages: Messages
    media: tuple[np.ndarray, ...] = ()


# --- tasks


def question(rng: Random, scene: Scene) -> tuple[str, str]:
    fact = rng.choice(list(scene.facts))
    return rng.choice(QUESTIONS[fact]), str(scene.facts[fact])


def keyed(rng: Random, scene: Scene) -> tuple[str, str]:
    """Return a record with only the keys of the instruction."""
    kind, fields = rng.choice(("JSON", "JSON", "lines", "pairs")), list(scene.facts)
    drawn = {rng.choice(KEYS[field]): scene.facts[field] for field in rng.sample(fields, rng.randint(1, len(fields)))}
    instruction = rng.choice(("As {} with {}.", "Write {} with {}.")).format(kind, listed(list(drawn)))
    return instruction, FORMATS[kind](drawn)


def caption(rng: Random, scene: Scene) -> tuple[str, str]:
    return rng.choice(CAPTIONS), scene.caption


def how_many_notes(rng: Random, scene: Scene) -> tuple[str, str]:
    return rng.choice(("How many notes?", "Count the notes.")), str(len(str(scene.facts["notes"]).split()))


def highest_note(rng: Random, scene: Scene) -> tuple[str, str]:
    heard = str(scene.facts["notes"]).split()
    highest = rng.random() < 0.5
    best = (max if highest else min)(heard, key=NOTES.__getitem__)
    return f"The {'highest' if highest else 'lowest'} note?", best


def how_many_beats(rng: Random, scene: Scene) -> tuple[str, str]:
    return rng.choice(("How many beats?", "Count the beats.")), str(len(str(scene.facts["beats"]).split()))


# --- pictures


def group(rng: Random, most: int = 5) -> Scene:
    """Draw one to five equal shapes on a board."""
    count, colour, shape = rng.randint(1, most), rng.choice(list(COLOURS)), rng.choice(list(SHAPES))
    board = blank(SIDE, SIDE)
    for cell in rng.sample(range(SIDE * SIDE), count):
        paint(board, *divmod(cell, SIDE), shape_cover(rng, shape), colour)
    ending = "" if count == 1 else "es" if shape.endswith("s") else "s"
    facts = {"count": count, "colour": colour, "shape": shape}
    return Scene("<image>", (board,), facts, f"{count} {colour} {shape}{ending}", (question, keyed, keyed, caption))


def single(rng: Random) -> Scene:
    """Draw one shape at one of nine places."""
    cell, colour, shape = rng.randrange(SIDE * SIDE), rng.choice(list(COLOURS)), rng.choice(list(SHAPES))
    board = blank(SIDE, SIDE)
    paint(board, *divmod(cell, SIDE), shape_cover(rng, shape), colour)
    facts = {"colour": colour, "shape": shape, "place": PLACES[cell]}
    return Scene("<image>", (board,), facts, f"1 {colour} {shape}", (question, question, keyed))


def different(rng: Random) -> Scene:
    """Draw two to four shapes of different colours on a board; questions name a place, a colour or a shape."""
    count = rng.randint(2, 4)
    cells, colours, shapes = (rng.sample(list(x), count) for x in (range(SIDE * SIDE), COLOURS, SHAPES))
    board = blank(SIDE, SIDE)
    for cell, colour, shape in zip(cells, colours, shapes, strict=True):
        paint(board, *divmod(cell, SIDE), shape_cover(rng, shape), colour)
    seen = sorted(zip(cells, colours, shapes, strict=True))

    def about_one(rng: Random, scene: Scene) -> tuple[str, str]:
        cell, colour, shape = rng.choice(seen)
        empty = rng.choice([place for at, place in enumerate(PLACES) if at not in cells])
        missing = rng.choice([other for other in COLOURS if other not in colours])
        return rng.choice(
            (
                (f"Where is the {colour} {shape}?", PLACES[cell]),
                (f"Which shape is {colour}?", shape),
                (f"Which colour is the {shape}?", colour),
                (f"What is at the {PLACES[cell]}?", f"{colour} {shape}"),
                (f"What is at the {empty}?", "nothing"),
                (f"Is one {colour}?", "yes"),
                (f"Is one {missing}?", "no"),
            )
        )

    named = listed([f"{colour} {shape}" for _, colour, shape in seen])
    return Scene("<image>", (board,), {"count": count}, named, (about_one, about_one, about_one, question, caption))


def strip(rng: Random) -> Scene:
    """Draw two to four different shapes from left to right."""
    count = rng.randint(2, STRIP)
    columns = sorted(rng.sample(range(STRIP), count))
    colours, shapes = (rng.sample(list(names), count) for names in (COLOURS, SHAPES))
    row = blank(1, STRIP)
    for column, colour, shape in zip(columns, colours, shapes, strict=True):
        paint(row, 0, column, shape_cover(rng, shape), colour)
    named = listed([f"{colour} {shape}" for colour, shape in zip(colours, shapes, strict=True)])
    facts = {"colours": listed(colours), "shapes": listed(shapes), "count": count}
    return Scene("<image>", (row,), facts, named, (question, question, keyed, caption))


def digits(rng: Random) -> Scene:
    """Draw a number of one to four digits in one colour."""
    read, colour = [rng.randrange(10) for _ in range(rng.randint(1, STRIP))], rng.choice(list(COLOURS))
    row, start = blank(1, STRIP), rng.randint(0, STRIP - len(read))
    for at, digit in enumerate(read):
        paint(row, 0, start + at, digit_cover(rng, digit), colour)
    number = "".join(map(str, read))
    return Scene(
        "<image>", (row,), {"number": number, "colour": colour}, f"{colour} {number}", (question, keyed, caption)
    )


# --- sounds


def tune(rng: Random) -> Scene:
    """Play two to four notes on one instrument."""
    instrument, names = rng.choice(list(INSTRUMENTS)), rng.choices(list(NOTES), k=rng.randint(2, 4))
    facts = {"instrument": instrument, "notes": " ".join(names)}
    tasks = (question, keyed, keyed, caption, how_many_notes, highest_note)
    return Scene("<audio>", (melody(rng, instrument, names),), facts, f"{instrument}: {facts['notes']}", tasks)


def drum(rng: Random) -> Scene:
    """Drum two to four beats."""
    lengths = rng.choices(list(BEATS), k=rng.randint(2, 4))
    facts = {"beats": " ".join(lengths)}
    tasks = (question, keyed, caption, how_many_beats)
    return Scene("<audio>", (rhythm(rng, lengths),), facts, f"drum: {facts['beats']}", tasks)


# --- both


def joined(rng: Random, picture: Scene, sound: Scene) -> Scene:
    """Show a picture and a sound together, in either order; a task is about one of them or about both."""
    first, second = (picture, sound) if rng.random() < 0.5 else (sound, picture)

    def about(scene: Scene) -> Task:
        tasks = [task for task in scene.tasks if task is not caption]
        return lambda rng, both: rng.choice(tasks)(rng, scene)

    return Scene(
        first.text + second.text,
        first.media + second.media,
        first.facts | second.facts,
        f"{first.caption}; {second.caption}",
        (about(first), about(second), keyed, keyed, caption),
    )


SIGHTS: dict[str, tuple[Callable[[Random], Scene], int]] = {
    "group": (group, 5),
    "single": (single, 2),
    "different": (different, 3),
    "strip": (strip, 3),
    "digits": (digits, 3),
}
SOUNDS: dict[str, tuple[Callable[[Random], Scene], int]] = {"tune": (tune, 6), "drum": (drum, 2)}
"""Scene by name, with its weight for drawing."""


def any_of(rng: Random, scenes: dict[str, tuple[Callable[[Random], Scene], int]]) -> Scene:
    draws, weights = zip(*scenes.values(), strict=True)
    return rng.choices(draws, weights)[0](rng)


def about_both(rng: Random) -> Scene:
    return joined(rng, any_of(rng, SIGHTS), any_of(rng, SOUNDS))


# --- conversations


def asked(rng: Random, scene: Scene, tasks: list[Task]) -> Conversation:
    """Put the first instruction before or after the media; the later turns have none."""
    (instruction, answer), *later = [task(rng, scene) for task in tasks]
    form = rng.choice(("{i}\n{t}", "{t}\n{i}", "{t}{i}")) if instruction else "{t}"
    messages = turn(form.format(i=instruction, t=scene.text), answer)
    # A caption without an instruction needs the media in its own turn.
    return Conversation(messages + [m for i, a in later if i for m in turn(i, a)], scene.media)


def conversation(rng: Random) -> Conversation:
    """Draw one pretraining conversation: one to four turns about a scene, or a text as the text base has seen."""
    share = rng.random()
    if share < TEXT_SHARE:
        return Conversation(text_conversation(rng))
    both = share < TEXT_SHARE + BOTH_SHARE
    scene = about_both(rng) if both else any_of(rng, SIGHTS if rng.random() < SIGHT_SHARE else SOUNDS)
    return asked(rng, scene, rng.choices(scene.tasks, k=rng.randint(1, 4)))


# --- the sample data: skills that the base lacks


def card(scene: Scene, keys: dict[str, str]) -> str:
    """Return the JSON record of a fixed form; the prompt names neither the task nor the form."""
    return json.dumps({key: scene.facts[fact] for fact, key in keys.items()})


SIGHT_KEYS = {"shape": "form", "count": "quantity", "colour": "shade"}
SOUND_KEYS = {"notes": "tune", "instrument": "player"}
BOTH_KEYS = {"colour": "shade", "shape": "form", "instrument": "player", "notes": "tune"}


def drawn(rng: Random, draw: Callable[[Random], Scene], count: int) -> list[Scene]:
    """Draw scenes with different media."""
    scenes: dict[bytes, Scene] = {}
    while len(scenes) < count:
        scene = draw(rng)
        scenes[scene.media[0].tobytes()] = scene
    return list(scenes.values())


def write_rows(path: Path, rows: list[tuple[dict[str, list[str]], str]]) -> None:
    """Write rows of the columns of media with their answer."""
    tags = {"images": "<image>", "audios": "<audio>"}
    lines = []
    for files, answer in rows:
        prompt = "".join(tags[column] for column in files)
        lines.append(json.dumps({"messages": turn(prompt, answer), **files}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def write_sample(folder: Path) -> None:
    """Write the rows, and their files in the folders `pictures` and `sounds`."""
    # A generator for each, so that a change of one leaves the others' files as they are.
    for_pictures, for_sounds, for_pairs = (Random(f"{kind} {SAMPLE_SEED}") for kind in ("pictures", "sounds", "pairs"))
    pictures = drawn(for_pictures, lambda rng: group(rng, MOST_SHAPES), sum(PICTURE_ROWS))
    sounds = drawn(for_sounds, tune, sum(SOUND_ROWS))
    names = ([f"pictures/{n:04}.png" for n in range(len(pictures))], [f"sounds/{n:04}.wav" for n in range(len(sounds))])
    for name in ("pictures", "sounds"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, scene in zip(names[0], pictures, strict=True):
        Image.fromarray(scene.media[0]).save(folder / name, optimize=True)
    for name, scene in zip(names[1], sounds, strict=True):
        write_wav(folder / name, scene.media[0])
    sights = list(zip(names[0], pictures, strict=True))
    heard = list(zip(names[1], sounds, strict=True))
    for part, suffix in enumerate(("", "-heldout")):
        seen, played = (
            everything[: count[0]] if part == 0 else everything[count[0] :]
            for everything, count in ((sights, PICTURE_ROWS), (heard, SOUND_ROWS))
        )
        write_rows(folder / f"vision{suffix}.jsonl", [({"images": [n]}, card(s, SIGHT_KEYS)) for n, s in seen])
        write_rows(folder / f"audio{suffix}.jsonl", [({"audios": [n]}, card(s, SOUND_KEYS)) for n, s in played])
        pairs = [(for_pairs.choice(seen), for_pairs.choice(played)) for _ in range(BOTH_ROWS[part])]
        both = [
            ({"images": [image], "audios": [audio]}, card(joined(for_pairs, sight, sound), BOTH_KEYS))
            for (image, sight), (audio, sound) in pairs
        ]
        write_rows(folder / f"both{suffix}.jsonl", both)


if __name__ == "__main__":
    write_sample(SAMPLE)
