"""format=ollama: a GGUF file with the Modelfile that Ollama makes a model of."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.data.template.sandbox import Renderer
from finetune.export.exporter import Exported, ExportRequest
from finetune.export.gguf.file import final_folder, model_name
from finetune.export.gguf.model import to_gguf
from finetune.export.gguf.tokenizer import load_tokenizer
from finetune.models.hub import read_json
from finetune.system.errors import ConfigError, DataError

Turn = dict[str, str]

# Ollama's names of what generation_config.json may set.
_PARAMETERS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
    "max_new_tokens": "num_predict",
}
# A turn of the assistant that comes last is left open: Ollama has the model go on with it.
_TEMPLATE = """{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}%s<|im_start|>{{ .Role }}
{{ .Content }}{{ if not (and $last (eq .Role "assistant")) }}<|im_end|>
{{ end }}
{{- if and $last (ne .Role "assistant") }}<|im_start|>assistant
{{ end }}
{{- end }}"""
_DEFAULT_SYSTEM = """
{{- if and (eq $i 0) (ne .Role "system") }}<|im_start|>system
%s<|im_end|>
{{ end }}"""


def to_ollama(request: ExportRequest) -> Exported:
    """Writes a GGUF file and a Modelfile beside it into job.out: weights, template, stop tokens, sampling.

    Ollama's templates are Go's, so the model's own (jinja) is rebuilt; for system, user and assistant turns the two
    write the same. Tools are not offered to it.
    Raises: ConfigError if the model's template is not ChatML, or for merge=false; else as `to_gguf`.
    """
    if not request.options.merge:
        raise ConfigError(
            "format=ollama merge=false: an adapter alone is no model; use format=gguf merge=false, and ADAPTER in a "
            "Modelfile of the base"
        )
    tokenizer = load_tokenizer(request.source)
    template = go_template(tokenizer)
    settings = _generation_config(request.source)
    gguf = to_gguf(request)
    lines = [f"FROM ./{gguf.notes['file']}", f'TEMPLATE """{template}"""']
    lines += [f'PARAMETER stop "{token}"' for token in _stop_tokens(request.source, tokenizer, settings)]
    lines += [f"PARAMETER {name} {value}" for name, value in _sampling(settings).items()]
    (request.out / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    name = model_name(request).lower()
    modelfile = shlex.quote(str(final_folder(request) / "Modelfile"))
    return Exported(gguf.checks, [f"ollama create {name} -f {modelfile}", f"ollama run {name}"], gguf.notes)


def go_template(tokenizer: Any) -> str:
    """A Go template for Ollama that writes what the tokenizer's chat template writes.

    Raises: ConfigError unless that is ChatML: the template is tried on conversations in which templates differ.
    """
    source = tokenizer.chat_template
    if not isinstance(source, str):
        raise ConfigError(
            "format=ollama: the model has no chat template, or several; give its tokenizer one, or use format=gguf"
        )
    try:
        default = _default_system(source, tokenizer)
    except DataError as error:
        raise ConfigError(f"format=ollama: {error}; {_ADVICE}") from error
    if default is None:
        return _TEMPLATE % ""
    if '"""' in default:
        raise ConfigError(
            f'format=ollama: the template\'s system prompt holds """, which a Modelfile cannot: {default!r}'
        )
    return _TEMPLATE % (_DEFAULT_SYSTEM % default.replace("{{", '{{ "{{" }}'))


_ADVICE = (
    "only ChatML templates can be rebuilt for Ollama; use format=gguf, which carries the template as it is "
    "(llama-server --jinja)"
)


def chatml(turns: Sequence[Turn], default: str | None, prompt: bool) -> str:
    """A conversation in ChatML. default: the system prompt of conversations that open without one, None for none.

    prompt: whether the header of the assistant's next turn follows.
    """
    if default is not None and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": default}, *turns]
    text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
    return text + "<|im_start|>assistant\n" * prompt


def _probes() -> list[list[Turn]]:
    def conversation(*contents: str) -> list[Turn]:
        roles = {"s": "system", "u": "user", "a": "assistant"}
        return [{"role": roles[content[0]], "content": content[1:]} for content in contents]

    return [
        conversation("uA"),
        conversation("sS", "uA"),
        conversation("s", "uA"),
        conversation("uA", "aB", "uC"),
        conversation("uA", "aB", "uC", "aD", "uE"),
        conversation("sS", "uA", "aB", "sT", "uC", "aD"),
        conversation("uA", "aB"),
        conversation("u  A \n", "a\n B\n\n", "u", "a"),
        conversation("uA", "a<think>\nx\n</think>\n\nB", "uC", "a<think>\n\n</think>\n\nD"),
        conversation("sS {{ .System }}", "u<|im_start|>'\"\\", "uB", "aC", "aD"),
    ]


def _default_system(source: str, tokenizer: Any) -> str | None:
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    template = Renderer(source, special)
    opening = template.render([{"role": "user", "content": "A"}], None, False)
    before, _, _ = opening.rpartition("<|im_start|>user\nA<|im_end|>\n")
    default = before.removeprefix("<|im_start|>system\n").removesuffix("<|im_end|>\n") if before else None
    for turns in _probes():
        for prompt in (False, True):
            found, wanted = template.render(turns, None, prompt), chatml(turns, default, prompt)
            if found != wanted:
                raise ConfigError(
                    f"format=ollama: the chat template writes {found[:300]!r}, ChatML is {wanted[:300]!r}; {_ADVICE}"
                )
    return default


def _generation_config(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    return read_json(path, f"model {folder}") if path.is_file() else {}


def _stop_tokens(folder: Path, tokenizer: Any, settings: dict[str, Any]) -> list[str]:
    ids = settings.get("eos_token_id")
    if ids is None:
        ids = read_json(folder / "config.json", f"model {folder}").get("eos_token_id")
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    tokens = [tokenizer.convert_ids_to_tokens(id) for id in listed] + [tokenizer.eos_token, "<|im_end|>"]
    return list(dict.fromkeys(token for token in tokens if token))


def _sampling(settings: dict[str, Any]) -> dict[str, str]:
    """Ollama's own defaults would sample at 0.8 and may punish repetition."""
    found = {theirs: settings[ours] for ours, theirs in _PARAMETERS.items() if settings.get(ours) is not None}
    found.setdefault("repeat_penalty", 1.0)
    if settings.get("do_sample") is False:
        found = {name: value for name, value in found.items() if name not in ("top_k", "top_p", "min_p")}
        found["temperature"] = 0
    return {name: json.dumps(value) for name, value in found.items()}
