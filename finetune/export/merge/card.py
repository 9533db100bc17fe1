"""The model card of a merged model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from finetune import __version__
from finetune.config.compose import to_yaml
from finetune.models.adapters.trained import Trained

if TYPE_CHECKING:
    from finetune.export.merge.merge import MergeReport

_CARD = """\
---
{metadata}
---

# {name}

`{base}`{revision} with a LoRA adapter merged into its weights by finetune {version}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("<this folder>")
tokenizer = AutoTokenizer.from_pretrained("<this folder>")
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


def merged_card(trained: Trained, report: MergeReport) -> str:
    """Return README.md: hub metadata, the merge, its distance from the trained model, the run's settings."""
    metadata = ["library_name: transformers", "pipeline_tag: text-generation"]
    if not Path(trained.model.name).exists():
        metadata += [f"base_model: {trained.model.name}", "base_model_relation: finetune"]
    card = _CARD.format(
        metadata="\n".join(metadata),
        name=trained.cfg.name if trained.cfg is not None else Path(report.adapters[0]).name,
        base=trained.model.name,
        revision=f" at revision `{trained.model.revision}`" if trained.model.revision else "",
        version=__version__,
        facts="\n".join(f"| {key} | {value} |" for key, value in _facts(trained, report)),
    )
    return card + _SETTINGS.format(yaml=to_yaml(trained.cfg).strip()) if trained.cfg else card


def _facts(trained: Trained, report: MergeReport) -> list[tuple[str, str]]:
    into = {"original": "the original weights", "dequantized": f"the dequantized {trained.quant.type} weights"}
    weights = [f"{name} × {weight:g}" for name, weight in zip(report.adapters, report.weights, strict=True)]
    facts = [
        ("adapter", ", ".join(f"`{name}`" for name in (weights if len(weights) > 1 else report.adapters))),
        ("merged into", f"{into[report.base]}: {report.reason}"),
        ("dtype", report.dtype),
        ("tensors changed", f"{report.changed} of {report.tensors}"),
    ]
    if len(weights) > 1:
        facts.append(("combination", report.combination))
    if trained.cfg is not None:
        facts.append(("trained on", ", ".join(f"`{Path(source.path).name}`" for source in trained.cfg.data.train)))
    for check in report.kl_checks:
        of = f" ({check.adapter})" if len(report.kl_checks) > 1 else ""
        perplexity = f"{check.perplexity_trained:.4f} trained, {check.perplexity_merged:.4f} merged"
        facts += [
            (f"KL(trained, merged){of}", f"{check.kl:.6f} nats per token, {check.tokens:,} held-out tokens"),
            (f"same top token{of}", f"{check.top1:.2%}"),
            (f"perplexity{of}", perplexity),
        ]
    return facts
