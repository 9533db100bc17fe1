"""Write the files of a merged model that are not weights."""

from __future__ import annotations

import json
from pathlib import Path

from finetune.export.copied_files import GENERATION, TOKENIZER, copy_files
from finetune.export.merge.weights import MergePlan
from finetune.models.adapters.trained import Trained
from finetune.models.load import TOKENIZER_FILES


def write_metadata(trained: Trained, plan: MergePlan, dtype: str, folder: Path) -> None:
    """Write config.json, generation_config.json and the tokenizer: the adapter's own if it has one, else the base's."""
    config = json.loads((trained.folder / "config.json").read_text(encoding="utf-8"))
    config |= {"dtype": dtype, "vocab_size": plan.vocabulary}
    config.pop("torch_dtype", None)
    if plan.unties:
        config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    copy_files(trained.folder, folder, (GENERATION,))
    adapter = trained.adapters[0].folder
    copy_files(adapter if (adapter / TOKENIZER_FILES[0]).is_file() else trained.folder, folder, TOKENIZER)
