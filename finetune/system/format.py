"""Sizes, durations and tables as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

from finetune.system.errors import ConfigError


def format_bytes(size_bytes: float) -> str:
    """Format a size in units of 10^9 (GB), 10^6 (MB) or 10^3 (kB) bytes, as memory of GPUs is sold: `1.59 GB`."""
    if size_bytes >= 1e8:
        return f"{size_bytes / 1e9:,.2f} GB"
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes >= 1e5 else f"{size_bytes / 1e3:.1f} kB"


def format_duration(seconds: float) -> str:
    """Format a duration in its two largest units: `4.2 s`, `3 min 20 s`, `2 h 5 min`, `1 d 3 h`."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    whole = round(seconds)
    for size, unit, smaller_size, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller_size} {smaller}"
    raise AssertionError("60 seconds or more have minutes")


def format_estimate(seconds: float) -> str:
    """Format an estimated duration with two significant digits: `0.034 s`, `32 s`, `3 min 20 s`."""
    rounded = float(f"{seconds:.2g}")
    return f"{rounded:g} s" if rounded < 60 else format_duration(rounded)


def parse_size(key: str, text: str) -> int:
    """Return the bytes of `4GB`, `500MB` or `1GiB`; key names the option in the ConfigError of any other text."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    number = text.strip().upper().rstrip("KMGIB")
    unit = text.strip().upper()[len(number) :]
    try:
        size = int(float(number) * units[unit])
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise ConfigError(f"{key}={text}: write a size as 4GB or 500MB")
    return size


def first_lines(lines: Iterable[str], count: int, most: int) -> list[str]:
    """Return the first of `count` lines, and how many more there are."""
    return [*islice(lines, most), *([f"  … and {count - most:,} more"] if count > most else [])]


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows, the head first, as a markdown table with aligned columns."""
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows)
