"""Draw plots in one style, as SVG inside a page or as a PNG file."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.system.atomic import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which color-blind readers can tell apart: jfly.uni-koeln.de/color.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "font.size": 9,
    "grid.alpha": 0.3,
    "legend.fontsize": 8,
    "legend.frameon": False,
    # Text stays text, so that a page can be searched and read aloud; ids do not change from one drawing to the next.
    "svg.fonttype": "none",
    "svg.hashsalt": "finetune",
}


def figure(width_inches: float = 6.4, height_inches: float = 2.8, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """Return an empty figure with panels side by side; it needs no display and no closing."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.rcsetup import cycler

    with matplotlib.rc_context({**_STYLE, "axes.prop_cycle": cycler(color=COLORS)}):
        drawn = Figure(figsize=(width_inches, height_inches), layout="constrained")
        return drawn, list(drawn.subplots(1, panels, squeeze=False)[0])


def curve(
    title: str, lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], x_label: str, logarithmic: bool = False
) -> Figure:
    """Draw lines; `lines` maps a name to its (x, y), `logarithmic` is for the y axis."""
    drawn, (axes,) = figure()
    for name, (x, y) in lines.items():
        axes.plot(x, y, label=name, linewidth=1.4, marker="o" if len(x) < 3 else None)
    axes.set_title(title)
    axes.set_xlabel(x_label)
    if logarithmic:
        axes.set_yscale("log")
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=8)
    return drawn


def svg(drawn: Figure) -> str:
    """Return the figure as a self-contained <svg> element that scales with its page.

    Black becomes the page's text color and the background is transparent, for dark pages; COLORS become the CSS
    variables --line-1 … --line-7 of the page.
    """
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        drawn.savefig(file, format="svg", transparent=True, metadata=metadata)
    text = file.getvalue()
    head, body = text[text.index("<svg") :].split(">", 1)
    for number, color in enumerate(COLORS[:-1], 1):
        body = body.replace(color.lower(), f"var(--line-{number}, {color})")
    body = body.replace("#000000", "currentColor")
    # Several figures share a page, on which an id may stand once; one that nothing refers to is not needed.
    used, name = set(re.findall(r"#([\w.-]+)", body)), hashlib.sha256(body.encode()).hexdigest()[:8]
    body = re.sub(r' id="([^"]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", body)
    return re.sub(r' (width|height)="[^"]*"', "", head) + ' fill="currentColor">' + body


def save_png(drawn: Figure, file: Path) -> None:
    """Write the figure as a PNG file."""
    import matplotlib

    content = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        drawn.savefig(content, format="png", dpi=120)
    write_bytes(file, content.getvalue())
