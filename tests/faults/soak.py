"""A long run of the embedded base: memory, open files, threads and step time stay as they were at its start."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.faults import Figures

# Evaluations, checkpoints and sample answers come 40 times in a full run.
_EVERY = 500
_SETTINGS = (
    "data.train.0.limit=64",
    "data.eval.0.limit=4",
    "data.max_length=64",
    "train.batch_size=1",
    "train.learning_rate=1e-4",
    "train.schedule=constant",
    "generation.num_examples=0",
    "generation.max_new_tokens=8",
    "quant.cache=false",
)
# Growth from the second tenth of a run to its last: allocators settle in the first.
_MOST_MEMORY_GROWTH = 1.05
# A step's processor time; a shared machine moves it by some percent.
_MOST_TIME_GROWTH = 1.2


@dataclass(frozen=True)
class Sample:
    """One look at the process. step: steps done; cpu_seconds: of all its threads since its start."""

    step: int
    rss_bytes: int
    files: int
    threads: int
    cpu_seconds: float


def run(seed: int, count: int, minutes: float | None) -> Figures:
    """Train for `count` steps, or as many as fit into `minutes`, and watch the process from outside."""
    with tempfile.TemporaryDirectory() as folder:
        out, every = Path(folder) / "run", max(1, min(_EVERY, count // 40))
        words = ["config=quickstart.yaml", *_SETTINGS, f"output_dir={out}", f"train.seed={seed}"]
        words += [f"train.max_steps={count}", f"train.eval_every={every}", f"train.save_every={every}"]
        command = [sys.executable, "-m", "finetune", "train", *words, f"generation.every={every}"]
        with open(Path(folder) / "log", "wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
            samples = _watch(psutil.Process(process.pid), out / "metrics.jsonl", minutes)
            code = process.wait()
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        figures = judge(samples, [line["seconds"] for line in lines])
        # 130 and more: stopped at the end of the minutes, with a checkpoint.
        figures["lost"] += len(lines) != count if minutes is None else code not in (0, 143)
    return {"exit_code": code, **figures}


def _watch(process: psutil.Process, metrics: Path, minutes: float | None) -> list[Sample]:
    """Look at a process once a second until it ends, and stop it after the minutes."""
    samples: list[Sample] = []
    end = None if minutes is None else time.monotonic() + 60 * minutes
    steps = offset = 0
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):  # a process that has ended has no open files to count
        while process.status() != psutil.STATUS_ZOMBIE:
            if metrics.exists():
                with metrics.open("rb") as stream:
                    stream.seek(offset)
                    new = stream.read()
                steps, offset = steps + new.count(b"\n"), offset + len(new)
            with process.oneshot():
                cpu = process.cpu_times()
                values = process.memory_info().rss, process.num_fds(), process.num_threads(), cpu.user + cpu.system
            if steps:
                samples.append(Sample(steps, *values))
            if end is not None and time.monotonic() > end:
                process.terminate()
                end = None
            time.sleep(1)
    return samples


def judge(samples: Sequence[Sample], step_seconds: Sequence[float]) -> Figures:
    """Compare the second tenth of the steps with the last one.

    samples: while training. step_seconds: wall time of each step.
    Returns: figures with `lost`, the number of quantities that grew.
    """
    steps = len(step_seconds)
    tenth = max(1, steps // 10)
    early = [sample for sample in samples if tenth < sample.step <= 2 * tenth]
    # Without the end of the run, which draws a report.
    late = [sample for sample in samples if steps - tenth < sample.step < steps]
    if len(early) < 2 or len(late) < 2:
        raise ValueError(f"soak: {steps} steps are too few to compare; raise count or minutes")

    def rss(some: Sequence[Sample]) -> float:
        return statistics.median(sample.rss_bytes for sample in some) / 2**20

    def milliseconds(some: Sequence[Sample]) -> float:
        return 1000 * (some[-1].cpu_seconds - some[0].cpu_seconds) / max(1, some[-1].step - some[0].step)

    first_ms, last_ms = (1000 * statistics.median(part) for part in (step_seconds[:tenth], step_seconds[-tenth:]))
    # Medians: a checkpoint that is being written is an open file, too.
    files = [round(statistics.median(sample.files for sample in some)) for some in (early, late)]
    threads = [round(statistics.median(sample.threads for sample in some)) for some in (early, late)]
    grew = {
        "memory": rss(late) > _MOST_MEMORY_GROWTH * rss(early),
        "files": files[1] > files[0],
        "threads": threads[1] > threads[0],
        "time": milliseconds(late) > _MOST_TIME_GROWTH * milliseconds(early),
    }
    return {
        "steps": steps,
        "rss_mib": [round(rss(early)), round(rss(late))],
        "most_rss_mib": round(max(sample.rss_bytes for sample in samples) / 2**20),
        "open_files": files,
        "threads": threads,
        "cpu_ms_per_step": [round(milliseconds(early), 1), round(milliseconds(late), 1)],
        "median_step_ms": [round(first_ms, 1), round(last_ms, 1)],
        "grew": [name for name, did in grew.items() if did],
        "lost": sum(grew.values()),
    }
