"""Everything of a model's folder that is not weights: configs, tokenizer, template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune.export.copied_files import GENERATION, TOKENIZER, copy_files
from finetune.export.merge.weights import MergePlan
from finetune.models.adapters.trained import Trained
from finetune.models.load import TOKENIZER_FILES


def write_metadata(trained: Trained, plan: MergePlan, dtype: str, folder: Path) -> None:
    """config.json, generation_config.json and the tokenizer: the adapter's own where it has one, else the base's.

    dtype: `bfloat16` and the like, of most of the weights.
    """
    config = json.loads((trained.folder / "config.json").read_text(encoding="utf-8"))
    config |= {"dtype": dtype, "vocab_size": plan.vocabulary}
    config.pop("torch_dtype", None)
    if plan.unties:
        config["tie_word_embeddings"] = False
    _write_json(folder / "config.json", config)
    copy_files(trained.folder, folder, (GENERATION,))
    adapter = trained.adapters[0].folder
    copy_files(adapter if (adapter / TOKENIZER_FILES[0]).is_file() else trained.folder, folder, TOKENIZER)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
