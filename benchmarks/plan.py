"""Compare predictions of `finetune plan` with training: peak memory and seconds per step over a grid of configs.

    python -m benchmarks.plan [cases=all] [steps=2] [tokenizer=FOLDER] [calibrate=true]

`cases=0,3` measures these again, and keeps the others of the day's file.

Each case trains random weights of real shapes through `finetune.train` in a fresh process. Memory is counted above that
of the process before the run (CPU: resident; CUDA: allocated). Seconds are those of the last step. On a CPU they are
CPU time of one thread, also in the calibration, since other programs may share the cores. The plan is given the number
of tokens and targets of the step, which it cannot predict. Bounds: memory within 10 % in every case, time within 25 %.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from benchmarks import report
from benchmarks.media_models import write_random_vl
from benchmarks.processes import ROOT, device, measure, parse, work_folder
from benchmarks.rows import write_long_rows, write_pairs, write_prompts, write_rows

OPTIONS = {
    "cases": "all",
    "steps": "2",
    "rows": "data/sample/train.jsonl",
    "tokenizer": "data/tiny-qwen2.5",
    "omni": "data/tiny-qwen2.5-omni",
    "minutes": "15",
    "calibrate": "true",
    "work": "",
    "results": "benchmarks/results",
}
_MEDIA_ROWS = 40
MEMORY_BAR, TIME_BAR = 0.10, 0.25
_COLUMNS = (
    ("predicted GB", "predicted_bytes", 1e-9, ".3f"),
    ("measured GB", "measured_bytes", 1e-9, ".3f"),
    ("error", "memory_error", 1.0, ".1%"),
    ("predicted s", "predicted_seconds", 1.0, ".2f"),
    ("measured s", "measured_seconds", 1.0, ".2f"),
    ("error", "time_error", 1.0, ".1%"),
)


@dataclass(frozen=True)
class Case:
    """One run.

    size, layers: of the model; layers=None: all. size=embedded: the packaged base. document: tokens per row; None: one
    row fills the pack. answers: tokens of a prompt and of an answer, before the template, of rows that are pairs, or
    prompts to which answers are sampled. batch: sequences per step, or prompts. media: sample rows with images or sound
        (vision, audio, both), for size=omni, the packaged base, or size=vl, random weights behind wider towers.
    """

    size: str
    length: int
    settings: tuple[str, ...] = ()
    layers: int | None = None
    document: int | None = None
    batch: int = 1
    answers: tuple[int, int] | None = None
    media: str | None = None

    @property
    def samples(self) -> bool:
        return any(word.startswith("reward.") for word in self.settings)

    @property
    def name(self) -> str:
        size = self.size if self.layers is None else f"{self.size}, {self.layers} layers"
        rows = f", rows of {self.document}" if self.document else ""
        if self.answers:
            rows = f", prompts of {self.answers[0]}, answers of {self.answers[1]}"
        if self.media:
            rows = f", rows of {self.media}"
        batch = f" x {self.batch}" if self.batch > 1 else ""
        return ", ".join([size, f"{self.length} tokens{batch}{rows}", *self.settings])


_ALL, _RECOVER = "lora.target_modules=all-linear", "distill.objective=recover"
# Above its limit from the start: a recovery step follows each evaluation.
_GUARD = ("train.eval_every=1", "guard.max=1e-9", "guard.action=recover", "guard.steps=1")
_DPO = ("preference.objective=dpo", "data.truncation=error")
_GRPO = ("reward.loss=grpo", "data.truncation=error")
_FP32 = ("model.dtype=float32", "quant.type=none")
# A sample picture has 36 patches; enlarged, it has 1,024.
_LARGE = "data.image.min_pixels=200704"
_STAY = "data.media_cache=false"
# Some cases have fewer layers to save time; widths and vocabulary are always those of the size.
CASES = (
    Case("0.5B", 512),
    Case("0.5B", 1024, ("train.gradient_checkpointing=all",), layers=12),
    Case("0.5B", 1024, ("train.gradient_checkpointing=4",), layers=8),
    Case("0.5B", 2048, layers=8),
    Case("0.5B", 4096, ("train.gradient_checkpointing=all",), layers=4),
    Case("0.5B", 512, (_ALL, "lora.rank=64"), layers=8),
    Case("0.5B", 512, (_ALL, "lora.dropout=0.05"), layers=8, batch=2),
    Case("0.5B", 1024, ("quant.type=none",), layers=8),
    Case("0.5B", 512, ("quant.keep_dequantized=true",), layers=8),
    Case("0.5B", 512, (_RECOVER,), layers=8),
    Case("0.5B", 512, (_RECOVER, "distill.teacher.placement=streamed"), layers=8),
    Case("0.5B", 512, (_RECOVER, "distill.teacher.placement=cached"), layers=8),
    Case("0.5B", 1024, _GUARD, layers=8),
    Case("0.5B", 512, ("train.kernels=peft",), layers=8),
    Case("0.5B", 1024, layers=8, document=160),
    Case("1.5B", 512),
    Case("1.5B", 1024, ("train.gradient_checkpointing=all",), layers=7),
    Case("1.5B", 512, (_ALL, "lora.rank=16", "train.gradient_checkpointing=all"), layers=7),
    Case("3B", 1024, layers=2),
    Case("7B", 512, (_ALL,), layers=2),
    Case("embedded", 1024, batch=2),
    Case("0.5B", 8192, layers=4, document=512),
    Case("0.5B", 1024, _DPO, layers=8, answers=(32, 475)),
    Case("0.5B", 1024, _DPO, layers=8, answers=(400, 110)),
    Case("0.5B", 1024, (*_DPO, "preference.reference=cached"), layers=8, answers=(160, 350)),
    Case("0.5B", 1024, (*_DPO, "train.gradient_checkpointing=all"), layers=8, answers=(160, 350)),
    Case("0.5B", 1024, (*_DPO, *_FP32), layers=4, answers=(160, 350)),
    Case("0.5B", 1024, _GRPO, layers=8, answers=(160, 96)),
    Case("0.5B", 1024, (*_GRPO, "train.gradient_checkpointing=all"), layers=8, answers=(160, 96)),
    Case("0.5B", 1024, (*_GRPO, "reward.beta=0.04"), layers=8, answers=(400, 64)),
    Case("0.5B", 2048, (*_GRPO, "quant.keep_dequantized=true"), layers=4, answers=(160, 96), batch=2),
    Case("0.5B", 1024, (*_GRPO, *_FP32), layers=4, answers=(160, 96)),
    Case("1.5B", 1024, (*_GRPO, _ALL, "train.gradient_checkpointing=all"), layers=4, answers=(160, 96)),
    Case("omni", 512, (_LARGE,), batch=2, media="vision"),
    Case("omni", 512, (_ALL,), batch=2, media="audio"),
    Case("omni", 512, (_LARGE, _STAY), batch=2, media="both"),
    Case("omni", 512, (_LARGE, "lora.towers=[vision,audio]"), batch=2, media="both"),
    Case("vl", 512, (_LARGE,), batch=2, media="vision"),
    Case("vl", 512, (_LARGE, "quant.type=none"), batch=2, media="vision"),
    Case("vl", 512, (_LARGE, _STAY), batch=2, media="vision"),
    Case("vl", 512, (_LARGE, "lora.towers=[vision]"), batch=2, media="vision"),
)


@dataclass(frozen=True)
class Bench:
    """folder: of this run. cache: FINETUNE_CACHE of its processes. machine: of `processes.device`."""

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
        """Return the random model of a case, written at its first use."""
        if case.size == "embedded":
            return ROOT / "data/tiny-qwen2.5"
        if case.media:
            omni = Path(self.options["omni"]).resolve()
            return omni if case.size == "omni" else write_random_vl(omni, self.work / "qwen2.5-vl-random")
        tokenizer = Path(self.options["tokenizer"]).resolve()
        layers = "" if case.layers is None else f"-{case.layers}"
        folder = self.work / f"qwen2.5-{case.size}{layers}-{tokenizer.parent.name}-{tokenizer.name}"
        if case.name not in self.models:
            made = {"size": case.size, "tokenizer": tokenizer, "folder": folder, "layers": case.layers or ""}
            done = measure("benchmarks.models", made, 1800)
            if "failed" in done:
                raise SystemExit(f"model: cannot be written: {done['failed']}")
            self.models[case.name] = folder
        return folder

    def rows(self, case: Case) -> Path:
        """Write rows that fill every pack: long ones, or short ones of about `document` tokens."""
        steps = int(self.options["steps"])
        if case.media:
            return ROOT / f"data/sample/{case.media}.jsonl"
        file = self.folder / f"rows-{case.length}x{case.batch}-{case.document}.jsonl"
        source, tokenizer = Path(self.options["rows"]), Path(self.options["tokenizer"])
        if file.exists():
            return file
        if case.samples:
            assert case.answers is not None
            return write_prompts(source, file, tokenizer, case.answers[0], 2 * steps * case.batch)
        if case.answers is not None:
            return write_pairs(source, self.folder, tokenizer, case.answers, 2 * steps * case.batch)[0]
        if case.document is None:
            write_long_rows(source, file, tokenizer, case.length, 2 * steps * case.batch)
        else:
            count = 4 * steps * case.length // case.document
            long = self.folder / "short-documents.jsonl"
            write_long_rows(source, long, tokenizer, case.document, count)
            write_rows(long, file, count)
        return file

    def config(self, case: Case, folder: Path) -> Path:
        config = {
            "output_dir": str(folder / "run"),
            "model": {"name": str(self.model(case))},
            "data": {
                "train": [{"path": str(self.rows(case)), "limit": _MEDIA_ROWS if case.media else None}],
                "max_length": case.length,
                "truncation": "right",
                "workers": 1,
                "eval": [{"path": str(self.rows(case))}] if case.settings == _GUARD else [],
            },
            "train": {
                "max_steps": int(self.options["steps"]),
                "batch_size": case.batch,
                "micro_batch_size": case.batch,
                "gradient_checkpointing": "none",
                "warmup_ratio": 0,
            },
        }
        if case.samples:
            assert case.answers is not None
            config["reward"] = {"max_new_tokens": case.answers[1], "functions": {"exact": 1}}
        file = folder / "case.yaml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        return file


def predict_case(case: Case, config: Path, settings: list[str], kind: str, step: Mapping[str, Any]) -> dict[str, Any]:
    """Predict bytes above the process's own, and seconds of a measured step if the machine is calibrated."""
    from finetune.config.compose import load_config
    from finetune.data.loader import load_all_rows
    from finetune.models.families import shape_of
    from finetune.planning.auto_batch import free_memory, keep_copies, recomputed_layers
    from finetune.planning.flops import step_work
    from finetune.planning.inputs import plan_inputs
    from finetune.planning.media import measured_media
    from finetune.planning.peak_memory import predict_peak
    from finetune.planning.timing import read_rates, step_seconds, tower_seconds
    from finetune.planning.towers import first_passes

    cfg = load_config(str(config), settings)
    shape = shape_of(cfg.model.name)
    assert shape is not None, "a random model has a config.json"
    inputs = plan_inputs(cfg, shape, device_type=kind).with_rows(*lengths(case, cfg.reward.group_size, step))
    if case.media:
        documents = load_all_rows(cfg, report.log)[2].documents
        rows = zip(documents.lengths.tolist(), documents.media_of_each(), strict=True)
        inputs = inputs.with_rows(round(documents.lengths.mean()), inputs.target_share)
        inputs = replace(inputs, media=measured_media(inputs.towers, rows, ()))
    inputs = keep_copies(inputs, free_memory(kind))
    micro = math.ceil(inputs.step_sequences)
    found = predict_peak(inputs, micro, 0)
    count = recomputed_layers(inputs, found.activations)
    found = predict_peak(inputs, micro, count)
    own = found.parts.get("process and libraries", 0.0)
    figures = {"predicted_bytes": found.peak_bytes - own, "moment": found.moment, "parts": dict(found.parts)}
    if rates := read_rates(kind):
        seconds = step_seconds(inputs, step_work(inputs, micro, count), rates)
        media_seconds = sum(tower_seconds(each, rates) for each in first_passes(inputs, None))
        planned = inputs.step_sequences * inputs.sequence.places
        figures |= {
            "predicted_seconds": sum(seconds.values()) * step["tokens"] / planned,
            "seconds_by_part": seconds,
            "predicted_media_seconds": media_seconds,
        }
    return figures


def lengths(case: Case, group_size: int, step: Mapping[str, Any]) -> tuple[int | None, float]:
    """Return what the plan is given of a measured step: tokens of an example, and the trained share of them."""
    tokens, targets = step["tokens"], step["target_tokens"]
    if case.samples:  # an example is a prompt
        return round((tokens - targets) / (case.batch * group_size)), 1.0
    return tokens // case.batch if case.answers else case.document, targets / tokens


def run_case(bench: Bench, case: Case) -> dict[str, Any]:
    """Return prediction, measurement and error of one case."""
    with tempfile.TemporaryDirectory(dir=bench.folder) as name:
        folder, settings = Path(name), list(case.settings)
        config = bench.config(case, folder)
        if any(word.endswith("=cached") for word in settings):
            section = "preference" if "preference.reference=cached" in settings else "distill"
            settings.append(f"{section}.cache={folder / 'cache'}")
            # The cache is written with a resident teacher.
            asked = [word for word in settings if not word.endswith("=cached")]
            options = {"config": config, "set": ";".join(asked), "do": "cache"}
            done = measure("benchmarks.plan_case", options, bench.limit_seconds, bench.cache)
            if "failed" in done:
                return done
        if case.media:  # an earlier case may have computed the same embeddings
            shutil.rmtree(bench.cache / "media" / "embeddings", ignore_errors=True)
        run = measure(
            "benchmarks.plan_case", {"config": config, "set": ";".join(settings)}, bench.limit_seconds, bench.cache
        )
        if "failed" in run:
            return run
        step = run["steps"][-1]
        figures: dict[str, Any] = predict_case(case, config, settings, bench.machine["kind"], step)
    # Modules that only runs with media import are part of the plan's slack, not of its process.
    own = figures["parts"].get("process and libraries", 0.0)
    measured = run["peak_bytes"] - (own if case.media else run["baseline_bytes"])
    figures |= {
        "measured_bytes": measured,
        "memory_error": figures["predicted_bytes"] / measured - 1,
        "loading_bytes": (run["load_peak_bytes"] or 0) - run["baseline_bytes"],
        "baseline_bytes": run["baseline_bytes"],
        "measured_seconds": step["seconds"],
        "measured_media_seconds": run["media_seconds"],
        "tokens": step["tokens"],
        "target_share": step["target_tokens"] / step["tokens"],
        "computed_share": step["computed_tokens"] / step["tokens"],
    }
    if "predicted_seconds" in figures:
        figures["time_error"] = figures["predicted_seconds"] / figures["measured_seconds"] - 1
    return figures


def main(words: list[str]) -> None:
    options = parse(words, OPTIONS)
    work, machine = work_folder(options["work"]), device()
    wanted = None if options["cases"] == "all" else {int(number) for number in options["cases"].split(",")}
    os.environ["FINETUNE_CACHE"] = str(work / "cache")
    if machine["kind"] == "cpu":
        os.environ["OMP_NUM_THREADS"] = "1"
    if options["calibrate"] == "true":
        done = measure("benchmarks.plan_case", {"do": "calibrate"}, 900, work / "cache")
        if "failed" in done:
            raise SystemExit(f"calibration failed: {done['failed']}")
    results: dict[str, dict[str, Any]] = {}
    heading = report.heading("plan", options, machine)
    file = report.results_file("plan", options, machine)
    if wanted is not None and file.exists():
        known = json.loads(file.read_text(encoding="utf-8"))["cases"]
        results |= {case.name: known[case.name] for case in CASES if case.name in known}
    with tempfile.TemporaryDirectory(dir=work) as name:
        bench = Bench(options, Path(name), work, machine)
        for number, case in enumerate(CASES):
            if wanted is None or number in wanted:
                results[case.name] = run_case(bench, case)
                report.log(report.table({case.name: results[case.name]}, _COLUMNS))
                report.write(file, {**heading, **verdict(results), "cases": results})
    report.log(report.table(results, _COLUMNS))
    print(json.dumps(verdict(results)))


def verdict(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Return the largest error of each kind, and the median error of the times."""
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
