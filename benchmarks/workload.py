"""Run each side on one model and one file of rows; used by every benchmark of training."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import rows
from benchmarks.processes import ROOT, device, measure, work_folder
from benchmarks.stock import PEERS, STOCK, VARIANTS, installed

# Options of every benchmark of training.
DEFAULTS = {
    "size": "0.5B",
    "layers": "",
    "rows": "data/sample/train.jsonl",
    "tokenizer": "data/tiny-qwen2.5",
    "limit": "400",
    "rank": "8",
    "targets": "q_proj,v_proj",
    "seed": "0",
    "ours": "fast",
    "stock": "all",
    "warmup": "2",
    "steps": "4",
    "minutes": "30",
    "work": "",
    "results": "benchmarks/results",
}
# Overrides of our variants, by name; `ours.NAME=key=value;key=value` on the command line adds a variant.
# compile=true: with null, a benchmark has too few steps to compile; a training has enough.
OURS = {
    "fast": "train.compile=true",
    "uncompiled": "train.compile=false",
    "plain": "train.kernels=peft",
    "whole": "train.compile=true;train.share_prefixes=false",
    "resident": "train.compile=true;quant.keep_dequantized=true",
}
# Time limit for measuring the ceiling once.
_CEILING_SECONDS = 120.0
# More tokens than a run needs, so that no run reaches the half-empty packs at the end.
_SPARE = 1.25


@dataclass(frozen=True)
class Workload:
    """shape: the model's config. folder: for this benchmark's files. cache: FINETUNE_CACHE of our runs."""

    options: Mapping[str, str]
    model: Path
    shape: dict[str, Any]
    folder: Path
    cache: Path

    @property
    def limit_seconds(self) -> float:
        return 60 * float(self.options["minutes"])

    def ours(
        self,
        variant: str,
        length: int,
        batch: int,
        settings: str = "",
        module: str = "benchmarks.ours",
        *,
        rows: Path | None = None,
        **changes: Any,
    ) -> dict[str, Any]:
        """Run steps of our trainer with packs of `length` tokens, `batch` of them per step.

        settings: in addition to the variant's. module: another measurement with the same config. rows: other ones.
        changes: of options.
        """
        steps = int(self.options["warmup"]) + int(self.options["steps"])
        options = {
            "model": self.model,
            "rows": rows or self.rows(steps * length * batch),
            "steps": steps,
            "length": length,
            "batch": batch,
            "micro": batch,
            "set": ";".join(filter(None, (self.variant(variant), settings))),
            **{key: self.options[key] for key in ("rank", "targets", "seed")},
            **changes,
        }
        return measure(module, options, self.limit_seconds, self.cache)

    def stock(
        self, variant: str, length: int, batch: int, *, rows: Path | None = None, **changes: Any
    ) -> dict[str, Any]:
        """Run steps of the stock trainer on `batch` rows (or packs) of up to `length` tokens, after a warm-up step."""
        if variant in PEERS and not installed(PEERS[variant]):
            return {"failed": "not installed"}
        if variant not in VARIANTS:
            return {"failed": "installed, but has a command of its own: see docs/benchmarks.md"}
        steps = 1 + int(self.options["steps"])
        options = {
            "model": self.model,
            "rows": rows or self.rows(steps * length * batch),
            "steps": steps,
            "length": length,
            "batch": batch,
            "variant": variant,
            **{key: self.options[key] for key in ("rank", "targets", "seed")},
            **changes,
        }
        return measure("benchmarks.stock", options, self.limit_seconds, self.cache)

    def ceiling(self, tokens: int, seconds: float = 0.4) -> dict[str, float]:
        """Return operations per second of each product; empty if they cannot be measured."""
        options = {"model": self.model, "tokens": tokens, "seconds": seconds}
        done = measure("benchmarks.ceiling", options, min(_CEILING_SECONDS, self.limit_seconds))
        return done.get("flops_per_second", {})

    def rows(self, tokens: int) -> Path:
        """Return the rows of a run that needs `tokens`: `limit` of them, or more if those are too few."""
        source, tokenizer = Path(self.options["rows"]), Path(self.options["tokenizer"])
        count = max(int(self.options["limit"]), rows.rows_holding(source, tokenizer, math.ceil(_SPARE * tokens)))
        file = self.folder / f"rows-{count}.jsonl"
        return file if file.exists() else rows.write_rows(source, file, count)

    def long_rows(self, tokens: int) -> Path:
        """Return rows of at least `tokens` tokens each, two per step."""
        file = self.folder / f"long-{tokens}.jsonl"
        count = 2 * (int(self.options["warmup"]) + int(self.options["steps"]))
        if not file.exists():
            rows.write_long_rows(Path(self.options["rows"]), file, Path(self.options["tokenizer"]), tokens, count)
        return file

    def variant(self, name: str) -> str:
        return self.options.get(f"ours.{name}", OURS.get(name, ""))

    def ours_variants(self) -> list[str]:
        names = [name for name in self.options["ours"].split(",") if name]
        for name in names:
            if name not in OURS and f"ours.{name}" not in self.options:
                raise SystemExit(f"ours={name}: unknown; choose from {', '.join(OURS)}, or set ours.{name}=key=value;…")
        return names

    def stock_variants(self, trainer: str = "sft") -> list[str]:
        """Return the chosen variants; `all` is every variant of `trainer` that suits the device."""
        given = self.options["stock"]
        if given == "all":
            return [*STOCK[trainer][device()["multiplies_in"]]]
        names = [] if given in ("none", "") else given.split(",")
        if unknown := [name for name in names if name not in VARIANTS]:
            raise SystemExit(f"stock={','.join(unknown)}: unknown; choose from all, none, {', '.join(VARIANTS)}")
        return names


@contextmanager
def prepared(options: Mapping[str, str]) -> Iterator[Workload]:
    """Yield the workload of these options; its random model is written at its first use, and kept."""
    options = {**options, "rows": _found(options["rows"]), "tokenizer": _found(options["tokenizer"])}
    work = work_folder(options["work"])
    shape = {key: options[key] for key in ("size", "layers")}
    tokenizer = Path(options["tokenizer"])
    model = work / "-".join(["qwen2.5", *filter(None, shape.values()), tokenizer.parent.name, tokenizer.name])
    made = measure("benchmarks.models", {**shape, "tokenizer": tokenizer, "folder": model}, 900)
    if "failed" in made:
        raise SystemExit(f"model: cannot be written: {made['failed']}")
    shape = json.loads((model / "config.json").read_text())
    with tempfile.TemporaryDirectory(dir=work) as folder:
        yield Workload(options, model, shape, Path(folder), work / "cache")


def _found(path: str) -> str:
    """Return an absolute path; relative ones are searched here, then at the top of the checkout."""
    for folder in (Path.cwd(), ROOT):
        if (folder / path).exists():
            return str((folder / path).resolve())
    raise SystemExit(f"{path}: not found here or in {ROOT}")
