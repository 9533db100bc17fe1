"""The model card that goes with an adapter."""

from __future__ import annotations

from pathlib import Path

from finetune import __version__
from finetune.config.compose import to_yaml
from finetune.config.schema import RunConfig
from finetune.training.run_folder import RunResult


def model_card(cfg: RunConfig, result: RunResult) -> str:
    """README.md of an adapter folder: hub metadata, how to load it, figures, settings."""
    hub_base = not Path(cfg.model.name).exists()
    metadata = [
        "library_name: peft",
        *([f"base_model: {cfg.model.name}", "pipeline_tag: text-generation"] if hub_base else []),
        "tags:",
        "- lora",
        *([f"- base_model:adapter:{cfg.model.name}"] if hub_base else []),
    ]
    figures = [
        ("steps", f"{result.steps:,}"),
        ("target tokens", f"{result.target_tokens:,}"),
        ("training loss at the end", _figure(result.final_loss)),
        ("held-out loss", _figure(result.eval_loss)),
        ("held-out exact match before", _share(result.exact_match_before)),
        ("held-out exact match after", _share(result.exact_match_after)),
    ]
    if result.teacher_kl_after is not None:
        figures += [
            ("nats a target from the teacher before", _figure(result.teacher_kl_before)),
            ("nats a target from the teacher after", _figure(result.teacher_kl_after)),
            ("of that regained", _share(result.recovered)),
        ]
    revision = f" at revision `{cfg.model.revision}`" if cfg.model.revision else ""
    rows = "\n".join(f"| {name} | {value} |" for name, value in figures if value)
    return f"""---
{chr(10).join(metadata)}
---

# {cfg.name}

A LoRA adapter for `{cfg.model.name}`{revision}, trained with finetune {__version__} over the base in {cfg.quant.type}.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{cfg.model.name}"), "<this folder>")
```

| | |
|---|---|
{rows}

## Settings

```yaml
{to_yaml(cfg).strip()}
```
"""


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
