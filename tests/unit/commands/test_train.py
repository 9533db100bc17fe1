"""Reward functions come from the command line alone, and are checked before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.objectives.user_rewards import UserReward
from tests.commands import ROOT, run_here

GRPO = ("config=quickstart.yaml", "reward.loss=grpo")
CODE = "def score(completions, **_):\n    return [1 for _ in completions]\n\ndef other(**_): ...\n"


@pytest.fixture
def trained(monkeypatch) -> list[list[UserReward]]:
    found: list[list[UserReward]] = []
    monkeypatch.setattr(
        "finetune.training.recipe.train", lambda cfg, verbose, reward_functions: found.append(reward_functions)
    )
    return found


def run(folder: Path, *words: str) -> Any:
    (folder / "mine.py").write_text(CODE)
    return run_here("train", *GRPO, *words, cwd=folder)


@pytest.mark.parametrize(
    ("word", "names"),
    [
        ("mine.py:score", ["score"]),
        ("[mine.py:score, mine.py:other]", ["score", "other"]),
        ("[mine.py:score,trl.rewards:think_format_reward]", ["score", "think_format_reward"]),
    ],
)
def test_functions_reach_the_run(tmp_path, trained, word, names):
    done = run(tmp_path, f"reward_function={word}")
    assert done.returncode == 0, done.stderr
    [functions] = trained
    assert [function.name for function in functions] == names
    assert functions[0].word == "mine.py:score"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "reward.functions: empty"),
        (["reward_function=none.py:score"], "none.py does not exist"),
        (["reward_function=[mine.py:score, mine.py:score]"], "two functions are called score"),
        (["reward.loss=none", "reward_function=mine.py:score"], "needs reward.loss"),
        (["reward_functions=mine.py:score"], "did you mean reward_function?"),
        (["reward_function=3"], "expected FILE.py:NAME"),
    ],
)
def test_a_run_without_a_usable_reward_does_not_start(tmp_path, trained, words, message):
    done = run(tmp_path, *words)
    assert (done.returncode, trained) == (2, [])
    assert message in done.stderr


@pytest.mark.parametrize("key", ["reward_function", "reward_functions", "reward.function", "reward.reward_function"])
def test_a_config_cannot_name_code(tmp_path, trained, key):
    *parents, name = key.split(".")
    text = f"{name}: mine.py:score\n"
    for parent in parents:
        text = f"{parent}:\n  loss: grpo\n  {text}"
    (tmp_path / "mine.yaml").write_text(f"defaults: [quickstart, _self_]\n{text}")
    (tmp_path / "mine.py").write_text("raise SystemExit('it ran')")
    done = run_here("train", "config=mine.yaml", cwd=tmp_path)
    assert (done.returncode, trained) == (2, [])
    assert "unknown key" in done.stderr
    assert "reward_function=FILE.py:NAME" in done.stderr or key == "reward.function"
    assert "it ran" not in done.stderr


def test_a_dry_run_runs_no_code_of_the_user(tmp_path, trained):
    (tmp_path / "loud.py").write_text("raise SystemExit('it ran')")
    done = run(tmp_path, "reward_function=loud.py:score", "--dry-run")
    assert done.returncode == 0, done.stderr


def test_the_function_on_the_page_of_rewards_does_what_it_says(tmp_path, trained):
    page = (ROOT / "docs/reward.md").read_text()
    code = next(block for block in page.split("```python\n")[1:] if block.startswith("def ")).partition("```")[0]
    (tmp_path / "my_reward.py").write_text(code)
    done = run(tmp_path, "reward_function=my_reward.py:score")
    assert done.returncode == 0, done.stderr
    [[function]] = trained
    texts = ["4", "no", "4" + " " * 30]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    assert function.function(completions=completions, solution=["4"] * 3, level=[1] * 3) == [1.5, 0.5, 1]
