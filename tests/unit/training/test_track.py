"""metrics.jsonl survives crashes: a resumed run cuts the steps it repeats. Evaluations are printed."""

from __future__ import annotations

import json
import re
from contextlib import closing
from types import SimpleNamespace

import pytest

from finetune.training.track import METRICS, Goal, MetricsFile, NotebookView, Tracker
from tests.runs import REWARDED_RUN, small_run

REWARDED = (*REWARDED_RUN, "lora.dropout=0", "train.neftune_alpha=0")


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def test_steps_after_the_checkpoint_and_an_incomplete_line_are_cut(tmp_path):
    first = MetricsFile(tmp_path, resumed_step=0)
    for step in range(1, 6):
        first.log({"step": step, "loss": step / 3})
    first.close()
    kept = (tmp_path / METRICS).read_bytes().splitlines(keepends=True)[:3]
    with (tmp_path / METRICS).open("a") as stream:
        stream.write('{"step": 6, "lo')
    resumed = MetricsFile(tmp_path, resumed_step=3)
    resumed.log({"step": 4, "loss": 0.0})
    resumed.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert (tmp_path / METRICS).read_bytes().splitlines(keepends=True)[:3] == kept


def test_a_new_run_empties_the_file_and_writes_each_line_at_once(tmp_path):
    (tmp_path / METRICS).write_text('{"step": 1}\n')
    metrics = MetricsFile(tmp_path, resumed_step=0)
    metrics.log({"step": 1, "loss": 2.0})
    assert lines(tmp_path) == [{"step": 1, "loss": 2.0}]
    metrics.close()


def step(tracker: Tracker, number: int, **metrics: float) -> None:
    values = dict.fromkeys(("loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_bytes"), 1.0)
    tracker.step({"step": number, **values, **metrics}, 0.0)


def test_every_evaluation_is_printed_with_the_best_so_far_also_after_a_resume(tmp_path, capsys):
    cfg = small_run(tmp_path)
    with closing(Tracker(cfg, tmp_path, 5, 0)) as tracker:
        step(tracker, 1)
        step(tracker, 2, eval_loss=0.5, **{"eval/rows/accuracy": 0.25, "eval/rows/loss": 0.5})
    with closing(Tracker(cfg, tmp_path, 5, 2)) as tracker:
        step(tracker, 3, eval_loss=0.75)
        step(tracker, 5, eval_loss=0.25)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("evaluation:")]
    assert [re.search(r"step=(\d)/5, eval_loss=([\d.]+) \((.*?)\)", line).groups() for line in lines] == [
        ("2", "0.5000", "best so far"),
        ("3", "0.7500", "best 0.5000"),
        ("5", "0.2500", "best so far"),
    ]
    assert "rows/accuracy=0.25" in lines[0] and "rows/loss" not in lines[0]


def judged(number: int, reward: float, held_out: float | None = None) -> dict[str, float]:
    """Figures of a step with rewards; the objective is a loss, so it is minus the reward on held-out rows."""
    metrics = {"loss": -1e-9, "train/reward": reward, "train/answer_tokens": 7.0 * number}
    if held_out is None:
        return metrics
    interval = {"reward": held_out, "reward_low": held_out - 0.125, "reward_high": held_out + 0.125}
    named = {f"eval/rows/{name}": value for name, value in interval.items()}
    return {**metrics, "eval_loss": -held_out, "eval/rows/loss": -held_out, **named}


def test_a_run_with_rewards_shows_reward_and_length_and_its_best_is_the_highest(tmp_path, capsys):
    cfg = small_run(tmp_path, *REWARDED)
    with closing(Tracker(cfg, tmp_path, 4, 0)) as tracker:
        for number, held_out in ((1, 0.0), (2, 0.5), (3, 0.25), (4, None)):
            step(tracker, number, **judged(number, 0.75, held_out))
    text = capsys.readouterr().err
    found = [re.search(r"step=\d/4, reward=([\d.]+) \((.*?)\), (.*)", line) for line in text.splitlines()]
    assert [match.groups() for match in found if match] == [
        ("0.0000", "best so far", "rows/reward=0 [-0.125, 0.125]"),
        ("0.5000", "best so far", "rows/reward=0.5 [0.375, 0.625]"),
        ("0.2500", "best 0.5000", "rows/reward=0.25 [0.125, 0.375]"),
    ]
    assert "step 4/4  reward 0.7500  held-out 0.2500  answers 28 tokens  lr" in text
    assert "loss" not in text


@pytest.mark.parametrize(("words", "name"), [((), "loss"), (REWARDED, "reward")])
def test_a_notebook_draws_what_the_run_improves(tmp_path, monkeypatch, words, name):
    pages = []
    shown = SimpleNamespace(update=lambda page: pages.append(page.data))
    monkeypatch.setattr("IPython.display.display", lambda page, display_id: shown)
    view = NotebookView(Goal.of(small_run(tmp_path, *words)), 2, [{"step": 1, **judged(1, 0.5, 0.25)}])
    view.step({"step": 2, **judged(2, 0.75)}, "text", "1 s")
    assert "step 2 of 2" in pages[-1]
    assert f">training {name}</text>" in pages[-1] and f">held-out {name}</text>" in pages[-1]
