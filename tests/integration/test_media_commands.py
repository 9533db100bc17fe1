"""Commands read the pictures and sounds of rows, or refuse them by name: none takes a placeholder for text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from finetune import load_config, train
from finetune.cli import main
from finetune.config.schema import QuantConfig
from finetune.data.loader import load_media_processor
from finetune.losses.hidden_states import target_states
from finetune.mixed_precision.layerwise import LayerwiseModel
from finetune.mixed_precision.measure import batches_of, load_rows
from finetune.models.load import load_base
from finetune.system.errors import ConfigError
from finetune.system.resources import packaged
from finetune.towers.towers import build_towers
from tests.runs import metrics

SAMPLE = packaged("data") / "sample"
CPU = torch.device("cpu")
SMALL = (
    f"model.name={packaged('data') / 'tiny-qwen2.5-omni'}",
    f"data.train=[{{path: {SAMPLE / 'both.jsonl'}, limit: 4}}]",
    "data.eval=[]",
    "data.max_length=256",
    "train.max_steps=2",
    "generation.num_examples=0",
)


def test_a_model_computed_by_layers_sees_what_the_model_sees():
    cfg = load_config("quickstart.yaml", [*SMALL, "model.dtype=float32"])
    batches = batches_of(load_rows(cfg, lambda _: None)[0], cfg.data.max_length)
    assert all(batch.media for batch in batches)
    media = load_media_processor(cfg.model, cfg.data)
    base = load_base(cfg.model, QuantConfig(type="none", double=False), CPU).eval()
    build_towers(base, cfg.model, media)
    with torch.no_grad():
        expected = [target_states(base, batch).hidden_ND for batch in batches]
    found = LayerwiseModel(cfg.model, cfg.quant, CPU, media).run(batches, {})
    for found_ND, expected_ND in zip(found, expected, strict=True):
        torch.testing.assert_close(found_ND, expected_ND, rtol=1e-4, atol=1e-4)


def test_bits_are_allocated_by_rows_with_media(tmp_path: Path):
    folder, file = tmp_path / "sensitivity", tmp_path / "mixed.yaml"
    assert main(["sensitivity", "config=quickstart.yaml", *SMALL, f"out={folder}", "rows=2", "type=int8"]) == 0
    words = [f"sensitivity={folder}", f"out={file}", "budget_gb=0.008", "rows=2"]
    assert main(["allocate", "config=quickstart.yaml", *SMALL, *words]) == 0
    assert "model.language_model.layers.0" in file.read_text()


def test_a_cached_teacher_of_rows_with_media_is_refused(tmp_path: Path, capsys):
    words = ["distill.objective=recover", f"distill.cache={tmp_path / 'cache'}"]
    assert main(["cache", "config=quickstart.yaml", *SMALL, *words]) == 2
    assert "distill.teacher.placement=resident" in capsys.readouterr().err and not (tmp_path / "cache").exists()


def test_a_cached_reference_of_pairs_with_media_is_that_of_the_run(tmp_path: Path):
    pairs = tmp_path / "pairs.jsonl"
    rows = [json.loads(line) for line in (SAMPLE / "both.jsonl").read_text().splitlines()[:4]]
    pairs.write_text("".join(json.dumps(pair(row)) + "\n" for row in rows))
    settings = [*SMALL, f"data.train={pairs}", "preference.objective=dpo", "lora.dropout=0"]
    cache = [f"preference.cache={tmp_path / 'cache'}"]
    assert main(["cache", "config=quickstart.yaml", *settings, *cache]) == 0
    found = []
    for name, words in (("online", []), ("cached", ["preference.reference=cached", *cache])):
        train(load_config("quickstart.yaml", [*settings, *words, f"output_dir={tmp_path / name}"]))
        found.append([line["loss"] for line in metrics(tmp_path / name)])
    assert found[0] == pytest.approx(found[1], abs=1e-3)


def pair(row: dict) -> dict:
    """The row's answer, and a worse one."""
    question, answer = row["messages"][-2:]
    media = {name: [str(SAMPLE / file) for file in row[name]] for name in ("images", "audios")}
    rejected = [{"role": "assistant", "content": "none"}]
    return {"prompt": [question], "chosen": [answer], "rejected": rejected, **media}


def test_a_server_that_samples_answers_to_media_is_refused(tmp_path: Path):
    words = ["reward.loss=grpo", "reward.functions={exact: 1}", "reward.engine=server", "reward.url=http://localhost:9"]
    with pytest.raises(ConfigError, match=r"reward\.engine=process"):
        train(load_config("quickstart.yaml", [*SMALL, *words, f"output_dir={tmp_path}"]))
