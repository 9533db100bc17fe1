"""Show a run in a notebook: a progress bar and the loss curve, redrawn while it trains."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from finetune.system.plotting import curve, svg

# Limit of the share of time spent drawing.
_DRAWING_SHARE = 0.05
_SECONDS_BETWEEN_DRAWINGS = 1.0
_MOST_POINTS = 500
_LOSS, _HELD_OUT = "training loss", "held-out loss"


class NotebookView:
    """One output of the cell, replaced in place; messages appear above it."""

    def __init__(self, total_steps: int, past: Iterable[Mapping[str, Any]]):
        """Show the first drawing. past: metrics of earlier steps, for a resumed run."""
        from IPython.display import HTML, display

        self._html = HTML
        self._total = total_steps
        self._points: dict[str, dict[int, float]] = {_LOSS: {}, _HELD_OUT: {}}
        for metrics in past:
            self._note(metrics)
        self._text = "starting"
        self._next_drawing = 0.0
        self._shown: Any = display(HTML(self._page(self._last_step())), display_id=True)

    def step(self, metrics: Mapping[str, float], text: str, time_left: str) -> None:
        self._note(metrics)
        self._text = f"{text} · {time_left} left"
        if time.monotonic() >= self._next_drawing or self._last_step() == self._total:
            self._draw()

    def message(self, message: str) -> None:
        print(message, flush=True)

    def close(self) -> None:
        self._draw()

    def _note(self, metrics: Mapping[str, Any]) -> None:
        step = int(metrics["step"])
        self._points[_LOSS][step] = metrics["loss"]
        if "eval_loss" in metrics:
            self._points[_HELD_OUT][step] = metrics["eval_loss"]

    def _last_step(self) -> int:
        return max(self._points[_LOSS], default=0)

    def _draw(self) -> None:
        start = time.monotonic()
        self._shown.update(self._html(self._page(self._last_step())))
        end = time.monotonic()
        self._next_drawing = end + max(_SECONDS_BETWEEN_DRAWINGS, (end - start) / _DRAWING_SHARE)

    def _page(self, step: int) -> str:
        bar = f'<progress value="{step}" max="{self._total}" style="width: 20em"></progress>'
        text = f"<div>{bar} step {step} of {self._total} · {self._text}</div>"
        lines = {name: _thinned(points) for name, points in self._points.items() if points}
        picture = svg(curve("", lines, "step")) if lines else ""
        return f'{text}<div style="max-width: 44em">{picture}</div>'


def _thinned(points: Mapping[int, float]) -> tuple[list[float], list[float]]:
    """Keep every n-th point and the last one."""
    stride = max(1, len(points) // _MOST_POINTS)
    kept = list(points.items())[::-1][::stride][::-1]
    return [float(step) for step, _ in kept], [value for _, value in kept]
