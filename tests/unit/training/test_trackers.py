"""Each tracker's own reader returns every step once, also of a resumed run; no tracker ends a run or keeps a secret."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune import train
from finetune.config.schema import TrackConfig
from finetune.system.errors import MissingExtra
from finetune.training import trackers
from finetune.training.track import Tracker
from finetune.training.trackers import TRACKERS, Trackers
from tests.runs import differing, reference_run, small_run

Points = list[tuple[int, float]]
LIBRARIES = {"wandb": "wandb", "tensorboard": "tensorboard", "mlflow": "mlflow", "trackio": "trackio"}
SET = "eval/rows (v2+)/loss"
THIS_RUN = uuid.uuid4().hex[:8]


@pytest.fixture(autouse=True)
def _local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def project_of(folder: Path) -> str:
    """Return a project of the test's own: trackio keeps one folder per user, with what other test runs left there."""
    return f"tests-{THIS_RUN}-{folder.name}"


def read_tensorboard(folder: Path) -> list[dict[str, Points]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [{tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}]


def read_mlflow(folder: Path) -> list[dict[str, Points]]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert all(run.data.params["lora.rank"] == "8" for run in runs)
    return [
        {
            name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
            for name in run.data.metrics
        }
        for run in runs
    ]


def read_trackio(folder: Path) -> list[dict[str, Points]]:
    from trackio import Api
    from trackio.sqlite_storage import SQLiteStorage

    found = []
    for run in Api().runs(project_of(folder)):
        logs = SQLiteStorage.get_logs(project_of(folder), run.name, run_id=run.id)
        names = {name for line in logs for name in line} - {"step", "timestamp"}
        found.append({name: [(line["step"], line[name]) for line in logs if name in line] for name in names})
    return found


READERS: dict[str, Callable[[Path], list[dict[str, Points]]]] = {
    "tensorboard": read_tensorboard,
    "mlflow": read_mlflow,
    "trackio": read_trackio,
}


def log_steps(folder: Path, name: str, last_step: int, steps: range) -> None:
    cfg = small_run(folder, f"track.{name}=true", f"track.project={project_of(folder)}")
    warnings: list[str] = []
    tracking = Trackers(cfg, folder, last_step, warnings.append)
    for step in steps:
        tracking.log(step, {"loss": 1 / 2**step, SET: 2.0})
    tracking.close()
    assert warnings == []


def test_every_tracker_has_its_key_and_its_reader():
    assert (
        set(TRACKERS)
        == set(LIBRARIES)
        == {*READERS, "wandb"}
        == set(TrackConfig.model_fields) - {"project", "run_name"}
    )


@pytest.mark.parametrize("name", READERS)
def test_a_resumed_run_is_one_run_with_each_step_once(name: str, tmp_path: Path):
    pytest.importorskip(LIBRARIES[name])
    log_steps(tmp_path, name, 0, range(1, 4))
    log_steps(tmp_path, name, 3, range(3, 6))
    (found,) = READERS[name](tmp_path)
    assert found["loss"] == [(step, 1 / 2**step) for step in range(1, 6)]
    assert [values for key, values in found.items() if key.startswith("eval/rows")] == [[(s, 2.0) for s in range(1, 6)]]


@pytest.mark.parametrize("name", ["mlflow", "trackio"])
def test_a_new_run_in_the_same_folder_is_another_run(name: str, tmp_path: Path):
    pytest.importorskip(LIBRARIES[name])
    for _ in range(2):
        log_steps(tmp_path, name, 0, range(1, 3))
    assert [len(run["loss"]) for run in READERS[name](tmp_path)] == [2, 2]


def test_wandb_records_offline_without_a_key_and_writes_no_secret(tmp_path, monkeypatch, capfd):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("SOME_API_KEY", "s3cr3t-value")
    monkeypatch.setenv("HF_TOKEN", "s3cr3t-value")
    log_steps(tmp_path, "wandb", 0, range(1, 3))
    log_steps(tmp_path, "wandb", 2, range(3, 4))
    assert "deprecated" not in capfd.readouterr().err
    written = [path for path in (tmp_path / "wandb").rglob("*") if path.is_file()]
    # Offline, each part of a run has a file of its own under the run's id.
    assert len({path.stem for path in written if path.suffix == ".wandb"}) == 1
    assert len([path for path in written if path.suffix == ".wandb"]) == 2
    assert not [path for path in written if b"s3cr3t-value" in path.read_bytes()]


def test_wandb_summarizes_a_reward_by_its_maximum_and_a_loss_by_its_last_value(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    started, init = [], wandb.init
    monkeypatch.setattr(wandb, "init", lambda **options: started.append(init(**options)) or started[0])
    tracking = Trackers(small_run(tmp_path, "track.wandb=true"), tmp_path, 0, print)
    for step, value in enumerate((0.25, 0.75, 0.5, 0.5), 1):
        tracking.log(step, {"loss": value, "train/reward": value})
    summary = started[0].summary
    assert dict(summary["train/reward"]) == {"max": 0.75, "last": 0.5} and summary["loss"] == 0.5
    tracking.close()


class Failing:
    """A tracker that fails where it is set to: "start", "log" or "close"."""

    def __init__(self, where: str):
        self.where, self.logged = where, 0

    def __call__(self, run: object) -> Failing:
        self._fail("start")
        return self

    def log(self, step: int, values: object) -> None:
        self.logged += 1
        self._fail("log")

    def close(self) -> None:
        self._fail("close")

    def _fail(self, where: str) -> None:
        if self.where == where:
            raise RuntimeError(f"no service at {where}")


@pytest.mark.parametrize(("where", "calls"), [("start", 0), ("log", 1), ("close", 4)])
def test_a_failing_tracker_is_named_once_and_changes_nothing_in_the_run(where, calls, tmp_path, monkeypatch, capfd):
    failing = Failing(where)
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", failing)
    result = train(small_run(tmp_path, "track.mlflow=true", "track.tensorboard=true"))
    assert result.status == "finished" and differing(reference_run(), tmp_path) == []
    warnings = [line for line in capfd.readouterr().err.splitlines() if "no service" in line]
    assert len(warnings) == 1 and "track.mlflow" in warnings[0]
    assert failing.logged == calls
    assert [step for step, _ in read_tensorboard(tmp_path)[0]["loss"]] == [1, 2, 3, 4]


def test_a_resumed_part_logs_no_step_twice(tmp_path):
    """A killed run has logged steps after its checkpoint; the resumed one repeats them."""
    cfg = small_run(tmp_path, "track.tensorboard=true")
    values = dict.fromkeys(("loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_bytes"), 1.0)
    for resumed_step, steps in ((0, range(1, 6)), (3, range(4, 8))):
        tracker = Tracker(cfg, tmp_path, 7, resumed_step)
        for step in steps:
            tracker.step({"step": step, **values}, 0.0)
        tracker.close()
    assert [step for step, _ in read_tensorboard(tmp_path)[0]["loss"]] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(("name", "library"), LIBRARIES.items())
def test_a_missing_library_names_the_command_that_installs_it(name: str, library: str, tmp_path, monkeypatch):
    blocked = "torch.utils.tensorboard" if name == "tensorboard" else library
    monkeypatch.setitem(sys.modules, blocked, None)
    with pytest.raises(MissingExtra, match=rf"track\.{name}.*finetune-qlora\[tracking\]"):
        Trackers(small_run(tmp_path, f"track.{name}=true"), tmp_path, 0, print)


def test_without_a_tracker_no_file_is_written(tmp_path):
    Trackers(small_run(tmp_path), tmp_path, 0, print).close()
    assert list(tmp_path.iterdir()) == []
