"""Draw the pictures of the embedded base that sees: coloured shapes and digits in square cells.

A picture is a pure function of its facts and of a random generator, which moves and scales each shape a little.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import numpy as np

CELL = 28  # pixels: the vision tower merges a cell's four patches into one embedding
# About the mean that the image processor subtracts: an empty patch is near zero, and the tower learns in fewer steps.
GROUND = (123, 117, 104)
# The ground is lighter to the right and bluer to the bottom, so that a patch shows its place: the positions of the
# vision tower are relative alone.
LIGHT, TINT = (30, 30, 30), (-30, 0, 30)
COLOURS = {
    "red": (220, 30, 30),
    "blue": (30, 60, 220),
    "green": (20, 170, 50),
    "black": (16, 16, 16),
    "white": (250, 250, 250),
    "yellow": (245, 225, 20),
    "orange": (250, 130, 10),
    "pink": (255, 120, 200),
}
# Rows from the top; each row has five columns.
DIGITS = {
    0: "01110 10001 10011 10101 11001 10001 01110",
    1: "00100 01100 00100 00100 00100 00100 01110",
    2: "01110 10001 00001 00110 01000 10000 11111",
    3: "01110 10001 00001 00110 00001 10001 01110",
    4: "00010 00110 01010 10010 11111 00010 00010",
    5: "11111 10000 11110 00001 00001 10001 01110",
    6: "00110 01000 10000 11110 10001 10001 01110",
    7: "11111 00001 00010 00100 01000 01000 01000",
    8: "01110 10001 10001 01110 10001 10001 01110",
    9: "01110 10001 10001 01111 00001 00010 01100",
}
# Distance from the edge in units of the half size, negative inside; x and y are from the centre, y points down.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: np.hypot(x, y) - 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - 0.85,
    "triangle": lambda x, y: np.maximum(abs(x) * 0.89 - y * 0.45 - 0.45, y - 0.85),
    "cross": lambda x, y: np.maximum(np.minimum(abs(x), abs(y)) - 0.3, np.maximum(abs(x), abs(y)) - 0.95),
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.75) - 0.25,
    "diamond": lambda x, y: (abs(x) * 1.35 + abs(y) - 1.1) * 0.6,
}


def blank(rows: int, columns: int) -> np.ndarray:
    """Return an empty picture [height, width, 3] uint8 of that many cells."""
    down, right = (np.linspace(-1, 1, cells * CELL) for cells in (rows, columns))
    ground = GROUND + right[None, :, None] * np.array(LIGHT) + down[:, None, None] * np.array(TINT)
    return np.rint(ground).astype(np.uint8)


def paint(picture: np.ndarray, row: int, column: int, cover: np.ndarray, colour: str) -> None:
    """Mix a colour into a cell; cover [CELL, CELL] is the share of each pixel that it takes."""
    cell = picture[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
    mixed = cell + cover[..., None] * (np.array(COLOURS[colour]) - cell)
    cell[:] = np.rint(mixed).astype(np.uint8)


def shape_cover(rng: Random, shape: str) -> np.ndarray:
    """Return the cover of a shape, with a half size of 8 to 11 pixels and up to 2 pixels off the centre."""
    half = rng.uniform(8, 11)
    right, down = (CELL / 2 - 0.5 + rng.uniform(-2, 2) for _ in range(2))
    y, x = np.mgrid[:CELL, :CELL]
    return np.clip(0.5 - half * SHAPES[shape]((x - right) / half, (y - down) / half), 0, 1)


def digit_cover(rng: Random, digit: int) -> np.ndarray:
    """Return the cover of a digit, 15 pixels wide and 21 high, up to 3 pixels off the centre."""
    dots = np.array([[int(dot) for dot in row] for row in DIGITS[digit].split()], dtype=float)
    glyph = np.kron(dots, np.ones((3, 3)))
    cover = np.zeros((CELL, CELL))
    top, left = 3 + rng.randint(-2, 3), 6 + rng.randint(-3, 3)
    cover[top : top + glyph.shape[0], left : left + glyph.shape[1]] = glyph
    return cover
