"""Where configs are found, which part wins, and what interpolations can read."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from finetune.config.compose import load_config
from finetune.system.errors import ConfigError
from finetune.system.resources import packaged

RUN = "model: {name: base}\ndata: {train: [{path: rows.jsonl}]}\n"


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_name_is_looked_up_here_then_in_configs_then_among_the_packaged(here: Path):
    assert load_config("lora", needs_data=False).model.name == "Qwen/Qwen2.5-7B-Instruct"
    write(here / "configs/lora.yaml", RUN.replace("base", "in-configs"))
    assert load_config("lora").model.name == "in-configs"
    write(here / "lora.yaml", RUN.replace("base", "here"))
    assert load_config("lora").model.name == "here"
    assert load_config("lora.yaml") == load_config(str(here / "lora.yaml"))
    assert load_config("configs/lora.yaml").model.name == "in-configs"


def test_a_missing_config_lists_the_folders_searched_and_the_nearest_names(here: Path):
    with pytest.raises(ConfigError) as caught:
        load_config("all_linear.yml")
    for part in ("all_linear.yml", "configs", str(packaged("configs")), "all-linear.yaml"):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["", ".", "x" * 5000, "a\0b", "\ud800", "/", "configs"])
def test_a_name_that_cannot_be_a_file_is_a_missing_config(here: Path, name: str):
    with pytest.raises(ConfigError, match="no config"):
        load_config(name)


@pytest.mark.parametrize("folder", ["a b", "it's", "é漢", "${x}", "a=b,c", "[x]{y}", "#1", "%20"])
def test_a_user_config_in_any_folder_composes_the_packaged_groups(here: Path, folder: str):
    file = write(here / folder / "my ${run}@1=.yaml", "defaults: [{quant: int8}]\n" + RUN)
    config = load_config(str(file))
    assert (config.name, config.quant.type, config.output_dir) == ("my ${run}@1=", "int8", "outputs/my ${run}@1=")


def test_a_user_group_option_wins_over_a_packaged_one_of_the_same_name(here: Path):
    write(here / "lora/wide.yaml", "rank: 256\n")
    write(here / "quant/int8.yaml", "type: none\n")
    write(here / "run.yaml", "defaults: [{lora: wide}, {quant: int8}]\n" + RUN)
    config = load_config("run")
    assert (config.lora.rank, config.quant.type) == (256, "none")


def test_a_packaged_config_takes_options_from_the_configs_of_the_working_directory(here: Path):
    """So does a user config: its own folder comes first, then configs/ of the working directory, then the package."""
    write(here / "configs/quant/allocated.yaml", "int8: [down_proj]\n")
    write(here / "configs/quant/none.yaml", "int8: [k_proj]\n")
    quant = load_config("quickstart", ["quant=allocated"]).quant
    assert (quant.type, quant.int8) == ("nf4", ["down_proj"])
    own = write(here / "elsewhere/run.yaml", "defaults: [{quant: allocated}]\n" + RUN)
    assert load_config(str(own)).quant.int8 == ["down_proj"]
    assert load_config(str(own), ["quant=none"]).quant.int8 == ["k_proj"]
    write(here / "elsewhere/quant/allocated.yaml", "int8: [up_proj]\n")
    assert load_config(str(own)).quant.int8 == ["up_proj"]


def test_defaults_then_groups_then_the_file_then_the_command_line(here: Path):
    write(here / "train/slow.yaml", "max_steps: 10\nkeep_checkpoints: 3\nseed: 1\n")
    write(here / "train/slower.yaml", "max_steps: 20\nkeep_checkpoints: 4\nseed: 2\n")
    write(here / "run.yaml", "defaults: [{train: slow}]\n" + RUN + "train: {keep_checkpoints: 5}\n")
    train = load_config("run").train
    assert (train.max_steps, train.keep_checkpoints, train.seed, train.batch_size) == (10, 5, 1, 16)
    train = load_config("run", ["train.seed=9", "train=slower"]).train
    assert (train.max_steps, train.keep_checkpoints, train.seed) == (20, 5, 9)


def test_a_group_can_be_chosen_that_the_file_does_not_name(here: Path):
    write(here / "run.yaml", RUN)
    config = load_config("run", ["model=qwen2.5-0.5b-instruct", "+quant=none"])
    assert (config.model.name, config.quant.type) == ("Qwen/Qwen2.5-0.5B-Instruct", "none")


def test_a_whole_run_can_build_on_another(here: Path):
    write(here / "run.yaml", "defaults: [lora]\nlora: {rank: 4}\n")
    config = load_config("run", ["model=qwen2.5-3b", "data.train=a.jsonl"])
    assert (config.name, config.lora.rank, config.model.name) == ("run", 4, "Qwen/Qwen2.5-3B")


def test_a_group_file_can_build_on_another_of_its_group(here: Path):
    write(here / "train/base.yaml", "keep_checkpoints: 7\nseed: 1\n")
    write(here / "train/more.yaml", "defaults: [base]\nseed: 2\n")
    write(here / "run.yaml", "defaults: [{train: more}]\n" + RUN)
    assert (load_config("run").train.keep_checkpoints, load_config("run").train.seed) == (7, 2)


def test_a_file_with_a_byte_order_mark_and_windows_line_ends_is_read(here: Path):
    (here / "run.yaml").write_bytes(b"\xef\xbb\xbf" + RUN.replace("\n", "\r\n").encode())
    assert load_config("run").model.name == "base"


def test_interpolations_see_the_values_after_every_override(load: Callable):
    text = "train: {seed: 3, max_steps: '${train.seed}', resume: 'runs/${name}'}\noutput_dir: out/${train.seed}\n"
    config = load(text, "train.seed=5")
    assert (config.train.max_steps, config.output_dir, config.train.resume) == (5, "out/5", "runs/run")
    assert load("", "train.max_steps=${train.keep_checkpoints}").train.max_steps == 2
    assert load("train: {resume: '\\${name}'}").train.resume == "${name}"


def test_the_output_folder_follows_the_name(load: Callable):
    assert load().output_dir == "outputs/run"
    assert load("name: other").output_dir == "outputs/other"
    assert load("", "name=third").output_dir == "outputs/third"


def test_packaged_files_have_absolute_paths(load: Callable):
    config = load("model: {name: '${packaged:data/base}'}")
    assert config.model.name == str(packaged("data") / "base")
    assert Path(config.model.name).is_absolute()


def test_the_environment_is_read_but_not_for_secrets(
    load: Callable, complaint: Callable, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MY_FOLDER", "/scratch")
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    monkeypatch.setenv("NAME_OF_IT", "HF_TOKEN")
    assert load("output_dir: '${oc.env:MY_FOLDER}/x'").output_dir == "/scratch/x"
    assert load("", "output_dir=${oc.env:UNSET,there}").output_dir == "there"
    hidden = {
        "output_dir": "${oc.env:HF_TOKEN}",
        "model.name": "${oc.env:HF_TOKEN,none}",
        "model.revision": "${oc.env:${oc.env:NAME_OF_IT}}",
        "data.system": '${oc.decode:"${oc.env:HF_TOKEN}"}',
        "train.resume": "x-${oc.env:MY_API_KEY,1}",
        "track.project": "${oc.env:Db_Password,1}",
        "track.run_name": "${oc.env:AWS_SECRET,1}",
    }
    text = complaint("", *(f"{key}={value}" for key, value in hidden.items()))
    assert text.count("looks like a secret") == len(hidden)
    assert "hf_very_secret" not in text
    assert "hf_very_secret" not in complaint("defaults: [{model: '${oc.env:HF_TOKEN}'}]")


def test_the_users_own_omegaconf_keeps_its_resolver(load: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_TOKEN", "mine")
    OmegaConf.register_new_resolver("packaged", lambda path: f"the user's {path}")
    try:
        load()
        assert OmegaConf.create({"x": "${oc.env:MY_TOKEN}"}).x == "mine"
        assert OmegaConf.create({"x": "${packaged:y}"}).x == "the user's y"
    finally:
        OmegaConf.clear_resolver("packaged")
    load()
    assert not OmegaConf.has_resolver("packaged")


def test_loading_twice_gives_the_same_and_touches_no_global_hydra(load: Callable):
    from hydra.core.global_hydra import GlobalHydra

    assert load() == load()
    assert not GlobalHydra.instance().is_initialized()


def test_nothing_is_printed_or_warned(here: Path):
    write(here / "run.yaml", "defaults: [{quant: nf4}]\n" + RUN)
    code = "from finetune.config.compose import load_config; load_config('run')"
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    root = str(packaged("configs").parent)
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": root, "PATH": ""})
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def test_a_dataset_beside_the_config_is_read_if_the_working_directory_lacks_it(tmp_path, monkeypatch):
    (tmp_path / "project").mkdir()
    file = tmp_path / "project" / "mine.yaml"
    file.write_text("model: {name: m}\ndata: {train: [rows.jsonl, nowhere.jsonl], eval: ['held*.jsonl']}\n")
    for name in ("rows.jsonl", "held-1.jsonl"):
        (tmp_path / "project" / name).touch()
    monkeypatch.chdir(tmp_path)
    data = load_config(str(file)).data
    assert [source.path for source in data.train] == [str(file.with_name("rows.jsonl")), "nowhere.jsonl"]
    assert data.eval[0].path == str(file.with_name("held*.jsonl"))
    (tmp_path / "rows.jsonl").touch()
    assert load_config(str(file)).data.train[0].path == "rows.jsonl"
