"""A first config for a dataset and a machine: what the data is, the model that fits, and the length of training."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from finetune.config.command_options import PlanOptions
from finetune.config.compose import load_config
from finetune.config.schema import RunConfig, SourceConfig
from finetune.data.formats.detection import with_formats
from finetune.data.formats.messages import Conversation, MediaKind, RawText
from finetune.data.formats.parser import RowParser
from finetune.data.formats.rules import DEFAULT_RULES, RowRules
from finetune.data.sources.paths import resolve_source
from finetune.models.families import FAMILIES, QWEN25_SHAPES, shape_of
from finetune.planning.advice import longest_that_fits
from finetune.planning.auto_batch import estimate_memory
from finetune.planning.inputs import plan_inputs
from finetune.planning.timing import BYTES_PER_TOKEN, estimate_time, read_rates, tokens_in_files
from finetune.system.accelerator import on_gpu
from finetune.system.errors import DataError

_ROWS_READ = 20_000
_TEMPLATE_TOKENS = 5  # of the chat template, per message
# Assumed of a file: an image of data.image.max_pixels, 30 s of audio, a short video.
_FILE_TOKENS: dict[MediaKind, int] = {"image": 1280, "audio": 750, "video": 4096}
# The largest model that is proposed: larger ones are slow to try, and one word chooses them.
_LARGEST = "7B"
_SHORTEST, _LONGEST = 512, 32_768
_ENOUGH_STEPS = 60


@dataclass(frozen=True)
class DataFacts:
    """What the first rows of a source show.

    tokens: estimates of the rows read, from the bytes of each text, sorted. total_tokens: of the whole source, as far
    as it is known. complete: whether all rows were read. files: of all rows read, by their kind.
    """

    path: str
    format: str
    rows: int
    bad_rows: int
    tokens: list[int]
    total_tokens: int
    complete: bool
    files: Mapping[MediaKind, int] = field(default_factory=dict)

    @property
    def longest_tokens(self) -> int:
        return self.tokens[-1]

    @property
    def median_tokens(self) -> int:
        return self.tokens[len(self.tokens) // 2]


@dataclass(frozen=True)
class Starter:
    """The proposed settings, by key, each with its reason; and what the planner says about them."""

    model: str
    settings: dict[str, tuple[Any, str]]
    peak_bytes: float
    step_seconds: float
    steps: int
    time_source: str


def read_facts(source: SourceConfig, rules: RowRules = DEFAULT_RULES) -> DataFacts:
    """Read up to 20,000 rows of a source.

    Raises: DataError if the file cannot be read, its format is not recognized, or no row is usable.
    """
    tokens, bad, last, formats, files = list[int](), 0, "", dict[str, None](), Counter[MediaKind]()
    parser = RowParser(source, rules=rules)
    batches = with_formats(source, resolve_source(source).batches(source.limit))
    rows = ((batch.format, example) for batch in batches for _, example in parser.rows(batch))
    for name, example in islice(rows, _ROWS_READ):
        if isinstance(example, DataError):
            bad, last = bad + 1, str(example)
        else:
            kinds = [part.kind for message in getattr(example, "messages", ()) for part in message.media]
            files.update(kinds)
            tokens.append(_tokens(example) + sum(_FILE_TOKENS[kind] for kind in kinds))
            formats[name] = None
    complete = next(rows, None) is None
    if not tokens:
        raise DataError(f"{source.path}: no usable row" + f": {last}" * bool(bad))
    read = sum(tokens)
    total = read if complete else max(read, tokens_in_files([source]) or 0)
    return DataFacts(source.path, ", ".join(formats), len(tokens), bad, sorted(tokens), total, complete, files)


def _tokens(example: Any) -> int:
    if isinstance(example, Conversation):
        texts = [message.content for message in example.messages]
        return round(sum(len(text.encode()) for text in texts) / BYTES_PER_TOKEN) + _TEMPLATE_TOKENS * len(texts)
    if isinstance(example, RawText):
        return round(len(example.text.encode()) / BYTES_PER_TOKEN)
    return len(example.input_ids)


def propose(
    facts: DataFacts, device_type: str, free_bytes: float, *, model: str | None = None, gpu_name: str | None = None
) -> Starter:
    """Choose the settings of a first run.

    Args:
        facts: of the training data.
        device_type: one of torch's device types.
        free_bytes: free memory of the device.
        model: an option of the group model; None: the largest up to 7B that fits (on a CPU: 0.5B).
        gpu_name: for its assumed speed.

    Raises:
        DataError: no model fits with sequences of 512 tokens, or `model` does not read the rows' files.
    """
    if model is not None and (unread := set(facts.files) - _kinds_of(model)):
        raise DataError(
            f"model={model}: does not read the {', '.join(sorted(unread))} of the rows\n"
            f"help: model={_largest_model(facts, device_type, free_bytes, _SHORTEST)}"
        )
    wanted = _rounded(facts.longest_tokens * 1.2)
    chosen = model or _largest_model(facts, device_type, free_bytes, wanted)
    fits = longest_that_fits(_inputs(chosen, device_type), free_bytes)
    length = min(max(wanted, 2048 if on_gpu(device_type) else 1024), _LONGEST, fits // 64 * 64)
    if length < _SHORTEST:
        raise DataError(f"{chosen}: does not fit into {free_bytes / 1e9:.1f} GB\nhelp: finetune plan table=true gpus=8")
    share = 0.05 if facts.rows >= 400 else 0.1 if facts.rows >= 100 else 0.2 if facts.rows >= 20 else 0.0
    per_epoch = facts.total_tokens * (1 - share) / length
    epochs = 3 if facts.rows < 2000 else 2 if facts.rows < 20_000 else 1
    batch = max(1, min(16, 2 ** int(math.log2(max(per_epoch * epochs / _ENOUGH_STEPS, 1)))))
    steps = max(1, math.ceil(per_epoch * epochs / batch))
    every = max(1, steps // 10)
    small = _inputs(chosen, device_type).shape["hidden_size"] < 2048
    settings: dict[str, tuple[Any, str]] = {
        "data.train": (facts.path, f"format: {facts.format}"),
        "data.held_out": (share, f"about {max(1, round(facts.rows * share)):,} examples measure the progress"),
        "data.max_length": (length, f"the longest example has about {facts.longest_tokens:,} tokens"),
        "data.on_bad_row": ("skip", f"{facts.bad_rows:,} unusable rows were found"),
        "lora.rank": (16, "more learns more; 8 is enough for style and format"),
        "lora.alpha": (32, "twice the rank"),
        "lora.target_modules": ("all-linear", "as in the QLoRA paper; [q_proj, v_proj] is the smallest choice"),
        "train.epochs": (epochs, f"about {steps:,} steps"),
        "train.batch_size": (batch, "packed sequences per step, over all GPUs"),
        "train.learning_rate": (5e-4 if small else 2e-4, "peak of a cosine"),
        "train.eval_every": (every, "steps"),
        "train.save_every": (every, "steps"),
    }
    if not facts.bad_rows:
        del settings["data.on_bad_row"]
    if not share:  # Too few to measure on.
        del settings["data.held_out"], settings["train.eval_every"]
    if facts.longest_tokens > length:
        way = "split" if facts.format == "text" else "right"
        settings["data.truncation"] = (way, "some examples are longer than data.max_length")
    inputs = _inputs(chosen, device_type, *(f"{k}={v}" for k, (v, _) in settings.items() if k != "data.train"))
    memory = estimate_memory(inputs, free_bytes)
    timing = estimate_time(inputs, memory, rates=read_rates(device_type), options=PlanOptions(), gpu_name=gpu_name)
    return Starter(
        chosen, settings, memory.peak_bytes, timing["step_seconds"], steps, timing["rates"].partition(";")[0]
    )


def _inputs(model: str, device_type: str, *overrides: str) -> Any:
    words = [f"model={model}", "lora.target_modules=all-linear", "lora.rank=16", *overrides]
    cfg: RunConfig = load_config("lora.yaml", words, needs_data=False)
    return plan_inputs(cfg, shape_of(cfg.model.name), device_type=device_type)


def _kinds_of(model: str) -> set[str]:
    """Return the kinds of files that a packaged model reads."""
    shape = shape_of(load_config("lora.yaml", [f"model={model}"], needs_data=False).model.name)
    return set(FAMILIES[shape["model_type"]].placeholders) if shape else set()


def _rounded(tokens: float) -> int:
    return max(_SHORTEST, math.ceil(tokens / 256) * 256)


def _largest_model(facts: DataFacts, device_type: str, free_bytes: float, wanted: int) -> str:
    sizes = list(QWEN25_SHAPES)
    sizes = sizes[:1] if device_type == "cpu" else sizes[: sizes.index(_LARGEST) + 1]
    suffix = "" if facts.format == "text" else "-instruct"
    names = [f"qwen2.5-{size.lower()}{suffix}" for size in reversed(sizes)]
    if facts.files:
        pattern = "qwen2.5-omni-{}" if "audio" in facts.files else "qwen2.5-vl-{}-instruct"
        names = [pattern.format(size) for size in (("3b",) if device_type == "cpu" else ("7b", "3b"))]
    needed = min(wanted, 2048)
    return next((n for n in names if longest_that_fits(_inputs(n, device_type), free_bytes) >= needed), names[-1])
