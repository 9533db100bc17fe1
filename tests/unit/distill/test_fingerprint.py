"""A cache of another origin is refused, and each field that differs is named."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.config.sections import DistillConfig, ModelConfig, TeacherConfig
from finetune.distill import fingerprint as origins
from finetune.distill.fingerprint import fingerprint, teacher_adapter
from finetune.distill.shards import check_fingerprint, open_folder
from finetune.system.errors import ConfigError

WEIGHTS, ADAPTER = {"a.safetensors": "11", "b.safetensors": "22"}, {"adapter_config.json": "33"}


def chat(tokenizer: str, template: str) -> Any:
    """The parts of a chat template that a fingerprint uses."""
    return SimpleNamespace(digest=lambda: tokenizer, template=template)


CHAT = chat("tokens", "turns")


def origin(
    *, placement="resident", dtype="bfloat16", chat=CHAT, vocabulary=99, weights=WEIGHTS, adapter=ADAPTER, **keys
) -> dict[str, Any]:
    teacher = TeacherConfig(placement=placement, name="teacher", dtype=dtype)
    cfg = DistillConfig(objective="distill", teacher=teacher, **keys)
    return fingerprint(
        cfg, ModelConfig(name="teacher", dtype=dtype), chat, vocabulary, weights=weights, adapter=adapter
    )


def begin(folder: Path, fingerprint: Mapping[str, Any]) -> None:
    with open_folder(folder, fingerprint):
        pass


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"weights": WEIGHTS | {"b.safetensors": "44"}}, ["  weights.b.safetensors: '22' there, '44' here"]),
        ({"weights": {"a.safetensors": "11"}}, ["  weights.b.safetensors: '22' there, None here"]),
        ({"adapter": {}}, ["  adapter.adapter_config.json: '33' there, None here"]),
        ({"dtype": "float32"}, ["  dtype: 'bfloat16' there, 'float32' here"]),
        ({"vocabulary": 98}, ["  vocabulary: 99 there, 98 here"]),
        ({"chat": chat("other", "turns")}, ["  tokenizer: 'tokens' there, 'other' here"]),
        ({"top_k": 31}, ["  kept.top_k: 32 there, 31 here"]),
        ({"num_samples": 15}, ["  kept.num_samples: 16 there, 15 here"]),
        ({"seed": 1}, ["  kept.seed: 0 there, 1 here"]),
        (
            {"cache_kind": "hidden"},
            [
                "  kept.cache_kind: 'sampled' there, 'hidden' here",
                "  kept.num_samples: 16 there, None here",
                "  kept.seed: 0 there, None here",
                "  kept.top_k: 32 there, None here",
            ],
        ),
        (
            {"placement": "server"},
            [
                "  kept.cache_kind: 'sampled' there, 'top' here",
                "  kept.num_samples: 16 there, None here",
                "  kept.seed: 0 there, None here",
                "  served: 'nowhere' there, 'teacher' here",
            ],
        ),
    ],
)
def test_fields_that_differ_are_named_with_both_values(tmp_path, changed, named):
    begin(tmp_path / "cache", origin())
    for act in (check_fingerprint, begin):
        with pytest.raises(ConfigError) as failure:
            act(tmp_path / "cache", origin(**changed))
        first, *lines, last = str(failure.value).split("\n")
        assert first.startswith("distill.cache: ") and lines == named
        assert last.startswith("help: ") and "finetune cache" in last


def test_another_template_or_version_is_named(tmp_path, monkeypatch):
    begin(tmp_path / "cache", origin())
    with pytest.raises(ConfigError, match=r"\n  template: '\w{64}' there, '\w{64}' here\n"):
        check_fingerprint(tmp_path / "cache", origin(chat=chat("tokens", "other")))
    monkeypatch.setattr(origins, "SIGNAL_VERSION", 2)
    with pytest.raises(ConfigError, match=r"\n  version: 1 there, 2 here\n"):
        check_fingerprint(tmp_path / "cache", origin())


def test_unknown_fields_are_not_compared(tmp_path):
    begin(tmp_path / "cache", origin())
    check_fingerprint(tmp_path / "cache", origin())
    check_fingerprint(tmp_path / "cache", origin(weights=None, adapter=None))
    with pytest.raises(ConfigError, match="vocabulary"):
        check_fingerprint(tmp_path / "cache", origin(weights=None, adapter=None, vocabulary=98))


def test_the_settings_of_an_adapter_are_part_of_the_fingerprint(tmp_path):
    for name, text in (("adapter_config.json", '{"lora_alpha": 16}'), ("adapter_model.safetensors", "tensors")):
        (tmp_path / name).write_text(text)
    before = teacher_adapter(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 32}')
    after = teacher_adapter(str(tmp_path))
    assert [name for name in before if before[name] != after[name]] == ["adapter_config.json"]
    assert teacher_adapter(None) == {}
