"""Write sensitivities as a table and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from finetune.mixed_precision.journal import ALL, Sensitivities, layer_of, part_of
from finetune.models.quant.bit_widths import stored_bytes
from finetune.system.atomic import write_text
from finetune.system.plotting import COLORS, figure, save_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKDOWN, PICTURE = "sensitivity.md", "sensitivity.png"
_RANKED = 10


def write_summary(found: Sensitivities, folder: Path, double: bool, dtype: str) -> None:
    """Write sensitivity.md and sensitivity.png; `double` and `dtype` are `quant.double` and `model.dtype`."""
    write_text(folder / MARKDOWN, as_markdown(found, double, dtype))
    save_png(as_picture(found), folder / PICTURE)


def as_markdown(found: Sensitivities, double: bool, dtype: str) -> str:
    """Format tables by layer and part, and the layers where 16 bits gain most per byte."""
    parts = list(dict.fromkeys(part_of(name) for name in found.shapes))
    targets = next(iter(found.measured.values())).tokens
    lines = [
        f"# Sensitivity of {found.model}",
        "",
        f"KL(16 bit || changed) in nats per target token on {found.rows:,} rows ({targets:,} targets), computed "
        "in fp32; ± is one standard error over rows. Each layer alone is stored as in the heading, all others in 16 "
        "bit.",
    ]
    for kind in found.kinds:
        total = sum(found.measured[name, kind].kl for name in found.shapes)
        lines += [
            "",
            f"## {kind}",
            "",
            f"All layers at once: {found.measured[ALL, kind]}; the sum of all single ones: {total:.2e}.",
            "",
            f"| layer | {' | '.join(parts)} |",
            f"|---|{'---|' * len(parts)}",
        ]
        for layer in range(found.layers):
            cells = {part_of(name): found.measured[name, kind] for name in found.shapes if layer_of(name) == layer}
            lines.append(f"| {layer} | {' | '.join(str(cells.get(part, '')) for part in parts)} |")
        gains = {}
        for name, shape in found.shapes.items():
            saved_bytes = stored_bytes("none", shape, double, dtype) - stored_bytes(kind, shape, double, dtype)
            gains[name] = found.measured[name, kind].kl / saved_bytes * 1e6
        lines += ["", "Layers where 16 bits gain most per byte:", "", "| layer | nats per MB |", "|---|---|"]
        best = sorted(gains, key=gains.__getitem__, reverse=True)[:_RANKED]
        lines += [f"| {name} | {gains[name]:.2e} |" for name in best]
    return "\n".join(lines) + "\n"


def as_picture(found: Sensitivities) -> Figure:
    """Draw bars by layer: one color for each part of a layer, one panel for each kind of storage."""
    parts = list(dict.fromkeys(part_of(name) for name in found.shapes))
    width_inches = min(30.0, max(4.8, 0.14 * len(found.shapes)) * len(found.kinds))
    drawn, panels = figure(width_inches, 3.4, len(found.kinds))
    bar = 0.8 / len(parts)
    for axes, kind in zip(panels, found.kinds, strict=True):
        for number, part in enumerate(parts):
            names = [name for name in found.shapes if part_of(name) == part]
            places = [layer_of(name) + (number - (len(parts) - 1) / 2) * bar for name in names]
            means = [found.measured[name, kind] for name in names]
            axes.bar(
                places,
                [mean.kl for mean in means],
                bar,
                yerr=[mean.error for mean in means],
                label=part,
                color=COLORS[number % len(COLORS)],
                error_kw={"elinewidth": 0.6},
            )
        axes.set_title(f"{kind} alone")
        axes.set_xlabel("layer")
        axes.set_xticks(range(found.layers))
        axes.grid(axis="x", visible=False)
    panels[0].set_ylabel("KL to the 16-bit model (nats per target)")
    panels[0].legend(ncols=2)
    return drawn
