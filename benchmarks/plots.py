"""Plot curves of benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Series = Mapping[str, Mapping[str, Mapping[str, Any]]]  # line -> point -> figures
_GB = 1e9


def draw(
    file: Path, title: str, label: str, points: Sequence[str], series: Series, ceiling: float | None = None
) -> None:
    """Plot tokens/s and peak memory over the points, one line per series.

    The axis of memory is linear, so that linear growth is a straight line.

    ceiling: operations per second, for the share in the title of the left panel.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (speed, memory) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    numbers = all(point.isdecimal() for point in points)
    for name, line in series.items():
        done = [(i, point) for i, point in enumerate(points) if "failed" not in line.get(point, {"failed": ""})]
        at = [int(point) if numbers else i for i, point in done]
        style = {"marker": "o", "linestyle": "-" if name.startswith("ours") else "--", "label": name}
        speed.plot(at, [line[point]["tokens_per_second"] for _, point in done], **style)
        memory.plot(at, [line[point]["peak_bytes"] / _GB for _, point in done], **style)
    if numbers:
        speed.set_xscale("log", base=2)
        speed.set_xticks([int(point) for point in points], [f"{int(point):,}" for point in points])
        memory.xaxis.set_major_formatter("{x:,.0f}")
    for axes, what in ((speed, "real tokens / s"), (memory, "peak memory, GB")):
        if not numbers:
            axes.set_xticks(range(len(points)), [p.replace("_proj", "").replace(",", ", ") for p in points])
        axes.set_xlabel(label)
        axes.set_ylabel(what)
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        axes.grid(alpha=0.3)
    speed.legend()
    under = "" if ceiling is None else f"; bf16 matmul ceiling {ceiling / 1e12:,.3g} TFLOP/s"
    figure.suptitle(title + under)
    figure.savefig(file, dpi=110)
    plt.close(figure)
