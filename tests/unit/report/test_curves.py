"""Pictures of runs: their titles, curves and axes."""

from __future__ import annotations

import re

import pytest

from finetune.report.curves import overlaid, run_pictures
from finetune.report.run import Run, Series


def run_of(tmp_path, steps: int = 20, **metrics: float) -> Run:
    series = {
        name.replace("__", "/"): Series(list(range(1, steps + 1)), [value] * steps) for name, value in metrics.items()
    }
    return Run(tmp_path, metrics=series)


def numbers_below(svg: str) -> list[str]:
    return re.findall(r">([\d,.]+)</text>", svg)


def test_only_measured_quantities_are_drawn(tmp_path):
    titles = [picture.title for picture in run_pictures(run_of(tmp_path, loss=1.0, peak_bytes=2.0**30))]
    assert titles == ["Loss, nats per target token", "Peak memory, GB"]
    assert run_pictures(Run(tmp_path)) == []


def test_all_pictures_of_a_run_share_their_steps(tmp_path):
    run = run_of(tmp_path, 40, loss=1.0)
    once = Run(tmp_path, metrics={**run.metrics, "learning_rate": Series([39, 40], [1e-4, 0.0])})
    for picture in run_pictures(once):
        assert numbers_below(picture.svg)[:3] == ["0", "10", "20"]


def test_the_axis_names_the_steps_of_an_epoch(tmp_path):
    run = run_of(tmp_path, loss=1.0)
    assert "step (12 per epoch)" in run_pictures(run, 12)[0].svg and "epoch" not in run_pictures(run)[0].svg


def test_single_points_are_numbers(tmp_path):
    metrics = {"loss": Series([1, 2], [2.0, 1.0]), "eval/a/accuracy": Series([2], [0.5])}
    loss, accuracy = run_pictures(Run(tmp_path, metrics=metrics))
    assert loss.svg and not loss.numbers
    assert not accuracy.svg and accuracy.numbers == (("step 2", "50.0%"),)
    metrics = {"tokens_per_second": Series([7], [1234.5])}
    (several,) = overlaid([(name, Run(tmp_path, metrics=metrics)) for name in "xy"])
    assert several.numbers == (("x, step 7", "1,234"), ("y, step 7", "1,234"))


def test_only_several_held_out_sets_have_their_own_picture(tmp_path):
    one = run_of(tmp_path, loss=1.0, eval_loss=2.0, eval__a__loss=2.0)
    two = run_of(tmp_path, loss=1.0, eval_loss=2.0, eval__a__loss=1.0, eval__b__loss=3.0)
    by_set = "Held-out loss by set, nats per target token"
    assert by_set not in [picture.title for picture in run_pictures(one)]
    (picture,) = [picture for picture in run_pictures(two) if picture.title == by_set]
    assert ">a</text>" in picture.svg and ">b</text>" in picture.svg
    titles = [picture.title for picture in overlaid([("x", one), ("y", two)])]
    assert f"{by_set}, a" in titles and f"{by_set}, b" in titles
    assert not any(title.startswith(by_set) for title in [p.title for p in overlaid([("x", one), ("y", one)])])


def heights(svg: str) -> list[float]:
    """Return the heights of the points of the first curve."""
    path = re.findall(r'<path d="([^"]+)"[^>]*stroke: var\(--line-1', svg)[0]
    return [float(corner.split()[1]) for corner in re.split("[ML]", path)[1:]]


@pytest.mark.parametrize(("values", "logarithmic"), [([1.0, 0.01, 1e-4], True), ([1.0, 0.5, 0.25], False)])
def test_a_spread_over_powers_of_ten_is_drawn_on_a_logarithmic_axis(tmp_path, values: list[float], logarithmic: bool):
    run = Run(tmp_path, metrics={"loss": Series([1, 2, 3], values), "learning_rate": Series([1, 2, 3], values)})
    high, middle, low = heights(run_pictures(run)[0].svg)
    assert (abs((middle - high) - (low - middle)) < 0.01) == logarithmic
    high, middle, low = heights(run_pictures(run)[1].svg)  # never for a learning rate
    assert middle - high > low - middle


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 1e-30, 1e200])
def test_a_constant_curve_is_drawn(tmp_path, value: float):
    (picture,) = run_pictures(run_of(tmp_path, loss=value))
    assert re.search(r'<path d="M [^"]+L [^"]+"[^>]*--line-1', picture.svg)


def test_a_noisy_curve_has_a_moving_average_and_a_note(tmp_path):
    values = [float(i % 2) for i in range(200)]
    run = Run(tmp_path, metrics={"loss": Series(list(range(200)), values)})
    (picture,) = run_pictures(run)
    assert picture.note and picture.svg.count("var(--line-1") >= 2
    assert not run_pictures(run_of(tmp_path, loss=1.0))[0].note
    assert not overlaid([("a", run)])[0].note


def test_runs_differ_by_color_and_then_by_dashes(tmp_path):
    (picture,) = overlaid([(str(i), run_of(tmp_path, loss=float(i + 1))) for i in range(9)])
    curves = re.findall(r'<path d="M [^"]+"[^>]*style="([^"]*)"', picture.svg)
    styles = [
        (color[0], dashes[0] if (dashes := re.findall("stroke-dasharray: ([^;]+)", style)) else "")
        for style in curves
        if (color := re.findall(r"stroke: (var\(--line-\d|currentColor)", style)) and "stroke-width: 1.5" in style
    ]
    assert len(styles) == len(set(styles)) == 9


def rewarded(tmp_path, *names: str, **held_out: list[float]) -> Run:
    """A run with rewards; its losses are minus the rewards."""
    steps = {name: Series([1, 2], [0.25, 0.75]) for name in ("loss", *names)}
    evaluations = {f"eval/{name.replace('__', '/')}": Series([0, 2], values) for name, values in held_out.items()}
    config = {"reward": {"loss": "grpo"}}
    return Run(tmp_path, config=config, metrics={"eval_loss": Series([2], [-0.5]), **steps, **evaluations})


def test_a_run_with_rewards_has_curves_of_them_and_none_of_its_losses(tmp_path):
    figures = ("reward", "reward_std", "answer_tokens", "entropy", "sampling_gap", "clipped", "divergence")
    run = rewarded(tmp_path, *(f"train/{name}" for name in figures), a__reward=[0.1, 0.5], a__loss=[-0.1, -0.5])
    titles = [picture.title for picture in run_pictures(run)]
    assert len(titles) == len(figures) and not any("loss" in title.lower() for title in titles)
    assert [picture.title for picture in overlaid([("x", run)])][:2] == ["Reward, training", "Reward, a"]
    assert not any("loss" in picture.title.lower() for picture in overlaid([("x", run), ("y", run)]))


def test_held_out_rewards_have_a_band_between_the_ends_of_their_intervals(tmp_path):
    values = {"a__reward": [0.2, 0.5], "a__reward_low": [0.1, 0.4], "a__reward_high": [0.3, 0.9]}
    (picture,) = run_pictures(rewarded(tmp_path, "train/reward", **values))
    assert picture.note == "The band is the 95 % interval." and "opacity: 0.15" in picture.svg
    del values["a__reward_high"]
    (picture,) = run_pictures(rewarded(tmp_path, "train/reward", **values))
    assert not picture.note and "opacity: 0.15" not in picture.svg


def test_rewards_by_function_share_a_picture_and_have_their_names(tmp_path):
    run = rewarded(tmp_path, "train/reward_exact", "train/reward_my_own", "train/equal_groups", "train/unfinished")
    by_function, shares = run_pictures(run)
    assert ">exact</text>" in by_function.svg and ">my own</text>" in by_function.svg
    assert ">equal groups</text>" in shares.svg and ">unfinished</text>" in shares.svg
    titles = [picture.title for picture in overlaid([("x", run)])]
    assert titles[0].endswith(", exact") and titles[1].endswith(", my own") and len(set(titles)) == 4
