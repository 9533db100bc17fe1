"""What differs between families is in their records alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from finetune.models.families import FAMILIES, shape_of, text_settings
from finetune.models.families.proven import PROVEN
from finetune.system.resources import packaged

# "llama" is also GGUF's name of SentencePiece.
_LITERAL = re.compile("|".join(rf"[\"']{name}[\"']" for name in FAMILIES if name != "llama"))
_BRANCH = re.compile(r"model_type[\"']?\]?\)?\s*(==|!=|\bin\b|not in\b)|(match|startswith\()\s*[\w.]*model_type")


def test_no_code_outside_the_records_asks_for_a_family(repo_root: Path):
    records = repo_root / "finetune" / "models" / "families"
    found = [
        f"{file.relative_to(repo_root)}:{number}: {line.strip()}"
        for file in sorted((repo_root / "finetune").rglob("*.py"))
        if records not in file.parents
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if _LITERAL.search(line) or _BRANCH.search(line)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("line", ['if config.model_type == "x":', "if config['model_type'] in KNOWN:", 'x = "qwen2"'])
def test_a_branch_would_be_found(line: str):
    assert _LITERAL.search(line) or _BRANCH.search(line)


def test_what_is_proven_is_of_known_families():
    assert all(set(names) <= FAMILIES.keys() for names in PROVEN.values())


def test_every_packaged_model_has_a_shape():
    files = list(packaged("configs").glob("model/*.yaml"))
    names = [re.search(r"^name: (\S+)", file.read_text(), re.MULTILINE)[1] for file in files if "tiny" not in file.stem]
    assert len(names) > 40 and [name for name in names if shape_of(name) is None] == []


def test_a_decoder_keeps_the_model_type_of_its_whole():
    nested = {"model_type": "qwen2_5_vl", "text_config": {"model_type": "qwen2_5_vl_text", "hidden_size": 8}}
    assert text_settings(nested)["model_type"] == "qwen2_5_vl" and text_settings(nested)["hidden_size"] == 8
