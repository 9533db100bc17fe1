"""A pickled adapter becomes a safetensors folder that PEFT loads with the same logits; code in a pickle never runs."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from finetune.cli import main
from finetune.system.resources import packaged

IDS = torch.arange(12)[None]


@pytest.fixture
def made_by_peft(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """An adapter as PEFT saves it with safe_serialization=False, and its logits."""
    base = packaged("data") / "tiny-qwen2.5"
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    model.save_pretrained(str(tmp_path / "old"), safe_serialization=False)
    with torch.no_grad():
        return tmp_path / "old", model(IDS).logits


def test_a_pickled_adapter_is_converted_and_gives_the_same_logits_in_peft(made_by_peft, tmp_path, capsys):
    old, logits = made_by_peft
    assert main(["merge", f"adapter={old}", f"out={tmp_path / 'merged'}"]) == 2
    command = capsys.readouterr().err.split("help: finetune ")[1].split()
    assert main(command) == 0
    new = tmp_path / "old-safetensors"
    assert json.loads((new / "adapter_config.json").read_text())["r"] == 2
    base = AutoModelForCausalLM.from_pretrained(packaged("data") / "tiny-qwen2.5")
    with torch.no_grad():
        assert peft.PeftModel.from_pretrained(base, str(new)).eval()(IDS).logits.equal(logits)
    assert main(command) == 2  # the folder exists


def test_names_of_a_state_dict_are_those_of_peft_afterwards(made_by_peft, tmp_path):
    file = made_by_peft[0] / "adapter_model.bin"
    tensors = torch.load(file, weights_only=True)
    torch.save({name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}, file)
    assert main(["migrate", str(file), f"out={tmp_path / 'new'}"]) == 0
    assert load_file(tmp_path / "new" / "adapter_model.safetensors").keys() == tensors.keys()


class _Code:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


@pytest.mark.parametrize("content", [pickle.dumps(_Code()), b"no pickle", b"", pickle.dumps([1])])
def test_a_pickle_with_code_or_without_tensors_is_refused(made_by_peft, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    file = made_by_peft[0] / "adapter_model.bin"
    file.write_bytes(content)
    assert main(["migrate", str(file), "out=new"]) == 2
    assert not Path("ran").exists() and not Path("new").exists()


@pytest.mark.parametrize("name", ["data.pkl", "byteorder", "version", "data/0", ".format_version"])
def test_a_damaged_part_of_a_pickle_is_refused(made_by_peft, tmp_path, name):
    """Each part fails elsewhere in torch's loader, with an error of another kind."""
    file = made_by_peft[0] / "adapter_model.bin"
    with zipfile.ZipFile(file) as old:
        parts = {each: old.read(each) for each in old.namelist()}
    for content in (b"\xff\xfe\xfd" * 7, b"", b"9" * 50, b"}."):
        with zipfile.ZipFile(file, "w") as new:
            for each, kept in parts.items():
                new.writestr(each, content if each.endswith(f"/{name}") else kept)
        assert main(["migrate", str(file), f"out={tmp_path / 'new'}"]) in (0, 2, 3)
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
