"""Files of a model that are copied unchanged."""

from __future__ import annotations

import shutil
from pathlib import Path

from finetune.models.load import TOKENIZER_FILES

GENERATION = "generation_config.json"
# vocab.json and merges.txt belong to slow tokenizers.
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
    """Copy the named files that exist in source."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
