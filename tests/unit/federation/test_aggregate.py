"""What a server does with the adapters of parties: good ones are averaged, bad ones are named."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.config.command_options import AggregateOptions, ClipOptions
from finetune.federation.adapters import read_round
from finetune.federation.aggregate import RESIDUAL, aggregate
from finetune.federation.clip import clip
from finetune.models.adapters.folder import CONFIG_FILE, TENSOR_FILE
from finetune.system.errors import ConfigError
from finetune.system.manifest import differences, record_files

MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"
CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "somewhere/base",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
    "init_lora_weights": True,
}
Change = Callable[[dict[str, Any], dict[str, Tensor]], object]


def party(folder: Path, seed: int, change: Change = lambda config, tensors: None, seed_a: int = 0) -> str:
    folder.mkdir(parents=True)
    tensors = {
        A: torch.randn(2, 7, generator=torch.Generator().manual_seed(seed_a)),
        B: torch.randn(5, 2, generator=torch.Generator().manual_seed(seed)),
    }
    config = dict(CONFIG)
    change(config, tensors)
    save_file(tensors, folder / TENSOR_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    return str(folder)


def three(tmp_path: Path, **options: Any) -> list[str]:
    return [party(tmp_path / name, seed, **options) for seed, name in enumerate("abc", start=1)]


def run(adapters: list[str], out: Path, **options: Any) -> list[str]:
    lines: list[str] = []
    aggregate(AggregateOptions(adapters=adapters, out=str(out), **options), lines.append)
    return lines


def tensors_of(folder: Path | str) -> dict[str, Tensor]:
    return load_file(Path(folder) / TENSOR_FILE)


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_every_order_of_the_parties_gives_the_same_folder(tmp_path: Path):
    names, weights = three(tmp_path), [3.0, 1.0, 0.1]
    found = []
    for number, order in enumerate(itertools.permutations(range(3))):
        out = tmp_path / f"out{number}"
        run([names[i] for i in order], out, weights=[weights[i] for i in order], max_norm=100.0)
        found.append(content(out))
    assert all(each == found[0] for each in found)
    mean = sum(w / 4.1 * tensors_of(name)[B].double() for w, name in zip(weights, names, strict=True))
    torch.testing.assert_close(tensors_of(tmp_path / "out0")[B].double(), mean, rtol=0, atol=1e-7)
    assert torch.equal(tensors_of(tmp_path / "out0")[A], tensors_of(names[0])[A])
    assert not differences(tmp_path / "out0")


def test_the_record_names_the_parties_and_no_seed(tmp_path: Path):
    names = three(tmp_path)
    run(names, tmp_path / "out", weights=[2, 1, 1], max_norm=100.0)
    record = read_round(tmp_path / "out")
    assert {each["name"]: each["weight"] for each in record["parties"]} == dict(
        zip(names, (0.5, 0.25, 0.25), strict=True)
    )
    for each in record["parties"]:
        assert each["update_norm"] == pytest.approx(float(tensors_of(each["name"])[B].norm()), rel=1e-6)
    clip(ClipOptions(adapter=names[0], out=str(tmp_path / "sent"), noise=1.0, seed=91234), lambda line: None)
    assert "91234" not in json.dumps(read_round(tmp_path / "sent"))
    assert "norm_before" not in read_round(tmp_path / "sent") and "update_norm" not in read_round(tmp_path / "sent")


def spoil(key: str, value: Any) -> Change:
    return lambda config, tensors: config.update({key: value})


BAD: dict[str, tuple[Change, str]] = {
    "base": (spoil("base_model_name_or_path", "elsewhere/other"), "base: "),
    "rank": (lambda c, t: (c.update(r=3), t.update({A: torch.ones(3, 7), B: torch.ones(5, 3)})), "r: found 3"),
    "alpha": (spoil("lora_alpha", 8), "lora_alpha: found 8"),
    "rslora": (spoil("use_rslora", True), "alpha: "),
    "init": (spoil("init_lora_weights", "gaussian"), "init_lora_weights: found gaussian"),
    "kind": (spoil("peft_type", "IA3"), "IA3"),
    "dora": (spoil("use_dora", True), "use_dora: "),
    "pissa": (spoil("init_lora_weights", "pissa"), "pissa"),
    "new tokens": (spoil("trainable_token_indices", [3]), "new tokens: "),
    "missing": (lambda c, t: t.pop(B), "lora_B.weight is missing"),
    "more": (lambda c, t: t.update({"base_model.model.norm.weight": torch.ones(3)}), "norm.weight more than"),
    "shape": (lambda c, t: t.update({B: torch.ones(6, 2)}), "shape [6, 2]"),
    "integers": (lambda c, t: t.update({B: torch.ones(5, 2, dtype=torch.int64)}), "have a mean"),
    "embedding": (
        lambda c, t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 9)}),
        "have a mean",
    ),
    "nan": (lambda c, t: t[B].fill_(float("nan")), "NaN"),
    "infinity": (lambda c, t: t[B][0].fill_(float("inf")), "infinity"),
    "large": (lambda c, t: t[B].mul_(100), "max_norm=50"),
    "other A": (lambda c, t: t[A].add_(1), "freeze_a=true"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_party_is_named_and_can_be_left_out(tmp_path: Path, kind: str):
    change, text = BAD[kind]
    good, bad = three(tmp_path), party(tmp_path / "bad", 9, change)
    with pytest.raises(ConfigError) as error:
        run([bad, *good], tmp_path / "out", max_norm=50.0)
    assert f"{bad}: " in str(error.value) and text in str(error.value)
    assert not any(f"  {name}: " in str(error.value) for name in good)
    assert not (tmp_path / "out").exists()
    lines = run([*good, bad], tmp_path / "out", max_norm=50.0, on_bad_party="leave_out")
    assert [line for line in lines if bad in line and text in line]
    run(good, tmp_path / "without", max_norm=50.0)
    assert content(tmp_path / "out")[TENSOR_FILE] == content(tmp_path / "without")[TENSOR_FILE]
    assert list(read_round(tmp_path / "out")["left_out"]) == [bad]


def test_several_bad_parties_are_named_at_once(tmp_path: Path):
    good = three(tmp_path)
    bad = [party(tmp_path / kind.replace(" ", "-"), 9, BAD[kind][0]) for kind in ("nan", "alpha", "large", "other A")]
    torn = Path(party(tmp_path / "torn", 9))
    (torn / TENSOR_FILE).write_bytes((torn / TENSOR_FILE).read_bytes()[:-7])
    altered = Path(party(tmp_path / "altered", 9))
    record_files(altered, [TENSOR_FILE])
    save_file({A: torch.ones(2, 7), B: torch.ones(5, 2)}, altered / TENSOR_FILE)
    record = Path(party(tmp_path / "record", 9))
    (record / "federation.json").write_text("{}")
    record_files(record, ["federation.json"])
    (record / "federation.json").write_text('{"base": {"fingerprint": "x"}}')
    bad += [str(torn), str(altered), str(record), str(tmp_path / "absent")]
    with pytest.raises(ConfigError) as error:
        run([*good, *bad], tmp_path / "out", weights=[1.0] * 11, max_norm=50.0)
    assert all(f"  {name}: " in str(error.value) for name in bad)
    assert "8 of 11" in str(error.value)


def test_a_weight_that_is_not_positive_names_its_party(tmp_path: Path):
    good = three(tmp_path)
    with pytest.raises(ConfigError, match=f"{good[1]}: weight"):
        run(good, tmp_path / "out", weights=[1, 0, 1])
    with pytest.raises(ConfigError, match="weights: expected one for each of 3"):
        run(good, tmp_path / "out", weights=[1, 1])


def test_one_party_must_stay(tmp_path: Path):
    bad = party(tmp_path / "bad", 1, BAD["nan"][0])
    with pytest.raises(ConfigError, match="1 of 1"):
        run([bad], tmp_path / "out", on_bad_party="leave_out")


def test_a_folder_cannot_count_twice(tmp_path: Path):
    names = three(tmp_path)
    with pytest.raises(ConfigError, match="named 2 times"):
        run([*names, f"{names[0]}/../a"], tmp_path / "out", on_bad_party="leave_out")


def test_without_a_majority_nobody_is_left_out(tmp_path: Path):
    names = [party(tmp_path / "a", 1), party(tmp_path / "b", 2, BAD["other A"][0])]
    with pytest.raises(ConfigError, match="start="):
        run(names, tmp_path / "out", on_bad_party="leave_out")
    run(names, tmp_path / "out", on_bad_party="leave_out", start=names[1])
    assert torch.equal(tensors_of(tmp_path / "out")[B], tensors_of(names[1])[B])


def test_the_start_decides_whose_a_is_right(tmp_path: Path):
    start = party(tmp_path / "start", 5)
    others = [party(tmp_path / name, seed, seed_a=1) for seed, name in enumerate("abc")]
    with pytest.raises(ConfigError, match="3 of 4"):
        run([*others, party(tmp_path / "d", 9)], tmp_path / "out", start=start)


def test_fedavg_is_refused_with_the_error_it_makes(tmp_path: Path):
    names = [party(tmp_path / name, seed, seed_a=seed) for seed, name in enumerate("abc")]
    with pytest.raises(ConfigError, match="max_error=0: ") as error:
        run(names, tmp_path / "out", method="fedavg")
    accepted = float(str(error.value).rpartition("max_error=")[2].split()[0])
    assert 0.1 < accepted < 2
    lines = run(names, tmp_path / "out", method="fedavg", max_error=accepted)
    assert "error of mean(B) mean(A)=" in lines[0]
    assert read_round(tmp_path / "out")["factor_error"] == pytest.approx(accepted, abs=1.001e-3)
    equal = [party(tmp_path / name, seed) for seed, name in enumerate("xyz")]
    run(equal, tmp_path / "exact", method="fedavg")


def scaled(folder: Path) -> Tensor:
    tensors, config = tensors_of(folder), json.loads((folder / CONFIG_FILE).read_text())
    scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    assert config["r"] == len(tensors[A])
    return scaling * (tensors[B].double() @ tensors[A].double())


@pytest.mark.parametrize("rslora", [False, True])
def test_the_mean_and_the_residual_of_fedex_are_the_mean_of_the_updates(tmp_path: Path, rslora: bool):
    names = [party(tmp_path / name, seed, spoil("use_rslora", rslora), seed_a=seed) for seed, name in enumerate("abc")]
    run(names, tmp_path / "out", method="fedex", weights=[1, 2, 5])
    wanted = sum(w / 8 * scaled(Path(name)) for w, name in zip((1, 2, 5), names, strict=True))
    found = scaled(tmp_path / "out") + scaled(tmp_path / "out" / RESIDUAL)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_fedex_needs_a_base_that_can_change(tmp_path: Path):
    names = three(tmp_path)
    (Path(names[0]) / "federation.json").write_text(json.dumps({"base": {"quant": "nf4"}}))
    with pytest.raises(ConfigError, match=r"a: quant\.type=nf4"):
        run(names, tmp_path / "out", method="fedex")


def test_an_update_that_was_clipped_is_not_too_large(tmp_path: Path):
    names = three(tmp_path)
    start, sent = party(tmp_path / "start", 77, lambda config, tensors: tensors[B].mul_(1e4)), []
    for name in names:
        out = tmp_path / f"{Path(name).name}-sent"
        clip(ClipOptions(adapter=name, start=start, out=str(out), max_norm=0.35), lambda line: None)
        sent.append(str(out))
    run(sent, tmp_path / "out", start=start, max_norm=0.35)
    # Rounding to fp32 beside a large start moved some of them above the limit.
    assert max(each["update_norm"] for each in read_round(tmp_path / "out")["parties"]) > 0.35
    with pytest.raises(ConfigError, match="3 of 3"):
        run(sent, tmp_path / "again", start=start, max_norm=0.3)


def test_clip_and_aggregate_write_what_they_read(tmp_path: Path):
    """Tokenizer and chat template travel with the adapter; other files of a run do not."""
    names = three(tmp_path)
    for name in names:
        for file in ("tokenizer.json", "chat_template.jinja", "config.yaml.txt", "README.md"):
            (Path(name) / file).write_text("{}")
    clip(ClipOptions(adapter=names[0], out=str(tmp_path / "sent")), lambda line: None)
    run([str(tmp_path / "sent"), *names[1:]], tmp_path / "out")
    kept = {CONFIG_FILE, TENSOR_FILE, "federation.json", "manifest.json", "tokenizer.json", "chat_template.jinja"}
    assert content(tmp_path / "sent").keys() == content(tmp_path / "out").keys() == kept


def test_other_chat_templates_are_another_task(tmp_path: Path):
    names = three(tmp_path)
    for name, text in zip(names, "xxy", strict=True):
        (Path(name) / "chat_template.jinja").write_text(text)
    with pytest.raises(ConfigError, match=r"c: chat_template\.jinja"):
        run(names, tmp_path / "out")


def test_a_first_round_cannot_clip_what_did_not_start_from_zero(tmp_path: Path):
    name = party(tmp_path / "a", 1, BAD["more"][0])
    with pytest.raises(ConfigError, match="start: "):
        clip(ClipOptions(adapter=name, out=str(tmp_path / "sent")), lambda line: None)
    shutil.copytree(name, tmp_path / "start")
    clip(ClipOptions(adapter=name, start=str(tmp_path / "start"), out=str(tmp_path / "sent")), lambda line: None)
    assert tensors_of(tmp_path / "sent").keys() == tensors_of(name).keys()
