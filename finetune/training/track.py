"""Record a run: metrics.jsonl always, Weights & Biases and TensorBoard on request, and progress for the user."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from finetune.config.schema import RunConfig, TrackConfig
from finetune.system.atomic import write_bytes
from finetune.system.console import in_notebook
from finetune.system.errors import MissingExtra
from finetune.system.format import format_bytes, format_duration
from finetune.training.notebook import NotebookView

METRICS = "metrics.jsonl"
_SECONDS_BETWEEN_LINES = 10.0


class Backend(Protocol):
    """A destination of metrics."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class WandbBackend:
    """Weights & Biases, offline without a key."""

    def __init__(self, cfg: RunConfig, folder: Path):
        """Raises: MissingExtra if wandb is not installed."""
        try:
            import wandb
        except ImportError as error:
            raise MissingExtra('track.wandb needs: pip install "finetune-qlora[wandb]"') from error
        configured = "WANDB_MODE" in os.environ or wandb.api.api_key
        self._run = wandb.init(
            project=cfg.track.project,
            name=cfg.track.run_name or cfg.name,
            dir=str(folder),
            config=cfg.model_dump(),
            resume="allow",
            mode=None if configured else "offline",
            settings=wandb.Settings(init_timeout=30, silent=True, console="off"),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class TensorboardBackend:
    """TensorBoard event files in `<run>/tensorboard`."""

    def __init__(self, folder: Path):
        """Raises: MissingExtra if tensorboard is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtra('track.tensorboard needs: pip install "finetune-qlora[tensorboard]"') from error
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class View(Protocol):
    """Progress for the user."""

    def step(self, metrics: Mapping[str, float], text: str, time_left: str) -> None: ...

    def message(self, message: str) -> None: ...

    def close(self) -> None: ...


class ConsoleView:
    """Progress on stderr: a bar on a terminal, elsewhere a line every few seconds."""

    def __init__(self, total_steps: int):
        self._console = Console(stderr=True, highlight=False)
        self._total = total_steps
        self._last_line = 0.0
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=total_steps)
            self._bar.start()

    def step(self, metrics: Mapping[str, float], text: str, time_left: str) -> None:
        step = int(metrics["step"])
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif step == self._total or time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self.message(f"step {step}/{self._total}  {text}  {time_left} left")

    def message(self, message: str) -> None:
        self._console.print(message, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class MetricsFile:
    """metrics.jsonl: one complete line per step, readable while the run goes on."""

    def __init__(self, folder: Path, resumed_step: int):
        path = folder / METRICS
        written = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        # A resumed run repeats the steps after its checkpoint. A crash may have cut the last line short.
        lines = [line for line in written if line.endswith(b"\n") and json.loads(line)["step"] <= resumed_step]
        write_bytes(path, b"".join(lines))
        self.past: list[dict[str, Any]] = [json.loads(line) for line in lines]
        self._stream = path.open("a", encoding="utf-8")

    def log(self, values: Mapping[str, Any]) -> None:
        self._stream.write(json.dumps(values) + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


class Tracker:
    """Send the main rank's figures and messages to metrics.jsonl, the backends and the user."""

    def __init__(self, cfg: RunConfig, folder: Path, total_steps: int, resumed_step: int):
        self._file = MetricsFile(folder, resumed_step)
        self._backends = build_backends(cfg, cfg.track, folder)
        self._view: View = NotebookView(total_steps, self._file.past) if in_notebook() else ConsoleView(total_steps)

    def step(self, metrics: Mapping[str, float], seconds_left: float) -> None:
        """Record the figures of one step, with those of an evaluation if there was one."""
        self._file.log(metrics)
        values = {name: value for name, value in metrics.items() if name != "step"}
        for backend in self._backends:
            backend.log(int(metrics["step"]), values)
        text = (
            f"loss {metrics['loss']:.4f}  lr {metrics['learning_rate']:.2e}  grad {metrics['grad_norm']:.3f}  "
            f"{metrics['tokens_per_second']:,.0f} tokens/s  {format_bytes(metrics['peak_bytes'])}"
        )
        self._view.step(metrics, text, format_duration(seconds_left))

    def message(self, message: str) -> None:
        self._view.message(message)

    def close(self) -> None:
        self._view.close()
        self._file.close()
        for backend in self._backends:
            backend.close()


class SilentTracker:
    """A tracker for the other ranks, which records nothing."""

    def step(self, metrics: Mapping[str, float], seconds_left: float) -> None:
        pass

    def message(self, message: str) -> None:
        pass

    def close(self) -> None:
        pass


def build_backends(cfg: RunConfig, track: TrackConfig, folder: Path) -> list[Backend]:
    """Start the backends enabled in `track`. If wandb fails to start, warn and train without it."""
    backends: list[Backend] = []
    if track.tensorboard:
        backends.append(TensorboardBackend(folder))
    if track.wandb:
        try:
            backends.append(WandbBackend(cfg, folder))
        except MissingExtra:
            raise
        except Exception as error:  # noqa: BLE001 - a tracker must not end a run, however it fails
            print(f"WARNING: track.wandb: wandb did not start ({error}); metrics.jsonl is complete", file=sys.stderr)
    return backends
