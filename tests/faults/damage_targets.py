"""The files that `damage.py` damages: one small folder of every kind that this package reads back."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from finetune import load_config, train
from finetune.config.compose import saved_config
from finetune.config.schema import DataConfig, ModelConfig, SourceConfig
from finetune.data.batch import build_batch
from finetune.data.documents import Document
from finetune.data.encoded import IGNORE_INDEX
from finetune.data.media.media import Media
from finetune.data.positions import PlacedMedia
from finetune.data.stream import StreamingSampler
from finetune.data.template.chat import ChatTemplate
from finetune.data.tokens.prepare import Preparation
from finetune.data.tokens.store import ROW, EncodedBatch, StoreWriter, TokenStore
from finetune.distill.cache import fill_cache
from finetune.distill.fingerprint import key_of
from finetune.distill.shards import ShardReader, check_fingerprint, open_folder, vocabulary_of
from finetune.evaluation.gap_table import GapTable, ModelFigures, SetFigures, load_gap, to_json
from finetune.evaluation.intervals import Estimate
from finetune.evaluation.probe import read_probe
from finetune.mixed_precision.journal import ALL, Journal, MeanKl, Measured, Sensitivities
from finetune.models.adapters.base_config import recorded_fingerprint
from finetune.models.adapters.files import fetch_adapter
from finetune.models.digest import check_downloads, weights_digest
from finetune.models.families import FAMILIES
from finetune.models.families.family import PositionRule
from finetune.models.hub import named_in_model, read_config, weight_files
from finetune.models.quant.cache import QuantizedCache
from finetune.models.quant.four_bit import build_skeleton, holds_all
from finetune.models.safetensors_index import WeightFiles, read_tensor
from finetune.models.tokenizer import load_adapter_tokenizer, load_tokenizer
from finetune.objectives.reference_cache import ReferenceCache
from finetune.report.run import read_run
from finetune.sweep.record import Record, Trial, load_record
from finetune.system.console import log
from finetune.system.errors import IntegrityError
from finetune.system.manifest import sha256_of
from finetune.system.resources import packaged
from finetune.towers.cache import EmbeddingCache
from finetune.training.checkpoint import TRAINING, TrainState, newest_valid, read_state
from finetune.training.choices import choices_before, leave_smaller
from tests.faults.damage import Target

TINY = packaged("data") / "tiny-qwen2.5"
ORIGIN = {"version": 1, "kept": {"cache_kind": "sampled", "head": 2}, "vocabulary": 100, "weights": None}
RUN = ("train.max_steps=2", "train.save_every=1", "data.train.0.limit=16", "data.eval.0.limit=4", "data.max_length=64")


def build_targets(folder: Path, run: Path | None = None) -> list[Target]:
    """Write a folder of every kind. run: a finished run with two checkpoints, else one is trained."""
    if run is None:
        run = folder / "run"
        words = [*RUN, "train.batch_size=2", "train.keep_checkpoints=2", "generation.num_examples=2"]
        train(load_config("quickstart.yaml", [*words, f"output_dir={run}"]))
    makers = (_run_folders, _weights, _downloads, _caches, _tokens, _records)
    targets = []
    for make in makers:
        place = folder / make.__name__.strip("_")
        place.mkdir()
        targets += make(place, run)
    return targets


def _copy(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder, ignore=shutil.ignore_patterns("*.html", ".lock", "report*")))


def _run_folders(folder: Path, run: Path) -> Iterator[Target]:
    both = _copy(run, folder / "both")
    one, two = both / "checkpoint-1", both / "checkpoint-2"

    def state(checkpoint: Path) -> Any:
        return read_state(checkpoint), load_file(checkpoint / TRAINING)

    def newest() -> Any:
        found = newest_valid(both, log)
        return None if found is None else state(found)

    names = tuple(f"checkpoint-2/{file.name}" for file in two.iterdir() if file.is_file())
    yield Target("newest checkpoint", both, names, newest, others=(state(one),))

    def adapter(place: Path, name: str = "tiny") -> Any:
        found = fetch_adapter(str(place), "adapter")
        tokenizer = load_adapter_tokenizer(ModelConfig(name=name), place)
        return found.config, found.tensors, tokenizer.get_vocab(), tokenizer.chat_template

    files = ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json")
    single = Path(shutil.copytree(two, folder / "single" / "checkpoint-2"))
    kept = tuple(name for name in (*files, "manifest.json", "chat_template.jinja") if (single / name).is_file())
    yield Target("checkpoint as adapter", single, kept, lambda: adapter(single))
    own = _copy(run, folder / "own")
    yield Target("adapter of a run", own, kept, lambda: adapter(own))
    foreign = folder / "foreign"
    foreign.mkdir()
    for name in files[:2]:
        shutil.copy(run / name, foreign / name)
    tensors_only = (files[0],)
    yield Target(
        "adapter without a manifest",
        foreign,
        tensors_only,
        lambda: fetch_adapter(str(foreign), "adapter").tensors.keys(),
        header_only=True,
    )
    figures = _copy(run, folder / "figures")
    shown = ("config.yaml", "run.json", "result.json", "samples.json", "metrics.jsonl", "probe.json", "manifest.json")

    def figures_of_run() -> Any:
        found = read_run(figures)
        for problem in found.problems:
            log(problem)
        parts = (found.config, found.result, found.facts, found.samples, {k: list(v) for k, v in found.metrics.items()})
        return saved_config(figures), recorded_fingerprint(figures), read_probe(figures), parts

    there = tuple(name for name in shown if (figures / name).is_file())
    yield Target("figures of a run", figures, there, figures_of_run)


def _weights(folder: Path, run: Path) -> Iterator[Target]:
    base = Path(shutil.copytree(TINY, folder / "base"))
    config = read_config(base, str(base))
    skeleton = build_skeleton(base, torch.bfloat16, "eager")
    names = sorted(weight_files(base, str(base)))
    tensors = {name: read_tensor(base / "model.safetensors", name) for name in names}
    # Two shards with an index, as a hub has them.
    (base / "model.safetensors").unlink()
    half = len(names) // 2
    shards = {"model-00001-of-00002.safetensors": names[:half], "model-00002-of-00002.safetensors": names[half:]}
    for shard, some in shards.items():
        save_file({name: tensors[name].clone() for name in some}, base / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, some in shards.items() for name in some}
    index = {"metadata": {}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))

    def structure() -> Any:
        files = weight_files(base, str(base))
        placed = named_in_model(files, FAMILIES[config["model_type"]])
        if not holds_all(placed, skeleton):
            # What `load_base` says with the names of the differing tensors.
            raise IntegrityError("weights do not match config.json")
        return {
            name: (stored.file.name, stored.offset, str(stored.dtype), stored.shape)
            for name, stored in WeightFiles(files).tensors.items()
        }

    yield Target("base without digests", base, (*shards, "model.safetensors.index.json"), structure, header_only=True)


def _downloads(folder: Path, run: Path) -> Iterator[Target]:
    """A base in the hub's cache: a link whose target has its SHA-256 as name."""
    blobs, snapshot, memory = (folder / name for name in ("blobs", "snapshot", "memory"))
    for place in (blobs, snapshot):
        place.mkdir()
    save_file({"a": torch.arange(5000.0)}, snapshot / "model.safetensors")
    name = sha256_of(snapshot / "model.safetensors")
    (snapshot / "model.safetensors").rename(blobs / name)
    (snapshot / "model.safetensors").symlink_to(blobs / name)

    def load() -> Any:
        check_downloads([snapshot / "model.safetensors"], memory)
        return load_file(snapshot / "model.safetensors")

    yield Target("base of the hub", blobs, (name,), load)


def _caches(folder: Path, run: Path) -> Iterator[Target]:
    quantized = folder / "quantized"
    generator = torch.Generator().manual_seed(0)
    layers = [
        {
            f"layers.{i}.weight": torch.randint(0, 255, (512, 1), generator=generator, dtype=torch.uint8),
            f"layers.{i}.weight.absmax": torch.rand(16, generator=generator),
        }
        for i in range(6)
    ]
    cache = QuantizedCache(quantized, {"weights": {"model.safetensors": "0" * 64}, "type": "nf4"}, log)

    def quantize() -> Any:
        if (found := cache.find()) is None:
            with cache.claim():
                cache.write(layers, 10_000)
            found = cache.find()
        return found

    quantize()
    names = tuple(f"{cache.entry.name}/{file.name}" for file in cache.entry.iterdir())
    yield Target("quantized cache", quantized, names, quantize)

    documents = [document(i) for i in range(40)]
    keys = [key for document in documents if (key := key_of(document)) is not None]
    teacher = folder / "teacher"

    def encode(some: Sequence[Document]) -> Iterator[dict[str, np.ndarray]]:
        for document in some:
            rng, count = np.random.default_rng(int(document.ids[0])), document.target_tokens
            yield {"ids": rng.integers(0, 99, (count, 4), np.int32), "probs": rng.random((count, 4), np.float32)}

    def targets() -> Any:
        check_fingerprint(teacher, ORIGIN)
        with open_folder(teacher, ORIGIN) as writer:
            stored = sorted(writer.stored)
        return vocabulary_of(teacher), stored, ShardReader(teacher).read(keys)

    for some in (documents[:20], documents):
        fill_cache(teacher, ORIGIN, some, encode, group_tokens=50, progress=lambda done, total: None)
    yield Target("teacher cache", teacher, _names(teacher), targets)

    reference, origin = folder / "reference", {"version": 1, "weights": {"a": "b"}}
    scores = ReferenceCache(reference, origin)
    scores.fill(documents, lambda some: iter([0.5 * i for i, _ in enumerate(some)]), lambda done, total: None)
    batch = build_batch(documents)
    yield Target(
        "reference cache", reference, _names(reference), lambda: ReferenceCache(reference, origin).log_probs(batch)
    )

    towers = folder / "towers"
    store, media = EmbeddingCache(towers), Media("image", b"0123456789abcdef", "a.png", 40, (1, 4, 40))
    embeddings = torch.rand(40, 64, generator=generator).bfloat16()

    def embedded() -> Any:
        if (found := store.find(media)) is None:
            store.write(media, embeddings)
            found = store.find(media)
        return found

    embedded()
    yield Target("media cache", towers, _names(towers), embedded)

    weights, memory = folder / "weights.safetensors", folder / "digests"
    save_file({"a": torch.rand(10)}, weights)
    time.sleep(2.1)  # a file that changed just now is not remembered
    weights_digest([weights], memory)
    yield Target("remembered digests", memory, _names(memory), lambda: weights_digest([weights], memory))


def document(number: int) -> Document:
    """A row with 1 to 7 targets."""
    labels = np.full(9, IGNORE_INDEX, dtype=np.int32)
    labels[: 1 + number % 7] = 3
    return Document(np.array([number, *range(8)], dtype=np.int32), labels, f"rows:{number + 1}")


def _names(folder: Path) -> tuple[str, ...]:
    return tuple(
        str(file.relative_to(folder))
        for file in folder.rglob("*")
        if file.is_file() and file.suffix != ".lock" and file.name != ".lock"
    )


def _tokens(folder: Path, run: Path) -> Iterator[Target]:
    rows = folder / "rows.jsonl"
    lines = [json.dumps({"prompt": f"question {i}", "completion": f"answer {i} " * (i % 7 + 1)}) for i in range(60)]
    rows.write_text("\n".join([*lines, "{broken"]))
    source = SourceConfig(path=str(rows))
    chat = ChatTemplate(load_tokenizer(ModelConfig(name=str(TINY))))
    texts = folder / "texts"
    cfg = DataConfig(train=[source], cache=str(texts), on_bad_row="skip", max_bad_share=0.5, stream_rows=20)
    preparation = Preparation(cfg, chat)
    yield _store("tokenized text", texts, lambda: preparation.store(source))

    mixed, files = folder / "mixed", [folder / f"{name}.png" for name in "ab"]
    for file in files:
        file.write_bytes(file.name.encode())
    placed = [
        PlacedMedia((Media("image", file.name.encode() * 4, str(file), 4, (1, 4, 4)),), (0,), PositionRule(1.0, True))
        for file in files
    ]
    batch = EncodedBatch(
        file="a.jsonl",
        unit="line",
        rows=np.array([(6, 2, i, i + 1, 0, 0, i) for i in range(2)], ROW),
        ids=np.arange(12, dtype=np.int32),
        weights=np.ones(12, np.float32),
        placed=tuple(placed),
        chosen_tokens=(3, 2),
        bad=(),
        bytes_read=0,
    )

    def write(temporary: Path) -> None:
        writer = StoreWriter(temporary)
        writer.append(batch)
        writer.finish({"made": "here"})

    def provided() -> TokenStore:
        preparation.provide(mixed / "store", write)
        return TokenStore(mixed / "store")

    yield _store("tokenized media and pairs", mixed, provided)

    windows = folder / "windows"

    def streamed() -> Any:
        sampler = StreamingSampler(preparation, batch_size=4, seed=3, folder=windows)
        steps = [sampler.step_batches(step) for step in (9, 0)]
        sampler.close()
        return [[(d.location, d.ids) for sequence in step for d in sequence] for step in steps]

    streamed()
    yield Target("stream of rows", windows, _names(windows), streamed)


def _store(name: str, folder: Path, open_store: Callable[[], TokenStore]) -> Target:
    def content() -> Any:
        store = open_store()
        pieces = [(found.ids, found.weights, found.chosen_tokens, store.location(i)) for i, found in enumerate(store)]
        media = [store.placed(row) for row in range(len(store))]
        return pieces, media, store.targets, store.hashes, store.meta, store.bad_rows.read_text()

    content()
    return Target(name, folder, _names(folder), content)


def _records(folder: Path, run: Path) -> Iterator[Target]:
    sweep = folder / "sweep"
    sweep.mkdir()
    trials = [Trial(i, {"lora.rank": str(i)}, "finished", 1 / i) for i in range(1, 9)]
    Record({"lora.rank": "1,2", "seed": 3}, "eval_loss", True, trials).save(sweep)
    yield Target("sweep.json", sweep, _names(sweep), lambda: load_record(sweep))

    layers = [f"model.layers.{i}.mlp.up_proj" for i in range(12)]
    made_from = {"version": 1, "dtype": "bfloat16"}
    measured = {(name, "nf4"): MeanKl(0.1 * i, 0.01, 50) for i, name in enumerate([*layers, ALL])}
    journal, result = folder / "journal", folder / "sensitivity"

    def resumed() -> Any:
        """Measure what the journal lacks, as the next start of the command does."""
        opened = Journal(journal, made_from)
        for (name, kind), mean in measured.items():
            if (name, kind) not in opened.measured:
                opened.append(Measured(name, kind, mean))
        return opened.measured

    resumed()
    yield Target("sensitivity journal", journal, _names(journal), resumed)
    result.mkdir()
    Sensitivities("base", ["nf4"], 7, dict.fromkeys(layers, (8, 64)), measured, made_from).save(result)
    yield Target("sensitivities", result, _names(result), lambda: Sensitivities.read(result))

    choices = folder / "choices"
    choices.mkdir()
    state = TrainState({}, "digest", choices={"micro_batch": 4, "ranks": 1}, step=3)
    leave_smaller(choices, state, 4, 2)
    yield Target("smaller micro-batch", choices, _names(choices), lambda: choices_before(choices, None))

    gap = folder / "gap"
    gap.mkdir()
    sets = [SetFigures("heldout", 24, 700, False, 20, {"loss": Estimate(1.0, 0.9, 1.1)}, {})]
    models = [ModelFigures("base", "bf16 base", 1_500_000, sets)]
    table = GapTable("run", "tiny", "base", None, 1000, 0, 12.3, {"torch": "2.13"}, models)
    (gap / "gap.json").write_text(to_json(table))
    yield Target("gap table", gap, _names(gap), lambda: load_gap(gap))
