"""Synthesize the sounds of the embedded base that hears: short melodies of three instruments, and rhythms.

A sound is a pure function of its facts and of a random generator, which varies loudness and noise.
"""

from __future__ import annotations

import wave
from pathlib import Path
from random import Random

import numpy as np

RATE = 16000  # samples per second
NOTE_SECONDS, BEAT_SECONDS = 0.16, 0.2
NOTES = {"C": 1046.5, "D": 1174.7, "E": 1318.5, "G": 1568.0, "A": 1760.0}  # hertz: a pentatonic scale
# Partials as multiples of the note's frequency with their amplitudes, and the time in which a note fades by 1/e.
INSTRUMENTS: dict[str, tuple[dict[float, float], float]] = {
    "flute": ({1: 1.0}, 0.2),
    "horn": ({1: 0.6, 2: 0.5, 3: 0.4, 4: 0.25}, 0.2),
    "bell": ({1: 0.8, 2.76: 0.5}, 0.05),
}
BEATS = {"long": 0.15, "short": 0.05}  # seconds of noise at the start of a beat
ATTACK_SECONDS, LOUDEST, HISS = 0.01, 0.5, 0.002


def note(instrument: str, name: str) -> np.ndarray:
    """Return one note [samples] of amplitude 1 at most."""
    partials, fade = INSTRUMENTS[instrument]
    seconds = np.arange(round(NOTE_SECONDS * RATE)) / RATE
    tone = sum(level * np.sin(2 * np.pi * NOTES[name] * part * seconds) for part, level in partials.items())
    envelope = np.minimum(seconds / ATTACK_SECONDS, 1) * np.exp(-seconds / fade)
    return tone / sum(partials.values()) * envelope * np.minimum((NOTE_SECONDS - seconds) / ATTACK_SECONDS, 1)


def beat(noise: np.random.Generator, length: str) -> np.ndarray:
    """Return one beat [samples]: noise, then silence."""
    seconds = np.arange(round(BEAT_SECONDS * RATE)) / RATE
    return np.where(seconds < BEATS[length], noise.uniform(-1, 1, seconds.size), 0)


def finish(rng: Random, parts: list[np.ndarray], noise: np.random.Generator) -> np.ndarray:
    """Join parts at a random loudness with a little hiss; return samples int16."""
    joined = np.concatenate(parts) * rng.uniform(0.3, 1) * LOUDEST
    return np.rint(32767 * (joined + noise.uniform(-HISS, HISS, joined.size))).astype(np.int16)


def melody(rng: Random, instrument: str, names: list[str]) -> np.ndarray:
    """Play notes one after another; return samples int16."""
    noise = np.random.default_rng(rng.getrandbits(32))
    return finish(rng, [note(instrument, name) for name in names], noise)


def rhythm(rng: Random, lengths: list[str]) -> np.ndarray:
    """Drum beats one after another; return samples int16."""
    noise = np.random.default_rng(rng.getrandbits(32))
    return finish(rng, [beat(noise, length) for length in lengths], noise)


def write_wav(path: Path, samples: np.ndarray) -> None:
    """Write samples int16 as a wav file of one channel."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(samples.astype("<i2").tobytes())
