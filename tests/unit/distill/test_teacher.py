"""Student and teacher share a cut vocabulary, and must agree on the tokens in use."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from finetune import load_config
from finetune.config.schema import RunConfig
from finetune.distill.teacher import check_same_tokens, check_vocabulary
from finetune.models.tokenizer import extend_tokenizer, load_tokenizer
from finetune.system.errors import ConfigError
from finetune.system.resources import packaged

TINY = packaged("data") / "tiny-qwen2.5"


def model_folder(folder: Path, rows: int, source: Path = TINY, **redefined: str) -> Path:
    """A model's text files: its tokenizer with some added tokens renamed, and a config with this number of rows."""
    folder.mkdir()
    definition = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    for token in definition["added_tokens"]:
        token["content"] = redefined.get(token["content"], token["content"])
    (folder / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    settings = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    for key in ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"):
        settings.pop(key, None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": rows}), encoding="utf-8")
    return folder


def run(student: Path, teacher: Path | None, *overrides: str) -> RunConfig:
    whom = (
        ["distill.objective=recover"]
        if teacher is None
        else ["distill.objective=distill", f"distill.teacher.name={teacher}"]
    )
    return load_config("quickstart.yaml", [f"model.name={student}", *whom, *overrides])


@pytest.mark.parametrize(("student", "teacher"), [(151_936, 152_064), (152_064, 151_936), (151_936, None)])
def test_qwens_tables_of_both_sizes_are_cut_to_the_tokenizer(tmp_path, shared, student, teacher):
    source = shared / "qwen2.5/tokenizer"
    small = model_folder(tmp_path / "student", student, source)
    large = None if teacher is None else model_folder(tmp_path / "teacher", teacher, source)
    cfg = run(small, large)
    tokenizer = load_tokenizer(cfg.model)
    assert check_vocabulary(cfg, tokenizer, np.arange(len(tokenizer))) == len(tokenizer) == 151_665


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "student", 896)


def test_a_redefined_token_is_refused_with_both_meanings_only_if_in_use(tmp_path, student):
    teacher = model_folder(tmp_path / "teacher", 1024, **{"<|im_end|>": "<|EOT|>"})
    cfg = run(student, teacher)
    tokenizer = load_tokenizer(cfg.model)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    used = np.arange(len(tokenizer))
    with pytest.raises(ConfigError) as failure:
        check_vocabulary(cfg, tokenizer, used)
    first, line, advice = str(failure.value).split("\n")
    assert f"distill.teacher.name={teacher}: 1 of the {len(used)} token" in first
    assert line == f"  {end}: '<|im_end|>' here, '<|EOT|>' for the teacher" and f"model.tokenizer={teacher}" in advice
    assert check_vocabulary(cfg, tokenizer, used[used != end]) == len(tokenizer)


def test_many_differences_are_counted_and_the_first_are_shown(student):
    class Other:
        def __len__(self) -> int:
            return 20

        def convert_ids_to_tokens(self, i: int) -> str:
            return f"other{i}"

    tokenizer = load_tokenizer(run(student, None).model)
    with pytest.raises(ConfigError) as failure:
        check_same_tokens(tokenizer, Other(), np.arange(30), "some/teacher")
    _, *lines, _ = str(failure.value).split("\n")
    assert len(lines) == 9 and lines[0].endswith("'other0' for the teacher") and lines[-1] == "  … and 22 more"
    with pytest.raises(ConfigError, match=r"\n  25: .* here, None for the teacher\n"):
        check_same_tokens(tokenizer, Other(), np.array([25]), "some/teacher")


def test_a_teacher_without_embeddings_for_tokens_in_use_is_refused(tmp_path, student):
    teacher = model_folder(tmp_path / "teacher", 500)
    cfg = run(student, teacher)
    tokenizer = load_tokenizer(cfg.model)
    with pytest.raises(ConfigError, match=rf"{teacher} has no embedding for 2 .*first 500"):
        check_vocabulary(cfg, tokenizer, np.array([3, 499, 500, 501]))
    assert check_vocabulary(cfg, tokenizer, np.array([3, 499])) == 500


def test_new_tokens_are_refused_with_or_without_spare_rows_of_the_teacher(tmp_path, student):
    teacher = model_folder(tmp_path / "teacher", 883)
    cfg = run(student, teacher, 'lora.new_tokens=["<fact>"]')
    tokenizer = load_tokenizer(cfg.model)
    new = len(tokenizer)
    extend_tokenizer(tokenizer, cfg.lora.new_tokens)
    with pytest.raises(ConfigError, match=rf"\n  {new}: '<fact>' here, None for the teacher\n"):
        check_vocabulary(cfg, tokenizer, np.array([3, new]))
    own = run(model_folder(tmp_path / "own", 883), None)
    with pytest.raises(ConfigError, match=r"no embedding for 1 (.|\n)*lora\.new_tokens"):
        check_vocabulary(own, tokenizer, np.array([3, new]))
