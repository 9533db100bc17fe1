"""Compare the versions of constraints.txt with the database of known weaknesses, by pip-audit.

python .ci/audit.py PYTHON     a Python that has pip-audit

Exit code 1: a weakness that KNOWN does not list. Without the database it says so, and the exit code is 0.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PINS = Path(__file__).resolve().parents[1] / "constraints.txt"
# Id of a weakness -> why the pinned version stays. Each is printed by every run; one that is mended is taken out.
KNOWN: dict[str, str] = {}


def judge(report: dict[str, Any]) -> tuple[list[str], bool]:
    """Return lines that say what a report of pip-audit holds, and whether it holds a weakness that KNOWN lacks."""
    lines, unknown, found = [], False, set[str]()
    packages = report["dependencies"]
    skipped = [package for package in packages if "skip_reason" in package]
    if len(skipped) == len(packages):
        return [f"none: the database has no answer about any of {len(packages)} packages (is there a network?)"], False
    if skipped:
        lines.append(f"not looked up: {', '.join(package['name'] for package in skipped)}")
    for package in packages:
        for weakness in package.get("vulns", ()):
            names = {weakness["id"], *weakness["aliases"]}
            found |= names
            reason = next((KNOWN[name] for name in sorted(names & KNOWN.keys())), None)
            unknown |= reason is None
            mended = f"mended in {', '.join(weakness['fix_versions'])}" if weakness["fix_versions"] else "not mended"
            place = f"{package['name']} {package['version']}: {weakness['id']} ({mended})"
            lines.append(f"{place}: {'NOT KNOWN' if reason is None else f'known: {reason}'}")
    lines += [f"{name} is in KNOWN, and no pinned version has it: take it out" for name in sorted(KNOWN.keys() - found)]
    return [*lines, f"{len(packages) - len(skipped)} packages looked up, {len(found)} names of weaknesses"], unknown


def main(python: str) -> int:
    """Run pip-audit and print what it found."""
    words = ["--requirement", str(PINS), "--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off"]
    ended = subprocess.run([python, "-m", "pip_audit", *words], capture_output=True, text=True, check=False)
    try:
        report = json.loads(ended.stdout)
    except ValueError:
        last = (ended.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        print(f"none: pip-audit got no answer ({last[:300]})")
        return 0
    lines, unknown = judge(report)
    print("\n".join(lines))
    return int(unknown)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
