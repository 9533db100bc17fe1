"""What `finetune plan` predicts against what training takes: peak memory and seconds a step over a grid of configs.

    python -m benchmarks.plan [cases=all] [steps=2] [tokenizer=FOLDER] [calibrate=true]

Each case trains random weights of real shapes through `finetune.train` in a fresh process. Memory is compared above
what the process held before the run (CPU: resident; CUDA: allocated). Seconds are those of the last step; since other
programs may share the cores, the prediction is scaled by how fast one product ran around the case and around the
calibration. Bars: memory within 10 % in every case, time within 25 %.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from benchmarks import report
from benchmarks.models import shape_of_size
from benchmarks.processes import device, measure, parse, work_folder
from benchmarks.rows import write_long_rows, write_rows

OPTIONS = {
    "cases": "all", "steps": "2", "rows": "data/sample/train.jsonl", "tokenizer": "data/tiny-qwen2.5", "minutes": "15",
    "calibrate": "true", "work": "", "results": "benchmarks/results",
}  # fmt: skip
MEMORY_BAR, TIME_BAR = 0.10, 0.25
_COLUMNS = (
    ("predicted GB", "predicted_bytes", 1e-9, ".3f"),
    ("measured GB", "measured_bytes", 1e-9, ".3f"),
    ("error", "memory_error", 1.0, "+.1%"),
    ("predicted s", "predicted_seconds", 1.0, ".2f"),
    ("measured s", "measured_seconds", 1.0, ".2f"),
    ("error", "time_error", 1.0, "+.1%"),
)


@dataclass(frozen=True)
class Case:
    """size, layers: of the model; layers None is all of them. document: tokens of each row; None fills the pack."""

    size: str
    length: int
    settings: tuple[str, ...] = ()
    layers: int | None = None
    document: int | None = None
    batch: int = 1

    @property
    def name(self) -> str:
        size = self.size if self.layers is None else f"{self.size}, {self.layers} layers"
        rows = f", rows of {self.document}" if self.document else ""
        batch = f" x {self.batch}" if self.batch > 1 else ""
        return ", ".join([size, f"{self.length} tokens{batch}{rows}", *self.settings])


_ALL, _RECOVER = "lora.target_modules=all-linear", "distill.objective=recover"
CASES = (
    Case("0.5B", 512),
    Case("0.5B", 1024),
    Case("0.5B", 2048),
    Case("0.5B", 1024, ("train.recompute=all",)),
    Case("0.5B", 1024, ("train.recompute=12",)),
    Case("0.5B", 512, (_ALL, "lora.rank=64")),
    Case("0.5B", 512, (_ALL, "lora.dropout=0.05"), batch=2),
    Case("0.5B", 1024, ("quant.type=none",)),
    Case("0.5B", 512, ("quant.resident=true",)),
    Case("0.5B", 512, (_RECOVER,)),
    Case("0.5B", 512, (_RECOVER, "distill.teacher.placement=streamed")),
    Case("0.5B", 512, (_RECOVER, "distill.teacher.placement=cached")),
    Case("0.5B", 512, ("train.fast=false",)),
    Case("1.5B", 512),
    Case("1.5B", 1024, ("train.recompute=all",)),
    Case("1.5B", 512, (_ALL, "lora.rank=16", "train.recompute=all")),
    Case("3B", 2048, layers=4),
    Case("7B", 1024, (_ALL,), layers=2),
    Case("0.5B", 4096, ("train.recompute=all",), layers=6),
    Case("0.5B", 1024, (), document=160),
    Case("tiny", 1024),
)


@dataclass(frozen=True)
class Bench:
    """folder: of this run. cache: FINETUNE_CACHE of its processes. machine: from `processes.device`."""

    options: Mapping[str, str]
    folder: Path
    work: Path
    machine: Mapping[str, Any]
    models: dict[str, Path] = field(default_factory=dict)

    @property
    def cache(self) -> Path:
        return self.work / "cache"

    @property
    def limit_seconds(self) -> float:
        return 60 * float(self.options["minutes"])

    def model(self, case: Case) -> Path:
        """The random model of a case, made once."""
        tokenizer = Path(self.options["tokenizer"]).resolve()
        layers = "" if case.layers is None else f"-{case.layers}"
        folder = self.work / f"qwen2.5-{case.size}{layers}-{tokenizer.parent.name}-{tokenizer.name}"
        if case.name not in self.models:
            made = {"size": case.size, "tokenizer": tokenizer, "folder": folder, "layers": case.layers or ""}
            done = measure("benchmarks.models", made, 1800)
            if "failed" in done:
                raise SystemExit(f"the model could not be made: {done['failed']}")
            self.models[case.name] = folder
        return folder

    def rows(self, case: Case) -> Path:
        """Rows that fill every pack: long ones, or short ones of about `document` tokens."""
        steps = int(self.options["steps"])
        file = self.folder / f"rows-{case.document or case.length}.jsonl"
        source, tokenizer = Path(self.options["rows"]), Path(self.options["tokenizer"])
        if not file.exists() and case.document is None:
            write_long_rows(source, file, tokenizer, case.length, 2 * steps * case.batch)
        elif not file.exists():
            long = self.folder / "short-documents.jsonl"
            write_long_rows(source, long, tokenizer, case.document, 4 * steps * case.length // case.document)
            write_rows(long, file, 4 * steps * case.length // case.document)
        return file

    def config(self, case: Case, folder: Path) -> Path:
        config = {
            "output_dir": str(folder / "run"),
            "model": {"name": str(self.model(case))},
            "data": {
                "train": [{"path": str(self.rows(case))}], "max_length": case.length, "truncation": "right",
                "train_on": "all", "workers": 1,
            },
            "train": {
                "max_steps": int(self.options["steps"]), "batch_size": case.batch, "micro_batch_size": case.batch,
                "recompute": "none", "warmup": 0,
            },
        }  # fmt: skip
        file = folder / "case.yaml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        return file


def predict_case(case: Case, config: Path, settings: list[str], kind: str) -> dict[str, float]:
    """Bytes above the process's own, and seconds a step if the machine was calibrated."""
    from finetune.config.compose import load_config
    from finetune.models.families import shape_of
    from finetune.planning.footprint import predict
    from finetune.planning.plan import recomputed_layers_of
    from finetune.planning.timing import read_rates, step_seconds
    from finetune.planning.work import step_work

    cfg = load_config(str(config), settings)
    shape = shape_of(cfg.model.name)
    assert shape is not None, "a random model has a config.json"
    found = predict(cfg, shape, kind, case.batch, 0, document_tokens=case.document)
    count = recomputed_layers_of(cfg, found.activations)
    found = predict(cfg, shape, kind, case.batch, count, document_tokens=case.document)
    own = found.parts.get("process and libraries", 0.0)
    figures = {"predicted_bytes": found.peak_bytes - own, "moment": found.moment, "parts": dict(found.parts)}
    if rates := read_rates(kind):
        work = step_work(cfg, shape, case.batch, count, document_tokens=case.document)
        seconds = step_seconds(work, shape, rates, case.document or case.length)
        figures |= {"predicted_seconds": sum(seconds.values()), "seconds_by_part": seconds}
    return figures


def run_case(bench: Bench, case: Case, reference: float | None) -> dict[str, Any]:
    """Predicted, measured and error of one case. reference: the product's rate around the calibration."""
    with tempfile.TemporaryDirectory(dir=bench.folder) as name:
        folder, settings = Path(name), list(case.settings)
        config = bench.config(case, folder)
        if "distill.teacher.placement=cached" in settings:
            settings.append(f"distill.cache={folder / 'signal'}")
            # The teacher is asked where it is, not where its signal will lie.
            asked = [word for word in settings if "placement" not in word]
            options = {"config": config, "set": ";".join(asked), "do": "cache"}
            done = measure("benchmarks.plan_case", options, bench.limit_seconds, bench.cache)
            if "failed" in done:
                return done
        figures: dict[str, Any] = predict_case(case, config, settings, bench.machine["kind"])
        load_before = os.getloadavg()[0]
        run = measure(
            "benchmarks.plan_case", {"config": config, "set": ";".join(settings)}, bench.limit_seconds, bench.cache
        )
    if "failed" in run:
        return run
    measured = run["peak_bytes"] - run["baseline_bytes"]
    figures |= {
        "measured_bytes": measured, "memory_error": figures["predicted_bytes"] / measured - 1,
        "loading_bytes": (run["load_peak_bytes"] or 0) - run["baseline_bytes"], "baseline_bytes": run["baseline_bytes"],
        "measured_seconds": run["steps"][-1]["seconds"], "tokens": run["steps"][-1]["tokens"],
        "reference_flops_per_second": run["reference"], "load_average": load_before,
    }  # fmt: skip
    if reference and "predicted_seconds" in figures:
        figures["predicted_seconds"] *= reference / run["reference"] * figures["tokens"] / (case.length * case.batch)
        figures["time_error"] = figures["predicted_seconds"] / figures["measured_seconds"] - 1
    return figures


def main(words: list[str]) -> None:
    options = parse(words, OPTIONS)
    work, machine = work_folder(options["work"]), device()
    wanted = None if options["cases"] == "all" else {int(number) for number in options["cases"].split(",")}
    os.environ["FINETUNE_CACHE"] = str(work / "cache")
    reference = None
    if options["calibrate"] == "true":
        done = measure("benchmarks.plan_case", {"do": "calibrate"}, 900, work / "cache")
        if "failed" in done:
            raise SystemExit(f"calibration failed: {done['failed']}")
        reference = done["reference"]
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(dir=work) as name:
        bench = Bench(options, Path(name), work, machine)
        for number, case in enumerate(CASES):
            if wanted is None or number in wanted:
                results[case.name] = run_case(bench, case, reference)
                report.say(report.table({case.name: results[case.name]}, _COLUMNS))
    summary = {**report.heading("plan", options, machine), "reference_flops_per_second": reference, "cases": results}
    summary |= verdict(results)
    file = report.results_file("plan", options, machine)
    report.write(file, summary)
    report.say(report.table(results, _COLUMNS))
    report.say(f"largest error: memory {summary['worst_memory_error']:.1%}, time {summary['worst_time_error'] or 0:.1%}")
    print(yaml.safe_dump({key: summary[key] for key in ("worst_memory_error", "worst_time_error")}).strip())


def verdict(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """The largest error of each kind, and the middle one of the times'."""
    memory = [abs(case["memory_error"]) for case in results.values() if "memory_error" in case]
    seconds = [abs(case["time_error"]) for case in results.values() if "time_error" in case]
    return {
        "worst_memory_error": max(memory, default=None),
        "worst_time_error": max(seconds, default=None),
        "median_time_error": median(seconds) if seconds else None,
        "failed": sum("failed" in case for case in results.values()),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
