"""Record a real run in the terminal as docs/terminal.svg.

python docs/record.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

FILE = Path(__file__).resolve().parent / "terminal.svg"
COLUMNS = 118
# What is shown -> what is run: the packaged tiny model, so that anybody can repeat it.
COMMANDS = {
    "finetune train config=quickstart.yaml train.eval_every=20": [
        "train",
        "config=quickstart.yaml",
        "train.eval_every=20",
        "output_dir={folder}/outputs/quickstart",
    ],
}


def record() -> None:
    """Run the commands, and write the picture."""
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    with tempfile.TemporaryDirectory() as folder:
        for shown, words in COMMANDS.items():
            console.print(Text(f"$ {shown}", style="bold green"))
            command = [sys.executable, "-m", "finetune", *(word.format(folder=folder) for word in words)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            for line in (done.stderr + done.stdout).replace(f"{folder}/", "").splitlines():
                style = "cyan" if line.startswith("evaluation") else ""
                console.print(Text(line, style=style, no_wrap=True, overflow="ellipsis"))
    picture = re.sub(
        r"@font-face \{.*?\}\s*", "", console.export_svg(title="finetune"), flags=re.DOTALL
    )  # no downloads
    FILE.write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    record()
