"""format=onnx: a Qwen2 model folder as an ONNX graph with its cache, for onnxruntime-genai."""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from finetune.export.exporter import Exported, ExportRequest
from finetune.export.onnx.builder import build, runtime
from finetune.export.onnx.int8 import quantize
from finetune.export.onnx.reader import OnnxModel
from finetune.export.verify import PROMPTS, Answers, Verification, compare, require_same, source_answers
from finetune.models.load import quiet
from finetune.system.atomic import write_text
from finetune.system.errors import ConfigError, IntegrityError

GRAPH = "model.onnx"


@dataclass(frozen=True)
class NumberFormat:
    """What the builder is asked for, and what it is in words. dynamic: quantized afterwards, by onnxruntime."""

    meaning: str
    precision: str
    provider: str = "cpu"
    options: tuple[str, ...] = ()
    dynamic: bool = False


TYPES = {
    "fp32": NumberFormat("every bit; the only one whose answers must all be the source's", "fp32"),
    # Asked for fp16 on a CPU, the builder takes attention apart, and onnxruntime 1.32 fails on the second token. The
    # graph for CUDA keeps it whole, and runs on CPUs as well once its config names no provider.
    "fp16": NumberFormat("16 bits, for GPUs", "fp16", "cuda"),
    "int8": NumberFormat("weights in int8 by blocks of 32", "int8"),
    # Better rounding and int8 where it hurts most: KL 0.06 nats a token against the builder's default's 0.16 on the
    # embedded base, 16 % larger.
    "int4": NumberFormat(
        "weights in int4 by blocks of 32, the most sensitive in int8",
        "int4",
        options=("algo_config=k_quant", "matmul_mixed_precision=last_matmul:int8,mixed_layers:int8"),
    ),
    "int8-dynamic": NumberFormat("weights and activations in int8, by onnxruntime's quantizer", "fp32", dynamic=True),
}
DEFAULT = "fp32"
_SEARCH = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")


def to_onnx(request: ExportRequest) -> Exported:
    """Writes model.onnx, model.onnx.data, genai_config.json and the tokenizer's files into job.out.

    `options.type`: one of TYPES, fp32 if none is given. Memory: see `build`; int8-dynamic about 12 bytes a weight.
    Raises: ConfigError for another type; MissingExtra; IntegrityError where the export does not compute what its
    source does, or its tokenizer reads text otherwise; FinetuneError and ResourceError as `build`.
    """
    kind = request.options.type or DEFAULT
    check_ready(kind)
    if not request.options.merge:
        raise ConfigError("merge=false: ONNX has no adapters of this kind; leave it out, or choose format=adapter")
    request.log(f"building the ONNX graph ({kind}: {TYPES[kind].meaning})")
    _write(request, TYPES[kind])
    settings = settle(request.source, request.out)
    checks, notes = _verified(request, kind) if request.options.verify else ([], {})
    size = sum(path.stat().st_size for path in request.out.glob(f"{GRAPH}*"))
    serve = serving_command(Path(request.options.out), chat=_has_template(request.out))
    return Exported(checks, [serve], {"type": kind, "bytes": size, **settings, **notes})


def check_ready(kind: str) -> None:
    """Raises: ConfigError for an unknown type; MissingExtra."""
    if kind not in TYPES:
        listed = "; ".join(f"{name}: {each.meaning}" for name, each in TYPES.items())
        raise ConfigError(f"type={kind}: not a number format of ONNX; there are {listed}")
    runtime()


def _write(request: ExportRequest, kind: NumberFormat) -> None:
    # Beside the result rather than in /tmp, which often is small; a fp32 graph of a 7B model is 30 GB.
    with tempfile.TemporaryDirectory(dir=request.out, prefix=".onnx-") as name:
        scratch = Path(name)
        built = scratch / "fp32" if kind.dynamic else request.out
        build(request.source, built, kind.precision, kind.provider, kind.options, scratch)
        if kind.dynamic:
            quantize(built / GRAPH, request.out / GRAPH, scratch)
            for path in built.iterdir():
                if not path.name.startswith(GRAPH):
                    shutil.move(path, request.out / path.name)


def settle(source: Path, folder: Path) -> dict[str, Any]:
    """Mends genai_config.json where the builder says other than the source.

    Returns: facts for the report: context_tokens, stop_ids.
    """
    path = folder / "genai_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    model, search = settings["model"], settings["search"]
    generation = _read(source / "generation_config.json")
    # The builder adds the tokenizer's end token to the stop ids, and leaves out the repetition penalty.
    model["eos_token_id"] = generation.get("eos_token_id") or model["eos_token_id"]
    search |= {key: generation[key] for key in _SEARCH if generation.get(key) is not None}
    named = [
        _read(source / name).get(key)
        for name, key in (
            ("generation_config.json", "bos_token_id"),
            ("config.json", "bos_token_id"),
            ("tokenizer_config.json", "bos_token"),
        )
    ]
    if all(value is None for value in named):
        # The file must have a number, and the builder writes 1: an ordinary token. Qwen2.5 itself names its padding.
        model["bos_token_id"] = model["pad_token_id"]
    # A provider named here would have to be installed; `og.Config(folder).append_provider("cuda")` chooses one.
    model["decoder"]["session_options"]["provider_options"] = []
    write_text(path, json.dumps(settings, indent=2) + "\n")
    stops = model["eos_token_id"]
    return {"context_tokens": model["context_length"], "stop_ids": stops if isinstance(stops, list) else [stops]}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _verified(request: ExportRequest, kind: str) -> tuple[list[Verification], dict[str, Any]]:
    """One pass over the source's answers, answers of its own, and the tokenizer."""
    answers = source_answers(request.source, request.options.prompts, request.options.tokens)
    model = OnnxModel(request.out)
    _require_same_tokens(request.source, model)
    found = compare(answers, model.logits, f"{model.name} ({kind})")
    request.log(found.describe())
    require_same(found, exact=kind == "fp32")
    generated = _generated(answers, model, request.options.tokens)
    request.log(
        f"generated from its cache, {generated['same_answers']} of {generated['answers']} answers are the source's"
    )
    if kind == "fp32" and generated["same_answers"] < generated["answers"]:
        raise IntegrityError(
            f"the export computes the source's logits in one pass and other tokens from its cache: {generated}; "
            "nothing was kept"
        )
    return [found], {"generated": generated}


def _generated(answers: Answers, model: OnnxModel, tokens: int) -> dict[str, int]:
    """How much of what the model writes by itself is the source's: whole answers, and tokens before any other one."""
    counts = {"answers": len(answers.ids), "same_answers": 0, "tokens": 0, "same_tokens": 0}
    for ids, begin in zip(answers.ids, answers.begins, strict=True):
        theirs, ours = ids[begin:], model.generate(ids[:begin], tokens)
        counts["same_answers"] += ours == theirs
        counts["tokens"] += len(theirs)
        pairs = zip(theirs, ours, strict=False)
        counts["same_tokens"] += sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return counts


def _require_same_tokens(source: Path, model: OnnxModel) -> None:
    """onnxruntime-genai's tokenizer is not transformers': it must read the prompts alike.

    Raises: IntegrityError with the first text that it reads otherwise.
    """
    with quiet():
        tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=True)
    for prompt in PROMPTS:
        text = prompt
        if tokenizer.chat_template is not None:
            message = [{"role": "user", "content": prompt}]
            text = str(tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False))
        ours, theirs = tokenizer.encode(text, add_special_tokens=False), model.encode(text)
        if ours != theirs:
            raise IntegrityError(
                f"{model.name} reads {text!r} as tokens {theirs}, the source's tokenizer as {ours}; nothing was kept"
            )


def _has_template(folder: Path) -> bool:
    return (folder / "chat_template.jinja").is_file() or "chat_template" in _read(folder / "tokenizer_config.json")


def serving_command(folder: Path, chat: bool) -> str:
    """A shell command that asks the exported model one thing. chat: whether the folder has a chat template."""
    text = "Hello"
    prompt = json.dumps(text)
    if chat:
        messages = json.dumps(json.dumps([{"role": "user", "content": text}]))
        prompt = f"t.apply_chat_template({messages}, add_generation_prompt=True)"
    code = (
        f"import onnxruntime_genai as og; m = og.Model({json.dumps(str(folder))}); t = og.Tokenizer(m); "
        "p = og.GeneratorParams(m); p.set_search_options(max_length=512); g = og.Generator(m, p); "
        f"g.append_tokens(t.encode({prompt})); "
        "[g.generate_next_token() for _ in iter(g.is_done, True)]; print(t.decode(g.get_sequence(0)))"
    )
    return f"ORT_DISABLE_TELEMETRY=1 python -c {shlex.quote(code)}"
