"""The trajectory holds the settings that decide a run's result, and no others."""

from __future__ import annotations

import shlex
from datetime import UTC, datetime
from typing import Any

import pytest

from finetune.config.compose import load_config
from finetune.objectives.user_rewards import UserReward
from finetune.report.facts import next_commands
from finetune.report.run import read_run
from finetune.system.errors import ConfigError
from finetune.training.checkpoint import TrainState
from finetune.training.run_folder import check_continuation, describe_run, trajectory
from tests.runs import REWARDED_RUN, small_run


@pytest.mark.parametrize(
    "change",
    [
        "train.gradient_checkpointing=2",
        "train.gradient_checkpointing=offload",
        "train.kernels=peft",
        "train.compile=true",
        "quant.cache=false",
        "quant.keep_dequantized=true",
        "train.micro_batch_size=1",
    ],
)
def test_a_continued_run_may_change_how_it_computes(tmp_path, change):
    assert trajectory(small_run(tmp_path, change)) == trajectory(small_run(tmp_path))


@pytest.mark.parametrize(
    "change",
    ["quant.type=int8", "quant.double=false", "train.learning_rate=1e-3", "lora.rank=4", "preference.objective=orpo"],
)
def test_a_continued_run_may_not_change_its_result(tmp_path, change):
    assert trajectory(small_run(tmp_path, change)) != trajectory(small_run(tmp_path))


def own(name: str = "score", digest: str | None = "1f") -> UserReward:
    def function(**_: Any) -> list[float]:
        return []

    return UserReward(name, function, f"my folder/mine.py:{name}", digest)


@pytest.mark.parametrize("now", [[], [own(digest="2f")], [own("other")], [own(), own("other")]])
def test_a_continued_run_has_the_same_reward_functions(tmp_path, monkeypatch, now):
    cfg = load_config("quickstart.yaml", [*REWARDED_RUN, f"output_dir={tmp_path}"])
    before = TrainState(trajectory(cfg, [own()]), "digest")
    monkeypatch.setattr("finetune.training.run_folder.read_state", lambda checkpoint: before)
    check_continuation(cfg, "digest", tmp_path, [own()])
    with pytest.raises(ConfigError, match=r"reward_function: .*score.*1f.* then"):
        check_continuation(cfg, "digest", tmp_path, now)


@pytest.mark.parametrize("functions", [[], [own()], [own(), own("other")]])
def test_the_command_that_continues_a_run_repeats_its_reward_functions(tmp_path, functions):
    cfg = load_config("quickstart.yaml", [*REWARDED_RUN, f"output_dir={tmp_path}"])
    describe_run(cfg, "digest", functions, started=datetime.now(UTC), device_type="cpu", world_size=1)
    run = read_run(tmp_path)
    [(name, command)] = next_commands(run)
    words = [word for word in shlex.split(command) if word.startswith("reward_function=")]
    one, both = "my folder/mine.py:score", "[my folder/mine.py:score, my folder/mine.py:other]"
    assert (name, words) == ("resume", [[], [f"reward_function={one}"], [f"reward_function={both}"]][len(functions)])
    recorded = {function.name: {"word": function.word, "digest": "1f"} for function in functions}
    assert run.facts.get("reward_functions", {}) == recorded


def test_a_continued_run_has_the_same_json_schema_wherever_it_lies(tmp_path):
    def found(name: str, text: str) -> dict[str, Any]:
        (tmp_path / name).write_text(text)
        options = ["reward.functions={json_schema: 1}", "reward.length=null", f"reward.json_schema={tmp_path / name}"]
        return trajectory(load_config("quickstart.yaml", [*REWARDED_RUN, *options]))

    assert found("a.json", "{}") == found("b.json", "{}") != found("a.json", "true")
