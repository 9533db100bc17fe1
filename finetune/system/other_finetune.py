"""Find another distribution of the import name `finetune`. The package index has one; Python imports one of the two."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

ADVICE = "pip uninstall finetune, then install finetune-qlora again"


def other_distribution(folders: Sequence[str] | None = None) -> str | None:
    """Describe an installed distribution named `finetune`; None without one.

    Args:
        folders: where Python searches packages, in that order; None: sys.path.
    """
    folders = sys.path if folders is None else folders
    ours = Path(__file__).resolve().parents[2]
    for place, folder in enumerate(folders):
        with suppress(OSError):
            if found := next(Path(folder).glob("finetune-*.dist-info"), None):
                hidden = ours in [Path(each).resolve() for each in folders[:place]]
                effect = "this one hides it here, it hides this one elsewhere" if hidden else "it hides this one"
                return f"another distribution has the import name finetune: {found.stem} in {folder}; {effect}"
    return None
