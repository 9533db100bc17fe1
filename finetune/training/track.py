"""Record a run: metrics.jsonl always, experiment trackers on request, and progress for the user."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from finetune.config.schema import RunConfig
from finetune.report.facts import with_interval
from finetune.report.run import METRICS
from finetune.system.atomic import write_bytes
from finetune.system.console import in_notebook, log
from finetune.system.format import format_bytes, format_duration
from finetune.system.plotting import curve, svg
from finetune.training.trackers import Trackers

_SECONDS_BETWEEN_LINES = 10.0
# Limit of the share of time spent drawing.
_DRAWING_SHARE = 0.05
_SECONDS_BETWEEN_DRAWINGS = 1.0
_MOST_POINTS = 500


@dataclass(frozen=True)
class Goal:
    """The figure that a run improves: a loss, or a reward, which rises.

    name: for texts. metric: of the training rows; on held-out rows `eval_loss` is the loss, or the negative reward.
    """

    name: str
    metric: str
    rises: bool

    @classmethod
    def of(cls, cfg: RunConfig) -> Goal:
        return cls("loss", "loss", False) if cfg.reward.loss == "none" else cls("reward", "train/reward", True)

    def held_out(self, metrics: Mapping[str, float]) -> float:
        return 0 - metrics["eval_loss"] if self.rises else metrics["eval_loss"]  # never -0

    def best(self, values: Iterable[float]) -> float:
        return max(values) if self.rises else min(values)


class ConsoleView:
    """Progress on stderr: a bar on a terminal, elsewhere a line every few seconds."""

    def __init__(self, total_steps: int):
        self._console = Console(stderr=True, highlight=False)
        self._total = total_steps
        self._last_line = 0.0
        self._bar: Progress | None = None
        if self._console.is_terminal:
            text, left = TextColumn("{task.description}"), TimeRemainingColumn()
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), text, left)
            self._bar = Progress(*columns, console=self._console)
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


class NotebookView:
    """A progress bar and the curve of loss or reward in one output of the cell, redrawn; messages appear above it."""

    def __init__(self, goal: Goal, total_steps: int, past: Iterable[Mapping[str, Any]]):
        """Show the first drawing. past: metrics of earlier steps, for a resumed run."""
        from IPython.display import HTML, display

        self._html, self._total, self._text, self._next_drawing = HTML, total_steps, "starting", 0.0
        self._goal = goal
        self._trained: dict[int, float] = {}
        self._held_out: dict[int, float] = {}
        for metrics in past:
            self._note(metrics)
        self._shown: Any = display(HTML(self._page()), display_id=True)

    def step(self, metrics: Mapping[str, float], text: str, time_left: str) -> None:
        self._note(metrics)
        self._text = f"{text} · {time_left} left"
        if time.monotonic() >= self._next_drawing or metrics["step"] == self._total:
            self._draw()

    def message(self, message: str) -> None:
        print(message, flush=True)

    def close(self) -> None:
        self._draw()

    def _draw(self) -> None:
        start = time.monotonic()
        self._shown.update(self._html(self._page()))
        end = time.monotonic()
        self._next_drawing = end + max(_SECONDS_BETWEEN_DRAWINGS, (end - start) / _DRAWING_SHARE)

    def _note(self, metrics: Mapping[str, Any]) -> None:
        step = int(metrics["step"])
        self._trained[step] = metrics[self._goal.metric]
        if "eval_loss" in metrics:
            self._held_out[step] = self._goal.held_out(metrics)

    def _page(self) -> str:
        step = max(self._trained, default=0)
        bar = f'<progress value="{step}" max="{self._total}" style="width: 20em"></progress>'
        text = f"<div>{bar} step {step} of {self._total} · {self._text}</div>"
        points = {f"training {self._goal.name}": self._trained, f"held-out {self._goal.name}": self._held_out}
        lines = {name: _thinned(some) for name, some in points.items() if some}
        picture = svg(curve("", lines, "step")) if lines else ""
        return f'{text}<div style="max-width: 44em">{picture}</div>'


def _thinned(points: Mapping[int, float]) -> tuple[list[float], list[float]]:
    """Keep every n-th point and the last one."""
    stride = max(1, len(points) // _MOST_POINTS)
    kept = list(points.items())[::-1][::stride][::-1]
    return [float(step) for step, _ in kept], [value for _, value in kept]


class MetricsFile:
    """metrics.jsonl: one complete line per step, readable while the run goes on.

    Attributes:
        past: the steps up to `resumed_step`.
        last_step: of the run before this part of it, which repeats the steps after `resumed_step`; 0 for a new run.
    """

    def __init__(self, folder: Path, resumed_step: int):
        path = folder / METRICS
        written = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        steps = []
        for number, line in enumerate(written, 1):
            try:
                step = json.loads(line)["step"]
            except (ValueError, LookupError, TypeError):
                if line.endswith(b"\n"):  # A crash may have cut the last line short.
                    log(f"WARNING: {path}:{number}: corrupt, and left out")
                continue
            if line.endswith(b"\n") and isinstance(step, int):
                steps.append((step, line))
        lines = [line for step, line in steps if step <= resumed_step]
        write_bytes(path, b"".join(lines))
        self.past: list[dict[str, Any]] = [json.loads(line) for line in lines]
        self.last_step = max((step for step, _ in steps), default=0) if resumed_step else 0
        self._stream = path.open("a", encoding="utf-8")

    def log(self, values: Mapping[str, Any]) -> None:
        self._stream.write(json.dumps(values) + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


class SilentTracker:
    """The tracker of the other ranks, which records nothing."""

    def step(self, metrics: Mapping[str, float], seconds_left: float) -> None:
        """Record the figures of one step, with those of an evaluation if there was one."""

    def message(self, message: str) -> None:
        """Show a message."""

    def close(self) -> None:
        """End the recording."""


class Tracker(SilentTracker):
    """Send the main rank's figures and messages to metrics.jsonl, the trackers and the user."""

    def __init__(self, cfg: RunConfig, folder: Path, total_steps: int, resumed_step: int):
        self._file = MetricsFile(folder, resumed_step)
        self._trackers = Trackers(cfg, folder, self._file.last_step, log)
        past, self._goal = self._file.past, Goal.of(cfg)
        self._view = NotebookView(self._goal, total_steps, past) if in_notebook() else ConsoleView(total_steps)
        self._total = total_steps
        self._held_out = [self._goal.held_out(line) for line in past if "eval_loss" in line]

    def step(self, metrics: Mapping[str, float], seconds_left: float) -> None:
        self._file.log(metrics)
        values = {name: value for name, value in metrics.items() if name != "step"}
        self._trackers.log(int(metrics["step"]), values)
        if "eval_loss" in metrics:
            self._held_out.append(self._goal.held_out(metrics))
            self._view.message(self._evaluation(metrics))
        held_out = f"held-out {self._held_out[-1]:.4f}  " if self._held_out else ""
        length = f"answers {metrics['train/answer_tokens']:.0f} tokens  " if "train/answer_tokens" in metrics else ""
        text = (
            f"{self._goal.name} {metrics[self._goal.metric]:.4f}  {held_out}{length}lr {metrics['learning_rate']:.2e}  "
            f"grad {metrics['grad_norm']:.3f}  {metrics['tokens_per_second']:,.0f} tokens/s  "
            f"{format_bytes(metrics['peak_bytes'])}"
        )
        self._view.step(metrics, text, format_duration(seconds_left))

    def _evaluation(self, metrics: Mapping[str, float]) -> str:
        last, best = self._held_out[-1], self._goal.best(self._held_out)
        note = "best so far" if last == best else f"best {best:.4f}"
        others = "".join(
            f", {name.removeprefix('eval/')}={with_interval(metrics, name)}"
            for name in metrics
            if name.startswith("eval/") and not name.endswith(("/loss", "/tokens", "_low", "_high"))
        )
        name, step = "reward" if self._goal.rises else "eval_loss", f"{int(metrics['step'])}/{self._total}"
        return f"evaluation: step={step}, {name}={last:.4f} ({note}){others}"

    def message(self, message: str) -> None:
        self._view.message(message)

    def close(self) -> None:
        for part in (self._view, self._file, self._trackers):
            part.close()
