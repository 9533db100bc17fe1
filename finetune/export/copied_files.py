"""What belongs to a model besides its weights and its config, copied as it is."""

from __future__ import annotations

import shutil
from pathlib import Path

from finetune.models.load import TOKENIZER_FILES

GENERATION = "generation_config.json"
# vocab.json and merges.txt are those of the slow tokenizers.
TOKENIZER = (
    *TOKENIZER_FILES,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
MODEL = (GENERATION, *TOKENIZER, "README.md")


def copy_files(source: Path, out: Path, names: tuple[str, ...]) -> None:
    """Those of the files that are there."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
