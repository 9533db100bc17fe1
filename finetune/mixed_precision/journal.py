"""A folder of measurements. Each is on the disk as soon as it is made, so a killed command resumes where it stopped.

measured.jsonl      what the measurements were made from, then one line each
sensitivity.json    all measurements, when all are made; sensitivity.md and sensitivity.png show them
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.models.quant.bit_widths import stored_bytes
from finetune.system.atomic import write_text
from finetune.system.console import log_once
from finetune.system.errors import ConfigError, FinetuneError, IntegrityError, os_errors_as
from finetune.system.format import markdown_table
from finetune.system.plotting import COLORS, figure, save_png
from finetune.system.sealed import seal, unseal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKDOWN, PICTURE = "sensitivity.md", "sensitivity.png"
_FULL = "free space and repeat the command; it continues"
_RANKED = 10


def write_summary(found: Sensitivities, folder: Path, double: bool, dtype: str) -> None:
    """Write sensitivity.md and sensitivity.png; `double` and `dtype` are `quant.double` and `model.dtype`."""
    write_text(folder / MARKDOWN, as_markdown(found, double, dtype))
    save_png(as_picture(found), folder / PICTURE)


def as_markdown(found: Sensitivities, double: bool, dtype: str) -> str:
    """Format tables by layer and part, and the layers where 16 bits gain most per byte."""
    parts = list(dict.fromkeys(part_of(name) for name in found.shapes))
    targets = next(iter(found.measured.values())).tokens
    lines = [
        f"# Sensitivity of {found.model}",
        "",
        f"KL(16 bit || changed) in nats per target token on {found.rows:,} rows ({targets:,} targets), computed "
        "in fp32; ± is one standard error over rows. Each layer alone is stored as in the heading, all others in 16 "
        "bit.",
    ]
    for kind in found.kinds:
        total = sum(found.measured[name, kind].kl for name in found.shapes)
        rows = [["layer", *parts]]
        for layer in range(found.layers):
            cells = {part_of(name): found.measured[name, kind] for name in found.shapes if layer_of(name) == layer}
            rows.append([str(layer), *(str(cells.get(part, "")) for part in parts)])
        both = f"All layers at once: {found.measured[ALL, kind]}; the sum of all single ones: {total:.2e}."
        lines += ["", f"## {kind}", "", both, "", markdown_table(rows)]
        gains = {}
        for name, shape in found.shapes.items():
            saved_bytes = stored_bytes("none", shape, double, dtype) - stored_bytes(kind, shape, double, dtype)
            gains[name] = found.measured[name, kind].kl / saved_bytes * 1e6
        best = sorted(gains, key=gains.__getitem__, reverse=True)[:_RANKED]
        ranked = [["layer", "nats per MB"], *([name, f"{gains[name]:.2e}"] for name in best)]
        lines += ["", "Layers where 16 bits gain most per byte:", "", markdown_table(ranked)]
    return "\n".join(lines) + "\n"


def as_picture(found: Sensitivities) -> Figure:
    """Draw bars by layer: one color for each part of a layer, one panel for each kind of storage."""
    parts = list(dict.fromkeys(part_of(name) for name in found.shapes))
    width_inches = min(30.0, max(4.8, 0.14 * len(found.shapes)) * len(found.kinds))
    drawn, panels = figure(width_inches, 3.4, len(found.kinds))
    bar = 0.8 / len(parts)
    for axes, kind in zip(panels, found.kinds, strict=True):
        for number, part in enumerate(parts):
            names = [name for name in found.shapes if part_of(name) == part]
            places = [layer_of(name) + (number - (len(parts) - 1) / 2) * bar for name in names]
            means = [found.measured[name, kind] for name in names]
            axes.bar(
                places,
                [mean.kl for mean in means],
                bar,
                yerr=[mean.error for mean in means],
                label=part,
                color=COLORS[number % len(COLORS)],
                error_kw={"elinewidth": 0.6},
            )
        axes.set_title(f"{kind} alone")
        axes.set_xlabel("layer")
        axes.set_xticks(range(found.layers))
        axes.grid(axis="x", visible=False)
    panels[0].set_ylabel("KL to the 16-bit model (nats per target)")
    panels[0].legend(ncols=2)
    return drawn


JOURNAL, RESULT = "measured.jsonl", "sensitivity.json"
# Increment when the measurement or its rows change.
SENSITIVITY_VERSION = 1
ALL = "*"  # stands for a layer's name: all linear layers at once


@dataclass(frozen=True, slots=True)
class MeanKl:
    """kl: KL(16 bit || changed) in nats per target token. error: its standard error over documents. tokens: targets."""

    kl: float
    error: float
    tokens: int

    def __str__(self) -> str:
        return f"{self.kl:.2e} ± {self.error:.0e}"


@dataclass(frozen=True, slots=True)
class Measured:
    """The KL when the linear layer `name` alone is stored as `kind`."""

    name: str
    kind: str
    mean: MeanKl


class Journal:
    """Measurements of one model on some rows with some settings, by (name, kind) in `measured`."""

    def __init__(self, folder: Path, made_from: dict[str, Any]):
        """Open or create the folder; `made_from` is everything that decides the values, as JSON keeps it.

        Raises:
            ConfigError: the folder holds measurements made from something else, or cannot be written.
        """
        self.folder, self.made_from = folder, made_from
        with os_errors_as(ConfigError, f"out={folder}: cannot be written"):
            folder.mkdir(parents=True, exist_ok=True)
            lines = self._read()
            # Writes the file again without a last line that a kill cut off, and without damaged lines.
            content = map(seal, [{"made_from": made_from}, *lines])
            write_text(folder / JOURNAL, "".join(f"{json.dumps(line)}\n" for line in content))
        self.measured = {(line["name"], line["kind"]): MeanKl(**line["mean"]) for line in lines}

    def append(self, found: Measured) -> None:
        """Write a measurement to the disk."""
        written = os_errors_as(FinetuneError, f"out={self.folder}: cannot be written", _FULL)
        with written, (self.folder / JOURNAL).open("a", encoding="utf-8") as stream:
            stream.write(f"{json.dumps(seal(asdict(found)))}\n")
            stream.flush()
            os.fsync(stream.fileno())
        self.measured[found.name, found.kind] = found.mean

    def _read(self) -> list[dict[str, Any]]:
        file = self.folder / JOURNAL
        if not file.exists():
            return []
        head, *rest = file.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
        try:
            then = unseal(json.loads(head))["made_from"]
        except (ValueError, LookupError) as error:
            raise ConfigError(
                f"{file}: corrupt, or not written by finetune sensitivity ({error})\n"
                "help: choose another folder: out=DIR"
            ) from error
        if then != self.made_from:
            keys = sorted(key for key in {*then, *self.made_from} if then.get(key) != self.made_from.get(key))
            raise ConfigError(
                f"out={self.folder}: holds measurements with other settings: {', '.join(keys)}\n"
                "help: choose another folder, or remove this one"
            )
        lines = []
        for number, text in enumerate(rest, 2):
            try:
                line = unseal(json.loads(text))
                Measured(**line)
                lines.append(line)
            except (ValueError, TypeError) as error:
                log_once(f"{file}:{number}: incomplete or corrupt ({error}); measuring it again")
        return lines


@dataclass(frozen=True)
class Sensitivities:
    """The measurements of a model."""

    model: str  # as the config names it
    kinds: list[str]
    rows: int
    shapes: dict[str, tuple[int, int]]  # (out, in) of each linear layer, in the model's order
    measured: dict[tuple[str, str], MeanKl]  # by (name, kind); the name is ALL for all layers at once
    made_from: dict[str, Any]  # everything that decided the values

    @property
    def layers(self) -> int:
        return 1 + max(layer_of(name) for name in self.shapes)

    def save(self, folder: Path) -> None:
        """Write sensitivity.json."""
        modules = [
            {"name": name, "shape": list(shape), "measured": {k: asdict(self.measured[name, k]) for k in self.kinds}}
            for name, shape in self.shapes.items()
        ]
        content = {
            "model": self.model,
            "kinds": self.kinds,
            "rows": self.rows,
            "all": {kind: asdict(self.measured[ALL, kind]) for kind in self.kinds},
            "modules": modules,
            "made_from": self.made_from,
        }
        with os_errors_as(FinetuneError, f"out={folder}: cannot be written", _FULL):
            write_text(folder / RESULT, json.dumps(seal(content), indent=1) + "\n")

    @staticmethod
    def read(folder: Path) -> Sensitivities:
        """Read sensitivity.json.

        Raises:
            ConfigError: there is none, it is not complete, or it is of the removed mode=keep.
            IntegrityError: the file is corrupt.
        """
        file = folder / RESULT
        if not file.is_file():
            if (folder / JOURNAL).is_file():
                raise ConfigError(f"sensitivity={folder}: not complete\nhelp: repeat the finetune sensitivity command")
            raise ConfigError(
                f"sensitivity={folder}: no {RESULT}\nhelp: write one with finetune sensitivity config=X.yaml out=DIR"
            )
        try:
            content = unseal(json.loads(file.read_text(encoding="utf-8")))
            measured = {(ALL, kind): MeanKl(**mean) for kind, mean in content["all"].items()}
            shapes = {}
            for module in content["modules"]:
                measured |= {(module["name"], kind): MeanKl(**mean) for kind, mean in module["measured"].items()}
                shapes[module["name"]] = (int(module["shape"][0]), int(module["shape"][1]))
            if content.get("mode") == "keep":
                removed = "measured with mode=keep, which was removed"
                raise ConfigError(f"sensitivity={folder}: {removed}\nhelp: measure again")
            made_from = content["made_from"]
            return Sensitivities(content["model"], content["kinds"], content["rows"], shapes, measured, made_from)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise IntegrityError(f"{file}: corrupt ({error})\nhelp: remove it and measure again") from error


def layer_of(name: str) -> int:
    """Return the number of the decoder layer that a linear layer is in."""
    return int(name.rpartition(".layers.")[2].partition(".")[0])


def part_of(name: str) -> str:
    """Return the last part of a linear layer's name, as q_proj."""
    return name.rpartition(".")[2]
