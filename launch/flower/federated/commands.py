"""The commands of a round, as argument lists, and how they are run: by the executable of the project's environment."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Method -> whether parties train B alone, with an A that all of them share. fedex is none of them: it changes the base.
FREEZES_A = {"ffa": True, "fedavg": False}


class CommandFailed(RuntimeError):
    """A command ended with an error."""


@dataclass(frozen=True)
class Clipping:
    """What a party does to its update before it sends it. delta: of the epsilon that is printed if there is noise."""

    max_norm: float = 1.0
    noise: float = 0.0
    delta: float = 1e-5


@dataclass(frozen=True)
class Averaging:
    """How the server averages. weights: of parties by name, 1 for the others. max_norm: 0 sets no limit."""

    method: str = "ffa"
    weights: Mapping[str, float] | None = None
    max_norm: float = 0.0
    max_error: float = 0.0


def executable(given: str) -> list[str]:
    """Return the words that start finetune: `given`, else the environment variable FINETUNE, else `finetune`."""
    return shlex.split(given or os.environ.get("FINETUNE") or "finetune")


def run(program: Sequence[str], words: Sequence[str], folder: Path) -> None:
    """Run one command in a folder; what it prints goes to the log of the app.

    Raises:
        CommandFailed: names the command and its exit code alone, since this text leaves a party. What the command
            prints about rows and paths stays in the log.
    """
    # Settings of Flower's Python do not hold for the other one.
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    code = subprocess.run([*program, *words], cwd=folder, env=environment, stdin=subprocess.DEVNULL).returncode
    if code:
        raise CommandFailed(f"finetune {words[0]}: exit code {code}")


def train_words(config: str, method: str, seed: int, start: Path | None, out: Path) -> list[str]:
    """Return the words of `finetune train` for one round.

    Args:
        config: the party's own.
        method: a key of FREEZES_A.
        seed: another one for each round, so that its steps take other rows. The first makes A, equal at all parties.
        start: the adapter that all parties start from; None: an untrained one.
        out: folder of the run.
    """
    words = ["train", f"config={config}", f"train.seed={seed}", f"output_dir={out}"]
    words += ["lora.freeze_a=true"] if FREEZES_A[method] else []
    return words + ([] if start is None else [f"lora.init_adapter={start}"])


def clip_words(adapter: Path, start: Path | None, out: Path, clipping: Clipping, updates: int) -> list[str]:
    """Return the words of `finetune clip`. updates: number that this party has sent, this one included."""
    words = ["clip", f"adapter={adapter}", f"out={out}", f"max_norm={clipping.max_norm}"]
    words += [] if start is None else [f"start={start}"]
    if clipping.noise:
        words += [f"noise={clipping.noise}", f"rounds={updates}", f"delta={clipping.delta}"]
    return words


def aggregate_words(parties: Sequence[str], start: Path | None, out: Path, averaging: Averaging) -> list[str]:
    """Return the words of `finetune aggregate`. parties: their names, which are folders where the command runs."""
    words = ["aggregate", f"adapters=[{','.join(parties)}]", f"out={out}", f"method={averaging.method}"]
    words += [] if start is None else [f"start={start}"]
    if averaging.weights:
        words.append(f"weights=[{','.join(str(averaging.weights.get(name, 1.0)) for name in parties)}]")
    words += [f"max_norm={averaging.max_norm}"] if averaging.max_norm else []
    words += [f"max_error={averaging.max_error}"] if averaging.max_error else []
    return [*words, "on_bad_party=leave_out"]


def parse_weights(text: str) -> dict[str, float]:
    """Parse `clinic=2,hospital=1`.

    Raises:
        ValueError: the text is no list of names and numbers.
    """
    pairs = [pair.partition("=") for pair in text.split(",") if pair.strip()]
    return {name.strip(): float(weight) for name, _, weight in pairs}
