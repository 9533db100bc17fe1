"""One merge from its options to a whole folder: resolve, write, compare, describe, put in place."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from finetune.config.command_options import MergeOptions
from finetune.config.options import parse_size
from finetune.config.schema import Dtype
from finetune.export.merge.card import merged_card
from finetune.export.merge.kl_check import KlCheck, Remembered, ask_trained, compare_with, held_out_rows
from finetune.export.merge.metadata import write_metadata
from finetune.export.merge.weights import MergePlan, content_of, plan_merge
from finetune.export.shards import Advance, plan_shards, write_index, write_shard
from finetune.export.staging import KeepPartial, check_room, scratch, staged
from finetune.models.adapters.trained import Log, Trained, choose_base, find_trained, kept_in_training
from finetune.models.digest import identity
from finetune.system.console import log, progress_bar
from finetune.system.errors import ConfigError

REPORT = "merge_report.json"
Progress = Callable[[str, int], AbstractContextManager[Advance]]  # what is done, bytes in all


class KlCheckFailed(KeepPartial):
    """The merged model is farther from the trained one than `kl_check.max_kl` allows."""


@dataclass(frozen=True)
class MergeReport:
    """The content of merge_report.json.

    base: `original` or `dequantized`.
    changed: number of tensors that differ from the base's.
    kl_checks: one for each adapter with held-out examples.
    other_base, other: the same comparison with the base that was not chosen.
    kept: layers that training stored in more bits than the others, by storage; a quantizing export keeps them in bf16.
    """

    adapters: list[str]
    model: str
    base: str
    reason: str
    dtype: str
    tensors: int
    changed: int
    bytes: int
    combination: str
    weights: list[float]
    kl_checks: list[KlCheck] = field(default_factory=list)
    other_base: str | None = None
    other: list[KlCheck] = field(default_factory=list)
    kept: dict[str, list[str]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def merge(options: MergeOptions, log: Log = log, progress: Progress = progress_bar) -> MergeReport:
    """Merge adapters into their base and write a whole model folder.

    Raises:
        ConfigError, IntegrityError, ResourceError.
        KlCheckFailed: the weights stay; the next start with a higher `kl_check.max_kl` reuses them.
    """
    out = Path(options.out).expanduser()
    names = [options.adapter] if isinstance(options.adapter, str) else options.adapter
    limit_bytes = parse_size("shard_size", options.shard_size)
    trained = find_trained(names, options.model, log)
    base, reason = choose_base(trained, options.base)
    plan = plan_merge(trained, base, options, log)
    rows = [held for adapter in trained.adapters if (held := held_out_rows(trained, adapter, options.kl_check))]
    _check_measuring(options, bool(rows))
    if options.compare:
        choose_base(trained, _other(base))  # refuses what was never in 4 bit
    _say_plan(trained, plan, base, reason, options, bool(rows), log)
    with staged(out, plan.nbytes, _made_from(trained, base, options)) as folder:
        said = [ask_trained(trained, held) for held in rows]
        write_merged(trained, plan, folder, limit_bytes, progress)
        kl_checks = compare_with(folder, _dtype(plan), said) if said else []
        for check in kl_checks:
            log(check.describe())
        other_base, other = _compare_other(trained, base, options, said, out, log) if options.compare else (None, [])
        report = MergeReport(
            names,
            trained.model.name,
            base,
            reason,
            _dtype(plan),
            len(plan.tensors),
            plan.changed,
            plan.nbytes,
            options.combination,
            options.weights or [1.0] * len(names),
            kl_checks,
            other_base,
            other,
            kept_in_training(trained),
        )
        (folder / REPORT).write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(merged_card(trained, report.as_dict()), encoding="utf-8")
        _judge(kl_checks, options)
    return report


def _check_measuring(options: MergeOptions, measured: bool) -> None:
    """Raises: ConfigError for a proof or a comparison that has nothing to measure on."""
    asked = [
        *([f"kl_check.max_kl={options.kl_check.max_kl:g}"] if options.kl_check.max_kl is not None else []),
        *(["compare=true"] if options.compare else []),
    ]
    if asked and not measured:
        raise ConfigError(
            f"{' and '.join(asked)}: there are no held-out rows to measure on; name some with "
            "'kl_check.data=[{path: rows.jsonl}]' (and kl_check.num_examples above 0)"
        )


def write_merged(trained: Trained, plan: MergePlan, folder: Path, limit_bytes: int, progress: Progress) -> None:
    """All files of the merged model but its card; shards that are there already are kept."""
    shards = plan_shards(plan.tensors, limit_bytes)
    with progress("merging", plan.nbytes) as advance:
        for name, tensors in shards.items():
            _write_one(plan, folder / name, tensors, advance)
    trained.weights.check_unchanged()
    write_index(folder, shards)
    write_metadata(trained, plan, _dtype(plan), folder)


def _write_one(plan: MergePlan, file: Path, tensors: Sequence[Any], advance: Advance) -> None:
    if file.is_file():
        advance(sum(tensor.nbytes for tensor in tensors))
    else:
        write_shard(file, tensors, lambda tensor: content_of(plan, tensor), advance)


def _compare_other(
    trained: Trained, base: str, options: MergeOptions, said: Sequence[Remembered], out: Path, log: Log
) -> tuple[str, list[KlCheck]]:
    """The same comparison for the base that was not chosen, in a folder that is removed again."""
    other = _other(base)
    plan = plan_merge(trained, other, options, log)
    with scratch(out, "other") as folder:
        check_room(folder, out, plan.nbytes)
        write_merged(trained, plan, folder, plan.nbytes, _silent)
        kl_checks = compare_with(folder, _dtype(plan), said)
    for check in kl_checks:
        log(f"with base={other}: {check.describe()}")
    return other, kl_checks


def _other(base: str) -> Literal["original", "dequantized"]:
    return "original" if base == "dequantized" else "dequantized"


def _say_plan(
    trained: Trained, plan: MergePlan, base: str, reason: str, options: MergeOptions, measured: bool, log: Log
) -> None:
    log(f"base={base}: {reason}")
    if base == "dequantized" and trained.cfg is None:
        log("no run tells how the base was quantized: taken for nf4 with double quantization, the default")
    size = f"{plan.nbytes / 1e9:,.2f} GB" if plan.nbytes >= 1e9 else f"{plan.nbytes / 1e6:,.1f} MB"
    log(f"{plan.changed:,} of {len(plan.tensors):,} tensors change; {size} in {_dtype(plan)}")
    if not measured and options.kl_check.num_examples:
        log(
            "no held-out rows: how far the merged model is from the trained one is not measured; name some with "
            "'kl_check.data=[{path: rows.jsonl}]'"
        )


def _dtype(plan: MergePlan) -> Dtype:
    """The type that most of the weights have."""
    sizes: Counter[str] = Counter()
    for tensor in plan.tensors:
        sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    return cast(Dtype, sizes.most_common(1)[0][0])


def _judge(kl_checks: Sequence[KlCheck], options: MergeOptions) -> None:
    limit = options.kl_check.max_kl
    if limit is None:
        return
    if far := [check for check in kl_checks if not check.kl <= limit]:
        listed = "; ".join(f"{check.adapter}: {check.kl:.6f} nats" for check in far)
        raise KlCheckFailed(
            f"kl_check.max_kl={limit:g} is exceeded ({listed}), so {options.out} was not written; try the other base= "
            "or dtype=fp32, or raise the limit (the next start goes on from the weights that are there)"
        )


def _made_from(trained: Trained, base: str, options: MergeOptions) -> dict[str, Any]:
    """Everything that decides the weights' bytes and their files."""
    adapters = [adapter.folder / "adapter_model.safetensors" for adapter in trained.adapters]
    chosen = {"adapter", "out", "kl_check", "compare", "base", "model"}
    return {
        "files": [identity(file) for file in (*sorted(set(trained.files.values())), *adapters)],
        "settings": [adapter.config for adapter in trained.adapters],
        "base": base,
        "quant": trained.quant.model_dump(),
        "loaded": trained.model.dtype,
        **options.model_dump(exclude=chosen),
    }


@contextmanager
def _silent(what: str, size_bytes: int) -> Iterator[Advance]:
    yield lambda count: None
