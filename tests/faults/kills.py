"""`kill -9` at random moments and inside writes: the command run again ends in the bits of an undisturbed one."""

from __future__ import annotations

import math
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from finetune.system.resources import packaged
from tests.faults import Figures
from tests.faults.outcome import content_of, differences, held_locks
from tests.faults.processes import KILLED, Place, Watch, log_of, start, start_alone

_SAMPLE = packaged("data") / "sample"
# Dropout and noise are on, so that equal bits say something about random state.
_TRAIN = (
    "data.train.0.limit=24",
    "data.eval.0.limit=4",
    "train.batch_size=2",
    "train.max_steps=4",
    "train.save_every=1",
    "train.eval_every=2",
    "train.resume=auto",
    "generation.num_examples=0",
    "lora.dropout=0.1",
    "train.neftune_alpha=5",
    "output_dir=run",
)
_SFT = ("train", "config=quickstart.yaml", *_TRAIN, "data.max_length=96")
_PAIRS = (
    "config=dpo.yaml",
    "lora.target_modules=[q_proj,v_proj]",
    "data.max_length=160",
    "data.train.0.limit=12",
    "data.eval.0.limit=4",
)
_TEACHER = ("config=quickstart.yaml", "distill.objective=recover", "distill.cache=teacher", "data.max_length=96")
_EXPORT = ("export", "adapter={adapter}", "out=out", "verify=false")
# A command that takes longer hangs.
_MOST_SECONDS = 600.0
_MOST_KILLS = 4  # of one trial
# Half of the kills come at a moment, the others at a place; one of twenty hits a process that a user started.
_TIMED = 0.5
_OF_FORKS = 20
_STARTED_ALONE = ("train", "train, two ranks", "merge")


@dataclass(frozen=True)
class Job:
    """A command that is killed.

    Attributes:
        words: of the command; `{adapter}` is a trained one.
        watch: folder, in the trial's, on which operations are places of kills.
        out: folder that a finished command refuses to write again; None if it may run again.
    """

    words: tuple[str, ...]
    ranks: int = 1
    watch: str = "run"
    out: str | None = None


JOBS = {
    "train": Job(_SFT),
    "preference": Job(("train", *_PAIRS, *_TRAIN[2:])),
    "train, two ranks": Job(_SFT, ranks=2),
    "train, two ranks, sharded": Job((*_SFT, "parallel.shard=full"), ranks=2),
    "quantized cache": Job(
        (*_SFT, "train.max_steps=1", "data.eval=[]", "train.eval_every=null"), watch="cache/quantized"
    ),
    "tokens": Job(("data", "config=quickstart.yaml", "data.train.0.limit=300", "data.workers=1"), watch="cache/tokens"),
    "teacher cache": Job(("cache", *_TEACHER, "data.train.0.limit=32", "data.eval.0.limit=4"), watch="teacher"),
    "reference cache": Job(("cache", *_PAIRS, "preference.cache=reference"), watch="reference"),
    "merge": Job(
        ("merge", "adapter={adapter}", "out=out", "shard_size=1MB", "kl_check.num_examples=0"), watch="", out="out"
    ),
    "export safetensors": Job((*_EXPORT, "format=safetensors", "shard_size=1MB"), watch="", out="out"),
    "export nf4": Job((*_EXPORT, "format=safetensors", "type=nf4"), watch="", out="out"),
    "export gguf": Job((*_EXPORT, "format=gguf", "type=q8_0"), watch="", out="out"),
}


@dataclass
class Reference:
    """What an undisturbed run of a job did: its files, its operations in order, and how long it took."""

    folder: Path
    operations: Counter[str]
    seconds: float
    content: dict[str, Any]
    largest_bytes: int


@dataclass
class Campaign:
    """Kills so far. folder: of all trials; adapter: a trained one."""

    folder: Path
    adapter: Path = Path()
    references: dict[str, Reference] = field(default_factory=dict)
    kills: int = 0
    trials: int = 0
    places: Counter[str] = field(default_factory=Counter)
    by_job: Counter[str] = field(default_factory=Counter)
    unfinished: int = 0
    problems: list[str] = field(default_factory=list)

    def reference(self, name: str) -> Reference:
        """Return the undisturbed run of a job, which is made at the first call."""
        if name not in self.references:
            job, folder = JOBS[name], self.folder / name.replace(", ", "-").replace(" ", "-") / "undisturbed"
            folder.mkdir(parents=True)
            record = folder.with_name("operations")
            record.touch()
            began = time.monotonic()
            processes = start(self.words(job), folder, job.ranks, Watch(folder / job.watch, record=record))
            if problem := _ended(processes, folder):
                raise RuntimeError(f"{name}: the undisturbed run failed: {problem}")
            files = [path for path in folder.rglob("*") if path.is_file()]
            self.references[name] = Reference(
                folder,
                Counter(record.read_text().split()),
                time.monotonic() - began,
                content_of(folder),
                max(path.stat().st_size for path in files),
            )
        return self.references[name]

    def words(self, job: Job) -> list[str]:
        return [word.format(adapter=self.adapter) if "{adapter}" in word else word for word in job.words]

    def try_kills(self, name: str, rng: random.Random, most: int) -> None:
        """Kill a job up to `most` times, let it end, and compare its files with those of the undisturbed run."""
        job, reference = JOBS[name], self.reference(name)
        folder, story = self._new_folder(reference), []
        for _ in range(rng.randint(1, most)):
            place = None if rng.random() < _TIMED else draw_place(reference, rng)
            processes = start(self.words(job), folder, job.ranks, place and Watch(folder / job.watch, place=place))
            victim = 0 if place else rng.randrange(job.ranks)
            if not _kill(processes, victim, rng.random() * reference.seconds if place is None else None):
                break
            story.append(place)
            self._count(name, "moment" if place is None else place.name, folder)
        problem = None if _is_done(job, folder) else _ended(start(self.words(job), folder, job.ranks), folder)
        self._judge(name, folder, problem, f"killed at {story}")

    def try_alone(self, name: str, rng: random.Random) -> None:
        """Kill a job once that a user started, or its launcher or one of its ranks, and continue as `try_kills`."""
        job, reference = JOBS[name], self.reference(name)
        folder = self._new_folder(reference)
        process = start_alone(self.words(job), folder, job.ranks)
        while process.poll() is None and not any((folder / job.watch).rglob("*")):
            time.sleep(0.01)  # it imports libraries
        time.sleep(rng.random() * reference.seconds)
        everyone = [process, *(process.children() if job.ranks > 1 and process.poll() is None else [])]
        victim = rng.choice(everyone)
        with suppress(psutil.NoSuchProcess):  # it may have ended by itself
            victim.kill()
        if process.wait(_MOST_SECONDS) != 0:
            self._count(name, "process of a user", folder)
        # Ranks that lost their launcher stop by themselves.
        _, left = psutil.wait_procs(everyone[1:], _MOST_SECONDS)
        for other in left:
            other.kill()
        problem = f"{len(left)} ranks did not end" if left else None
        if not problem and not _is_done(job, folder) and start_alone(self.words(job), folder, job.ranks).wait():
            problem = f"failed: {log_of(folder).read_text()[-3000:]}"
        self._judge(name, folder, problem, "killed as a process of a user")

    def _new_folder(self, reference: Reference) -> Path:
        self.trials += 1
        folder = reference.folder.with_name(f"trial-{self.trials}")
        folder.mkdir()
        return folder

    def _count(self, name: str, place: str, folder: Path) -> None:
        self.kills += 1
        self.by_job[name] += 1
        self.places[place] += 1
        self.unfinished += any(map(_is_temporary, folder.rglob(".*")))

    def _judge(self, name: str, folder: Path, problem: str | None, story: str) -> None:
        found = [*differences(self.references[name].content, content_of(folder)), *held_locks(folder)]
        if problem or found:
            self.problems.append(f"{name}, trial {self.trials}, {story}: {problem or '; '.join(found[:5])}")
        else:
            shutil.rmtree(folder)


def run(seed: int, count: int, minutes: float | None, jobs: Sequence[str] = tuple(JOBS)) -> Figures:
    """Kill commands `count` times in all, or for `minutes`."""
    end = None if minutes is None else time.monotonic() + 60 * minutes
    alone = count // _OF_FORKS
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder).resolve())
        _ended(start(["--version"], campaign.folder), campaign.folder)  # imports, before a run is timed
        campaign.adapter = campaign.reference("train").folder / "run"
        for number, name in enumerate(_in_turn(jobs)):
            if campaign.kills >= count or (end is not None and time.monotonic() > end):
                break
            rng, left = random.Random(f"{seed}/{number}"), count - campaign.kills
            if left > alone:
                campaign.try_kills(name, rng, min(_MOST_KILLS, left - alone))
            else:
                campaign.try_alone(_STARTED_ALONE[left % len(_STARTED_ALONE)], rng)
        return {
            "kills": campaign.kills,
            "trials": campaign.trials,
            "places": dict(campaign.places.most_common()),
            "jobs": dict(campaign.by_job),
            "with_unfinished_files": campaign.unfinished,
            "problems": campaign.problems,
            "lost": len(campaign.problems),
        }


def _in_turn(jobs: Sequence[str]) -> Iterator[str]:
    while True:
        yield from jobs


def draw_place(reference: Reference, rng: random.Random) -> Place:
    """Draw an operation of an undisturbed run, or a byte of a file; each kind is as probable as the others."""
    kind = rng.choice([*sorted(reference.operations), "write"])
    operation = "open" if kind == "write" else kind
    byte = int(2 ** (rng.random() * math.log2(reference.largest_bytes))) if kind == "write" else None
    return Place(operation, rng.randint(1, reference.operations[operation]), byte)


def _kill(processes: Sequence[BaseProcess], victim: int, seconds: float | None) -> bool:
    """Let one process be killed, here after `seconds`, or by itself; then the others. Return whether it was killed."""
    processes[victim].join(_MOST_SECONDS if seconds is None else seconds)
    processes[victim].kill()
    processes[victim].join()
    was_killed = processes[victim].exitcode in KILLED
    for process in processes:
        if was_killed:
            process.kill()
        process.join()
    return was_killed


def _ended(processes: Sequence[BaseProcess], folder: Path) -> str | None:
    """Wait for all processes, and return what went wrong."""
    end = time.monotonic() + _MOST_SECONDS
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    if hanging:
        return f"ranks {hanging} did not end in {_MOST_SECONDS:.0f} s"
    codes = [process.exitcode for process in processes]
    log = log_of(folder)
    return f"exit codes {codes}: {log.read_text()[-1000:] if log.exists() else ''}" if any(codes) else None


def _is_done(job: Job, folder: Path) -> bool:
    return job.out is not None and (folder / job.out).exists()


def _is_temporary(path: Path) -> bool:
    return path.name not in (".lock", ".made_from.json")
