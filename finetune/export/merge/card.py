"""The model card of a merged model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune import __version__
from finetune.config.compose import to_yaml
from finetune.models.adapters.trained import Trained


def merged_card(trained: Trained, report: dict[str, Any]) -> str:
    """README.md: hub metadata, what went into it, how far it is from what was trained, the run's settings."""
    hub_base = not Path(trained.model.name).exists()
    metadata = ["library_name: transformers", "pipeline_tag: text-generation"]
    if hub_base:
        metadata += [f"base_model: {trained.model.name}", "base_model_relation: finetune"]
    revision = f" at revision `{trained.model.revision}`" if trained.model.revision else ""
    name = trained.cfg.name if trained.cfg is not None else Path(report["adapters"][0]).name
    rows = [f"| {key} | {value} |" for key, value in _facts(trained, report)]
    settings = ["", "## Settings of the run", "", "```yaml", to_yaml(trained.cfg).strip(), "```"] if trained.cfg else []
    return "\n".join(
        [
            "---",
            *metadata,
            "---",
            "",
            f"# {name}",
            "",
            f"`{trained.model.name}`{revision} with a LoRA adapter merged into its weights by finetune {__version__}.",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("<this folder>")',
            'tokenizer = AutoTokenizer.from_pretrained("<this folder>")',
            "```",
            "",
            "| | |",
            "|---|---|",
            *rows,
            *settings,
            "",
        ]
    )


def _facts(trained: Trained, report: dict[str, Any]) -> list[tuple[str, str]]:
    into = {"original": "the original weights", "dequantized": f"what {trained.quant.type} had made of the weights"}
    weights = [f"{name} × {weight:g}" for name, weight in zip(report["adapters"], report["weights"], strict=True)]
    facts = [
        ("adapter", ", ".join(f"`{name}`" for name in (weights if len(weights) > 1 else report["adapters"]))),
        ("merged into", f"{into[report['base']]}: {report['reason']}"),
        ("type", report["dtype"]),
        ("tensors changed", f"{report['changed']} of {report['tensors']}"),
    ]
    if len(weights) > 1:
        facts.append(("combination", report["combination"]))
    if trained.cfg is not None:
        facts.append(("trained on", ", ".join(f"`{Path(source.path).name}`" for source in trained.cfg.data.train)))
    for check in report["kl_checks"]:
        whose = f" ({check['adapter']})" if len(report["kl_checks"]) > 1 else ""
        facts += [
            (f"KL(trained, merged){whose}", f"{check['kl']:.6f} nats a token, {check['tokens']:,} held-out tokens"),
            (f"same first choice{whose}", f"{check['top1']:.2%}"),
            (
                f"perplexity{whose}",
                f"{check['perplexity_trained']:.4f} trained, {check['perplexity_merged']:.4f} merged",
            ),
        ]
    return facts
