"""An allocation is written as a config option; other files and other models' sensitivities are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.config.command_options import AllocateOptions
from finetune.config.schema import QuantConfig
from finetune.mixed_precision import choose as choose_module
from finetune.mixed_precision.choose import (
    Allocation,
    as_yaml,
    check_place,
    choose,
    measure_quants,
    quant_of,
    write_allocation,
)
from finetune.mixed_precision.journal import ALL, MeanKl, Sensitivities
from finetune.models.quant.bit_widths import storage_of
from finetune.system.errors import ConfigError

NAMES = [f"model.layers.{i}.mlp.{part}_proj" for i in (1, 11) for part in ("gate", "down")]


@pytest.mark.parametrize(
    ("kinds", "quant_type"),
    [
        (["nf4", "int8", "none", "nf4"], "nf4"),
        (["nf4"] * 4, "nf4"),
        (["int8", "none", "int8", "none"], "int8"),
        (["int8"] * 4, "int8"),
        (["none"] * 4, "none"),
    ],
)
def test_the_settings_give_the_same_storage(kinds: list[str], quant_type: str) -> None:
    storage = dict(zip(NAMES, kinds, strict=True))
    quant = quant_of(storage, QuantConfig(double=False, keep_dequantized=True, skip_modules=["layers.5"]))
    assert (quant.type, quant.double, quant.keep_dequantized) == (quant_type, False, quant_type == "nf4")
    assert storage_of(quant, [*NAMES, "lm_head"], "lm_head") == {**storage, "lm_head": "none"}


def allocation(**changes: Any) -> Allocation:
    storage = dict(zip(NAMES, ["nf4", "int8", "none", "nf4"], strict=True))
    measured = {"the allocation": MeanKl(2e-3, 1e-4, 500), "all nf4": MeanKl(9e-3, 1e-4, 500)}
    content: dict[str, Any] = {
        "storage": storage,
        "quant": quant_of(storage, QuantConfig()),
        "budget_bytes": 3e9,
        "size_bytes": 2_900_000_000,
        "predicted": 1.5e-3,
        "measured": measured,
    }
    return Allocation(**content | changes)


def test_the_file_holds_its_origin() -> None:
    text = as_yaml(allocation(), "finetune allocate config=x.yaml budget_gb=3", "base")
    for part in (
        "#   finetune allocate config=x.yaml budget_gb=3",
        "base, 2.9 GB of 3; linear layers: 2 in nf4, 1 in int8, 1 in 16 bit",
        "1.50e-03 by single layers",
        "2.00e-03 ± 1e-04 measured on 500 targets: the allocation (this one)",
        "9.00e-03 ± 1e-04 measured on 500 targets: all nf4\n",
    ):
        assert part in text
    assert yaml.safe_load(text) == {
        "type": "nf4",
        "double": True,
        "compute_dtype": "bfloat16",
        "skip_modules": [NAMES[2]],
        "int8": [NAMES[1]],
    }


def test_only_an_allocation_is_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "new" / "allocated.yaml"
    for model in ("first", "second"):
        write_allocation(allocation(), file, "finetune allocate", model)
        assert model in file.read_text()
    file.write_text("type: none\n")
    with pytest.raises(ConfigError, match="not an allocation"):
        write_allocation(allocation(), file, "finetune allocate", "third")
    assert file.read_text() == "type: none\n"
    for name, reason in (("allocated.json", "not a .yaml file"), ("nf4.yaml", "packaged option")):
        with pytest.raises(ConfigError, match=reason):
            check_place(tmp_path / name)
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ConfigError, match="not an allocation"):
        check_place(tmp_path / "folder.yaml")


@pytest.fixture
def folder(bench, tmp_path: Path) -> Path:
    """Write made-up sensitivities of the embedded base, which grow with the layer."""
    names = list(bench.model.linears)
    measured = {
        (name, kind): MeanKl(scale * (1 + names.index(name)), 1e-6, 90)
        for name in names
        for kind, scale in (("nf4", 1e-3), ("int8", 1e-5))
    }
    measured |= {(ALL, kind): MeanKl(0.1, 1e-6, 90) for kind in ("nf4", "int8")}
    made_from = {
        "weights": choose_module.teacher_weights(bench.cfg.model),
        "double": True,
        "compute_dtype": "bfloat16",
        "dtype": "bfloat16",
    }
    Sensitivities("base", ["nf4", "int8"], 4, bench.model.linears, measured, made_from).save(tmp_path)
    return tmp_path


def test_the_best_measured_allocation_is_chosen(bench, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = AllocateOptions(sensitivity=str(folder), budget_gb=0.003, rows=4)
    alone = choose(bench.cfg, options.model_copy(update={"measure": False}), lambda _: None)
    assert alone.measured == {} and alone.size_bytes <= 3e6

    def measured(model: Any, quants: dict[str, QuantConfig], batches: Any, log: Any, media: Any) -> dict[str, MeanKl]:
        assert quants["the allocation"] == alone.quant and len(batches) == 1 and media is None
        return {name: MeanKl(1.0 if name == "the allocation" else 0.5, 0.1, 4) for name in quants}

    monkeypatch.setattr(choose_module, "measure_quants", measured)
    found = choose(bench.cfg, options, lambda _: None)
    assert found.choice == "all nf4" and set(found.storage.values()) == {"nf4"} and found.quant.int8 == []


def test_sensitivities_of_other_weights_or_settings_are_refused(bench, folder: Path) -> None:
    cfg = bench.cfg.model_copy(update={"quant": QuantConfig(double=False, compute_dtype="float32")})
    options = AllocateOptions(sensitivity=str(folder), budget_gb=0.003, measure=False)
    with pytest.raises(ConfigError) as refused:
        choose(cfg, options, lambda _: None)
    assert [line.partition(":")[0] for line in str(refused.value).splitlines()[:-1]] == [
        "quant.double",
        "quant.compute_dtype",
    ]


def test_more_bits_have_a_lower_kl(bench) -> None:
    quants = {
        "none": QuantConfig(type="none"),
        "int8": QuantConfig(int8=["*"]),
        "mixed": QuantConfig(int8=["layers.0"]),
        "nf4": QuantConfig(),
    }
    found = [mean.kl for mean in measure_quants(bench.cfg.model, quants, bench.batches).values()]
    assert found[0] == 0 and 0 < found[1] < found[2] < found[3]
