"""Where model files come from, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors

from finetune.config.schema import ModelConfig, QuantConfig
from finetune.models import hub
from finetune.models.families import shape_of
from finetune.models.hub import INDEX_FILE, TEXT_FILES, fetch, read_config, weight_files
from finetune.models.load import load_base
from finetune.models.safetensors_index import read_tensor
from finetune.models.tokenizer import load_tokenizer
from finetune.system.errors import ConfigError, IntegrityError, ResourceError
from finetune.system.resources import packaged

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def copy(make_base, tmp_path: Path) -> Path:
    """A base that a test may spoil."""
    return Path(shutil.copytree(make_base(), tmp_path / "base"))


def rewrite_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_local_folder_is_its_own_source(copy: Path) -> None:
    assert fetch(str(copy), None, TEXT_FILES, "model.name") == hub.Source(copy, None)


def test_a_revision_of_a_local_folder_is_an_error(copy: Path) -> None:
    with pytest.raises(ConfigError, match="no revisions, found"):
        fetch(str(copy), "main", TEXT_FILES, "model.name")


@pytest.mark.parametrize("name", ["./missing", "/missing/folder", "a/b/c"])
def test_a_missing_folder_is_an_error(name: str) -> None:
    with pytest.raises(ConfigError, match="not a folder"):
        fetch(name, None, TEXT_FILES, "model.name")


def test_a_hub_id_is_read_from_the_cache(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "hub" / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(copy, repository / "snapshots" / COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    model = load_base(ModelConfig(name="someone/tiny"), QuantConfig(type="none"), device="cpu")

    assert (model.name_or_path, model.config.name_or_path) == ("someone/tiny", "someone/tiny")
    assert model.base_revision == COMMIT


def test_a_model_outside_the_cache_is_an_error_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"(?s)not a local folder.*HF_HUB_OFFLINE is set.*local folder"):
        fetch("no/such", None, TEXT_FILES, "model.name")


def http_error(kind: type[hub_errors.HfHubHTTPError], status: int) -> hub_errors.HfHubHTTPError:
    request = hub_errors.Response.__init__.__globals__["Request"]("GET", "https://hub.invalid/no/such")
    return kind("refused", response=hub_errors.Response(status, request=request))


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (http_error(hub_errors.GatedRepoError, 403), r"(?s)gated.*HF_TOKEN.*local folder"),
        (http_error(hub_errors.RepositoryNotFoundError, 401), r"(?s)hub id.*HF_TOKEN"),
        (http_error(hub_errors.RevisionNotFoundError, 404), r"revision, found 'v9'"),
        (http_error(hub_errors.HfHubHTTPError, 500), r"download failed: .*refused"),
        (hub_errors.LocalEntryNotFoundError("none"), r"not complete in the cache"),
    ],
)
def test_each_hub_error_has_a_help_text(error: Exception, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(ConfigError, match=says):
        fetch("no/such", "v9", TEXT_FILES, "model.name")


def test_a_full_disk_is_a_resource_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub, "snapshot_download", full)
    with pytest.raises(ResourceError, match="disk is full"):
        fetch("no/such", None, TEXT_FILES, "model.name")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"auto_map": {"AutoModel": "evil.Model"}}, "names code to run"),
        ({"model_type": ["qwen2"]}, "found ..qwen2"),
        ({"model_type": "phi3"}, "found 'phi3'; supported: qwen2, qwen3"),
        ({"quantization_config": {"quant_method": "awq"}}, "already quantized"),
    ],
)
def test_unsupported_configs_are_an_error(copy: Path, changes: dict, says: str) -> None:
    rewrite_config(copy, **changes)
    with pytest.raises(ConfigError, match=says):
        read_config(copy, "base")


@pytest.mark.parametrize(
    ("content", "says"), [(None, "has no config.json"), ("{", "is not JSON"), ("[]", "not a JSON object")]
)
def test_invalid_configs_are_an_error(copy: Path, content: str | None, says: str) -> None:
    (copy / "config.json").unlink()
    if content is not None:
        (copy / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=says):
        read_config(copy, "base")


def test_json_that_is_too_deep_is_an_error(copy: Path) -> None:
    (copy / "config.json").write_text('{"a": ' + "[" * 5_000)
    with pytest.raises(ConfigError, match="is not JSON"):
        read_config(copy, "base")
    assert shape_of(str(copy)) is None


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 2**31}, {"hidden_size": -1}, {"num_attention_heads": "4"}])
def test_sizes_of_no_model_are_an_error(copy: Path, changes: dict) -> None:
    rewrite_config(copy, **changes)
    with pytest.raises(ConfigError, match=next(iter(changes))):
        read_config(copy, "base")


def test_settings_that_transformers_refuses_are_an_error(copy: Path) -> None:
    rewrite_config(copy, rms_norm_eps="small")
    with pytest.raises(ConfigError, match=r"config\.json: transformers cannot build the model: .*rms_norm_eps"):
        load_base(ModelConfig(name=str(copy)), QuantConfig(), "cpu")


OUTSIDE = ["../secret.safetensors", "/etc/passwd", "", "..", "a/b.safetensors", "x" * 999, None, 7, ["a"]]


@pytest.mark.parametrize("name", OUTSIDE, ids=str)
def test_an_index_names_files_of_its_own_folder_only(make_base, tmp_path: Path, name: object) -> None:
    folder = Path(shutil.copytree(make_base(max_shard_size="60KB"), tmp_path / "base"))
    index = json.loads((folder / INDEX_FILE).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (folder / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"names no safetensors file of its own folder for 'model\.norm\.weight'"):
        weight_files(folder, "base")


def test_an_index_without_a_map_of_tensors_is_an_error(copy: Path) -> None:
    (copy / INDEX_FILE).write_text('{"weight_map": ["model.safetensors"]}')
    with pytest.raises(ConfigError, match=r"has no weight_map .*found list"):
        weight_files(copy, "base")


def test_a_missing_shard_is_an_error_with_its_name(make_base, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(make_base(max_shard_size="60KB"), tmp_path / "base"))
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ConfigError, match=shard.name):
        weight_files(folder, "base")


def test_pickled_weights_are_an_error(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"lacks model.safetensors\nhelp: pytorch_model.bin is a pickle"):
        weight_files(copy, "base")


@pytest.mark.parametrize("keep", [0.5, 0.999])
def test_truncated_weights_are_an_error_with_the_file_name(copy: Path, keep: float) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    with pytest.raises(IntegrityError, match=r"model\.safetensors: not a complete safetensors file"):
        weight_files(copy, "base")


def test_shards_and_a_single_file_hold_the_same_tensors(make_base) -> None:
    whole, shards = weight_files(make_base(), "a"), weight_files(make_base(max_shard_size="60KB"), "b")
    assert whole.keys() == shards.keys()
    assert len(set(shards.values())) > 1
    for name in whole:
        assert read_tensor(whole[name], name).equal(read_tensor(shards[name], name))


BROKEN_TOKENIZERS = {
    "tokenizer.json": [{"model": {}}, {"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}}, {"version": 7}],
    "tokenizer_config.json": [{"eos_token": 7}, {"added_tokens_decoder": [1]}, {"tokenizer_class": 7}],
}


@pytest.mark.parametrize(("file", "number"), [(file, i) for file in BROKEN_TOKENIZERS for i in range(3)])
def test_a_tokenizer_that_cannot_be_loaded_is_an_error_with_its_folder(tmp_path: Path, file: str, number: int) -> None:
    folder = Path(shutil.copytree(packaged("data") / "tiny-qwen2.5", tmp_path / "base"))
    content = json.loads((folder / file).read_text()) | BROKEN_TOKENIZERS[file][number]
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=rf"model\.name={folder}: the tokenizer in .* cannot be loaded"):
        load_tokenizer(ModelConfig(name=str(folder)))
