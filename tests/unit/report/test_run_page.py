"""Every run has a report.html, even with missing, corrupt, odd or long files."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from finetune.cli import main
from finetune.evaluation.generation import Answer
from finetune.report.facts import cards, headline, origin
from finetune.report.run import read_run
from finetune.report.run_page import REPORT, render, try_report, write_report
from finetune.system.resources import packaged
from finetune.training.run_folder import write_rewarded, write_samples, write_worst
from tests.html_reader import Reader
from tests.media_rows import media_processor, png
from tests.run_folders import metric, write_run


def page_of(folder: Path) -> Reader:
    write_report(folder)
    return Reader((folder / REPORT).read_text())


def figures_in(read: Reader) -> list[str | None]:
    return [attrs.get("aria-label") for tag, attrs, _ in read.elements if tag == "figure"]


def test_a_killed_run_shows_its_last_step(tmp_path: Path):
    folder = write_run(tmp_path / "a")
    for name in ("result.json", "run.json", "adapter_model.safetensors"):
        (folder / name).unlink()
    read = page_of(folder)
    assert dict(zip(read.texts("dt"), read.texts("dd"), strict=True))["steps so far"] == "20"
    assert read.texts("p")[1].startswith("unfinished") and "train.resume=auto" in read.texts("code")[-1]
    assert len(figures_in(read)) == 6


@pytest.mark.parametrize("metrics", ["", '{"step": 1, "loss": 2}\n', '{"step": 1, "loss": NaN}\n{"step": 2, "lo'])
def test_a_folder_with_nothing_but_metrics_has_a_page(tmp_path: Path, metrics: str):
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(metrics)
    read = page_of(folder)
    assert read.texts("h1") == ["bare"] and figures_in(read) == []
    numbers = dict(zip(read.texts("dt"), read.texts("dd"), strict=True))
    assert numbers.get("step 1") == ("2.0000" if '"loss": 2' in metrics else None)


def test_a_nan_loss_leaves_the_rest(tmp_path: Path):
    folder = write_run(tmp_path / "a", status="failed", error="step 3: the loss is nan", eval_loss=float("nan"))
    lines = [metric(1), metric(2), {"step": 3, "loss": float("nan"), "learning_rate": 1e-4}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    read = page_of(folder)
    assert "step 3: the loss is nan" in [text.strip() for text in read.texts("p")]
    assert "held-out loss" not in read.texts("dt") and "Loss, nats per target token" in figures_in(read)


def test_unexpected_types_break_nothing(tmp_path: Path):
    folder = write_run(tmp_path / "a", breaches=[1, {"step": None}], evaluations=[1], status=3)
    (folder / "config.yaml").write_text("lora: 3\nmodel: {name: x}\nquant: {}\ndistill: {}\nguard: {}\ndata: []\n")
    for name in ("samples.json", "data.json", "gap.json", "worst_answers.json"):
        (folder / name).write_text('[{"prompt": "only"}, 3]')
    read = page_of(folder)
    assert read.texts("p")[0] == "x" and len(read.texts("li")) == 3  # data.json, gap.json, worst_answers.json
    assert "only" in read.texts("dd")


def test_the_page_of_a_long_run_is_small(tmp_path: Path):
    folder = write_run(tmp_path / "a")
    draw = random.Random(0)
    with (folder / "metrics.jsonl").open("w") as stream:
        for step in range(1, 10_001):
            noise = {"loss": 1 + draw.random(), "grad_norm": draw.random(), "tokens_per_second": 1e3 + draw.random()}
            stream.write(json.dumps(metric(step, **noise)) + "\n")
    write_report(folder)
    assert (folder / REPORT).stat().st_size < 250_000


def test_steps_that_ran_out_of_memory_are_listed(tmp_path: Path):
    read = page_of(write_run(tmp_path / "a", halvings=[{"step": 17, "micro_batch": 2}, 5]))
    assert "Memory ran out" in read.texts("h2") and read.texts("td")[:2] == ["17", "2"]
    assert "Memory ran out" not in page_of(write_run(tmp_path / "b")).texts("h2")


def test_breaches_of_the_guard_limit_are_listed(tmp_path: Path):
    found = [
        {"step": 10, "teacher_kl": 0.0612, "action": "recover", "after": 0.012},
        {"step": 20, "teacher_kl": 0.07, "action": "stop"},
    ]
    settings = ("distill=anchor", "guard.max=0.05", "train.eval_every=10")
    read = page_of(write_run(tmp_path / "a", *settings, breaches=found))
    assert "Guard limit exceeded" in read.texts("h2")
    assert any("guard.max is 0.05" in text for text in read.texts("p"))
    cells = read.texts("td")
    assert cells[:8] == [
        "10",
        "0.0612",
        "trained on the teacher alone",
        "0.0120",
        "20",
        "0.0700",
        "run stopped",
        "",
    ]
    assert "Guard limit exceeded" not in page_of(write_run(tmp_path / "b")).texts("h2")


def test_predictions_are_beside_the_measurements(tmp_path: Path):
    read = page_of(write_run(tmp_path / "a", predicted_peak_bytes=3 * 2**29))
    assert read.texts("td")[:4] == ["peak memory", "1.61 GB", "1.07 GB", "+50.0%"]
    times = {"predicted_train_seconds": 30.5, "predicted_time_source": "assumed: 100 GFLOP/s per core, cores=2"}
    read = page_of(write_run(tmp_path / "c", **times))
    assert read.texts("td")[:5] == ["training time", "30 s", "1 min 1 s", "-50.0%", "assumed: 100 GFLOP/s per core"]
    assert "Predicted and measured" not in page_of(write_run(tmp_path / "b")).texts("h2")


def test_the_origin_of_a_run_is_shown(tmp_path: Path):
    folder = write_run(tmp_path / "a", duration_seconds=75.0)
    facts = {
        "started": "2026-11-29T13:05:00+01:00",
        "command": "finetune train config=a.yaml",
        "commit": None,
        "hardware": {"cpu": "Z80", "cores": 2, "threads": 4},
    }
    (folder / "run.json").write_text(json.dumps(facts))
    assert origin(read_run(folder)) == "started 2026-11-29 12:05 UTC · took 1 min 15 s · Z80, cores=2, threads=4"
    read = page_of(folder)
    shown = dict(zip(read.texts("dt"), read.texts("dd"), strict=True))
    assert (shown["command"], shown["commit"], shown["threads"]) == ("finetune train config=a.yaml", "none", "4")
    (folder / "run.json").write_text(json.dumps({"started": 3, "hardware": []}))
    assert origin(read_run(folder)) == "took 1 min 15 s"


def test_perplexity_and_the_losses_before_training_are_on_the_cards(tmp_path: Path):
    before = {"eval_loss": 5.0, "eval/heldout/loss": 5.0}
    after = {"eval/a/loss": 1.0, "eval/b/loss": 2.0, "eval/b/accuracy": 0.5}
    folder = write_run(tmp_path / "a", evaluations=after, eval_loss_before=5.0, evaluations_before=before)
    run = read_run(folder)
    shown = {label: (value, detail) for label, value, detail in cards(run)}
    assert shown["held-out perplexity"] == (f"{math.exp(1.5):.4f}", "")
    assert shown["held-out loss"][1] == "5.0000 before" and shown["training loss"][1] == "1.5000 at step 1"
    assert run.metrics["eval_loss"].steps == [0, 10, 20] and run.metrics["eval_loss"].values[0] == 5.0
    assert "held-out perplexity" not in [label for label, *_ in cards(read_run(write_run(tmp_path / "b")))]


def test_what_preferences_changed_is_on_the_cards(tmp_path: Path):
    after = {
        f"eval/{name}/{figure}": value
        for figure, values in {"loss": (0.5, 0.7), "reward_accuracy": (0.5, 1.0), "reference_kl": (0.25, 0.75)}.items()
        for name, value in zip("ab", values, strict=True)
    }
    folder = write_run(tmp_path / "a", "preference.objective=dpo", evaluations=after)
    shown = {label: value for label, value, _ in cards(read_run(folder))}
    assert (
        shown["held-out pairs ranked right"] == "75.0%" and shown["KL from the reference, nats per token"] == "0.5000"
    )
    assert "held-out perplexity" not in shown
    del after["eval/a/reference_kl"], after["eval/b/reference_kl"]
    folder = write_run(tmp_path / "b", "preference.objective=dpo", evaluations=after)
    assert "KL from the reference, nats per token" not in [label for label, *_ in cards(read_run(folder))]


def test_the_worst_answers_are_shown_worst_first(tmp_path: Path):
    folder = write_run(tmp_path / "a")
    right = Answer("p", "four apples", " four apples ")
    wrong = [Answer(f"q{i}", "four apples", "four apples"[:i]) for i in (8, 0, 3)]
    write_worst(folder, [right, *wrong])
    read = page_of(folder)
    assert "Worst answers" in read.texts("h2") and any(text.startswith("3 of 4 ") for text in read.texts("p"))
    pairs = zip(read.texts("dt"), read.texts("dd"), strict=True)
    assert [text for label, text in pairs if label == "after"] == ["(nothing)", "fou", "four app"]
    write_worst(folder, [Answer("p", "x" * 30, str(i)) for i in range(12)])
    assert page_of(folder).texts("dt").count("expected") == 10
    write_worst(folder, [right])
    assert "Worst answers" not in page_of(folder).texts("h2")


def asked(*files: Path, given: str = "red") -> Answer:
    """An answer about pictures and sounds of the sample rows."""
    processor = media_processor("qwen2_5_omni")
    kinds = {".png": "image", ".wav": "audio", ".flac": "audio"}
    media = tuple(processor.measure(kinds.get(file.suffix, "image"), str(file)) for file in files)
    return Answer("".join(f"<{each.kind}>" for each in media) + "Which?", "blue", given, media=media)


def test_files_are_shown_beside_the_answers_about_them(tmp_path: Path):
    folder, sample = write_run(tmp_path / "a"), packaged("data") / "sample"
    one, other = sorted(sample.glob("pictures/*"))[:2]
    sound = min(sample.glob("sounds/*"))
    write_samples(folder, [asked(one), asked(other)], [asked(one, given="blue"), asked(other)])
    write_worst(folder, [asked(other, sound)])
    read = page_of(folder)
    pictures = [attrs for tag, attrs, _ in read.elements if tag == "img"]
    names = [f"image {file.name}, " for file in (one, other, other)]
    assert [attrs["alt"][: len(name)] for attrs, name in zip(pictures, names, strict=True)] == names
    assert all(attrs["src"].startswith("data:image/jpeg;base64,") for attrs in pictures)
    [player] = [attrs for tag, attrs, _ in read.elements if tag == "audio"]
    assert player["src"].startswith("data:audio/")
    # The same question about two pictures is two rows.
    assert read.texts("dd").count("<image>Which?") == 2 and "<image><audio>Which?" in read.texts("dd")
    [policy] = [attrs["content"] for _, attrs, _ in read.elements if "http-equiv" in attrs]
    assert "img-src data:" in policy and "media-src data:" in policy


def test_a_file_that_is_gone_or_a_damaged_record_leaves_the_rest(tmp_path: Path):
    folder, picture = write_run(tmp_path / "a"), tmp_path / "gone.png"
    picture.write_bytes(png(28, 28))
    write_samples(folder, [asked(picture)])
    picture.unlink()
    [row] = json.loads((folder / "samples.json").read_text())
    row["media"] += [{}, 3, None, {**row["media"][0], "digest": "x"}]
    (folder / "samples.json").write_text(json.dumps([row, {**row, "media": "none"}]))
    read = page_of(folder)
    assert [text for text in read.texts("small") if "gone.png" in text] == ["image gone.png, cannot be read, 4 tokens"]
    assert read.texts("dd").count("<image>Which?") == 2


def test_an_answer_keeps_its_files_in_a_checkpoint_and_older_ones_have_none():
    answer = asked(min((packaged("data") / "sample").glob("pictures/*")))
    assert Answer.from_row(json.loads(json.dumps(answer.as_row()))) == answer
    assert Answer.from_row(["q", "a", "b", 0.5]) == Answer("q", "a", "b", 0.5)


def test_untrusted_text_is_escaped(tmp_path: Path):
    hostile = "<script>alert(1)</script>\x1b[31m"
    folder = write_run(tmp_path / "a", error=hostile, status="failed")
    samples = [{"prompt": hostile, "expected": "", "before": "x", "after": ""}]
    (folder / "samples.json").write_text(json.dumps(samples))
    read = page_of(folder)
    assert "script" not in {tag for tag, _, _ in read.elements}
    shown = hostile.replace("\x1b", "␛")
    assert shown in read.texts("dd") and shown in [text.strip() for text in read.texts("p")]
    assert read.texts("dd").count("(nothing)") == 2


def test_a_failing_report_ends_no_run(tmp_path: Path):
    logged: list[str] = []
    folder = write_run(tmp_path / "a")
    (folder / REPORT).mkdir()
    try_report(folder, logged.append)
    assert len(logged) == 1 and logged[0].startswith("warning: ") and f"finetune report {folder}" in logged[0]


def test_the_command_writes_every_report_once_or_none(tmp_path: Path, capsys):
    folders = [write_run(tmp_path / name) for name in ("a", "b")]
    for words in ([], ["config=x.yaml"], [str(folders[0]), "out=x"], [str(folders[0]), str(tmp_path / "none")]):
        assert main(["report", *words]) == 2
    assert "none: no such folder" in capsys.readouterr().err and not (folders[0] / REPORT).exists()
    assert main(["report", *map(str, folders), f"{folders[0]}/"]) == 0
    assert capsys.readouterr().out.split() == [str(folder / REPORT) for folder in folders]


def test_a_page_is_the_same_each_time(tmp_path: Path):
    run = read_run(write_run(tmp_path / "a"))
    assert render(run) == render(run)


REWARDS = ("reward.loss=dr_grpo", "reward.functions={exact: 1, length: 0.5}", "reward.length=9")


def write_rewarded_run(folder: Path) -> Path:
    """A finished run with rewards: its losses are minus the rewards."""
    ends = {"eval/a/reward_low": 0.5, "eval/a/reward_high": 0.875}
    evaluations = {"eval/a/loss": -0.75, "eval/a/reward": 0.75, **ends}
    before = {"eval_loss": -0.25, "eval/a/reward": 0.25}
    measured = {"evaluations": evaluations, "evaluations_before": before, "eval_loss": -0.75, "final_loss": 1e-9}
    return write_run(folder, *REWARDS, reward_before=0.25, reward_after=0.75, **measured)


def test_a_run_with_rewards_shows_the_held_out_reward_and_no_loss(tmp_path: Path):
    run = read_run(write_rewarded_run(tmp_path / "a"))
    shown = {label: (value, detail) for label, value, detail in cards(run)}
    assert shown["held-out reward"] == ("0.7500", "0.2500 before; 95 % interval [0.5, 0.875]")
    assert not any("loss" in label or "perplexity" in label for label in shown)
    assert headline(run).endswith("dr_grpo, rewards: exact, length")


def test_an_unfinished_run_with_rewards_shows_its_last_reward(tmp_path: Path):
    folder = write_rewarded_run(tmp_path / "a")
    (folder / "result.json").unlink()
    lines = [metric(step, **{"train/reward": step / 4}) for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cards(read_run(folder)) == [("steps so far", "2", ""), ("training reward", "0.5000", "")]


def test_answers_are_shown_with_their_rewards(tmp_path: Path):
    folder = write_rewarded_run(tmp_path / "a")
    answers = [Answer(f"q{i}", "", f"a{i}", i / 4) for i in range(5)]
    write_samples(folder, [Answer("q1", "", "old", -0.5)], answers[1:2])
    write_rewarded(folder, answers)
    read = page_of(folder)
    assert {"Answers before and after", "Highest rewards", "Lowest rewards"} <= set(read.texts("h2"))
    pairs = list(zip(read.texts("dt"), read.texts("dd"), strict=True))
    found = [(label, text) for label, text in pairs if text in ("old", *(f"a{i}" for i in range(5)))]
    assert found == [
        ("beforereward -0.5", "old"),
        ("afterreward 0.25", "a1"),
        ("afterreward 1", "a4"),
        ("afterreward 0.75", "a3"),
        ("afterreward 0", "a0"),
        ("afterreward 0.25", "a1"),
    ]
    assert "expected" not in read.texts("dt")
