"""Merge adapters into their base: plan, write, run the KL check, report, put in place."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune import __version__
from finetune.config.command_options import MergeOptions
from finetune.config.compose import to_yaml
from finetune.export.merge.kl_check import KlCheck, held_out_sets, measure_merged, measure_trained
from finetune.export.merge.weights import MergePlan, content_of, plan_merge
from finetune.export.shards import Advance, plan_shards, write_index, write_shard
from finetune.export.staging import OLD_TEMPLATE, PROCESSOR_COPIES, TOKENIZER_COPIES, KeepPartial, copy_files, staged
from finetune.models.adapters.trained import Trained, choose_base, find_trained, kept_in_training
from finetune.models.digest import identity
from finetune.models.families import FAMILIES, ModelFamily
from finetune.models.hub import TOKENIZER_FILES, fetch, read_config
from finetune.system.console import Log, log, progress_bar
from finetune.system.errors import ConfigError
from finetune.system.format import format_bytes, parse_size

REPORT = "merge_report.json"
_NAME_EXAMPLES = "'kl_check.data=[{path: rows.jsonl}]'"
_CARD = """\
---
{metadata}
---

# {name}

`{base}`{revision} with a LoRA adapter merged into its weights by finetune {version}.

```python
{snippet}
```

| | |
|---|---|
{facts}
"""
_SETTINGS = """
## Settings of the run

```yaml
{yaml}
```
"""
_SNIPPET = """\
from transformers import {classes}

model = {model}.from_pretrained("<this folder>")
{words} = {reader}.from_pretrained("<this folder>")"""
# Gets a task's name and its bytes; the function that it yields gets the bytes that are done.
Progress = Callable[[str, int], AbstractContextManager[Advance]]


class KlCheckFailed(KeepPartial):
    """The merged model is farther from the trained one than `kl_check.max_kl` allows."""


@dataclass(frozen=True)
class MergeReport:
    """The content of merge_report.json."""

    adapters: list[str]
    model: str
    base: str  # original or dequantized
    reason: str
    dtype: str
    tensors: int
    changed: int  # tensors that differ from the base's
    bytes: int
    combination: str
    weights: list[float]
    kl_checks: list[KlCheck]  # one for each adapter with held-out examples
    # Layers that training stored in more bits than the others, by storage; a quantizing export keeps them in bf16.
    kept: dict[str, list[str]]


def merge(options: MergeOptions, log: Log = log, progress: Progress = progress_bar) -> MergeReport:
    """Merge adapters into their base and write a complete model folder.

    Args:
        options: the keys of `finetune merge`.
        log, progress: receive the lines about the merge, and open a progress bar over bytes.

    Returns:
        What was merged into what, and the comparison of the merged model with the trained one.

    Raises:
        ConfigError: the folder exists, an adapter or base is missing, or options contradict each other.
        IntegrityError, ResourceError: a file is corrupt; the disk or the memory is too small.
        KlCheckFailed: the weights stay, and the next start with a higher `kl_check.max_kl` reuses them.
    """
    names = [options.adapter] if isinstance(options.adapter, str) else options.adapter
    limit_bytes = parse_size("shard_size", options.shard_size)
    trained = find_trained(names, options.model, log)
    base, reason = choose_base(trained, options.base)
    plan = plan_merge(trained, base, options, log)
    _fetch_companions(trained, log)
    dtype: Any = str(plan.dtype).removeprefix("torch.")
    held_out = held_out_sets(trained, options.kl_check)
    if not held_out:
        _refuse_limit(options)
    log(
        f"merge: base={base} ({reason}), tensors={len(plan.tensors):,}, changed={plan.changed:,}, "
        f"size={format_bytes(plan.nbytes)}, dtype={dtype}"
    )
    if base == "dequantized" and trained.cfg is None:
        log("merge: quant=nf4 with double quantization (assumed: the adapter has no run that names its quantization)")
    if not held_out and options.kl_check.num_examples:
        log(f"kl_check: skipped, no held-out examples; pass {_NAME_EXAMPLES}")
    with staged(Path(options.out).expanduser(), plan.nbytes, _made_from(trained, base, options)) as folder:
        references = [measure_trained(trained, adapter, examples) for adapter, examples in held_out]
        _write_merged(trained, plan, folder, limit_bytes, progress)
        write_metadata(trained, plan, dtype, folder)
        checks = measure_merged(folder, dtype, references) if references else []
        for check in checks:
            log(check.describe())
        report = MergeReport(
            adapters=names,
            model=trained.model.name,
            base=base,
            reason=reason,
            dtype=dtype,
            tensors=len(plan.tensors),
            changed=plan.changed,
            bytes=plan.nbytes,
            combination=options.combination,
            weights=options.weights or [1.0] * len(names),
            kl_checks=checks,
            kept=kept_in_training(trained),
        )
        (folder / REPORT).write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(merged_card(trained, report), encoding="utf-8")
        _require_near(checks, options)
    return report


def _write_merged(trained: Trained, plan: MergePlan, folder: Path, limit_bytes: int, progress: Progress) -> None:
    """Write the weights and their index; keep the shards of an interrupted start."""
    shards = plan_shards(plan.tensors, limit_bytes)
    with progress("merging", plan.nbytes) as advance:
        for name, tensors in shards.items():
            if (folder / name).is_file():
                advance(sum(tensor.nbytes for tensor in tensors))
            else:
                write_shard(folder / name, tensors, lambda tensor: content_of(plan, tensor), advance)
    trained.weights.check_unchanged()
    write_index(folder, shards)


def write_metadata(trained: Trained, plan: MergePlan, dtype: str, folder: Path) -> None:
    """Write config.json, and copy the other files: the tokenizer is the adapter's own if it has one.

    In config.json, only the dtype and what the adapter changed differ from the base.
    """
    config = json.loads((trained.folder / "config.json").read_text(encoding="utf-8"))
    family, parts = FAMILIES[config["model_type"]], [config]
    for key in (*family.loaded_settings, *family.decoder_settings):
        if isinstance(inner := parts[-1].get(key), dict):
            parts.append(inner)
    for part in parts:
        if part is config or part.get("dtype", part.get("torch_dtype")) is not None:
            part.pop("torch_dtype", None)
            part["dtype"] = dtype
        if plan.unties:
            part["tie_word_embeddings"] = False
        if part is parts[-1] or "vocab_size" in part:
            part["vocab_size"] = plan.vocabulary
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    copy_files(trained.folder, folder, ("generation_config.json", *PROCESSOR_COPIES, *family.companions))
    adapter = trained.adapters[0].folder
    copy_files(adapter if (adapter / TOKENIZER_FILES[0]).is_file() else trained.folder, folder, TOKENIZER_COPIES)
    if not (folder / "chat_template.jinja").is_file():
        copy_files(trained.folder, folder, (OLD_TEMPLATE,))


def _fetch_companions(trained: Trained, log: Log) -> None:
    """Download the other files of a checkpoint into the folder of its weights. Raises: ConfigError."""
    family = _family(trained)
    if family.companions:
        fetch(trained.model.name, trained.model.revision, family.companions, "model")
    if missing := [name for name in family.companions if not (trained.folder / name).is_file()]:
        log(f"merge: the base has no {', '.join(missing)}; transformers' {family.opened_by} needs it to open a folder")


def _family(trained: Trained) -> ModelFamily:
    return FAMILIES[read_config(trained.folder, trained.model.name)["model_type"]]


def _require_near(checks: Sequence[KlCheck], options: MergeOptions) -> None:
    limit = options.kl_check.max_kl
    if limit is not None and (far := [check for check in checks if not check.kl <= limit]):
        listed = ", ".join(f"{check.adapter}: {check.kl:.6f} nats per token" for check in far)
        raise KlCheckFailed(
            f"kl_check.max_kl={limit:g}: the merged model is too far from the trained one, found {listed}; "
            f"{options.out} was not written\n"
            "help: try the other base=, dtype=fp32 or a higher limit (the next start reuses the merged weights)"
        )


def _made_from(trained: Trained, base: str, options: MergeOptions) -> dict[str, Any]:
    """Return everything that decides the bytes of the weights and their files."""
    adapters = [adapter.folder / "adapter_model.safetensors" for adapter in trained.adapters]
    return {
        "files": [identity(file) for file in (*sorted(set(trained.files.values())), *adapters)],
        "settings": [adapter.config for adapter in trained.adapters],
        "base": base,
        "quant": trained.quant.model_dump(),
        "loaded": trained.model.dtype,
        **options.model_dump(exclude={"adapter", "out", "kl_check", "base", "model"}),
    }


def _refuse_limit(options: MergeOptions) -> None:
    if options.kl_check.max_kl is not None:
        raise ConfigError(
            f"kl_check.max_kl={options.kl_check.max_kl:g}: there are no held-out examples to measure on\n"
            f"help: pass {_NAME_EXAMPLES} and kl_check.num_examples above 0"
        )


def _snippet(family: ModelFamily) -> str:
    words = "processor" if family.towers else "tokenizer"
    reader = f"Auto{words.capitalize()}"
    classes = ", ".join(sorted((family.opened_by, reader)))
    return _SNIPPET.format(classes=classes, model=family.opened_by, words=words, reader=reader)


def merged_card(trained: Trained, report: MergeReport) -> str:
    """Return README.md: hub metadata, the merge, its distance from the trained model, the run's settings."""
    family = _family(trained)
    metadata = ["library_name: transformers", f"pipeline_tag: {family.task}"]
    if not Path(trained.model.name).exists():
        metadata += [f"base_model: {trained.model.name}", "base_model_relation: finetune"]
    into = {"original": "the original weights", "dequantized": f"the dequantized {trained.quant.type} weights"}
    several = len(report.adapters) > 1
    weights = zip(report.adapters, report.weights, strict=True)
    facts = {
        "adapter": ", ".join(f"`{name} × {weight:g}`" if several else f"`{name}`" for name, weight in weights),
        "merged into": f"{into[report.base]}: {report.reason}",
        "dtype": report.dtype,
        "tensors changed": f"{report.changed} of {report.tensors}",
    }
    if several:
        facts["combination"] = report.combination
    if trained.cfg is not None:
        facts["trained on"] = ", ".join(f"`{Path(source.path).name}`" for source in trained.cfg.data.train)
    for check in report.kl_checks:
        of = f" ({check.adapter})" if len(report.kl_checks) > 1 else ""
        facts[f"KL(trained, merged){of}"] = f"{check.kl:.6f} nats per token, {check.tokens:,} held-out tokens"
        facts[f"same top token{of}"] = f"{check.top1:.2%}"
        facts[f"perplexity{of}"] = f"{check.perplexity_trained:.4f} trained, {check.perplexity_merged:.4f} merged"
    card = _CARD.format(
        metadata="\n".join(metadata),
        name=trained.cfg.name if trained.cfg is not None else Path(report.adapters[0]).name,
        base=trained.model.name,
        revision=f" at revision `{trained.model.revision}`" if trained.model.revision else "",
        version=__version__,
        snippet=_snippet(family),
        facts="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
    )
    return card + _SETTINGS.format(yaml=to_yaml(trained.cfg).strip()) if trained.cfg else card
