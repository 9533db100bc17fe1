"""The rounds at the server: whom to ask, what to send, and the folder that keeps each round's adapter."""

from __future__ import annotations

import fcntl
import json
import random
import secrets
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from federated.adapters import Adapter, completed, count_bytes, read_adapter, without_a, write_adapter
from federated.commands import FREEZES_A, Averaging, aggregate_words, executable, parse_weights, run
from federated.party import NAME, Task

_WAIT_SECONDS = 2.0  # between two looks for parties


class FolderInUse(RuntimeError):
    """Another run writes the rounds of this folder; Flower may have kept it alive after its server was killed."""


class TooFewParties(RuntimeError):
    """A round has fewer usable updates than it needs; the next start repeats it."""


@dataclass(frozen=True)
class Answer:
    """What a party sent: its update, or why there is none. name: "" if the party could not say it."""

    name: str
    update: Adapter | None
    error: str = ""


# Nodes of Flower that are connected, and: task of each node -> answers of those that sent one.
Nodes = Callable[[], Sequence[int]]
Exchange = Callable[[Mapping[int, Task]], Mapping[int, Answer]]
Log = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """The settings of `[tool.flwr.app.config]`. start: adapter that round 1 starts from; "": an untrained one."""

    out: Path
    rounds: int
    min_parties: int
    fraction: float
    seed: int
    start: str
    program: list[str]
    averaging: Averaging

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Settings:
        """Build from a run's config. Raises: ValueError for a wrong value, before any party is asked."""
        method, start = str(config["method"]), str(config["start"])
        if method not in FREEZES_A:
            raise ValueError(f"method={method}: choose from {', '.join(FREEZES_A)}")
        if not start and not FREEZES_A[method]:
            raise ValueError(f"method={method}: needs start=ADAPTER, the same A and B for all parties")
        if not config["out"]:
            raise ValueError("out is missing: the folder that keeps each round's adapter")
        averaging = Averaging(
            method, parse_weights(str(config["weights"])), float(config["max-norm"]), float(config["max-error"])
        )
        return cls(
            Path(str(config["out"])).expanduser().resolve(),
            int(config["rounds"]),
            int(config["min-parties"]),
            float(config["fraction"]),
            int(config["seed"]),
            start,
            executable(str(config["finetune"])),
            averaging,
        )


class Federation:
    """The rounds of one federation. A folder of a finished round is never changed, so that a killed server goes on."""

    def __init__(self, settings: Settings, nodes: Nodes, exchange: Exchange, log: Log):
        self.settings, self.nodes, self.exchange, self.log = settings, nodes, exchange, log
        self.have_a: set[int] = set()  # nodes that have the A of the shared adapter
        settings.out.mkdir(parents=True, exist_ok=True)
        self.id = self._id()

    def run(self) -> Path:
        """Do the rounds that are not done, and return the folder of the final adapter.

        Raises:
            FolderInUse: another run writes the folder.
            TooFewParties: too few parties sent a usable update; the message names the others and their errors.
            CommandFailed: the updates cannot be averaged.
        """
        with open(self.settings.out / "lock", "w", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise FolderInUse(f"out={self.settings.out}: another run writes it\nhelp: flwr stop RUN") from error
            for number in range(self._done() + 1, self.settings.rounds + 1):
                self._round(number)
        final = self.settings.out / "final"
        shutil.rmtree(final, ignore_errors=True)
        shutil.copytree(self._folder(self._done()), final)
        self.log(f"federation: rounds={self._done()}, adapter={final}")
        return final

    def _round(self, number: int) -> None:
        start = self._start(number)
        shared = None if start is None else read_adapter(start)
        tasks = {node: self._task(number, shared, node) for node in self._choose(number)}
        answers = self.exchange(tasks)
        updates, errors = _sorted_out(tasks, answers)
        if len(updates) >= self.settings.min_parties:
            errors |= self._average(number, start, shared, updates)
        good = {node for node, answer in answers.items() if answer.update is not None and answer.name not in errors}
        # A party that failed, or is there anew, gets A again.
        self.have_a = (self.have_a - tasks.keys()) | good
        for name, error in sorted(errors.items()):
            self.log(f"round {number}: left out: {name}: {error}")
        if len(updates) < (needed := self.settings.min_parties):
            raise TooFewParties(f"round {number}: updates={len(updates)}, needed: min-parties={needed}")
        line = {
            "round": number,
            "parties": sorted(updates.keys() - errors.keys()),
            "left_out": errors,
            "bytes_sent": sum(count_bytes(task.start.tensors) for task in tasks.values() if task.start is not None),
            "bytes_received": sum(count_bytes(update.tensors) for update in updates.values()),
        }
        with (self.settings.out / "rounds.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.log(f"round {number}: " + ", ".join(f"{key}={value}" for key, value in line.items() if key != "round"))

    def _choose(self, number: int) -> list[int]:
        """Wait for enough parties, and draw a fraction of those that are there."""
        settings, waiting = self.settings, False
        while len(nodes := sorted(self.nodes())) < settings.min_parties:
            if not waiting:
                self.log(f"round {number}: waiting: parties={len(nodes)}, needed={settings.min_parties}")
            waiting = True
            time.sleep(_WAIT_SECONDS)
        count = max(settings.min_parties, round(settings.fraction * len(nodes)))
        return random.Random(settings.seed + number).sample(nodes, min(count, len(nodes)))

    def _task(self, number: int, shared: Adapter | None, node: int) -> Task:
        method = self.settings.averaging.method
        if shared is not None and FREEZES_A[method] and node in self.have_a:
            shared = Adapter(without_a(shared.tensors), shared.texts)
        return Task(self.id, number, method, self.settings.seed, shared)

    def _average(
        self, number: int, start: Path | None, shared: Adapter | None, updates: Mapping[str, Adapter]
    ) -> dict[str, str]:
        """Write the adapter of a round, and return the parties that the command leaves out, with its reasons."""
        known = {} if shared is None else shared.tensors
        out = self._folder(number)
        with tempfile.TemporaryDirectory(prefix=".round-", dir=self.settings.out) as folder:
            for name, update in updates.items():
                write_adapter(Adapter(completed(update.tensors, known), update.texts), Path(folder) / name)
            words = aggregate_words(sorted(updates), start, out, self.settings.averaging)
            run(self.settings.program, words, Path(folder))
        return json.loads((out / "federation.json").read_text(encoding="utf-8"))["left_out"]

    def _start(self, number: int) -> Path | None:
        if number > 1:
            return self._folder(number - 1)
        return Path(self.settings.start).expanduser().resolve() if self.settings.start else None

    def _done(self) -> int:
        """Return the number of finished rounds."""
        number = 0
        while self._folder(number + 1).is_dir():
            number += 1
        return number

    def _folder(self, number: int) -> Path:
        return self.settings.out / f"round-{number:03}"

    def _id(self) -> str:
        """Return the id under which the parties keep what they sent, drawn when the folder is new."""
        file = self.settings.out / "id"
        if not file.is_file():
            file.write_text(secrets.token_hex(8), encoding="utf-8")
        return file.read_text(encoding="utf-8").strip()


def _sorted_out(tasks: Mapping[int, Task], answers: Mapping[int, Answer]) -> tuple[dict[str, Adapter], dict[str, str]]:
    """Return the updates and the errors by the names of parties; a node without a name goes by its number."""
    updates: dict[str, Adapter] = {}
    errors: dict[str, str] = {}
    taken = Counter(answer.name for answer in answers.values())
    for node in tasks:
        answer = answers.get(node, Answer("", None, "no answer"))
        name = answer.name if NAME.fullmatch(answer.name) else f"node {node}"
        if answer.update is None:
            errors[name] = answer.error
        elif name != answer.name:
            errors[name] = f"the name {answer.name[:64]!r} is not of letters, digits, '_', '.' and '-'"
        elif taken[name] > 1:
            errors[name] = f"{taken[name]} parties have this name"
        else:
            updates[name] = answer.update
    return updates, errors
