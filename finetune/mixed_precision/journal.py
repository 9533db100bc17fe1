"""A folder of measurements: each is kept when it is made, so that a killed command goes on where it stopped.

measured.jsonl      what they were made from, then one line each
sensitivity.json    all of them, once all are there; sensitivity.md and sensitivity.png show it
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune.mixed_precision.divergences import MeanKl
from finetune.mixed_precision.sensitivity import ALL, Measured, Mode
from finetune.system.atomic import write_text
from finetune.system.errors import ConfigError, IntegrityError

JOURNAL, RESULT = "measured.jsonl", "sensitivity.json"
# Raised when what is measured, or how, changes.
SENSITIVITY_VERSION = 1


class Journal:
    """Measurements of one model on some rows with some settings. measured: by (name, kind), those that are there."""

    def __init__(self, folder: Path, made_from: dict[str, Any]):
        """made_from: everything that decides the figures, as JSON keeps it.

        Raises: ConfigError if the folder holds what was made from something else, or cannot be written.
        """
        self.folder, self.made_from = folder, made_from
        self.measured: dict[tuple[str, str], MeanKl] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lines = self._read()
            # Without the end of a line that a kill left unfinished.
            write_text(
                folder / JOURNAL, "".join(f"{json.dumps(line)}\n" for line in [{"made_from": made_from}, *lines])
            )
        except OSError as error:
            raise ConfigError(f"out={folder} cannot be used: {error.strerror or error}") from error
        self.measured = {(line["name"], line["kind"]): MeanKl(**line["mean"]) for line in lines}

    def append(self, found: Measured) -> None:
        """Keep a measurement; it is on the disk when this returns."""
        with (self.folder / JOURNAL).open("a", encoding="utf-8") as stream:
            stream.write(f"{json.dumps(asdict(found))}\n")
            stream.flush()
            os.fsync(stream.fileno())
        self.measured[found.name, found.kind] = found.mean

    def _read(self) -> list[dict[str, Any]]:
        file = self.folder / JOURNAL
        if not file.exists():
            return []
        lines = []
        for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                break
        then = lines[0].get("made_from") if lines and isinstance(lines[0], dict) else None
        if then != self.made_from:
            if not isinstance(then, dict):
                raise ConfigError(f"out={self.folder}: {JOURNAL} there is not this command's; name another folder")
            keys = [key for key in self.made_from if then.get(key) != self.made_from[key]]
            raise ConfigError(
                f"out={self.folder} holds measurements of other {', '.join(keys) or 'settings'}; name another folder, "
                "or remove it"
            )
        return lines[1:]


@dataclass(frozen=True)
class Sensitivities:
    """What was measured.

    model: as the config names it. shapes: (out, in) of each linear layer, in the model's order. measured: by (name,
    kind), with ALL for a model that is stored so throughout.
    """

    model: str
    mode: Mode
    kinds: list[str]
    rows: int
    shapes: dict[str, tuple[int, int]]
    measured: dict[tuple[str, str], MeanKl]
    made_from: dict[str, Any]

    @property
    def layers(self) -> int:
        return 1 + max(layer_of(name) for name in self.shapes)

    @property
    def targets(self) -> int:
        return next(iter(self.measured.values())).tokens

    def save(self, folder: Path) -> None:
        """Write sensitivity.json."""
        modules = [
            {"name": name, "shape": list(shape), "measured": {k: asdict(self.measured[name, k]) for k in self.kinds}}
            for name, shape in self.shapes.items()
        ]
        content = {
            "model": self.model,
            "mode": self.mode,
            "kinds": self.kinds,
            "rows": self.rows,
            "all": {kind: asdict(self.measured[ALL, kind]) for kind in self.kinds},
            "modules": modules,
            "made_from": self.made_from,
        }
        write_text(folder / RESULT, json.dumps(content, indent=1) + "\n")

    @staticmethod
    def read(folder: Path) -> Sensitivities:
        """Raises: ConfigError if the folder holds none, or none that is finished; IntegrityError for a damaged one."""
        file = folder / RESULT
        if not file.is_file():
            unfinished = (folder / JOURNAL).is_file()
            advice = (
                "is not finished: give the same finetune sensitivity command again"
                if unfinished
                else ("holds no sensitivity.json: finetune sensitivity config=X.yaml out=DIR writes one")
            )
            raise ConfigError(f"sensitivity={folder} {advice}")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            measured = {(ALL, kind): MeanKl(**mean) for kind, mean in content["all"].items()}
            for module in content["modules"]:
                measured |= {(module["name"], kind): MeanKl(**mean) for kind, mean in module["measured"].items()}
            shapes = {
                module["name"]: (int(module["shape"][0]), int(module["shape"][1])) for module in content["modules"]
            }
            return Sensitivities(
                content["model"],
                content["mode"],
                content["kinds"],
                content["rows"],
                shapes,
                measured,
                content["made_from"],
            )
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise IntegrityError(
                f"{file} is damaged ({error}); remove it and run finetune sensitivity again"
            ) from error


def layer_of(name: str) -> int:
    """The number of the layer that a linear is in."""
    return int(name.split(".")[2])


def part_of(name: str) -> str:
    """The last word of a linear's name, as q_proj."""
    return name.rpartition(".")[2]
