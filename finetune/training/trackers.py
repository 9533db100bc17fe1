"""Experiment trackers of a run: Weights & Biases, TensorBoard, MLflow and trackio. None of them can end a run."""

from __future__ import annotations

import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from finetune.config.schema import RunConfig
from finetune.system.atomic import write_text
from finetune.system.console import Log
from finetune.system.errors import MissingExtra
from finetune.system.wandb_login import has_wandb_key

RUN_ID = "tracker_run_id"
_MLFLOW_TAG = "finetune.run"
# Limit of MLflow's databases and servers.
_MOST_PARAMS = 100


@dataclass(frozen=True)
class TrackedRun:
    """A run as its trackers see it.

    Attributes:
        id: stored in the run's folder, so a resumed run continues the same run of each tracker.
        last_step: the last step that was logged before, 0 for a new run.
    """

    cfg: RunConfig
    folder: Path
    id: str
    last_step: int

    @property
    def name(self) -> str:
        return self.cfg.track.run_name or self.cfg.name

    @property
    def resumed(self) -> bool:
        return self.last_step > 0


class Tracking(Protocol):
    """One tracker's run."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the figures of a step."""

    def close(self) -> None:
        """Write what is left, and end the run."""


class Wandb:
    """Weights & Biases, offline without a key."""

    def __init__(self, run: TrackedRun):
        import wandb

        configured = "WANDB_MODE" in os.environ or has_wandb_key()
        self._run = wandb.init(
            project=run.cfg.track.project,
            id=run.id,
            name=run.name,
            dir=str(run.folder),
            config=run.cfg.model_dump(),
            resume="allow",
            mode=None if configured else "offline",
            settings=wandb.Settings(init_timeout=30, silent=True, console="off"),
        )

        self._rewards: set[str] = set()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name in values:
            # A run is as good as its highest reward; the summary of other figures is the last value.
            if name.endswith("/reward") and name not in self._rewards:
                self._run.define_metric(name, summary="max,last")
                self._rewards.add(name)
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class Tensorboard:
    """TensorBoard event files in `<run>/tensorboard`."""

    def __init__(self, run: TrackedRun):
        from torch.utils.tensorboard import SummaryWriter

        # Files of an earlier run that left no checkpoint are in the same folder: their steps are hidden.
        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.last_step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Mlflow:
    """MLflow: the server of MLFLOW_TRACKING_URI, else a database in the run's folder."""

    def __init__(self, run: TrackedRun):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.folder.resolve() / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=uri)
        project = run.cfg.track.project
        experiment = self._client.get_experiment_by_name(project)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(project)
        known = self._client.search_runs([experiment_id], f"tags.`{_MLFLOW_TAG}` = '{run.id}'")
        if known:
            self._run_id = known[0].info.run_id
            self._client.update_run(self._run_id, status="RUNNING")
            return
        self._run_id = self._client.create_run(experiment_id, tags={_MLFLOW_TAG: run.id}, run_name=run.name).info.run_id
        params = [Param(key, str(value)) for key, value in _flat(run.cfg.model_dump())]
        for start in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(self._run_id, params=params[start : start + _MOST_PARAMS])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        # MLflow refuses other characters, which names of datasets may have.
        metrics = [self._metric(re.sub(r"[^\w/. -]", "_", name), value, now, step) for name, value in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


class Trackio:
    """trackio: the server or Space of its environment variables, else its own folder."""

    def __init__(self, run: TrackedRun):
        import trackio

        self._finish = trackio.finish
        # trackio finds runs by name, so the id is a part of it. Its notes belong to stderr.
        with redirect_stdout(sys.stderr):
            self._run = trackio.init(
                project=run.cfg.track.project,
                name=f"{run.name}-{run.id}",
                config=run.cfg.model_dump(),
                resume="allow",
                embed=False,
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self._finish()


# By their keys in the config's section `track`.
TRACKERS: dict[str, Callable[[TrackedRun], Tracking]] = {
    "wandb": Wandb,
    "tensorboard": Tensorboard,
    "mlflow": Mlflow,
    "trackio": Trackio,
}


class Trackers:
    """The trackers enabled in `cfg.track`. One that fails is named once and receives no more; the run goes on."""

    def __init__(self, cfg: RunConfig, folder: Path, last_step: int, warn: Log):
        """last_step: the last step that was logged before, 0 for a new run. Earlier steps are not logged again.

        Raises: MissingExtra if the library of a tracker is not installed.
        """
        names = [name for name in TRACKERS if getattr(cfg.track, name)]
        self._last_step, self._warn = last_step, warn
        self._active: dict[str, Tracking] = {}
        if not names:
            return
        run = TrackedRun(cfg, folder, _run_id(folder, last_step), last_step)
        for name in names:
            try:
                self._active[name] = TRACKERS[name](run)
            except ImportError as error:
                raise MissingExtra(f'track.{name} needs: pip install "finetune-qlora[tracking]"') from error
            except Exception as error:  # noqa: BLE001 - a tracker must not end a run, however it fails
                self._report(name, "did not start", error)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the figures of a step to each tracker, unless an earlier part of the run did."""
        if step <= self._last_step:
            return
        for name, tracker in list(self._active.items()):
            try:
                tracker.log(step, values)
            except Exception as error:  # noqa: BLE001 - see above
                del self._active[name]
                self._report(name, f"failed at step {step} and receives no more", error)

    def close(self) -> None:
        """End the run of each tracker."""
        for name, tracker in self._active.items():
            try:
                tracker.close()
            except Exception as error:  # noqa: BLE001 - see above
                self._report(name, "did not finish", error)
        self._active.clear()

    def _report(self, name: str, what: str, error: Exception) -> None:
        text = str(error).strip().partition("\n")[0] or type(error).__name__
        self._warn(f"WARNING: track.{name}: {what} ({text}); metrics.jsonl is complete")


def _run_id(folder: Path, last_step: int) -> str:
    """Return the id that trackers know this run by: a new one for a new run."""
    file = folder / RUN_ID
    if last_step and file.exists():
        return file.read_text(encoding="utf-8").strip()
    run_id = uuid.uuid4().hex[:8]
    write_text(file, run_id + "\n")
    return run_id


def _flat(node: Any, key: str = "") -> list[tuple[str, Any]]:
    """Return the settings of nested sections by dotted key."""
    if isinstance(node, Mapping):
        return [pair for name, part in node.items() for pair in _flat(part, f"{key}.{name}".lstrip("."))]
    return [(key, node)]
