"""The digest of a base follows all of its weights and how they are stored."""

from __future__ import annotations

import shutil
from pathlib import Path

from finetune.config.compose import load_config
from finetune.models.digest import base_fingerprint
from finetune.serving.loading import base_digest


def test_a_merged_model_that_differs_only_in_its_last_bytes_has_another_digest(repo_root: Path, tmp_path: Path):
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        shutil.copytree(repo_root / "data" / "tiny-qwen2.5", folder)
    with (folders[1] / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    assert base_fingerprint(str(folders[0])) == base_fingerprint(str(folders[1]))
    digests = {
        base_digest(load_config("quickstart.yaml", [f"model.name={folder}", f"quant.type={quant}"]))
        for folder in folders
        for quant in ("nf4", "none")
    }
    assert len(digests) == 4
