"""The gap table against plain transformers and PEFT, and what is measured, refused and cleaned up."""

from __future__ import annotations

import gc
import json
import math
import shutil
import tempfile
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.commands.eval import write_merged
from finetune.config.command_options import EvalOptions, KlCheckOptions, MergeOptions
from finetune.config.overrides import read_options
from finetune.config.schema import ModelConfig, QuantConfig
from finetune.evaluation.compare import Variants, evaluate_gap
from finetune.evaluation.gap_table import GapTable, load_gap
from finetune.evaluation.gap_text import write_gap
from finetune.export.merge.merge import merge
from finetune.losses.hidden_states import base_of
from finetune.models.adapters.files import load_adapter
from finetune.models.load import load_base
from finetune.system.errors import InputError, ResourceError
from finetune.system.locks import locked
from tests.unit.evaluation.conftest import BASE


def plainly(model, rows_file: Path) -> list[tuple[torch.Tensor, list[int]]]:
    """Of each row alone, by transformers' own forward pass: log-probabilities [N, V] and the N target ids."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    found = []
    for line in rows_file.read_text().splitlines():
        turns = json.loads(line)["messages"]
        asked = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(turns, return_dict=False)
        end = len(whole) - whole[::-1].index(tokenizer.convert_tokens_to_ids("<|im_end|>"))
        with torch.no_grad():
            logits = model(torch.tensor([whole])).logits[0].double()
        found.append((logits[len(asked) - 1 : end - 1].log_softmax(-1), whole[len(asked) : end]))
    return found


@pytest.fixture(scope="module")
def plain_scores(run_folder, rows_file) -> dict[str, list[tuple[torch.Tensor, list[int]]]]:
    """Log-probabilities of each variant, loaded and run without the package's kernels."""
    plain = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16)
    four_bit = ModelConfig(name=str(BASE), attention="sdpa")
    quantized = load_base(four_bit, QuantConfig(), "cpu")
    trained = load_adapter(load_base(four_bit, QuantConfig(), "cpu"), run_folder)
    in_16_bit = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16), run_folder)
    models = {"base": plain, "quantized": quantized, "trained": trained, "merged": in_16_bit.eval()}
    return {variant: plainly(model, rows_file) for variant, model in models.items()}


@pytest.mark.parametrize("variant", ["base", "quantized", "trained", "merged"])
def test_each_models_figures_are_those_of_plain_libraries(variant, plain_scores, table):
    log_probs, ids = zip(*plain_scores[variant], strict=True)
    nll = [-float(p[range(len(i)), i].sum()) for p, i in zip(log_probs, ids, strict=True)]
    tokens = sum(map(len, ids))
    right = sum(int((p.argmax(-1) == torch.tensor(i)).sum()) for p, i in zip(log_probs, ids, strict=True))
    (model,) = [model for model in table.models if model.variant == variant]
    figures = model.sets[0].figures
    assert model.sets[0].tokens == tokens
    # bf16 products differ between kernels: a logit's last bit, 0.0625 at 16, and here less than 1 % of the loss.
    assert figures["loss"].value == pytest.approx(sum(nll) / tokens, rel=0.02)
    assert abs(figures["accuracy"].value * tokens - right) <= 2
    assert figures["perplexity"].value == pytest.approx(math.exp(figures["loss"].value))


@pytest.mark.parametrize("variant", ["quantized", "trained", "merged"])
def test_each_models_distance_from_the_16_bit_base_is_that_of_whole_distributions(variant, plain_scores, table):
    base = torch.cat([p for p, _ in plain_scores["base"]])
    other = torch.cat([p for p, _ in plain_scores[variant]])
    kl_N = (base.exp() * (base - other)).sum(-1)
    figures = next(model for model in table.models if model.variant == variant).sets[0].figures
    assert figures["kl"].value == pytest.approx(float(kl_N.mean()), rel=0.1)
    assert figures["kl_p99"].value == pytest.approx(float(np.quantile(kl_N, 0.99, method="inverted_cdf")), rel=0.2)
    same = int((base.argmax(-1) == other.argmax(-1)).sum())
    assert abs(figures["top1"].value * len(kl_N) - same) <= 3


def test_the_table_is_whole(table, run_folder):
    assert [model.variant for model in table.models] == ["base", "quantized", "trained", "merged"]
    assert [model.name for model in table.models] == ["bf16 base", "NF4 base", "NF4 + adapter", "merged"]
    assert (table.reference, table.metric) == ("base", "exact match")
    for model in table.models:
        task, forgetting = model.sets
        assert (task.rows, task.answered, task.forgetting) == (12, 8, False)
        assert (forgetting.rows, forgetting.answered, forgetting.forgetting) == (8, 0, True)
        assert "score" in task.figures and "score" not in forgetting.figures
        for one in (*task.figures.values(), *forgetting.figures.values(), *task.differences.values()):
            assert one.low <= one.value <= one.high
    base = table.models[0]
    assert not base.sets[0].differences and "kl" not in base.sets[0].figures
    # Two of three answers are the base's own: rows 0, 3 and 6 of eight are not.
    assert base.sets[0].figures["score"].value == 5 / 8
    for model in table.models[1:]:
        for rows, against in zip(model.sets, base.sets, strict=True):
            for name, difference in rows.differences.items():
                assert difference.value == pytest.approx(rows.figures[name].value - against.figures[name].value)


def test_bytes_are_those_of_the_weights_as_stored(table, run_folder, tmp_path):
    base, quantized, trained, merged = (model.stored_bytes for model in table.models)
    weights = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16)
    assert base == merged == 2 * sum(parameter.numel() for parameter in weights.parameters())
    linears = sum(m.weight.numel() for m in weights.model.modules() if isinstance(m, torch.nn.Linear))
    # Half a byte a weight, and its scales: a byte for 64 of them, and less than as much again for those of the scales.
    expected = base - 2 * linears + linears / 2
    assert expected + linears / 64 < quantized < expected + linears / 64 * 2
    assert trained - quantized == sum(
        parameter.numel() * parameter.element_size()
        for name, parameter in load_adapter(weights, run_folder).named_parameters()
        if "lora_" in name
    )


def test_a_merged_folder_is_taken_instead_of_merging(run_folder, measure, table, tmp_path, monkeypatch):
    merge(
        MergeOptions(adapter=str(run_folder), out=str(tmp_path / "m"), kl_check=KlCheckOptions(num_examples=0)),
        lambda text: None,
    )
    monkeypatch.setattr("finetune.export.merge.merge.merge", lambda *_, **__: pytest.fail("merged again"))
    found = measure(f"adapter={run_folder}", f"merged={tmp_path / 'm'}", "answers=0", "variants=[base,merged]")
    assert found.models[1].sets[0].figures["kl"] == table.models[3].sets[0].figures["kl"]
    alone = measure(f"model={tmp_path / 'm'}", f"data=[{{path: {_rows(run_folder)}}}]", "answers=0", "quant=int8")
    assert [model.name for model in alone.models] == ["bf16 model", "INT8 model"]
    assert alone.models[0].sets[0].figures["loss"].value == found.models[1].sets[0].figures["loss"].value


def _rows(run_folder: Path) -> str:
    return yaml.safe_load((run_folder / "config.yaml").read_text())["data"]["eval"][0]["path"]


def test_the_first_rows_alone_are_what_a_limit_leaves(run_folder, measure, plain_scores):
    found = measure(f"adapter={run_folder}", "limit=3", "answers=2", "variants=[trained]")
    (only,) = found.models
    assert (only.sets[0].rows, only.sets[0].answered, found.reference) == (3, 2, None)
    assert only.sets[0].tokens == sum(len(ids) for _, ids in plain_scores["base"][:3])
    assert set(only.sets[0].figures) == {"loss", "perplexity", "accuracy", "score"} and not only.sets[0].differences


def test_a_run_that_held_rows_back_is_measured_on_those(run_folder, rows_file, measure, tmp_path):
    other = tmp_path / "run"
    other.mkdir()
    for file in run_folder.iterdir():
        if file.is_file() and not file.name.startswith("gap"):
            (other / file.name).write_bytes(file.read_bytes())
    (other / "config.yaml").write_text(
        f"model: {{name: '{BASE}'}}\ndata: {{train: [{{path: '{rows_file}'}}], held_out: 0.4}}\n"
    )
    found = measure(f"adapter={other}", "answers=1", "variants=[base]").models[0].sets[0]
    assert found.name == "held_out" and 1 <= found.rows < 12


def test_a_table_comes_back_from_its_folder_as_it_was(table: GapTable, tmp_path):
    files = write_gap(table, tmp_path / "new")
    assert sorted(file.name for file in files) == ["gap.json", "gap.md", "gap.png"]
    assert load_gap(tmp_path / "new") == table
    assert not list((tmp_path / "new").glob(".*"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["adapter, model: ", "neither"]),
        (
            ["adapter=a", "model=b", "metric=regex", "merged=c", "variants=[base]"],
            ["adapter, model: ", "both", "data: ", "merged: ", "pattern: "],
        ),
        (["model={base}"], ["data: missing"]),
        (["model={base}", "data=[{{path: {rows}}}]", "variants=[trained]"], ["variants: ", "trained"]),
        (["adapter={run}", "data=[]"], ["data: ", "help: pass data="]),
        (["adapter={run}", "merged={run}/nowhere", "limit=1"], ["merged=", "does not exist"]),
        (["model={run}", "data=[{{path: {rows}}}]"], ["help: pass adapter="]),
        (["adapter={run}", "merged={run}", "limit=1"], ["merged=", "no config.json"]),
        (
            ["adapter={run}", "data=[{{path: a.jsonl}}]", "forgetting=[{{path: b.jsonl}}]"],
            ["\nforgetting[0]: b.jsonl does not exist"],
        ),
        (["adapter={run}", "tasks=[nowhere.yaml]"], ["tasks: ", "nowhere.yaml"]),
        (["adapter={run}", "quant=none", "variants=[quantized]"], ["variants: ", "quantized"]),
    ],
)
def test_invalid_options_are_refused_before_a_model_is_loaded(
    words, expected, run_folder, rows_file, measure, monkeypatch
):
    monkeypatch.setattr("finetune.evaluation.compare.Variants.load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(InputError) as caught:
        measure(*(word.format(base=BASE, run=run_folder, rows=rows_file) for word in words))
    assert all(text in str(caught.value) for text in expected), caught.value


def test_nothing_is_left_behind_where_measuring_fails(run_folder, measure, tmp_path, monkeypatch):
    def fail(*_, **__):
        assert list(tmp_path.rglob("model.safetensors")), "merged beside the run, not in the system's folder"
        raise RuntimeError("in the middle")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    monkeypatch.setattr("finetune.evaluation.measure.score_tokens", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        measure(f"adapter={run_folder}", place=tmp_path)
    assert not list(tmp_path.iterdir())


def test_one_model_is_in_memory_at_a_time(run_folder, measure, monkeypatch):
    load, loaded = Variants.load, []

    def watched(self, *arguments):
        gc.collect()
        assert not [reference for reference in loaded if reference() is not None]
        model = load(self, *arguments)
        loaded.append(weakref.ref(base_of(model).model.layers[0]))
        return model

    monkeypatch.setattr(Variants, "load", watched)
    measure(f"adapter={run_folder}", "limit=2", "answers=1")
    assert len(loaded) == 4


def test_a_score_is_compared_row_by_row(table):
    base, merged = table.models[0].sets[0], table.models[3].sets[0]
    difference = merged.differences["score"]
    # Agresti and Min's interval, which is wider than nothing even where both are right on the same rows.
    assert difference.low < merged.figures["score"].value - base.figures["score"].value < difference.high
    assert difference.high - difference.low < 2 * (base.figures["score"].high - base.figures["score"].low)


def test_on_bad_row_skip_leaves_out_invalid_rows(run_folder, rows_file, measure, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows_file.read_text() + '{"messages": [{"role": "user", "content": "and?"}]}\n')
    words = (f"adapter={run_folder}", f"data=[{{path: {rows}}}]", "answers=0", "variants=[trained]")
    with pytest.raises(InputError, match=r"^data\[0\]: .*on_bad_row=skip"):
        measure(*words)
    assert measure(*words, "on_bad_row=skip").models[0].sets[0].rows == 12


def test_misleading_rows_cause_warnings(run_folder, rows_file, tmp_path):
    trained, other = tmp_path / "gone.jsonl", tmp_path / "other.jsonl"
    lines = rows_file.read_text().splitlines()
    trained.write_text("\n".join(lines[:4]) + '\n{"messages": []}\n')
    other.write_text("\n".join([*lines[2:4], lines[7]]) + "\n")
    run = tmp_path / "run"
    shutil.copytree(run_folder, run)
    config = (run / "config.yaml").read_text().replace("gone.jsonl", str(trained))
    (run / "config.yaml").write_text(config)
    logged: list[str] = []
    words = [f"adapter={run}", f"data=[{{path: {trained}}}]", f"forgetting=[{{path: {other}}}]", "variants=[trained]"]
    evaluate_gap(
        read_options(EvalOptions, [*words, "answers=0", "resamples=100", "on_bad_row=skip"], "finetune eval"),
        logged.append,
        write_merged,
    )
    warnings = [text for text in logged if text.startswith("warning: ")]
    assert warnings[0].startswith("warning: data[0]: ") and "gone.jsonl" in warnings[0]
    assert warnings[1].startswith("warning: forgetting: 2 texts of other")
    assert [text.split(": ")[1] for text in warnings[2:]] == ["gone", "gone", "other"]
    assert "1 invalid row" in warnings[2] and "too few" in warnings[3] and "too few" in warnings[4]


def test_folders_of_killed_processes_are_removed_and_those_of_live_ones_stay(run_folder, measure, tmp_path):
    dead, live = tmp_path / ".eval-dead", tmp_path / ".eval-live"
    for folder in (dead, live):
        (folder / "merged").mkdir(parents=True)
    with locked(live / ".lock"):
        measure(f"adapter={run_folder}", "limit=1", "answers=0", "variants=[base]", place=tmp_path)
    assert list(tmp_path.iterdir()) == [live]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("40 GB"), r"^bf16 base: .*40 GB.*\nhelp: .*'variants=\[trained\]'"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "bf16 base: .*\nhelp: lower batch_size"),
        (OSError(28, "No space left on device"), "bf16 base: .*\nhelp: .*out=DIR"),
    ],
)
def test_full_memory_and_disk_errors_have_help(error, message, run_folder, measure, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("finetune.evaluation.measure.score_tokens", fail)
    with pytest.raises(ResourceError, match=message):
        measure(f"adapter={run_folder}", "variants=[base,trained]")


def test_long_evaluations_log_their_progress(run_folder, monkeypatch):
    words = [f"adapter={run_folder}", "variants=[base]", "answers=4", "batch_size=2", "resamples=100"]
    monkeypatch.setattr("finetune.evaluation.measure.EVALUATION_TOKENS", 1)

    def logged(pace: float) -> list[str]:
        monkeypatch.setattr("finetune.evaluation.measure.PACE_SECONDS", pace)
        lines: list[str] = []
        evaluate_gap(read_options(EvalOptions, words, "finetune eval"), lines.append, write_merged)
        return [line for line in lines if " of 12" in line or " of 4" in line]

    scored = [f"bf16 base: asked, scored {done} of 12" for done in range(1, 12)]
    assert logged(0.0) == [*scored, "bf16 base: asked, answered 2 of 4"]
    assert logged(3600.0) == []
