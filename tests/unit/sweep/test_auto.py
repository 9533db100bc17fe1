"""The search of sweep.space=auto, with a stub in place of training: limits, kills, resumes, configs."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import count, islice
from pathlib import Path

import pytest

from finetune import load_config
from finetune.cli import main
from finetune.config.command_options import SweepSettings
from finetune.sweep import sweep
from finetune.sweep.auto_space import ATTENTION_BITS, LENGTH, MLP_BITS, MLP_RANK, RANK, RATE, TARGETS, packing_lengths
from finetune.sweep.outcome import write_outcome
from finetune.sweep.plan import Plan, plan_sweep
from finetune.sweep.process import Stop
from finetune.sweep.record import RECORD, Record, load_record
from finetune.sweep.suggest import draws
from finetune.system.errors import ConfigError
from tests.unit.sweep.stub import train
from tests.unit.sweep.test_sweep import STUB, faults, started

pytest.importorskip("optuna")
STEPS, BUDGET = 8, 2.0
WORDS = (f"train.max_steps={STEPS}", "generation.num_examples=0")


def planned(*words: str, config: str = "quickstart.yaml", **settings) -> Plan:
    return plan_sweep(config, [*WORDS, *words], SweepSettings(space="auto", **settings), lambda text: None)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return planned(budget=BUDGET)


def into(folder: Path, plan: Plan) -> Plan:
    return replace(plan, settings=plan.settings.model_copy(update={"out": str(folder)}))


def in_this_process(command: list[str], log: Path, stop: Stop) -> tuple[int, str]:
    """Take the place of `run_process`."""
    return train(command[command.index("train") + 2 :]), ""


@pytest.fixture(autouse=True)
def _trains_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sweep, "run_process", lambda command, log, stop: (train(command[command.index("train") + 2 :]), "")
    )


def choices(found: Record) -> list[tuple]:
    return [(trial.values, trial.rungs, trial.until, trial.metric, trial.over_limits) for trial in found.trials]


def keys_of(plan: Plan) -> list[str]:
    return [parameter.key for parameter in plan.space.parameters]


def test_a_search_trains_within_its_budget_and_never_a_step_twice(plan: Plan, tmp_path: Path):
    found = sweep.run_sweep(into(tmp_path, plan), lambda text: None)
    trained = (tmp_path / "trained.txt").read_text().splitlines()
    assert max(Counter(trained).values()) == 1 and len(trained) == BUDGET * STEPS
    assert Counter(max(trial.rungs) for trial in found.trials) == {2: 2, 4: 1, 8: 1}
    assert Counter(started(tmp_path)) == {trial.folder_name: len(trial.rungs) for trial in found.trials}
    assert [trial.status for trial in found.ranked()] == ["finished", "paused", "paused", "paused"]


class Killed(BaseException):
    """What kill -9 is to the process of a sweep: nothing runs after it."""


@pytest.fixture(scope="module")
def undisturbed(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Record:
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sweep, "run_process", lambda command, log, stop: (train(command[command.index("train") + 2 :]), "")
        )
        return sweep.run_sweep(into(folder, plan), lambda text: None)


def killed_at(moment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the sweep die at its n-th moment: before or after the record is written, or a run was made."""
    moments, save, run = count(1), Record.save, sweep.run_process

    def dies(work):
        def wrapped(*arguments):
            if next(moments) == moment:
                raise Killed
            result = work(*arguments)
            if next(moments) == moment:
                raise Killed
            return result

        return wrapped

    monkeypatch.setattr(Record, "save", dies(save))
    monkeypatch.setattr(sweep, "run_process", dies(run))


@pytest.mark.parametrize("first", range(5))
def test_a_search_that_is_killed_at_any_moment_makes_the_same_choices(
    plan: Plan, undisturbed: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int
):
    moments = 0
    for moment in count(1 + first, 5):
        folder = tmp_path / str(moment)
        with monkeypatch.context() as patch:
            killed_at(moment, patch)
            try:
                sweep.run_sweep(into(folder, plan), lambda text: None)
                break
            except Killed:
                moments += 1
        found = sweep.run_sweep(into(folder, plan), lambda text: None)
        assert choices(found) == choices(undisturbed), moment
        assert max(Counter((folder / "trained.txt").read_text().splitlines()).values()) == 1
    assert moments >= 6


def test_the_memory_that_was_free_at_the_start_stays_the_limit(plan: Plan, tmp_path: Path):
    sweep.run_sweep(into(tmp_path, plan), lambda text: None)
    before = json.loads((tmp_path / RECORD).read_text())
    assert plan.search is not None
    less = replace(plan, search=plan.search.with_memory(1.0))
    assert choices(sweep.run_sweep(into(tmp_path, less), lambda text: None)) == choices(load_record(tmp_path))
    assert json.loads((tmp_path / RECORD).read_text())["memory_bytes"] == before["memory_bytes"] != 1.0


def test_a_larger_budget_continues_the_search(plan: Plan, tmp_path: Path):
    first = choices(sweep.run_sweep(into(tmp_path, plan), lambda text: None))
    found = sweep.run_sweep(into(tmp_path, planned(budget=2 * BUDGET)), lambda text: None)
    assert [values for values, *_ in choices(found)][:4] == [values for values, *_ in first] and len(found.trials) == 8
    assert max(Counter((tmp_path / "trained.txt").read_text().splitlines()).values()) == 1


def test_candidates_over_a_limit_never_start_and_are_counted(plan: Plan, tmp_path: Path):
    assert plan.search is not None
    drawn = islice(draws(plan.space, [], [True, True], 0), 30)
    seconds = sorted(plan.search.predict(values).seconds or 0.0 for values in drawn)
    tight = planned(budget=BUDGET, hours=seconds[0] / 3600)
    found = sweep.run_sweep(into(tmp_path, tight), lambda text: None)
    assert all(trial.plan is not None and (trial.plan.seconds or 0) <= seconds[0] for trial in found.trials)
    over = sum(trial.over_limits for trial in found.trials)
    assert over > 0 and f"draws over a limit: {over}" in tight.headline(found)


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        ({"memory_gb": 0.01}, ["sweep.memory_gb"]),
        ({"hours": 1e-7}, ["sweep.hours"]),
        ({"hours": 1e-7, "memory_gb": 0.01}, ["sweep.hours", "sweep.memory_gb"]),
    ],
)
def test_a_limit_that_nothing_fits_is_named(settings: dict[str, float], keys: list[str]):
    with pytest.raises(ConfigError) as caught:
        planned(**settings)
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()[:-1]] == keys


def test_every_draw_is_a_valid_config_and_the_first_is_the_users_own(plan: Plan):
    assert plan.search is not None and plan.search.space.start is not None
    own = plan.search.config_of(plan.search.space.start)
    assert own == load_config("quickstart.yaml", [*WORDS, "lora.rank_pattern={}"])
    assert keys_of(plan) == [TARGETS, RANK, MLP_RANK, ATTENTION_BITS, MLP_BITS, RATE, LENGTH]
    seen = []
    for values in islice(draws(plan.space, [], [True, True], 3), 40):
        cfg = plan.search.config_of(values)
        assert cfg.train.batch_size * cfg.data.max_length == own.train.batch_size * own.data.max_length
        assert (MLP_RANK in values) == (values[TARGETS] == "all-linear") == bool(cfg.lora.rank_pattern)
        stored = {"8": cfg.quant.int8, "16": cfg.quant.skip_modules, "4": []}
        assert values[MLP_BITS] == "4" or "mlp" in stored[values[MLP_BITS]]
        assert values[ATTENTION_BITS] == "4" or "self_attn" in stored[values[ATTENTION_BITS]]
        seen.append(cfg)
    assert len({cfg.model_dump_json() for cfg in seen}) == 40


@pytest.mark.parametrize(
    ("words", "gone"),
    [
        (["lora.rank=8"], {RANK, MLP_RANK}),
        (["lora.target_modules=[q_proj]"], {TARGETS, MLP_RANK}),
        (["lora.target_modules=all-linear"], {TARGETS}),
        (["lora.rank_pattern={q_proj:4}"], {MLP_RANK}),
        (["quant.int8=[mlp]"], {ATTENTION_BITS, MLP_BITS}),
        (["quant.type=none"], {ATTENTION_BITS, MLP_BITS}),
        (["train.learning_rate=1e-3"], {RATE}),
        (["train.batch_size=8"], {LENGTH}),
        (["data.packing=false"], {LENGTH}),
    ],
)
def test_a_key_on_the_command_line_is_out_of_the_space(words: list[str], gone: set[str]):
    found = planned(*words)
    assert {TARGETS, RANK, MLP_RANK, ATTENTION_BITS, MLP_BITS, RATE, LENGTH} - set(keys_of(found)) == gone
    assert found.search is not None and found.search.space.start is not None


def test_several_values_of_a_key_replace_its_part_of_the_space():
    found = planned("lora.rank=2,4", "train.learning_rate=tag(log,interval(1e-3,2e-3))", "lora.alpha=8,16")
    by_key = {parameter.key: parameter for parameter in found.space.parameters}
    assert by_key[RANK].choices == ("2", "4") and (by_key[RATE].low, by_key[RATE].high) == (1e-3, 2e-3)
    assert by_key["lora.alpha"].choices == ("8", "16") and MLP_RANK not in by_key
    assert found.search is not None and found.search.space.start is None  # 5e-3 is outside


def test_packing_lengths_keep_every_row_and_the_tokens_of_a_step():
    cfg = load_config("quickstart.yaml", ["data.max_length=256", "train.batch_size=8"])
    assert packing_lengths(cfg, 100) == [128, 256, 512, 1024]
    assert packing_lengths(cfg, 256) == [256, 512, 1024]
    odd = load_config("quickstart.yaml", ["data.max_length=256", "train.batch_size=6", "train.micro_batch_size=3"])
    assert packing_lengths(odd, 10) == [64, 128, 256, 512]


def test_rows_that_a_length_cuts_keep_the_length():
    assert LENGTH not in keys_of(planned("data.max_length=64"))


def test_epochs_are_counted_in_steps():
    words = ["generation.num_examples=0", "train.max_steps=null", "train.epochs=0.5", "data.train.0.limit=640"]
    found = plan_sweep("quickstart.yaml", words, SweepSettings(space="auto"), lambda text: None)
    assert found.search is not None and found.search.total_steps > 1
    assert f"train.max_steps={found.search.total_steps}" in found.space.fixed


def test_a_space_without_another_candidate_ends_the_search(tmp_path: Path):
    words = (
        "lora.rank=4,8",
        "lora.target_modules=[q_proj]",
        "quant.int8=[mlp]",
        "train.learning_rate=1e-3",
        "train.batch_size=8",
    )
    found = sweep.run_sweep(into(tmp_path, planned(*words, budget=3.0)), lambda text: None)
    assert [trial.values for trial in found.trials] == [{RANK: "8"}, {RANK: "4"}] and found.exhausted
    assert sorted(trial.status for trial in found.trials) == ["finished", "paused"]


def test_a_failed_trial_is_not_tried_again_and_three_at_the_start_end_the_search(
    plan: Plan, tmp_path: Path, monkeypatch
):
    faults(tmp_path / "s", trial_002={"nan": True})
    found = sweep.run_sweep(into(tmp_path / "s", plan), lambda text: None)
    assert found.trials[1].status == "failed" and "nan" in (found.trials[1].error or "")
    assert started(tmp_path / "s").count("trial-002") == 1
    faults(tmp_path / "all", **{f"trial_00{i}": {"nan": True} for i in range(1, 5)})
    with pytest.raises(Exception, match="every run of the sweep failed"):
        sweep.run_sweep(into(tmp_path / "all", plan), lambda text: None)
    assert len(started(tmp_path / "all")) == 3


def test_the_config_of_each_best_trial_trains_as_it_is(plan: Plan, tmp_path: Path):
    found = sweep.run_sweep(into(tmp_path, planned(budget=6.0)), lambda text: None)
    assert plan.search is not None
    write_outcome(into(tmp_path, planned(budget=6.0)), found)
    files = sorted(file.name for file in tmp_path.glob("*.yaml"))
    best = found.ranked()[0]
    cfg, trained = load_config(str(tmp_path / "best.yaml")), plan.search.config_of(best.values)
    assert cfg.model_dump(exclude={"name", "output_dir"}) == trained.model_dump(exclude={"name", "output_dir"})
    assert "output_dir" not in cfg.model_fields_set and cfg.name == "quickstart-best"
    rows = (tmp_path / "sweep.md").read_text().splitlines()
    named = [row for row in rows if ".yaml" in row]
    assert "best.yaml" in named[0] and len(named) == len(files)
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert ">Pareto front<" in (tmp_path / "sweep.html").read_text()


def run(folder: Path, *words: str) -> int:
    return main(["sweep", "config=quickstart.yaml", f"sweep.out={folder}", STUB, *WORDS, *words])


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["sweep.budget=3", "sweep.hours=1", "lora.rank=4,8"], ["sweep.budget", "sweep.hours"]),
        (["sweep.space=auto", "sweep.trials=3", "data.eval=[]"], ["sweep.trials", "sweep.metric=eval_loss"]),
        (
            ["sweep.space=auto", "sweep.metric=exact_match_after", "generation.num_examples=4"],
            ["generation.metrics=[exact_match]"],
        ),
        (["sweep.space=auto", "sweep.budget=0.5"], ["sweep.budget"]),
        (["sweep.space=auto", "lora.rank=4,-8"], ["lora.rank=-8"]),
    ],
)
def test_no_run_starts_with_wrong_settings(tmp_path: Path, words: list[str], found: list[str], capsys):
    assert run(tmp_path / "s", *words) == 2
    error = capsys.readouterr().err
    assert all(text in error for text in found) and not (tmp_path / "s").exists()


def test_a_missing_optuna_is_named_with_the_other_problems(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr("finetune.sweep.plan.find_spec", lambda name: None)
    assert run(tmp_path / "s", "sweep.space=auto", "data.eval=[]") == 2
    error = capsys.readouterr().err
    assert "finetune-qlora[sweep]" in error and "sweep.metric" in error


def test_a_dry_run_shows_the_space_the_limits_and_some_draws(tmp_path: Path, capsys):
    assert run(tmp_path / "s", "sweep.space=auto", "sweep.memory_gb=3", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert (
        all(key in shown for key in (TARGETS, MLP_RANK, RATE, "memory=3.00 GB", "24 to step 2"))
        and not (tmp_path / "s").exists()
    )
    assert shown.count("needed memory=") == 8


def test_another_search_in_the_folder_is_refused(plan: Plan, tmp_path: Path):
    sweep.run_sweep(into(tmp_path, plan), lambda text: None)
    with pytest.raises(ConfigError, match=r"sweep\.seed: 0 there, found 1"):
        sweep.run_sweep(into(tmp_path, planned(budget=BUDGET, seed=1)), lambda text: None)
