"""Every config that is shipped composes, validates, opens with the command that runs it, and says nothing twice."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from finetune.config.compose import load_config, to_yaml
from finetune.config.keys import schema_fields, sections
from finetune.system.resources import packaged, packaged_configs

CONFIGS = packaged("configs")
RUNS = [CONFIGS / name for name in packaged_configs()]
GROUPS = sorted(file for file in CONFIGS.glob("*/*.yaml") if file not in RUNS)
MODELS = sorted(
    file
    for file in CONFIGS.glob("model/*.yaml")
    if re.fullmatch(r"qwen2\.5(-coder|-math)?-[\d.]+b(-instruct)?", file.stem)
)
# A group option that only goes together with another choice.
COMPANIONS = {
    "lora/pissa": ["quant=none"],
    "train/early-stopping": ["data=files"],
    "distill/teacher": ["distill.teacher.name=t"],
    "distill/cached": ["distill.cache=c"],
}


def label(file: Path) -> str:
    return str(file.relative_to(CONFIGS).with_suffix(""))


def plain(file: Path) -> Any:
    return OmegaConf.to_container(OmegaConf.load(file), resolve=False)


def _data(file: Path) -> list[str]:
    """The words that a config without data needs."""
    return [] if load_config(str(file), needs_data=False).data.train else ["data.train=rows.jsonl"]


def settings_of(file: Path) -> Iterator[tuple[str, Any]]:
    """(key, value) of what a file sets, with the key seen from the run."""
    content = plain(file)
    if file in GROUPS:
        content = {file.parent.name: {key: value for key, value in content.items() if key != "defaults"}}
    for section, values in content.items():
        for name, value in values.items() if section in sections() else [("", values)]:
            if section != "defaults":
                yield f"{section}.{name}".rstrip("."), value


@pytest.mark.parametrize("file", RUNS, ids=label)
def test_a_whole_run_composes_and_reads_back(file: Path, tmp_path: Path):
    config = load_config(str(file), _data(file))
    assert config.name == file.stem
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(str(tmp_path / "again.yaml")) == config


@pytest.mark.parametrize("file", RUNS, ids=label)
def test_a_whole_run_opens_with_its_launch_command(file: Path):
    first = file.read_text().splitlines()[0]
    ranks = plain(file).get("train", {}).get("world_size")
    several = f" --config_file launch/accelerate/ddp.yaml --num_processes {ranks}" if ranks else ""
    command = f"# accelerate launch{several} finetune/train.py config={file.relative_to(CONFIGS)}"
    assert re.fullmatch(re.escape(command) + r" data.train=\w+\.jsonl" * bool(_data(file)), first)


@pytest.mark.parametrize("file", GROUPS, ids=label)
def test_every_group_option_composes_with_lora(file: Path):
    words = [f"{file.parent.name}={file.stem}", *COMPANIONS.get(label(file), [])]
    assert load_config("lora", words, needs_data=False).name == "lora"


@pytest.mark.parametrize("file", [*RUNS, *GROUPS], ids=label)
def test_a_config_sets_only_what_differs_from_the_default(file: Path):
    fields = schema_fields()
    repeated = [key for key, value in settings_of(file) if key in fields and fields[key].default == value]
    assert repeated == []


@pytest.mark.parametrize("file", GROUPS, ids=label)
def test_a_group_is_named_after_a_section(file: Path):
    assert file.parent.name in sections()


def test_lora_is_qlora_on_the_7b_model():
    config = load_config("lora.yaml", needs_data=False)
    assert config.model.name == "Qwen/Qwen2.5-7B-Instruct"
    assert (config.quant.type, config.quant.double, config.quant.compute_dtype) == ("nf4", True, "bfloat16")
    assert (config.lora.rank, config.lora.alpha, config.lora.target_modules) == (8, 16, ["q_proj", "v_proj"])


def test_the_quickstart_uses_packaged_files_only():
    config = load_config("quickstart.yaml")
    assert config.model.name == str(packaged("data") / "tiny-qwen2.5")
    for source in [*config.data.train, *config.data.eval]:
        assert Path(source.path).is_relative_to(packaged("data"))
    assert config.generation.num_examples >= 200


def test_every_qwen25_size_and_variant_has_its_option():
    sizes = {"": "0.5B 1.5B 3B 7B 14B 32B 72B", "Coder-": "0.5B 1.5B 3B 7B 14B 32B", "Math-": "1.5B 7B 72B"}
    expected = {
        f"Qwen/Qwen2.5-{family}{size}{variant}"
        for family, names in sizes.items()
        for size in names.split()
        for variant in ("", "-Instruct")
    }
    names = {file: plain(file)["name"] for file in MODELS}
    assert set(names.values()) == expected
    assert all(file.stem == name.removeprefix("Qwen/").lower() for file, name in names.items())


@pytest.mark.parametrize("file", MODELS, ids=label)
def test_a_base_model_warns_of_its_untrained_end_of_turn(file: Path):
    assert ("<|im_end|>" in file.read_text()) == (not file.stem.endswith("-instruct"))
