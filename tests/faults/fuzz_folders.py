"""Targets of fuzz.py: folders of adapters, models and tokenizers, caches, and pickles."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import pickle
import random
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from finetune.config.compose import load_config
from finetune.config.schema import DataConfig, ModelConfig, QuantConfig, SourceConfig
from finetune.data.documents import Document
from finetune.data.formats.messages import Conversation, Message
from finetune.data.media.processor import build_media_processor
from finetune.data.template.chat import ChatTemplate
from finetune.data.tokens.prepare import Preparation
from finetune.distill.cache import CachedTeacher, fill_cache
from finetune.distill.codec import encode_top, teacher_top_k
from finetune.distill.fingerprint import key_of
from finetune.distill.shards import COMPLETE, ShardReader, vocabulary_of
from finetune.export.adapter_folder import merge_reasons
from finetune.export.merge.deltas import read_deltas
from finetune.migration.adapters import convert_pickle
from finetune.models.adapters.base_config import find_base_config
from finetune.models.adapters.files import check_adapter, fetch_adapter, load_adapter
from finetune.models.families import FAMILIES
from finetune.models.hub import check_model, weight_files
from finetune.models.load import load_base
from finetune.models.quant.cache import QuantizedCache
from finetune.models.safetensors_index import WeightFiles, map_tensor, read_rows
from finetune.models.tokenizer import load_tokenizer
from finetune.planning.describe import dry_run
from finetune.serving.engine.adapters import load_lora
from finetune.system.errors import DataError, IntegrityError
from finetune.system.resources import packaged
from finetune.system.sealed import seal, unseal
from tests.faults.mutations import RAN, Mutator, as_json
from tests.models import random_qwen2, save_tiny_base

_DTYPES = ("F32", "F16", "BF16", "F64", "I64", "I8", "U8", "BOOL", "F8_E4M3", "F4", "", "float32")
_NUMBERS = (0, 1, -1, 7, 2**31, 2**40, 2**63, 2**64, -(2**63), 1.5, None, "1")


def stored(tensors: Mapping[str, torch.Tensor], change: Mutator) -> bytes:
    """Return a safetensors file, with its values, its header or its bytes changed."""
    tensors = dict(tensors)
    if change.often(0.3):
        name = change.rng.choice(list(tensors))
        tensors[name] = _odd(tensors[name], change)
    if change.often(0.2):
        name = change.rng.choice(list(tensors))
        other = change.text(name).encode("utf-8", "replace").decode() if change.often(0.5) else f"{name}.default"
        tensors[other] = tensors.pop(name)
    raw = save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"format": "pt"})
    if change.often(0.6):
        return raw
    if change.often(0.3):
        return change.raw(raw)
    length = int.from_bytes(raw[:8], "little")
    header, content = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    name = change.rng.choice([key for key in header if key != "__metadata__"])
    match change.rng.randrange(6):
        case 0:
            header[name]["dtype"] = change.rng.choice(_DTYPES)
        case 1:
            place = change.rng.randrange(len(header[name]["shape"]) or 1)
            header[name]["shape"][place : place + 1] = [change.rng.choice(_NUMBERS)]
        case 2:
            header[name]["data_offsets"][change.rng.randrange(2)] = change.rng.choice((*_NUMBERS, len(content)))
        case 3:
            header[name]["data_offsets"] = header[change.rng.choice(list(header))].get("data_offsets")
        case 4:
            header[name] = change.tree(header[name], ("dtype", "shape", "data_offsets"))
        case 5:
            header = change.tree(header, ("__metadata__", name))
    written = as_json(header)
    count = len(written) if change.often(0.8) else change.rng.choice((0, 7, 2**31, 2**62, 2**64 - 1))
    return count.to_bytes(8, "little") + written + content


def _odd(tensor: torch.Tensor, change: Mutator) -> torch.Tensor:
    tensor = tensor.clone()
    match change.rng.randrange(7):
        case 0:
            if tensor.is_floating_point():
                tensor.view(-1)[:1] = change.rng.choice((float("nan"), float("inf"), -float("inf"), 3e38))
        case 1:
            return tensor.to(change.rng.choice((torch.float16, torch.float64, torch.int64, torch.int8, torch.bool)))
        case 2:
            return tensor[:0]
        case 3:
            return tensor.flatten()
        case 4:
            return tensor[None]
        case 5:
            return tensor.sum()
        case 6:
            return torch.cat([tensor, tensor])
    return tensor


def write_json(file: Path, tree: Any, change: Mutator | None = None, names: Sequence[str] = ()) -> None:
    """Write a tree, or a changed one."""
    file.write_bytes(as_json(tree) if change is None else change.json(tree, names))


def adapters(folder: Path) -> Any:
    """Adapter folders: settings of every kind, and odd weights."""
    import peft

    base = random_qwen2()
    wrapped = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    )
    place = folder / "adapter"
    wrapped.save_pretrained(str(place))
    settings = json.loads((place / "adapter_config.json").read_text())
    tensors = dict(peft.get_peft_model_state_dict(wrapped))
    model = save_tiny_base(folder / "base", vocab_size=97)
    settings["base_model_name_or_path"] = str(model)
    weights = WeightFiles(weight_files(model, "base")).tensors
    kept = set(place.iterdir())

    def case(rng: random.Random) -> None:
        change = Mutator(rng)
        for file in set(place.iterdir()) - kept:
            file.unlink()
        (place / "adapter_config.json").write_text(json.dumps(settings))
        if change.often(0.7):
            write_json(place / "adapter_config.json", settings, change, list(settings))
        (place / "adapter_model.safetensors").write_bytes(
            stored(tensors, change) if change.often(0.4) else save(tensors)
        )
        check_adapter(place)
        match rng.randrange(5):
            case 0:
                adapter = fetch_adapter(str(place))
                for name, delta in read_deltas(adapter, weights).items():
                    delta.apply(read_rows(weights[name], 0, weights[name].shape[0]).float(), 0)
                list(merge_reasons(adapter.config))
            case 1:
                load_lora("mine", place, base)
            case 2:
                load_adapter(copy.deepcopy(base), place)
            case 3:
                find_base_config("fuzz", None, None, place, [])
            case 4:
                fetch_adapter(str(place)).check_same_kind(base=str(model), ranks={}, alpha=1, new_tokens={}, dora=False)

    return case


def models(folder: Path) -> Any:
    """Model folders: headers and indices of weights, config.json, settings of processors."""
    place = save_tiny_base(folder / "base", vocab_size=97, max_shard_size="100KB")
    texts = {name: json.loads((place / name).read_text()) for name in ("config.json", "model.safetensors.index.json")}
    omni = packaged("data") / "tiny-qwen2.5-omni"
    texts["preprocessor_config.json"] = json.loads((omni / "preprocessor_config.json").read_text())
    weights = {file.name: file.read_bytes() for file in place.glob("*.safetensors")}
    parts = {name: _tensors_of(raw) for name, raw in weights.items()}
    (folder / "outside.safetensors").write_bytes(next(iter(weights.values())))
    names = ("../outside.safetensors", str(folder / "outside.safetensors"), "/dev/zero", "sub/x.safetensors", "..", "")

    def case(rng: random.Random) -> None:
        change = Mutator(rng)
        for name, tree in texts.items():
            (place / name).write_text(json.dumps(tree))
        for name, raw in weights.items():
            (place / name).write_bytes(raw)
        match rng.randrange(4):
            case 0:
                name = rng.choice(list(weights))
                (place / name).write_bytes(stored(parts[name], change))
            case 1:
                write_json(place / "config.json", texts["config.json"], change, list(texts["config.json"]))
            case 2:
                index = copy.deepcopy(texts["model.safetensors.index.json"])
                index["weight_map"][rng.choice(list(index["weight_map"]))] = rng.choice((*names, change.value()))
                write_json(place / "model.safetensors.index.json", index, change if change.often(0.5) else None)
            case 3:
                write_json(place / "preprocessor_config.json", texts["preprocessor_config.json"], change)
                build_media_processor(FAMILIES["qwen2_5_omni_thinker"], place, DataConfig())
        cfg = ModelConfig(name=str(place))
        check_model(cfg)
        for tensor in WeightFiles(weight_files(place, "base")).tensors.values():
            read_rows(tensor, 0, tensor.shape[0] if tensor.shape else 0) if change.often(0.5) else map_tensor(tensor)
        if change.often(0.3):
            dry_run(load_config("lora", [f"model.name={place}"], needs_data=False))
        if change.often(0.3):
            load_base(cfg, QuantConfig(type=rng.choice(["none", "nf4"]), cache=False), "cpu")

    return case


def _tensors_of(raw: bytes) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return load(raw)


def tokenizers(folder: Path) -> Any:
    """Tokenizer files of a model folder, with its template."""
    place = Path(shutil.copytree(packaged("data") / "tiny-qwen2.5", folder / "base", dirs_exist_ok=True))
    (place / "model.safetensors").unlink()
    trees = {name: json.loads((place / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json")}
    tokens = trees["tokenizer.json"]["model"]["vocab"]
    # Few enough entries that a change meets the others, too.
    small = copy.deepcopy(trees["tokenizer.json"])
    small["model"] |= {"vocab": dict(list(tokens.items())[:300]), "merges": []}
    conversation = Conversation((Message("user", "question 7"), Message("assistant", "answer")))

    def case(rng: random.Random) -> None:
        change = Mutator(rng)
        for name, tree in trees.items():
            (place / name).write_text(json.dumps(tree))
        name = rng.choice(list(trees))
        tree = small if name == "tokenizer.json" and change.often(0.7) else trees[name]
        if tree is small and change.often(0.7):
            tree = small | {key: change.tree(small[key]) for key in rng.sample(list(set(small) - {"model"}), 1)}
            write_json(place / name, tree)
        else:
            write_json(place / name, tree, change, ("chat_template", "auto_map", "eos_token", "added_tokens_decoder"))
        chat = ChatTemplate(load_tokenizer(ModelConfig(name=str(place))))
        _ = chat.turn_end_id, chat.eos_id, chat.vocabulary_size, chat.text_start
        for found in chat.encode([conversation]):
            if isinstance(found, DataError):
                raise found
            chat.decode(found.ids)

    return case


def quantized_cache(folder: Path) -> Any:
    """Entries of the quantized cache, whose sums are right for what they hold: a corrupt one is quantized again."""
    made_from = {"weights": {"a": "b"}, "type": "nf4"}
    said: list[str] = []
    cache = QuantizedCache(folder / "quantized", made_from, said.append)
    tensors = {"a.weight": torch.zeros(32, 1, dtype=torch.uint8), "a.weight.absmax": torch.zeros(1)}

    def case(rng: random.Random) -> None:
        change = Mutator(rng)
        cache.entry.mkdir(parents=True, exist_ok=True)
        content = stored(tensors, change)
        (cache.entry / "part-00000.safetensors").write_bytes(content)
        manifest = {"made_from": made_from, "parts": {"part-00000.safetensors": hashlib.sha256(content).hexdigest()}}
        if change.often(0.3):
            name = rng.choice(("../../outside", "/etc/hostname", "..", ""))
            manifest["parts"] = {name: manifest["parts"]["part-00000.safetensors"]}
        (cache.entry / "manifest.json").write_text(json.dumps(manifest))
        if change.often(0.6):
            write_json(cache.entry / "manifest.json", manifest, change)
        if cache.find() is None:
            raise IntegrityError(said[-1])

    return case


def token_cache(folder: Path) -> Any:
    """Folders of tokenized rows: what is damaged is tokenized again, or refused."""
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": str(i)}]} for i in range(5)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = DataConfig(train=[SourceConfig(path=str(folder / "rows.jsonl"))], cache=str(folder / "tokens"))
    chat = ChatTemplate(load_tokenizer(ModelConfig(name=str(packaged("data") / "tiny-qwen2.5"))))
    preparation = Preparation(cfg, chat)
    place = preparation.store(cfg.train[0]).folder
    right = {file.name: file.read_bytes() for file in place.iterdir()}
    meta = json.loads(right["meta.json"])

    def case(rng: random.Random) -> None:
        change = Mutator(rng)
        place.mkdir(exist_ok=True)
        for name, raw in right.items():
            (place / name).write_bytes(raw)
        name = rng.choice(list(right))
        if name == "meta.json":
            write_json(place / name, meta, change, list(meta))
        else:
            content = change.raw(right[name])
            if change.often(0.7):  # of the size that is written down
                content = content[: len(right[name])].ljust(len(right[name]), b"\1")
            (place / name).write_bytes(content)
        store = preparation.store(cfg.train[0])
        for row in range(len(store)):
            _ = store[row], store.location(row), store.placed(row)
        _ = store.used_ids(), store.meta.format()

    return case


def teacher_cache(folder: Path) -> Any:
    """Folders of a teacher's targets, whose sums are right for what they hold."""
    place = folder / "teacher"
    origin = {"version": 1, "vocabulary": 100, "kept": {"cache_kind": "top", "top_k": 4}}
    documents = [
        Document(np.array([i, 1, 2, 3], np.int32), np.array([-100, 1, 2, 3], np.int32), f"rows:{i}") for i in range(4)
    ]
    columns = encode_top(np.arange(12).reshape(3, 4), np.full((3, 4), -1.5))
    fill_cache(
        place,
        origin,
        documents,
        lambda some: [columns for _ in some],
        group_tokens=8,
        progress=lambda done, total: None,
    )
    right = {file.name: file.read_bytes() for file in place.iterdir() if file.is_file()}
    shard = next(name for name in right if name.endswith(".safetensors"))
    tensors = _tensors_of(right[shard])

    def case(rng: random.Random) -> None:
        change = Mutator(rng)
        for name, raw in right.items():
            (place / name).write_bytes(raw)
        content = stored(tensors, change)
        (place / shard).write_bytes(content)
        complete = unseal(json.loads(right[COMPLETE]))
        complete["shards"][shard] |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        if change.often(0.3):
            complete["shards"][rng.choice(("../x", "/etc/hostname", "", ".."))] = complete["shards"].pop(shard)
        (place / COMPLETE).write_text(json.dumps(seal(complete)))
        if change.often(0.4):
            name = rng.choice((COMPLETE, "fingerprint.json"))
            write_json(place / name, json.loads((place / name).read_text()), change)
        vocabulary_of(place)
        teacher = CachedTeacher(place, origin, torch.device("cpu"))
        teacher.check_holds(documents)
        keys = [key for document in documents if (key := key_of(document)) is not None]
        teacher_top_k(ShardReader(place).read(keys), torch.device("cpu"))

    return case


class _Runs:
    """What a pickle runs when it is loaded."""

    def __init__(self, call: tuple) -> None:
        self.call = call

    def __reduce__(self) -> tuple:
        return self.call


def pickles(folder: Path) -> Any:
    """Pickled adapters, with code in them, and lists in place of tensors."""
    place = folder / "old"
    place.mkdir(exist_ok=True)
    names = [f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight" for side in "AB"]
    tensors = {names[0]: torch.ones(2, 8), names[1]: torch.ones(8, 2)}
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    calls = [(exec, (f"open({RAN!r}, 'w')",)), (Path.touch, (Path(RAN),)), (eval, ("1",)), (getattr, (Path, "cwd"))]
    out = folder / "new"

    def case(rng: random.Random) -> None:
        change = Mutator(rng)
        shutil.rmtree(out, ignore_errors=True)
        write_json(place / "adapter_config.json", settings, change) if change.often(0.3) else (
            place / "adapter_config.json"
        ).write_text(json.dumps(settings))
        found: Any = dict(tensors)
        match rng.randrange(5):
            case 0:
                found[change.text(names[0])] = found.pop(names[0])
            case 1:
                found[names[0]] = rng.choice([[1.0], [tensors], change.value(), _Runs(rng.choice(calls)), "x"])
            case 2:
                found = rng.choice([[tensors], [_Runs(rng.choice(calls))], _Runs(rng.choice(calls)), change.value()])
            case 3:
                found[names[0]] = _odd(found[names[0]], change)
        buffer = io.BytesIO()
        try:
            torch.save(found, buffer) if change.often(0.8) else pickle.dump(found, buffer)
        except (RecursionError, pickle.PicklingError):
            buffer.write(b"\x80\x02" + b"]" * 5000 + b".")
        raw = buffer.getvalue()
        if change.often(0.4):
            raw = (
                _repacked(raw, change) if change.often(0.7) and zipfile.is_zipfile(io.BytesIO(raw)) else change.raw(raw)
            )
        (place / "adapter_model.bin").write_bytes(raw)
        convert_pickle(place / "adapter_model.bin", out)

    return case


def _repacked(raw: bytes, change: Mutator) -> bytes:
    """Return a zip with one of its files changed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(buffer, "w") as new:
        chosen = change.rng.choice(old.namelist())
        for name in old.namelist():
            content, new_name = old.read(name), name
            if name == chosen and change.often(0.2):
                new_name = change.text(name).encode(errors="replace").decode() or "x"  # a zip holds no surrogates
            new.writestr(new_name, change.raw(content) if name == chosen else content)
    return buffer.getvalue()


TARGETS = {
    "adapters": adapters,
    "models": models,
    "tokenizers": tokenizers,
    "quantized-cache": quantized_cache,
    "token-cache": token_cache,
    "teacher-cache": teacher_cache,
    "pickles": pickles,
}
