"""A run gets a folder of its own, and never writes over another run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from finetune.config.compose import load_config
from finetune.config.schema import RunConfig
from finetune.system.errors import ConfigError
from finetune.training.output_folder import choose_folder, claim_folder, link_latest, release_folder


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def config(*overrides: str) -> RunConfig:
    return load_config("quickstart.yaml", overrides)


def finish(cfg: RunConfig) -> str:
    """Do what a run does to its folder; return the folder."""
    folder = choose_folder(cfg)
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "adapter_model.safetensors").write_bytes(b"")
    link_latest(cfg, folder)
    return folder


def test_each_run_of_a_config_gets_a_folder_and_the_newest_a_link():
    latest = Path("outputs/quickstart-latest")
    for name in ("quickstart", "quickstart-2", "quickstart-3"):
        assert finish(config()) == f"outputs/{name}"
        assert latest.resolve() == Path("outputs", name).resolve()
    assert finish(config("name=other")) == "outputs/other"
    assert sorted(path.name for path in Path("outputs").iterdir() if not path.is_symlink()) == [
        "other",
        "quickstart",
        "quickstart-2",
        "quickstart-3",
    ]


def test_a_run_without_a_checkpoint_is_replaced():
    Path("outputs/quickstart").mkdir(parents=True)
    assert choose_folder(config()) == "outputs/quickstart"


def test_resuming_continues_the_newest_run_or_that_of_the_checkpoint():
    auto = config("train.resume=auto")
    assert choose_folder(auto) == "outputs/quickstart"
    finish(config())
    finish(config())
    assert choose_folder(auto) == "outputs/quickstart-2"
    assert choose_folder(config("train.resume=outputs/quickstart-2/checkpoint-1")) == "outputs/quickstart-2"
    assert choose_folder(config("train.resume=elsewhere/checkpoint-1")) == "outputs/quickstart"


def test_a_given_folder_is_used_and_may_hold_no_run():
    given = config("output_dir=outputs/quickstart")
    finish(given)
    assert choose_folder(given) == "outputs/quickstart" and not Path("outputs/quickstart-latest").is_symlink()
    with pytest.raises(ConfigError, match="output_dir"):
        claim_folder(given)


def test_a_folder_that_has_the_name_of_the_link_stays():
    mine = Path("outputs/quickstart-latest/mine")
    mine.mkdir(parents=True)
    finish(config())
    assert mine.is_dir() and choose_folder(config("train.resume=auto")) == "outputs/quickstart"


def test_two_runs_in_one_folder_are_refused_until_the_first_one_ends(tmp_path):
    cfg = load_config("quickstart.yaml", [f"output_dir={tmp_path / 'run'}"])
    first = claim_folder(cfg)
    with pytest.raises(ConfigError, match="another process is training into"):
        claim_folder(cfg)
    release_folder(first)
    assert not (tmp_path / "run").exists(), "a folder without a run is removed"
    release_folder(claim_folder(cfg))


def test_a_folder_that_is_gone_is_released(tmp_path):
    lock = claim_folder(load_config("quickstart.yaml", [f"output_dir={tmp_path / 'run'}"]))
    shutil.rmtree(tmp_path / "run")
    release_folder(lock)
    assert not lock.is_locked
