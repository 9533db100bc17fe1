"""Engines answer as the trained model did, or are refused with figures; where the reference comes from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.config.command_options import ServeOptions, ServeSettings
from finetune.config.compose import load_config
from finetune.config.schema import ModelConfig, RunConfig
from finetune.evaluation.probe import FILE, read_probe
from finetune.models.adapters.base_config import find_base_config
from finetune.serving.adapters import check_bases, find_adapters, name_base
from finetune.serving.engine.engine import EmbeddedEngine, build_engine
from finetune.serving.loading import load_template
from finetune.serving.reference import check_served, reference, references
from finetune.serving.scorers import engine_scorer
from finetune.system.errors import ConfigError, FinetuneError, InputError, IntegrityError
from tests.runs import reference_run
from tests.serving_engine import ScriptedEngine

OTHER = ("lora.rank=2", "train.seed=5", "train.learning_rate=2e-2")


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_config(str(reference_run() / "config.yaml"), [])


def options_of(**settings: Any) -> ServeOptions:
    return ServeOptions(serve=ServeSettings(max_batch=4, cache_tokens=4096, **settings))


@pytest.fixture(scope="module")
def engine(config: RunConfig) -> Iterator[EmbeddedEngine]:
    adapters = {"right": str(reference_run()), "wrong": str(reference_run(*OTHER))}
    built = build_engine(config, options_of().model_copy(update={"adapters": adapters}))
    yield built
    built.close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(reference_run(), folder, ignore=shutil.ignore_patterns("manifest.json"))  # tests edit its files
    return folder


def test_the_embedded_engine_answers_as_the_run_recorded(engine, config):
    probes = references(config, options_of(), {"right": reference_run()}, "base")
    found = check_served(probes, {"right": engine_scorer(engine, "right")}, 0.002)["right"]
    assert found.kl < 0.002 and found.top1 > 0.98 and "recorded" in found.source
    assert found.nats_served == pytest.approx(found.nats_trained, abs=0.01)


@pytest.mark.parametrize("served", ["wrong", None])
def test_another_adapter_and_a_dropped_one_are_refused_with_figures(engine, config, served):
    probes = references(config, options_of(), {"right": reference_run()}, "base")
    with pytest.raises(IntegrityError) as refused:
        check_served(probes, {"right": engine_scorer(engine, served)}, ServeSettings().max_kl)
    assert "right: " in str(refused.value) and "KL=" in str(refused.value)


def test_a_base_that_drifted_is_refused(config):
    built = build_engine(
        config.model_copy(update={"quant": config.quant.model_copy(update={"type": "none"})}), options_of()
    )
    try:
        draw = torch.Generator().manual_seed(0)
        probe = reference(config, None, None, 8)
        scorer = engine_scorer(built, None)
        assert probe.source.endswith("built-in texts")
        check_served({"base": probe}, {"base": scorer}, 0.1)  # 16 bits in place of 4
        with torch.no_grad():
            for parameter in built.base.parameters():
                parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=draw).to(parameter.dtype))
        with pytest.raises(IntegrityError):
            check_served({"base": probe}, {"base": scorer}, 0.1)
    finally:
        built.close()


def test_without_a_record_the_rows_of_the_run_are_computed_and_without_them_built_in_texts(run, config, engine):
    recorded = read_probe(run)
    (run / FILE).unlink()
    computed = reference(config, run, None, 8)
    assert recorded is not None and computed.rows == recorded.rows
    assert "computed on held-out rows" in computed.source
    check_served({"right": computed}, {"right": engine_scorer(engine, "right")}, 0.002)
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("heldout.jsonl", "gone.jsonl"))
    built_in = reference(config, run, None, 3)
    assert built_in.source == "computed on built-in texts" and len(built_in.rows) == 3
    check_served({"right": built_in}, {"right": engine_scorer(engine, "right")}, 0.002)


def test_a_merged_model_is_compared_with_the_run_that_it_was_made_from(config):
    probes = references(config, options_of(check=str(reference_run()), check_rows=2), {}, "merged")
    assert probes["merged"].rows == read_probe(reference_run()).rows[:2]  # type: ignore[union-attr]
    assert references(config, options_of(check_rows=0), {}, "merged") == {}
    with pytest.raises(ConfigError):
        references(config, options_of(check=str(reference_run())), {"a": Path("a"), "b": Path("b")}, "merged")


def test_an_engine_that_scores_nothing_is_an_error(config):
    engine = ScriptedEngine()
    probe = reference(config, reference_run(), None, 2)
    short = engine_scorer(engine, None)
    try:
        assert [len(scores) for scores in short(probe.rows)] == [row.scored for row in probe.rows]
        engine.load_adapter("silent", "nowhere")
        submit, engine.submit = (
            engine.submit,
            lambda request, put: submit(type(request)(request.ids, 0, adapter=request.adapter), put),
        )  # type: ignore[method-assign]
        with pytest.raises(FinetuneError):
            short(probe.rows)
    finally:
        engine.close()


def test_all_problems_of_adapters_are_told_at_once(run, tmp_path):
    given = ServeOptions(adapter=str(run), adapters={"run": str(run), "gone": str(tmp_path / "gone")})
    with pytest.raises(ConfigError) as refused:
        find_adapters(given.model_copy(update={"serve": ServeSettings(max_adapters=1)}))
    assert [part in str(refused.value) for part in ("adapters.run", "adapters.gone", "serve.max_adapters")] == [
        True
    ] * 3
    found = find_adapters(ServeOptions(adapter=str(run / "checkpoint-4"), adapters={"b": str(run)}))
    assert list(found) == ["run-checkpoint-4", "b"]
    with pytest.raises(ConfigError):
        name_base(ModelConfig(name="base"), {"base": run})


def test_adapters_of_other_bases_are_refused_unless_the_user_names_the_base(run, config):
    facts = json.loads((run / "run.json").read_text())
    facts["base"]["fingerprint"] = "0" * 64
    (run / "run.json").write_text(json.dumps(facts))
    check_bases({"right": reference_run()}, config.model, chosen=False, log=pytest.fail)
    with pytest.raises(ConfigError) as refused:
        check_bases({"a": run, "b": run}, config.model, chosen=False, log=pytest.fail)
    assert "adapters.a" in str(refused.value) and "adapters.b" in str(refused.value)
    logged: list[str] = []
    check_bases({"a": run}, config.model, chosen=True, log=logged.append)
    assert len(logged) == 1
    (run / "run.json").unlink()
    settings = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "org/other"}))
    with pytest.raises(ConfigError):
        check_bases({"a": run}, config.model, chosen=False, log=pytest.fail)


def test_adapters_with_another_template_are_refused(run, config):
    assert load_template(config, {"a": reference_run(), "b": run})[1].template
    with (run / "chat_template.jinja").open("a") as file:
        file.write("{# another #}")
    with pytest.raises(ConfigError) as refused:
        load_template(config, {"a": reference_run(), "b": run})
    assert "adapters.b" in str(refused.value)


def test_a_run_named_as_the_model_is_answered(run):
    with pytest.raises(InputError) as refused:
        find_base_config("finetune serve", None, str(run), None, ())
    assert f"adapter={run}" in str(refused.value)
