"""Adapters on disk."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.config.schema import LoraConfig, ModelConfig, QuantConfig
from finetune.models.adapters.attach import attach_lora
from finetune.models.adapters.files import (
    TENSOR_FILE,
    check_adapter,
    fetch_adapter,
    file_tensors,
    load_adapter,
    save_adapter,
)
from finetune.models.adapters.names import PREFIX
from finetune.models.load import load_base
from finetune.models.tokenizer import load_tokenizer
from finetune.system.errors import ConfigError, IntegrityError

IDS = torch.arange(20)[None] * 7 % 300


def trained(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / TENSOR_FILE)
    change(tensors)
    save_file(tensors, folder / TENSOR_FILE, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def saved_once(make_base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    model = load_base(ModelConfig(name=str(make_base())), QuantConfig(), "cpu")
    save_adapter(trained(attach_lora(model, LoraConfig(rank=4))), folder)
    return folder


@pytest.fixture
def saved(saved_once: Path, tmp_path: Path) -> Path:
    """A trained adapter, q and v, rank 4, that a test may spoil."""
    return Path(shutil.copytree(saved_once, tmp_path / "adapter"))


def test_the_folder_has_the_format_of_peft(saved: Path, make_base) -> None:
    assert sorted(file.name for file in saved.iterdir()) == ["adapter_config.json", TENSOR_FILE]
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(make_base())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 16, ["q_proj", "v_proj"])
    assert (config["inference_mode"], config["task_type"], config["peft_type"]) == (True, "CAUSAL_LM", "LORA")
    assert isinstance(peft.PeftConfig.from_pretrained(str(saved)), peft.LoraConfig)


def test_the_revision_of_the_base_is_written(load, tmp_path: Path) -> None:
    model = load("nf4")
    model.base_revision = "abc123"
    adapted = attach_lora(model, LoraConfig())
    save_adapter(adapted, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["revision"], config["base_model_name_or_path"]) == ("abc123", model.name_or_path)
    save_adapter(adapted, tmp_path, base_name="someone/base", revision="v2")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["revision"], config["base_model_name_or_path"]) == ("v2", "someone/base")


def test_equal_adapters_give_equal_bytes(load, tmp_path: Path) -> None:
    files = []
    for number in (0, 1):
        folder = tmp_path / str(number)
        folder.mkdir()
        torch.manual_seed(0)
        save_adapter(attach_lora(load("nf4"), LoraConfig(target_modules="all-linear")), folder)
        files.append([file.read_bytes() for file in sorted(folder.iterdir())])
    assert files[0] == files[1]
    # A set of seven names would come in another order in the next process.
    names = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    assert len(names) == 7 and names == sorted(names)


def test_saving_does_not_use_the_hub(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("the hub was asked")

    for name in ("file_exists", "hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, forbidden)
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", forbidden)
    model = load("nf4")
    model.name_or_path = "Qwen/Qwen2.5-7B-Instruct"
    save_adapter(attach_lora(model, LoraConfig(modules_to_save=["lm_head"])), tmp_path)


def test_the_tokenizer_is_saved_with_template_and_new_tokens(load, tokenizer, tmp_path: Path) -> None:
    tokenizer.chat_template = "{{ messages }}"
    save_adapter(attach_lora(load("nf4"), LoraConfig(new_tokens=["<call>"]), tokenizer), tmp_path, tokenizer)
    again = load_tokenizer(ModelConfig(name=str(tmp_path)))
    assert again("t7 <call> t8").input_ids == [7, 300, 8]
    assert again.chat_template == "{{ messages }}"
    assert (tmp_path / "chat_template.jinja").is_file()


def test_a_trained_adapter_passes_the_check(load, tmp_path: Path) -> None:
    model = trained(attach_lora(load("nf4"), LoraConfig(dora=True)))
    save_adapter(model, tmp_path)
    check_adapter(tmp_path, model)


SPOILED = {
    "a partner is missing": (
        lambda t: t.pop(next(n for n in t if "lora_B" in n)),
        IntegrityError,
        "lora_B.weight is missing",
    ),
    "another rank": (
        lambda t: t.update({n: x[:2] for n, x in list(t.items()) if "lora_A" in n}),
        IntegrityError,
        "has rank 2, its lora_B has 4",
    ),
    "NaN": (lambda t: t[next(iter(t))].fill_(float("nan")), IntegrityError, "NaN or infinity in 1 tensors"),
    "infinity": (lambda t: t[next(iter(t))].fill_(float("inf")), IntegrityError, "NaN or infinity"),
    "nothing trained": (
        lambda t: [x.zero_() for n, x in t.items() if "lora_B" in n],
        IntegrityError,
        "nothing was trained",
    ),
    "empty": (lambda t: t.clear(), IntegrityError, "no lora_A and lora_B"),
}


@pytest.mark.parametrize(("change", "kind", "says"), SPOILED.values(), ids=SPOILED)
def test_a_corrupt_adapter_is_an_error_with_its_cause(saved: Path, change, kind: type, says: str) -> None:
    rewrite(saved, change)
    with pytest.raises(kind, match=says):
        check_adapter(saved)


# A setting of adapter_config.json with a value that no program writes.
ODD_SETTINGS = {
    "r": True,
    "lora_alpha": "16",
    "rank_pattern": {"(": 4},
    "alpha_pattern": ["q_proj"],
    "target_modules": {"q_proj": 1},
    "trainable_token_indices": [-1],
    "use_dora": "yes",
    "base_model_name_or_path": 7,
    "revision": ["main"],
    "peft_type": "IA3",
    "megatron_config": {"size": 1},  # with it PEFT imports the module that megatron_core names
}


@pytest.mark.parametrize("key", ODD_SETTINGS)
def test_an_odd_setting_is_an_error_wherever_the_adapter_is_read(saved: Path, load, key: str) -> None:
    file = saved / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: ODD_SETTINGS[key]}))
    with pytest.raises(ConfigError, match="IA3" if key == "peft_type" else "pattern" if key == "rank_pattern" else key):
        fetch_adapter(str(saved))
    with pytest.raises(ConfigError, match=r"adapter_config.json|not a LoRA adapter"):
        load_adapter(load("none"), saved)


@pytest.mark.parametrize("change", [{"task_type": "x"}, {"layer_replication": [1]}, {"lora_ga_config": "x"}])
def test_a_setting_that_peft_refuses_is_an_error(saved: Path, load, change: dict) -> None:
    file = saved / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConfigError, match="PEFT cannot load the adapter"):
        load_adapter(load("none"), saved)


@pytest.mark.parametrize("shape", [(), (4,), (1, 4, 64)])
def test_a_factor_that_is_no_matrix_is_an_error(saved: Path, shape: tuple[int, ...]) -> None:
    rewrite(saved, lambda tensors: tensors.update({next(iter(tensors)): torch.ones(shape)}))
    with pytest.raises(IntegrityError, match="a factor is a matrix"):
        check_adapter(saved)


def test_an_untrained_adapter_passes_the_check_only_on_request(load, tmp_path: Path) -> None:
    save_adapter(attach_lora(load("nf4"), LoraConfig()), tmp_path)
    check_adapter(tmp_path, trained=False)
    with pytest.raises(IntegrityError, match="nothing was trained"):
        check_adapter(tmp_path)


def test_one_changed_bit_is_an_error_if_the_model_is_given(load, tmp_path: Path) -> None:
    model = trained(attach_lora(load("nf4"), LoraConfig()))
    save_adapter(model, tmp_path)
    rewrite(tmp_path, lambda tensors: tensors[next(iter(tensors))].view(torch.int32)[0, 0].bitwise_xor_(1))
    check_adapter(tmp_path)
    with pytest.raises(IntegrityError, match="differs from the saved value"):
        check_adapter(tmp_path, model)


def test_truncated_missing_and_pickled_files_are_errors(saved: Path) -> None:
    file = saved / TENSOR_FILE
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    with pytest.raises(IntegrityError, match="not a complete safetensors file"):
        check_adapter(saved)
    file.rename(saved / "adapter_model.bin")
    with pytest.raises(
        ConfigError, match=r"adapter_model\.safetensors.*\nhelp: finetune migrate .*adapter_model.bin out="
    ):
        check_adapter(saved)


# Names that other programs write, by PEFT's name.
SPELLINGS = {
    "state dict": lambda name: name.replace(".weight", ".default.weight"),
    "other adapter name": lambda name: name.replace(".weight", ".mine.weight"),
    "no prefix": lambda name: name.removeprefix(PREFIX),
    "two prefixes": lambda name: PREFIX + name,
    "wrapped": lambda name: f"module._orig_mod.{name}",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_names_of_other_programs_give_the_same_adapter_wherever_it_is_read(load, saved: Path, spelling: str) -> None:
    own = load_file(saved / TENSOR_FILE)
    expected = load_adapter(load("none"), saved)(IDS).logits
    base = {"base_model.model.model.norm.weight": torch.ones(3)} if "state dict" in spelling else {}
    named = {SPELLINGS[spelling](name): tensor for name, tensor in own.items()} | base
    save_file(named, saved / TENSOR_FILE)
    check_adapter(saved)
    assert load_adapter(load("none"), saved)(IDS).logits.equal(expected)
    assert fetch_adapter(str(saved)).tensors.keys() == own.keys()
    started = file_tensors(attach_lora(load("nf4"), LoraConfig(rank=4, init_adapter=str(saved))))
    assert all(started[name].equal(own[name]) for name in own)


def test_a_file_with_several_adapters_is_an_error(saved: Path) -> None:
    rewrite(saved, lambda tensors: tensors.update({f"{PREFIX}q.lora_A.{n}.weight": torch.ones(1) for n in "ab"}))
    with pytest.raises(IntegrityError, match="several adapters"):
        check_adapter(saved)


def test_init_adapter_loads_the_weights(load, saved: Path) -> None:
    model = attach_lora(load("nf4"), LoraConfig(rank=4, init_adapter=str(saved)))
    old = load_file(saved / TENSOR_FILE)
    new = file_tensors(model)
    assert new.keys() == old.keys()
    assert all(new[name].equal(old[name]) for name in old)
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if "lora_" in name)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"rank": 8},
            "ranks: found rank 4 on q_proj, v_proj (4 modules), the config has rank 8 on q_proj, v_proj (4 modules)",
        ),
        ({"rank": 4, "target_modules": ["q_proj", "k_proj"]}, "rank 4 on k_proj, q_proj (4 modules)"),
        ({"rank": 4, "layers_to_transform": [0]}, "the config has rank 4 on q_proj, v_proj (2 modules)"),
        ({"rank": 4, "alpha": 32.0}, "alpha: found 16, the config has 32.0"),
        ({"rank": 4, "dora": True}, "dora: found False, the config has True"),
        ({"rank": 4, "rslora": True}, "rslora: found False, the config has True"),
        ({"rank": 4, "new_tokens": ["<x>"]}, "new_tokens: found {}, the config has {'embed_tokens': [300]}"),
    ],
)
def test_init_adapter_of_another_kind_is_an_error(
    untouched, saved: Path, tokenizer, settings: dict[str, Any], says: str
) -> None:
    model = untouched("nf4")
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ConfigError) as error:
        attach_lora(model, LoraConfig(init_adapter=str(saved), **settings), tokenizer)
    assert says in str(error.value)
    assert [name for name, _ in model.named_modules()] == before and len(tokenizer) == 300


def test_init_adapter_of_another_base_is_an_error(load, saved: Path, make_base) -> None:
    model = load("nf4")
    model.name_or_path = "someone/other"
    with pytest.raises(ConfigError) as error:
        attach_lora(model, LoraConfig(rank=4, init_adapter=str(saved)))
    assert f"base: found {make_base()}, the config has someone/other" in str(error.value)
    model.name_or_path = f"copies/{make_base().name}"
    attach_lora(model, LoraConfig(rank=4, init_adapter=str(saved)))


@pytest.mark.parametrize("change", [SPOILED["NaN"][0], SPOILED["a partner is missing"][0]], ids=["NaN", "incomplete"])
def test_a_corrupt_init_adapter_is_an_error(untouched, saved: Path, change) -> None:
    rewrite(saved, change)
    with pytest.raises(IntegrityError):
        attach_lora(untouched("nf4"), LoraConfig(rank=4, init_adapter=str(saved)))


def test_an_init_adapter_folder_without_an_adapter_is_an_error(untouched, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no adapter_config\.json"):
        attach_lora(untouched("nf4"), LoraConfig(init_adapter=str(tmp_path)))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    (tmp_path / TENSOR_FILE).write_bytes(b"")
    with pytest.raises(ConfigError, match="not a LoRA adapter, found IA3"):
        attach_lora(untouched("nf4"), LoraConfig(init_adapter=str(tmp_path)))


@pytest.mark.parametrize(
    "settings", [{"modules_to_save": ["norm", "lm_head"]}, {"new_tokens": ["<call>"]}, {"dora": True}]
)
@pytest.mark.parametrize("tied", [True, False])
def test_init_adapter_loads_every_kind_of_weight(
    load, tokenizer, tmp_path: Path, settings: dict[str, Any], tied: bool
) -> None:
    cfg = LoraConfig(rank=4, **settings)
    old = trained(attach_lora(load("nf4", tied=tied), cfg, copy.deepcopy(tokenizer)))
    save_adapter(old, tmp_path)
    new = attach_lora(load("nf4", tied=tied), cfg.model_copy(update={"init_adapter": str(tmp_path)}), tokenizer)
    assert new(IDS).logits.equal(old(IDS).logits)


def test_loading_an_adapter_grows_the_embedding_for_new_tokens(make_base, tokenizer, tmp_path: Path) -> None:
    name = ModelConfig(name=str(make_base(vocab_size=301)))
    model = trained(
        attach_lora(load_base(name, QuantConfig(), "cpu"), LoraConfig(new_tokens=["<a>", "<b>"]), tokenizer)
    )
    save_adapter(model, tmp_path)
    ids = torch.tensor([[5, 300, 7, 301, 9]])
    assert load_adapter(load_base(name, QuantConfig(), "cpu"), tmp_path)(ids).logits.equal(model.eval()(ids).logits)


def test_token_ids_may_be_a_list(load, tokenizer, tmp_path: Path) -> None:
    cfg = LoraConfig(new_tokens=["<call>"])
    old = trained(attach_lora(load("nf4"), cfg, copy.deepcopy(tokenizer)))
    save_adapter(old, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trainable_token_indices": [300]}))
    assert load_adapter(load("nf4"), tmp_path)(IDS).logits.equal(old.eval()(IDS).logits)
    attach_lora(load("nf4"), cfg.model_copy(update={"init_adapter": str(tmp_path)}), tokenizer)


def test_a_loaded_adapter_is_frozen(load, saved: Path) -> None:
    model = load_adapter(load("nf4"), saved)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
