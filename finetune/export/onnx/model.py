"""format=onnx: a Qwen2 model folder as an ONNX graph with a key-value cache, for onnxruntime-genai, which reads it."""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.export.exporter import Exported, ExportRequest
from finetune.export.onnx import run
from finetune.export.onnx.builder import build, quantize, runtime
from finetune.export.verify import (
    PROMPTS,
    Answers,
    Verification,
    compare,
    open_tokenizer,
    read_settings,
    require_same_ids,
    source_answers,
)
from finetune.system.atomic import write_text
from finetune.system.errors import IntegrityError

GRAPH, SCRIPT = "model.onnx", "run.py"


@dataclass(frozen=True)
class NumberFormat:
    """The builder's options of a number type; dynamic: onnxruntime quantizes the graph afterwards."""

    precision: str
    provider: str = "cpu"
    options: tuple[str, ...] = ()
    dynamic: bool = False


TYPES = {
    "fp32": NumberFormat("fp32"),
    # The builder's fp16 graph for CPUs splits attention, and onnxruntime 1.32 fails on its second token. The graph for
    # CUDA does not, and runs on CPUs once its config names no provider.
    "fp16": NumberFormat("fp16", "cuda"),
    "int8": NumberFormat("int8"),
    # KL is 0.06 nats per token on the embedded base, and 0.16 with the builder's defaults, which are 16 % smaller.
    "int4": NumberFormat(
        "int4",
        options=("algo_config=k_quant", "matmul_mixed_precision=last_matmul:int8,mixed_layers:int8"),
    ),
    "int8-dynamic": NumberFormat("fp32", dynamic=True),
}
_SEARCH = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")


def check_libraries(kind: str) -> None:
    """Raise MissingExtra without the libraries of the extra."""
    runtime()


def write(request: ExportRequest) -> Exported:
    """Write model.onnx, model.onnx.data, genai_config.json, the tokenizer's files and a script that answers a prompt.

    Memory: see `build`; int8-dynamic needs about 12 bytes per weight.

    Raises:
        IntegrityError: the export or its tokenizer does not compute what its source computes.
        FinetuneError, ResourceError: as `build`.
    """
    kind = request.kind
    request.log(f"onnx: building the graph, type={kind}")
    _build(request, TYPES[kind])
    settings = settle(request.source, request.out)
    checks, notes = _verify(request, kind) if request.options.verify else ([], {})
    size = sum(path.stat().st_size for path in request.out.glob(f"{GRAPH}*"))
    shutil.copyfile(run.__file__, request.out / SCRIPT)
    serve = shlex.join(["python", str(Path(request.options.out) / SCRIPT), "Hello"])
    return Exported(checks, [serve], {"type": kind, "bytes": size, **settings, **notes})


def _build(request: ExportRequest, kind: NumberFormat) -> None:
    # In the output folder, since /tmp is often small: an fp32 graph of a 7B model has 30 GB.
    with tempfile.TemporaryDirectory(dir=request.out, prefix=".onnx-") as name:
        scratch = Path(name)
        built = scratch / "fp32" if kind.dynamic else request.out
        build(request.source, built, scratch, precision=kind.precision, provider=kind.provider, options=kind.options)
        if kind.dynamic:
            quantize(built / GRAPH, request.out / GRAPH, scratch)
            for path in built.iterdir():
                if not path.name.startswith(GRAPH):
                    shutil.move(path, request.out / path.name)


def settle(source: Path, folder: Path) -> dict[str, Any]:
    """Correct genai_config.json where the builder differs from the source.

    Returns:
        Facts for the report: context_tokens, stop_ids.
    """
    path = folder / "genai_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    model, search = settings["model"], settings["search"]
    generation = read_settings(source, "generation_config.json")
    # The builder adds the tokenizer's eos token to the stop ids, and omits the repetition penalty.
    model["eos_token_id"] = generation.get("eos_token_id") or model["eos_token_id"]
    search |= {key: generation[key] for key in _SEARCH if generation.get(key) is not None}
    named = (
        generation.get("bos_token_id"),
        read_settings(source, "config.json").get("bos_token_id"),
        read_settings(source, "tokenizer_config.json").get("bos_token"),
    )
    if all(value is None for value in named):
        # The file needs an id, and the builder writes 1, an ordinary token. Qwen2.5 itself uses its pad token.
        model["bos_token_id"] = model["pad_token_id"]
    # A provider in this file must be installed; `og.Config(folder).append_provider("cuda")` chooses one at run time.
    model["decoder"]["session_options"]["provider_options"] = []
    write_text(path, json.dumps(settings, indent=2) + "\n")
    stops = model["eos_token_id"]
    return {"context_tokens": model["context_length"], "stop_ids": stops if isinstance(stops, list) else [stops]}


def _verify(request: ExportRequest, kind: str) -> tuple[list[Verification], dict[str, Any]]:
    """Compare logits over the source's answers, generated answers, and the tokenizer."""
    answers = source_answers(request.source, request.options)
    model = OnnxModel(request.out)
    tokenizer, texts = open_tokenizer(request.source), list(PROMPTS)
    if tokenizer.chat_template is not None:
        turns = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
        texts = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    # onnxruntime-genai has its own tokenizer.
    ids = {text: tokenizer.encode(text, add_special_tokens=False) for text in texts}
    require_same_ids(model.name, ids, model.encode)
    found = compare(answers, model.logits, f"{model.name} ({kind})", exact=kind == "fp32")
    generated = _generated(answers, model, request.options.tokens)
    request.log(f"onnx: generated answers equal to the source's: {generated['same_answers']}/{generated['answers']}")
    if kind == "fp32" and generated["same_answers"] < generated["answers"]:
        raise IntegrityError(
            f"the export generates other tokens with its cache than in one pass: {generated}; nothing was kept"
        )
    return [found], {"generated": generated}


def _generated(answers: Answers, model: OnnxModel, tokens: int) -> dict[str, int]:
    """Count generated answers that equal the source's, and the tokens before the first difference."""
    counts = {"answers": len(answers.ids), "same_answers": 0, "tokens": 0, "same_tokens": 0}
    for ids, begin in zip(answers.ids, answers.begins, strict=True):
        theirs, ours = ids[begin:], model.generate(ids[:begin], tokens)
        counts["same_answers"] += ours == theirs
        counts["tokens"] += len(theirs)
        pairs = zip(theirs, ours, strict=False)
        counts["same_tokens"] += sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return counts


class OnnxModel:
    """An ONNX folder, opened on the CPU.

    Raises:
        MissingExtra: onnxruntime-genai is missing.
        IntegrityError: onnxruntime-genai cannot open or run the folder.
    """

    def __init__(self, folder: Path):
        self._genai = runtime()
        self.name = f"onnxruntime-genai {self._genai.__version__}"
        self._folder = folder
        with self._readable_errors():
            self._model: Any = self._genai.Model(str(folder))
            self._tokenizer: Any = self._genai.Tokenizer(self._model)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Return fp32 logits [T, V] of ids [T], from one pass."""
        with self._readable_errors():
            generator = self._started(ids, 1)
            # get_logits returns the last token's only; the graph's output has all, in the graph's precision.
            return torch.from_numpy(np.array(generator.get_output("logits"), dtype=np.float32))[0]

    def generate(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """Return the new ids of a greedy answer, generated with the cache; a stop token is included."""
        new: list[int] = []
        with self._readable_errors():
            generator = self._started(ids, max_new_tokens)
            while len(new) < max_new_tokens and not generator.is_done():
                generator.generate_next_token()
                # The generator's own sequence omits the stop token.
                new.append(int(generator.get_next_tokens()[0]))
        return new

    def encode(self, text: str) -> list[int]:
        """Return the ids by onnxruntime-genai's tokenizer; control tokens in the text become control tokens.

        That tokenizer does not normalize Unicode: give it text in NFC.
        """
        with self._readable_errors():
            return self._tokenizer.encode(text).tolist()

    def _started(self, ids: Sequence[int], more: int) -> Any:
        parameters = self._genai.GeneratorParams(self._model)
        # The sampling of genai_config.json is for chats; a comparison needs the arg max.
        parameters.set_search_options(
            do_sample=False,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            num_beams=1,
            min_length=0,
            max_length=len(ids) + more,
        )
        generator = self._genai.Generator(self._model, parameters)
        generator.append_tokens(np.array(ids, dtype=np.int32))
        return generator

    @contextmanager
    def _readable_errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # The library raises no other error.
            raise IntegrityError(f"{self._folder}: {self.name} cannot run it, found {error}") from error
