"""The probe of a run: what is recorded, and a distance that never exceeds the true one."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from finetune.data.documents import Document
from finetune.data.encoded import IGNORE_INDEX
from finetune.evaluation.probe import (
    FILE,
    Probe,
    Row,
    Scored,
    compare,
    least_kl,
    measure,
    read_probe,
    require_close,
    row_of_ids,
    text_rows,
    write_probe,
)
from finetune.models.load import load_base
from finetune.system.errors import IntegrityError
from finetune.system.resources import packaged
from tests.models import random_qwen2
from tests.runs import reference_run, small_run

BASE = packaged("data") / "tiny-qwen2.5"


def document(tokens: int, targets: Sequence[int]) -> Document:
    """Token t of the text is t; `targets` are the positions that are predicted."""
    ids = np.arange(tokens, dtype=np.int32)
    labels = np.full(tokens, IGNORE_INDEX, dtype=np.int32)
    labels[np.array(targets, dtype=np.int64) - 1] = ids[list(targets)]
    return Document(ids, labels, "rows.jsonl:1")


def top_of(log_probs_V: torch.Tensor, count: int) -> dict[int, float]:
    best = log_probs_V.topk(count)
    return dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def random_log_probs(*, seed: int, sharp: float = 3.0, tokens: int = 50) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (sharp * torch.randn(tokens, generator=draw, dtype=torch.float64)).log_softmax(-1)


def test_rows_end_with_their_first_targets_and_hold_the_text_before_them():
    short, long = document(9, [4, 5, 7]), document(2000, [*range(1500, 1900)])
    rows = text_rows([short, long, document(30, [])])
    assert rows[0] == Row(tuple(range(8)), 1)
    assert (len(rows[1].ids), rows[1].ids[-1], rows[1].scored) == (512, 1563, 96)
    assert rows[2] == Row(tuple(range(30)), 1)
    assert len(text_rows([short] * 20)) == 8


def test_of_a_preference_the_desirable_answer_is_recorded():
    pair = document(20, [5, 6, 15, 16])
    chosen, only_rejected = (Document(pair.ids, pair.labels, "", chosen_tokens=tokens) for tokens in (10, 0))
    assert text_rows([chosen])[0].ids == tuple(range(7))
    assert text_rows([only_rejected])[0].ids == tuple(range(17))


def test_scores_are_those_of_transformers_in_float32():
    model = random_qwen2().eval()
    rows = [Row((5, 6, 7, 8, 9), 1), Row((1, 2, 3, 4, 5, 6, 7), 3)]
    with torch.no_grad():
        for row, scores in zip(rows, measure(model, rows, 4), strict=True):
            log_probs_TV = model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
            for place, scored in zip(range(row.first, len(row.ids)), scores, strict=True):
                assert scored.own == pytest.approx(float(log_probs_TV[place - 1, row.ids[place]]), abs=1e-5)
                assert scored.top == pytest.approx(top_of(log_probs_TV[place - 1], 4), abs=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_the_distance_is_a_lower_bound_that_grows_with_the_tokens_listed(seed):
    trained, served = random_log_probs(seed=seed), random_log_probs(seed=1000 + seed)
    true = float((trained.exp() * (trained - served)).sum())
    bounds = [least_kl(top_of(trained, count), top_of(served, count)) for count in (1, 5, 20, 50)]
    assert all(bound <= true + 1e-4 for bound in bounds)
    assert bounds[-1] == pytest.approx(true, abs=1e-4)
    assert bounds[2] > 0.3 * true


def test_equal_scores_are_at_distance_zero_and_lists_without_a_common_token_far_apart():
    scores = top_of(random_log_probs(seed=0), 20)
    assert least_kl(scores, scores) == pytest.approx(0, abs=1e-9)
    there, here = {1: math.log(0.9), 2: math.log(0.09)}, {3: math.log(0.9), 4: math.log(0.09)}
    assert least_kl(there, here) > 3


def probe_of(model: torch.nn.Module, rows: list[Row]) -> Probe:
    return Probe(rows, measure(model, rows), "test rows")


def test_a_scorer_is_compared_where_it_has_scores():
    model, other = random_qwen2().eval(), random_qwen2(seed=1).eval()
    rows = [row_of_ids(range(4, 20)), row_of_ids(range(30, 50))]
    probe = probe_of(model, rows)
    same = compare(probe, lambda rows: measure(model, rows))
    assert (same.kl, same.top1, same.rows, same.tokens) == (pytest.approx(0, abs=1e-6), 1.0, 2, 15 + 19)
    assert same.nats_trained == pytest.approx(same.nats_served)
    few = compare(probe, lambda rows: [[*scores[:2], *[None] * (len(scores) - 2)] for scores in measure(model, rows)])
    assert few.tokens == 4
    far = compare(probe, lambda rows: measure(other, rows))
    require_close({"adapter=a": same}, 0.001)
    with pytest.raises(IntegrityError) as refused:
        require_close({"adapter=a": same, "adapter=b": far, "adapter=c": far}, 0.001)
    lines = str(refused.value).splitlines()
    assert len(lines) == 4 and all(f"KL={far.kl:.2g}" in line for line in lines[1:3])


def test_scores_that_are_not_numbers_are_refused():
    row = row_of_ids([1, 2])
    probe = Probe([row], [[Scored(-0.1, {2: -0.1})]], "test rows")
    broken = compare(probe, lambda rows: [[Scored(math.nan, {2: math.nan})]])
    with pytest.raises(IntegrityError):
        require_close({"adapter=a": broken}, 1e9)


def test_a_run_records_its_held_out_rows_and_its_model_answers_them(tmp_path):
    from finetune.models.adapters.files import load_adapter

    run = reference_run()
    probe = read_probe(run)
    assert probe is not None and "held-out" in probe.source and len(probe.rows) == 8
    assert sum(map(len, probe.scores)) > 8
    config = small_run(tmp_path)
    model = load_adapter(load_base(config.model, config.quant, "cpu"), run)
    trained = compare(probe, lambda rows: measure(model, rows))
    assert trained.kl < 2e-4 and trained.top1 > 0.99
    with model.disable_adapter():
        base = compare(probe, lambda rows: measure(model, rows))
    assert base.kl > 100 * trained.kl


def test_a_probe_counts_only_for_the_adapter_it_was_recorded_with(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(reference_run(), run)
    checkpoint = run / "checkpoint-4"
    assert read_probe(checkpoint) is not None  # its weights are those of the final adapter
    tensors = run / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-4] + b"\0\0\0\0")
    assert read_probe(run) is None
    (checkpoint / "adapter_model.safetensors").unlink()
    for name in ("config.json", "README.md"):
        (tmp_path / name).touch()
    assert read_probe(tmp_path) is None


def test_a_corrupt_probe_is_refused(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(reference_run(), run)
    content = json.loads((run / FILE).read_text())
    content["rows"][0]["first"] = 2
    for text in (json.dumps(content), "{", "[]", json.dumps({**content, "rows": [{"ids": 3}]})):
        (run / FILE).write_text(text)
        with pytest.raises(IntegrityError):
            read_probe(run)


def test_a_local_base_is_recorded_by_its_fingerprint(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    rows = [row_of_ids([1, 2, 3])]
    write_probe(tmp_path, rows, measure(random_qwen2().eval(), rows), source="rows", base=str(BASE))
    probe = read_probe(tmp_path)
    assert probe is not None and probe.base is not None and len(probe.base) == 64
