"""The cache of quantized weights: never stale, foreign, damaged or half-written, and never the end of a run."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

from finetune.config.schema import ModelConfig, QuantConfig
from finetune.models.load import load_base
from finetune.models.quant import cache, four_bit


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "quantized"


@pytest.fixture
def base(make_base, tmp_path: Path) -> Path:
    """A copy of the tiny base that a test may change."""
    return Path(shutil.copytree(make_base(), tmp_path / "base"))


@pytest.fixture
def start(base: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, int, list[str]]]:
    """`start(**quant)`: the model, how many matrices were quantized for it, what was said."""
    real = four_bit.quantize

    def load(folder: Path = base, **quant: Any) -> tuple[Any, int, list[str]]:
        count, said = 0, []

        def counted(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            return real(*arguments)

        monkeypatch.setattr(four_bit, "quantize", counted)
        model = load_base(ModelConfig(name=str(folder)), QuantConfig(**quant), "cpu", said.append)
        return model, count, said

    return load


def entries(home: Path) -> list[Path]:
    return [path for path in home.iterdir() if path.is_dir() and path.name != "digests" and path.name[0] != "."]


def parts(home: Path) -> list[Path]:
    return sorted(entries(home)[0].glob("*.safetensors"))


def same(first: Any, second: Any) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)


def test_the_second_start_quantizes_nothing(start, home: Path) -> None:
    first, count, said = start()
    assert (count, said) == (14, [])
    second, count, said = start()
    assert (count, said) == (0, [])
    assert same(first, second)
    assert not list(home.glob(".*"))


def test_a_change_of_a_loaded_weight_does_not_change_the_cache(start) -> None:
    start()
    cached = start()[0]
    before = cached.model.layers[0].mlp.up_proj.weight.data.clone()
    cached.model.layers[0].mlp.up_proj.weight.data.zero_()
    again, count, said = start()
    assert again.model.layers[0].mlp.up_proj.weight.data.equal(before) and (count, said) == (0, [])


def test_without_the_cache_no_file_is_read_or_written(start, home: Path) -> None:
    for _ in range(2):
        assert start(cache=False)[1:] == (14, [])
    assert not home.exists()


@pytest.mark.parametrize(
    "options",
    [{"double": False}, {"skip_modules": ["o_proj"]}],
    ids=str,
)
def test_other_options_use_another_entry(start, home: Path, options: dict[str, Any]) -> None:
    start()
    assert start(**options)[1] > 0
    assert len(entries(home)) == 2
    assert start()[1] == start(**options)[1] == 0


def test_another_compute_dtype_uses_the_same_entry(start) -> None:
    start()
    model, count, _ = start(compute_dtype="float32")
    assert count == 0 and model.model.layers[0].mlp.up_proj.compute_dtype == torch.float32


def change_one_weight(folder: Path) -> None:
    """Of the file's bytes as few as can be, none of them in the header."""
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-100:] = bytes(100)
    file.write_bytes(content)


def test_changed_weights_are_quantized_again(start, base: Path) -> None:
    """Even where size and time of writing are put back as they were."""
    start()
    file = base / "model.safetensors"
    before = file.stat()
    time.sleep(0.05)
    change_one_weight(base)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    changed, count, said = start()
    assert (count, said) == (14, [])
    assert same(changed, start(cache=False)[0])


def test_a_copy_of_the_weights_uses_the_same_entry(start, base: Path, tmp_path: Path) -> None:
    start()
    assert start(Path(shutil.copytree(base, tmp_path / "copy")))[1] == 0


def test_an_unchanged_file_is_hashed_once(start, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one that was written a moment ago: within a tick of the clock it could change again unseen."""
    from finetune.models import digest

    hashed = []
    real = digest.sha256_of
    monkeypatch.setattr(digest, "sha256_of", lambda file: hashed.append(file) or real(file))
    start()
    start()
    assert len(hashed) == 2
    monkeypatch.setattr(digest, "_SETTLED_NANOSECONDS", 0)
    start()
    start()
    assert len(hashed) == 3
    (base / "model.safetensors").touch()
    assert start()[1] == 0 and len(hashed) == 4


def flip_a_byte(home: Path) -> None:
    file = parts(home)[0]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(home: Path) -> None:
    file = parts(home)[0]
    os.truncate(file, file.stat().st_size // 2)


def change_the_manifest(home: Path, **changes: Any) -> None:
    manifest = entries(home)[0] / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | changes))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a flipped bit": flip_a_byte,
    "half a file": truncate,
    "a lost file": lambda home: parts(home)[0].unlink(),
    "a lost manifest": lambda home: (entries(home)[0] / "manifest.json").unlink(),
    "a torn manifest": lambda home: os.truncate(entries(home)[0] / "manifest.json", 40),
    "an empty manifest": lambda home: os.truncate(entries(home)[0] / "manifest.json", 0),
    "a manifest of another kind": lambda home: (entries(home)[0] / "manifest.json").write_text("[1]"),
    "sums of another kind": lambda home: change_the_manifest(home, parts=3),
    "another model's": lambda home: change_the_manifest(home, made_from={"weights": {}}),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_corrupt_entry_is_logged_and_replaced(start, home: Path, damage: str) -> None:
    first = start()[0]
    DAMAGE[damage](home)
    second, count, said = start()
    assert count == 14 and same(first, second)
    assert all("is corrupt" in line and "quantizing again" in line for line in said) and said
    assert start()[1:] == (0, [])


def test_a_full_disk_does_not_end_the_run(start, home: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system refuses the bytes in the middle of a file."""
    home.mkdir(parents=True)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        _, count, said = start()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert count == 14
    assert len(said) == 1 and "set FINETUNE_CACHE to another folder" in said[0]
    assert not entries(home) and not list(home.glob(".*"))


def test_the_cache_leaves_space_on_the_disk(start, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, 1 << 30))
    _, count, said = start()
    assert count == 14 and "No space left on device" in said[0] and not entries(home)


def test_an_unwritable_folder_does_not_end_the_run(start, home: Path) -> None:
    home.parent.mkdir(parents=True)
    home.write_text("a file in the way")
    _, count, said = start()
    assert count == 14 and len(said) == 1 and "quantizing without the cache" in said[0]


# Forked where the libraries are imported and nothing has run yet: one import serves all of them.
SCRIPT = """
import os, signal, sys, time
import bitsandbytes
from finetune.config.schema import ModelConfig, QuantConfig
from finetune.models.quant import four_bit
from finetune.models.quant import cache
from finetune.models.load import load_base
real, count = four_bit.quantize, 0
def slow(*arguments):
    global count
    count += 1
    time.sleep(0.05)
    return real(*arguments)
four_bit.quantize = slow
def start(killed):
    if process := os.fork():
        return process
    if killed:
        cache.write_text = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    load_base(ModelConfig(name=sys.argv[1]), QuantConfig(), "cpu")
    os._exit(count)
def end(process):
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
print(end(start(True)), len([name for name in os.listdir(sys.argv[2]) if name[0] == "."]))
print(*sorted(map(end, [start(False), start(False)])))
"""


def test_a_killed_writer_leaves_no_entry_and_two_processes_quantize_once(start, home, base) -> None:
    """Exit codes: how many matrices each quantized."""
    command = [sys.executable, "-c", SCRIPT, str(base), str(home)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert run.stdout.split("\n")[:2] == [f"{-signal.SIGKILL} 1", "0 14"], run.stderr
    assert len(entries(home)) == 1 and not list(home.glob(".*")), "what the killed one left is gone"
    assert start()[1:] == (0, [])


def test_a_process_stops_waiting_and_quantizes_itself(start, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start()
    entry = entries(home)[0]
    shutil.rmtree(entry)
    monkeypatch.setattr(cache, "_PATIENCE_SECONDS", 0.1)
    with FileLock(home / f"{entry.name}.lock"):
        _, count, said = start()
    assert count == 14 and "another process holds" in said[0] and not entries(home)


def test_only_old_leftovers_of_other_models_are_removed(start, home: Path) -> None:
    old, young = home / ".other.1", home / ".other.2"
    old.mkdir(parents=True)
    young.mkdir()
    os.utime(old, (0, 0))
    start()
    assert not old.exists() and young.exists()


def test_weights_from_files_that_change_meanwhile_are_not_cached(
    start, home, base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was quantized from a file that changed meanwhile belongs to no digest, and is not kept."""
    real = four_bit._quantize_all

    def disturbed(*arguments: Any) -> None:
        real(*arguments)
        (base / "model.safetensors").touch()

    monkeypatch.setattr(four_bit, "_quantize_all", disturbed)
    start()
    assert not entries(home)


def test_one_16_bit_matrix_at_a_time_is_in_memory(make_base, monkeypatch: pytest.MonkeyPatch) -> None:
    """16-bit matrices that are alive when the next is read: none."""
    import gc
    import weakref

    alive: list[weakref.ref] = []
    most = 0
    real = four_bit.read_tensor

    def watched(file: Path, name: str) -> torch.Tensor:
        nonlocal most
        tensor = real(file, name)
        if "proj.weight" in name:
            most = max(most, sum(known() is not None for known in alive))
            alive.append(weakref.ref(tensor))
        return tensor

    gc.disable()
    monkeypatch.setattr(four_bit, "read_tensor", watched)
    load_base(ModelConfig(name=str(make_base())), QuantConfig(cache=False), "cpu")
    gc.enable()
    assert len(alive) == 14 and most <= 1


@pytest.mark.parametrize("compute_dtype", ["bfloat16", "float32"])
def test_a_resident_weight_equals_the_dequantized_one(start, compute_dtype: Any) -> None:
    """As bitsandbytes does it where a gradient is wanted."""
    model, _, _ = start(keep_dequantized=True, compute_dtype=compute_dtype)
    layer = model.model.layers[1].mlp.down_proj
    x: Any = torch.randn(5, 128, dtype=torch.bfloat16).requires_grad_()
    expected = layer(x)
    found = torch.nn.functional.linear(x.to(layer.resident_weight.dtype), layer.resident_weight).bfloat16()
    assert found.equal(expected)
    assert layer.resident_weight.dtype == getattr(torch, compute_dtype) and layer.resident_weight.shape == (64, 128)
    plain, _, _ = start(compute_dtype=compute_dtype)
    assert not hasattr(plain.model.layers[1].mlp.down_proj, "resident_weight")
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]


def test_files_with_other_tensor_names_are_loaded_by_transformers(start, base: Path) -> None:
    """As one saved from the model without its head."""
    expected = start(cache=False)[0]
    tensors = load_file(base / "model.safetensors")
    renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(renamed, base / "model.safetensors", metadata={"format": "pt"})
    model, count, said = start()
    assert (count, said) == (0, []) and same(model, expected)


@pytest.mark.parametrize("name", ["../../outside", "/etc/hostname", "", "x.safetensors"])
def test_a_manifest_names_its_own_parts_only(tmp_path: Path, name: str) -> None:
    said: list[str] = []
    entry = cache.QuantizedCache(tmp_path, {"a": 1}, said.append)
    entry.entry.mkdir()
    (entry.entry / "manifest.json").write_text(json.dumps({"made_from": {"a": 1}, "parts": {name: "0" * 64}}))
    assert entry.find() is None and "is no part of it" in said[0]


def test_a_manifest_that_is_too_deep_is_corrupt(tmp_path: Path) -> None:
    said: list[str] = []
    entry = cache.QuantizedCache(tmp_path, {"a": 1}, said.append)
    entry.entry.mkdir()
    (entry.entry / "manifest.json").write_text("[" * 5_000)
    assert entry.find() is None and "is corrupt" in said[0]
