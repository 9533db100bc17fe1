"""What `disk.py` saves onto a failing disk: every kind of file that this package writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from finetune import load_config, train
from finetune.config.command_options import ExportOptions, KlCheckOptions, MergeOptions
from finetune.config.schema import DataConfig, ModelConfig, SourceConfig
from finetune.data.documents import Document
from finetune.data.media.media import Media
from finetune.data.template.chat import ChatTemplate
from finetune.data.tokens.prepare import Preparation
from finetune.data.tokens.store import TokenStore, is_valid
from finetune.distill.cache import fill_cache
from finetune.distill.shards import ShardReader
from finetune.evaluation.gap_table import GapTable, ModelFigures, SetFigures, load_gap
from finetune.evaluation.gap_text import write_gap
from finetune.evaluation.intervals import Estimate
from finetune.export.export import export_model
from finetune.export.merge.merge import merge
from finetune.mixed_precision.journal import ALL, Journal, MeanKl, Measured, Sensitivities
from finetune.models.adapters.files import fetch_adapter
from finetune.models.adapters.folder import CONFIG_FILE, TENSOR_FILE, list_checkpoints
from finetune.models.digest import weights_digest
from finetune.models.quant.cache import QuantizedCache
from finetune.models.safetensors_index import save_tensors
from finetune.models.tokenizer import load_tokenizer
from finetune.objectives.reference_cache import FILE, ReferenceCache
from finetune.report.run import read_run
from finetune.report.run_page import write_report
from finetune.sweep.record import Record, Trial, load_record
from finetune.system.console import log
from finetune.system.errors import ConfigError, FinetuneError, os_errors_as
from finetune.towers.cache import EmbeddingCache
from finetune.training import run_folder
from finetune.training.checkpoint import (
    FULL_DISK,
    TRAINING,
    TrainState,
    newest_valid,
    prune_checkpoints,
    read_state,
    verify_checkpoint,
    write_checkpoint,
)
from finetune.training.run_folder import RunResult
from finetune.training.track import MetricsFile
from tests.faults.damage_targets import ORIGIN, RUN, TINY, document
from tests.faults.disk import Case

# Those that train or load a model: a sample of their operations is tried.
SLOW = ("run", "merge", "export safetensors", "export gguf", "export adapter")
_SAMPLE = 8


def build_cases(folder: Path, names: Sequence[str] = ()) -> Iterator[Case]:
    """Yield the cases of these names, or all."""
    for make in (_checkpoint, _figures, _caches, _tokens, _records, _with_models):
        place = folder / make.__name__.strip("_")
        place.mkdir()
        yield from (case for case in make(place, names) if not names or case.name in names)


def _checkpoint(folder: Path, names: Sequence[str]) -> Iterator[Case]:
    torch.manual_seed(0)
    model = nn.Linear(64, 48)
    optimizer = torch.optim.AdamW(list(model.named_parameters()), lr=0.1)
    model(torch.randn(2, 64)).sum().backward()
    optimizer.step()
    run = folder / "run"

    def adapter(part: Path) -> None:
        save_tensors({"a": torch.ones(100)}, part / "adapter_model.safetensors")
        (part / "adapter_config.json").write_text("{}")
        (part / "tokenizer.json").write_text("{}")

    def write(step: int) -> None:
        state = TrainState({"train.seed": 0}, "digest", step=step, last_loss=0.25)
        write_checkpoint(run / f"checkpoint-{step}", adapter, optimizer, state)

    def save() -> None:
        write(3)
        with os_errors_as(FinetuneError, f"output_dir: {run}: the run stopped", FULL_DISK):
            prune_checkpoints(run, 2, None)

    def read() -> Any:
        found = newest_valid(run, log)
        return None if found is None else (read_state(found), load_file(found / TRAINING))

    for step in (1, 2):
        write(step)
    yield Case("checkpoint", run, save, read)


def _figures(folder: Path, names: Sequence[str]) -> Iterator[Case]:
    """The files that a run writes besides its weights, as `train` writes them."""
    run = folder / "run"
    cfg = load_config("quickstart.yaml", [*RUN, f"output_dir={run}"])

    def save() -> None:
        with os_errors_as(FinetuneError, f"output_dir: {run}: the run stopped", FULL_DISK):
            run.mkdir(exist_ok=True)
            started = datetime(2026, 1, 2, tzinfo=UTC)
            run_folder.describe_run(cfg, "digest", started=started, device_type="cpu", world_size=1)
            metrics = MetricsFile(run, 0)
            for step in (1, 2):
                metrics.log({"step": step, "loss": 1 / step})
            metrics.close()
            run_folder.write_result(run, RunResult("finished", steps=2))
            write_report(run)

    def read() -> Any:
        try:
            found = read_run(run)
        except FinetuneError:
            return None
        assert not found.problems, found.problems
        return found.result or None  # the files before it are written

    yield Case("figures of a run", run, save, read)


def _caches(folder: Path, names: Sequence[str]) -> Iterator[Case]:
    layers = [{f"layers.{i}.weight": torch.full((64, 1), i, dtype=torch.uint8)} for i in range(4)]
    home = folder / "quantized"
    cache = QuantizedCache(home, {"weights": {"model.safetensors": "0" * 64}, "type": "nf4"}, log)

    def quantize() -> None:
        if cache.find() is None:
            with cache.claim() as mine:
                if mine:
                    cache.write(layers, 1_000)

    yield Case("quantized cache", home, quantize, cache.find, is_logged=True)

    weights, memory = folder / "weights.safetensors", folder / "digests"
    save_file({"a": torch.arange(10.0)}, weights)
    yield Case("remembered digests", memory, lambda: weights_digest([weights], memory), lambda: None)

    documents = [document(i) for i in range(40)]
    teacher, reference = folder / "teacher", folder / "reference"

    def encode(some: Sequence[Document]) -> Iterator[dict[str, np.ndarray]]:
        return ({"ids": np.full((one.target_tokens, 4), one.ids[0], np.int32)} for one in some)

    def fill() -> None:
        fill_cache(teacher, ORIGIN, documents, encode, group_tokens=50, progress=lambda *_: None)

    def read_teacher() -> Any:
        try:
            return len(ShardReader(teacher).missing([]))
        except ConfigError:
            return None  # not complete yet

    yield Case("teacher cache", teacher, fill, read_teacher)

    def score() -> None:
        ReferenceCache(reference, {"version": 1}).fill(documents, lambda some: iter([0.5] * len(some)), lambda *_: None)

    yield Case(
        "reference cache",
        reference,
        score,
        lambda: (reference / FILE).is_file() and len(ReferenceCache(reference, {"version": 1}).missing(documents)),
    )

    media, towers = Media("image", b"0123456789abcdef", "a.png", 40, (1, 4, 40)), folder / "towers"
    store = EmbeddingCache(towers)
    yield Case("media cache", towers, lambda: store.write(media, torch.ones(40, 64)), lambda: store.find(media))


def _tokens(folder: Path, names: Sequence[str]) -> Iterator[Case]:
    rows, cache = folder / "rows.jsonl", folder / "cache"
    rows.write_text("\n".join(json.dumps({"prompt": f"question {i}", "completion": f"answer {i}"}) for i in range(40)))
    chat = ChatTemplate(load_tokenizer(ModelConfig(name=str(TINY))))
    preparation = Preparation(DataConfig(train=[SourceConfig(path=str(rows))], cache=str(cache)), chat)

    def read() -> Any:
        return [asdict(TokenStore(store).meta) for store in cache.glob("[0-9a-f]*/") if is_valid(store)]

    yield Case("tokenized data", cache, lambda: preparation.store(preparation.cfg.train[0]), read)


def _records(folder: Path, names: Sequence[str]) -> Iterator[Case]:
    sweep = folder / "sweep"
    sweep.mkdir()
    trials = [Trial(i, {"lora.rank": str(i)}, "finished", 1 / i) for i in range(1, 9)]
    old, new = (Record({"lora.rank": "1,2"}, "eval_loss", True, trials[:count]) for count in (4, 8))
    old.save(sweep)
    yield Case("sweep.json", sweep, lambda: new.save(sweep), lambda: load_record(sweep))

    made_from, found = {"version": 1}, Measured("model.layers.0.mlp.up_proj", "nf4", MeanKl(0.1, 0.01, 50))
    journal = folder / "journal"

    def measure() -> None:
        current = Journal(journal, made_from)
        if (found.name, found.kind) not in current.measured:
            current.append(found)

    def read() -> Any:
        file = journal / "measured.jsonl"
        return Journal(journal, made_from).measured or None if file.is_file() else None

    yield Case("sensitivity journal", journal, measure, read)

    result, gap = folder / "result", folder / "gap"
    layer = {found.name: (8, 8)}
    summary = Sensitivities("base", ["nf4"], 7, layer, {(n, "nf4"): found.mean for n in (*layer, ALL)}, made_from)
    result.mkdir()
    yield Case(
        "sensitivities",
        result,
        lambda: summary.save(result),
        lambda: any(result.iterdir()) and Sensitivities.read(result),
    )
    sets = [SetFigures("heldout", 24, 700, False, 20, {"loss": Estimate(1.0, 0.9, 1.1)}, {})]
    models = [ModelFigures("base", "bf16 base", 1_500_000, sets)]
    table = GapTable("run", "tiny", "base", None, 1000, 0, 12.3, {"torch": "2.13"}, models)
    yield Case("gap table", gap, lambda: write_gap(table, gap), lambda: load_gap(gap))


def _with_models(folder: Path, names: Sequence[str]) -> Iterator[Case]:
    """Whole commands on the embedded base."""
    if names and not set(names) & set(SLOW):
        return
    run = folder / "run"
    options = [*RUN, "train.batch_size=2", "train.resume=auto", "generation.num_examples=0", f"output_dir={run}"]

    def finished() -> Any:
        for checkpoint in list_checkpoints(run):
            verify_checkpoint(checkpoint)
        whole = all((run / name).is_file() for name in (CONFIG_FILE, TENSOR_FILE))
        return fetch_adapter(str(run), "adapter").tensors if whole else None

    yield Case("run", run, lambda: train(load_config("quickstart.yaml", options)), finished, most=_SAMPLE)
    if not (run / TENSOR_FILE).is_file():
        train(load_config("quickstart.yaml", options))

    def command(name: str, write: Callable[[Path], Any]) -> Case:
        out = folder / name.replace(" ", "-") / "out"

        def save() -> None:
            if not out.exists():
                write(out)

        return Case(name, out.parent, save, lambda: sorted(file.name for file in out.glob("*")) or None, most=_SAMPLE)

    check = KlCheckOptions(num_examples=0)

    def exported(kind: str, **more: Any) -> Callable[[Path], Any]:
        return lambda out: export_model(
            ExportOptions(adapter=str(run), format=kind, out=str(out), verify=False, kl_check=check, **more)
        )

    yield command("merge", lambda out: merge(MergeOptions(adapter=str(run), out=str(out), kl_check=check)))
    yield command("export safetensors", exported("safetensors"))
    yield command("export adapter", exported("adapter"))
    yield command("export gguf", exported("gguf"))
