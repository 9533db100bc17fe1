"""Report a benchmark: a table on stderr, and JSON on stdout's last line and in benchmarks/results/."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.processes import ROOT

Figures = Mapping[str, Any]
_VERSIONS = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "liger_kernel", "unsloth")
# Heading, key, factor, format.
COLUMNS = (
    ("tokens/s", "tokens_per_second", 1.0, ",.1f"),
    ("targets/s", "target_tokens_per_second", 1.0, ",.1f"),
    ("peak GB", "peak_bytes", 1e-9, ".2f"),
    ("TFLOP/s", "flops_per_second", 1e-12, ".3f"),
    ("of ceiling", "ceiling_share", 1.0, ".1%"),
    ("start s", "start_seconds", 1.0, ".1f"),
)


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(lines: Mapping[str, Figures], columns: Sequence[tuple[str, str, float, str]] = COLUMNS) -> str:
    """Format one line per name; a failed run shows its reason."""
    width = max(map(len, lines), default=0) + 2
    head = " " * width + "".join(f"{heading:>12}" for heading, *_ in columns)
    return "\n".join([head, *(f"{name:<{width}}{_line(figures, columns)}" for name, figures in lines.items())])


def _line(figures: Figures, columns: Sequence[tuple[str, str, float, str]]) -> str:
    if "failed" in figures:
        return f"  {figures['failed']}"
    return "".join(
        f"{'-':>12}" if figures.get(key) is None else f"{figures[key] * factor:>12{form}}"
        for _, key, factor, form in columns
    )


def versions() -> dict[str, str]:
    """Return the versions of the installed libraries that influence the figures."""
    found = {}
    for name in _VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def heading(name: str, options: Mapping[str, str], machine: Mapping[str, Any]) -> dict[str, Any]:
    """Return the first keys of every result. Paths are shortened to their last part."""
    settings = {key: value for key, value in options.items() if key not in ("work", "results")}
    for key in ("rows", "tokenizer"):
        settings[key] = "/".join(Path(settings[key]).parts[-2:]) if key in settings else ""
    return {
        "benchmark": name,
        "date": date.today().isoformat(),
        "device": dict(machine),
        "versions": versions(),
        "settings": settings,
    }


def results_file(name: str, options: Mapping[str, str], machine: Mapping[str, Any], ending: str = "json") -> Path:
    """Return the results file NAME-DEVICE-DATE."""
    device = re.sub(r"[^a-z0-9]+", "-", machine["name"].lower().removeprefix("nvidia ")).strip("-")
    folder = ROOT / options["results"]
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}-{device}-{date.today().isoformat()}.{ending}"


def write(file: Path, summary: Mapping[str, Any]) -> None:
    """Write the summary atomically."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)


def conclude(
    name: str, options: Mapping[str, str], machine: Mapping[str, Any], summary: Mapping[str, Any], text: str
) -> None:
    """Log the text, write the summary into the results file, and print it on one line without its single runs."""
    log("\n" + text)
    write(results_file(name, options, machine), summary)
    print(json.dumps({key: value for key, value in summary.items() if key != "runs"}))
