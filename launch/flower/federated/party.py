"""A round at a party: train from the shared adapter, clip the update, and keep what was sent."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from federated.adapters import Adapter, completed, read_adapter, without_a, write_adapter
from federated.commands import FREEZES_A, Clipping, clip_words, executable, run, train_words

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_CLIPPING = {"max-norm": "max_norm", "noise": "noise", "delta": "delta"}
SENT = "sent"  # folder of a round: the adapter that left the party


class BadTask(ValueError):
    """The server asks for what this party cannot do."""


@dataclass(frozen=True)
class Task:
    """What the server asks of a party. federation: its id. start: the shared adapter, perhaps without A; None: none."""

    federation: str
    round: int
    method: str
    seed: int
    start: Adapter | None


@dataclass(frozen=True)
class Party:
    """A party. config: YAML of its runs, with its base and its rows. work: folder that keeps all that it sent."""

    name: str
    config: str
    work: Path
    program: list[str]
    clipping: Clipping

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Party:
        """Build from the `--node-config` of a SuperNode.

        Raises:
            ValueError: a key is missing, or the name is no name.
        """
        if missing := [key for key in ("name", "config", "work") if not config.get(key)]:
            raise ValueError(f"--node-config: {', '.join(missing)} missing")
        if not NAME.fullmatch(str(config["name"])):
            raise ValueError(f"--node-config: name={config['name']!r} is not of letters, digits, '_', '.' and '-'")
        clipping = Clipping(**{key: float(config[word]) for word, key in _CLIPPING.items() if word in config})
        program = executable(str(config.get("finetune", "")))
        work = Path(str(config["work"])).expanduser().resolve()
        return cls(str(config["name"]), str(config["config"]), work, program, clipping)

    def update(self, task: Task) -> Adapter:
        """Train one round from the shared adapter, and return what leaves the party: its clipped adapter.

        Where A is frozen, it leaves only in a round without a start, in which the parties make it. A round that was
        done from the same start is not done again: another update, with other noise, would reveal more.

        Raises:
            BadTask: the task is no round, or comes without an A that this party lacks.
            CommandFailed: a command ended with an error.
        """
        if not NAME.fullmatch(task.federation) or task.round < 1 or task.method not in FREEZES_A:
            raise BadTask(f"round {task.round} of {task.federation[:64]!r} with method={task.method[:16]!r}")
        folder, start = self.work / task.federation / f"round-{task.round:03}", None
        if task.start is not None:
            start, shared = folder / "start", self._with_a(task)
            if not start.is_dir() or read_adapter(start) != shared:
                shutil.rmtree(folder, ignore_errors=True)
                write_adapter(shared, start)
        if not (folder / SENT).is_dir():
            self._train(task, folder, start)
        update = read_adapter(folder / SENT)
        has_a = start is not None and FREEZES_A[task.method]
        return Adapter(without_a(update.tensors), update.texts) if has_a else update

    def _with_a(self, task: Task) -> Adapter:
        """Return the start of a task, completed by the A of the newest adapter that this party sent."""
        assert task.start is not None
        sent = sorted((self.work / task.federation).glob(f"round-*/{SENT}"))
        known = read_adapter(sent[-1]).tensors if sent else {}
        tensors = completed(task.start.tensors, known)
        if FREEZES_A[task.method] and tensors.keys() == without_a(tensors).keys():
            raise BadTask("A of the shared adapter is not here")
        return Adapter(tensors, task.start.texts)

    def _train(self, task: Task, folder: Path, start: Path | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        trained = folder / "run"
        shutil.rmtree(trained, ignore_errors=True)
        updates = 1 + len(list(self.work.glob(f"*/round-*/{SENT}")))
        seed = task.seed + task.round - 1
        run(self.program, train_words(self.config, task.method, seed, start, trained), folder)
        run(self.program, clip_words(trained, start, folder / SENT, self.clipping, updates), folder)
        shutil.rmtree(trained)
