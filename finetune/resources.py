"""Files that come with the package: configs and data, the same from a wheel and from a checkout."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def packaged(kind: Literal["configs", "data"]) -> Path:
    """Folder of the packaged files: `finetune/_packaged/<kind>` in a wheel, the checkout's `<kind>` otherwise.

    Raises: FileNotFoundError if the installation has neither.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "_packaged" / kind, package.parent / kind):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"the installation lacks its {kind} folder: looked beside and inside {package}")
