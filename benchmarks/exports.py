"""Measure every export of one adapter: size, distance from its source, and exact match on held-out rows.

    python -m benchmarks.exports adapter=outputs/quickstart [rows=200] [only=gguf:q8_0,onnx:int4] [work=FOLDER]

`finetune export` writes and verifies each export. Then it answers the run's held-out rows greedily, in its own program
if that is installed: transformers or onnxruntime-genai. GGUF uses transformers' reader with the file's own numbers.
`trained` is the 4-bit base with the adapter.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.processes import device, parse, work_folder

DEFAULTS = {
    "adapter": "outputs/quickstart",
    "rows": "200",
    "max_new_tokens": "64",
    "only": "",
    "work": "",
    "results": "benchmarks/results",
}
EXPORTS = (
    "safetensors:bf16",
    "safetensors:fp32",
    "safetensors:nf4",
    "safetensors:int8",
    "safetensors:fp8",
    "gguf:f32",
    "gguf:bf16",
    "gguf:f16",
    "gguf:q8_0",
    "gguf:q5_1",
    "gguf:q5_0",
    "gguf:q4_1",
    "gguf:q4_0",
    "onnx:fp32",
    "onnx:fp16",
    "onnx:int8",
    "onnx:int4",
    "onnx:int8-dynamic",
)


@dataclass(frozen=True)
class Exam:
    """Held-out rows with their expected answers. asks: generates the answers of a transformers model."""

    conversations: Sequence[Any]
    tokenizer: Any
    chat: Any
    max_new_tokens: int

    def of_model(self, model: Any) -> float:
        from finetune.evaluation.generation import answer_rows, exact_match

        return exact_match(
            answer_rows(
                model, self.tokenizer, self.chat, self.conversations, max_new_tokens=self.max_new_tokens, batch_size=16
            )
        )

    def of_answers(self, answer: Callable[[list[int]], list[int]]) -> float:
        """answer: generates new ids for the ids of a prompt."""
        right = 0
        for row in self.conversations:
            *asked, expected = row.messages
            text = self.tokenizer.decode(answer(self.chat.prompt_ids(asked, row.tools)), skip_special_tokens=True)
            right += text.strip() == expected.content.strip()
        return right / len(self.conversations)


def exam_of(adapter: Path, rows: int, max_new_tokens: int) -> Exam:
    from finetune.config.compose import saved_config
    from finetune.data.loader import first_conversations, load_data
    from finetune.data.template.chat import ChatTemplate
    from finetune.data.tokens.prepare import Preparation
    from finetune.models.tokenizer import load_adapter_tokenizer

    cfg = saved_config(adapter)
    if cfg is None:
        raise SystemExit(f"adapter={adapter}: not a run folder with held-out rows")
    tokenizer = load_adapter_tokenizer(cfg.model, adapter)
    chat = ChatTemplate(tokenizer)
    preparation = Preparation(cfg.data, chat)
    return Exam(first_conversations(load_data(preparation).eval[0], preparation, rows), tokenizer, chat, max_new_tokens)


def trained(adapter: Path) -> Any:
    from finetune.config.compose import saved_config
    from finetune.models.adapters.files import load_adapter
    from finetune.models.load import load_base

    cfg = saved_config(adapter)
    assert cfg is not None
    return load_adapter(load_base(cfg.model, cfg.quant), adapter)


def in_transformers(folder: Path, exam: Exam) -> float:
    from transformers import AutoModelForCausalLM

    file = next((path.name for path in folder.glob("*.gguf")), None)
    reading = {"gguf_file": file} if file else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32" if file else "auto", **reading)
    return exam.of_model(model.eval())


def in_onnxruntime(folder: Path, exam: Exam) -> float:
    from finetune.export.onnx.model import OnnxModel

    model = OnnxModel(folder)
    return exam.of_answers(lambda ids: model.generate(ids, exam.max_new_tokens))


def one_export(name: str, adapter: Path, out: Path, exam: Exam) -> dict[str, Any]:
    """Write one format, and generate its answers."""
    from finetune.config.command_options import ExportOptions
    from finetune.config.overrides import read_options
    from finetune.export.export import export_model
    from finetune.system.console import progress_bar
    from finetune.system.errors import FinetuneError

    shutil.rmtree(out, ignore_errors=True)
    form, _, kind = name.partition(":")
    words = [f"adapter={adapter}", f"out={out}", f"format={form}", f"type={kind}"]
    start = time.perf_counter()
    try:
        exported = export_model(read_options(ExportOptions, words, "benchmark"), lambda text: None, progress_bar)
    except FinetuneError as error:
        return {"failed": str(error).splitlines()[0]}
    seconds = time.perf_counter() - start
    answers = in_onnxruntime if form == "onnx" else in_transformers
    weights = sum(file.stat().st_size for file in out.iterdir() if file.suffix not in (".json", ".md", ".jinja"))
    return {
        "bytes": weights,
        "seconds": seconds,
        "exact_match": answers(out, exam),
        "checks": [asdict(check) for check in exported.checks],
    }


def describe(base: float, found: dict[str, dict[str, Any]]) -> str:
    """Format the table as Markdown."""
    lines = [
        "| | size | KL from the merged model, nats a token | greedy tokens kept | held-out exact match |",
        "|---|---|---|---|---|",
        f"| trained: 4-bit base, adapter beside it | | | | {base:.1%} |",
    ]
    for name, one in found.items():
        if "failed" in one:
            lines.append(f"| {name} | {one['failed']} | | | |")
            continue
        check = one["checks"][-1]
        lines.append(
            f"| {name} | {one['bytes'] / 1e6:.1f} MB | {check['kl']:.2g} | {check['same']:.1%} "
            f"| {one['exact_match']:.1%} |"
        )
    return "\n".join(lines)


def main(words: list[str]) -> None:
    options = parse(words, DEFAULTS)
    machine, adapter = device(), Path(options["adapter"])
    work = work_folder(options["work"])
    exam = exam_of(adapter, int(options["rows"]), int(options["max_new_tokens"]))
    base = exam.of_model(trained(adapter))
    found: dict[str, dict[str, Any]] = {}
    for name in options["only"].split(",") if options["only"] else EXPORTS:
        found[name] = one_export(name, adapter, work / "export", exam)
        report.log("\n" + describe(base, found))
    shutil.rmtree(work / "export", ignore_errors=True)
    summary = {
        **report.heading("exports", options, machine),
        "trained": base,
        "exports": found,
        "table": describe(base, found),
    }
    report.write(report.results_file("exports", options, machine), summary)
    print(json.dumps(summary))


if __name__ == "__main__":
    main(sys.argv[1:])
