"""format=ollama: a GGUF file with a Modelfile for `ollama create`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any

from finetune.data.template.sandbox import Renderer
from finetune.export.exporter import Exported, ExportRequest
from finetune.export.gguf import model
from finetune.export.gguf.file import model_name
from finetune.export.verify import open_tokenizer, read_settings
from finetune.system.errors import ConfigError, DataError

_HELP = (
    "help: only ChatML templates can be rebuilt for Ollama; use format=gguf, which keeps the template "
    "(llama-server --jinja)"
)
# Keys of generation_config.json, as Ollama spells them.
_PARAMETERS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
    "max_new_tokens": "num_predict",
}
# A last turn of the assistant stays open: Ollama lets the model continue it.
_TEMPLATE = """{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}%s<|im_start|>{{ .Role }}
{{ .Content }}{{ if not (and $last (eq .Role "assistant")) }}<|im_end|>
{{ end }}
{{- if and $last (ne .Role "assistant") }}<|im_start|>assistant
{{ end }}
{{- end }}"""
# Conversations in which templates differ: the first letter of a turn is its role.
_ROLES = {"s": "system", "u": "user", "a": "assistant"}
_PROBES = [
    ["uA"],
    ["sS", "uA"],
    ["s", "uA"],
    ["uA", "aB", "uC"],
    ["uA", "aB", "uC", "aD", "uE"],
    ["sS", "uA", "aB", "sT", "uC", "aD"],
    ["uA", "aB"],
    ["u  A \n", "a\n B\n\n", "u", "a"],
    ["uA", "a<think>\nx\n</think>\n\nB", "uC", "a<think>\n\n</think>\n\nD"],
    ["sS {{ .System }}", "u<|im_start|>'\"\\", "uB", "aC", "aD"],
]
_DEFAULT_SYSTEM = """
{{- if and (eq $i 0) (ne .Role "system") }}<|im_start|>system
%s<|im_end|>
{{ end }}"""


check_libraries = model.check_libraries


def write(request: ExportRequest) -> Exported:
    """Write a GGUF file and its Modelfile: weights, chat template, stop tokens, sampling parameters.

    Ollama uses Go templates, so the model's Jinja template is rebuilt. Both render system, user and assistant turns
    alike. Tools are not part of the Go template.

    Raises:
        ConfigError: the chat template is not ChatML.
        ConfigError, IntegrityError: as format=gguf.
    """
    tokenizer = open_tokenizer(request.source)
    template = go_template(tokenizer)
    settings = read_settings(request.source, "generation_config.json")
    gguf = model.write(request)
    lines = [f"FROM ./{gguf.notes['file']}", f'TEMPLATE """{template}"""']
    ids = settings.get("eos_token_id")
    if ids is None:
        ids = read_settings(request.source, "config.json").get("eos_token_id")
    tokens = [tokenizer.convert_ids_to_tokens(id) for id in (ids if isinstance(ids, list) else [ids]) if id is not None]
    stops = dict.fromkeys(token for token in (*tokens, tokenizer.eos_token, "<|im_end|>") if token)
    lines += [f'PARAMETER stop "{token}"' for token in stops]
    lines += [f"PARAMETER {name} {value}" for name, value in _sampling(settings).items()]
    (request.out / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    name = model_name(request).lower()
    modelfile = shlex.quote(str(request.final_folder / "Modelfile"))
    return Exported(gguf.checks, [f"ollama create {name} -f {modelfile}", f"ollama run {name}"], gguf.notes)


def go_template(tokenizer: Any) -> str:
    """Return a Go template for Ollama that renders as the tokenizer's chat template.

    Raises:
        ConfigError: the chat template is not ChatML. It is compared on conversations in which templates differ.
    """
    source = tokenizer.chat_template
    if not isinstance(source, str):
        raise ConfigError(
            "format=ollama: needs exactly one chat template\nhelp: set tokenizer.chat_template, or use format=gguf"
        )
    try:
        default = _default_system(source, tokenizer)
    except DataError as error:
        raise ConfigError(f"format=ollama: {error}\n{_HELP}") from error
    if default is None:
        return _TEMPLATE % ""
    if '"""' in default:
        raise ConfigError(f'format=ollama: a Modelfile cannot hold """, found in the default system prompt {default!r}')
    return _TEMPLATE % (_DEFAULT_SYSTEM % default.replace("{{", '{{ "{{" }}'))


def _chatml(turns: Sequence[dict[str, str]], default: str | None, prompt: bool) -> str:
    """Render ChatML; default: system prompt of conversations without one; prompt: open the assistant's turn."""
    if default is not None and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": default}, *turns]
    text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
    return text + "<|im_start|>assistant\n" * prompt


def _default_system(source: str, tokenizer: Any) -> str | None:
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    template = Renderer(source, special)
    opening = template.render([{"role": "user", "content": "A"}], None, False)
    before, _, _ = opening.rpartition("<|im_start|>user\nA<|im_end|>\n")
    default = before.removeprefix("<|im_start|>system\n").removesuffix("<|im_end|>\n") if before else None
    for contents in _PROBES:
        turns = [{"role": _ROLES[content[0]], "content": content[1:]} for content in contents]
        for prompt in (False, True):
            found, wanted = template.render(turns, None, prompt), _chatml(turns, default, prompt)
            if found != wanted:
                raise ConfigError(
                    f"format=ollama: the chat template is not ChatML: expected {wanted[:300]!r}, "
                    f"found {found[:300]!r}\n{_HELP}"
                )
    return default


def _sampling(settings: dict[str, Any]) -> dict[str, str]:
    """Return the sampling parameters, all explicit: Ollama's defaults are temperature 0.8 and a repetition penalty."""
    found = {theirs: settings[ours] for ours, theirs in _PARAMETERS.items() if settings.get(ours) is not None}
    found.setdefault("repeat_penalty", 1.0)
    if settings.get("do_sample") is False:
        found = {name: value for name, value in found.items() if name not in ("top_k", "top_p", "min_p")}
        found["temperature"] = 0
    return {name: json.dumps(value) for name, value in found.items()}
