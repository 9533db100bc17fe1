"""`finetune serve engine=NAME`: start another server with the right arguments, prove it, watch it.

Sources: `vllm serve --help`, `sglang serve --help`, `llama-server --help`, docs.sglang.io on LoRA serving, and of
TensorRT-LLM 1.2 commands/serve.py, serve/openai_protocol.py, serve/postprocess_handlers.py and features/lora.md.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from finetune import __version__
from finetune.config.command_options import ExportOptions, ServeOptions
from finetune.config.schema import RunConfig
from finetune.evaluation.probe import TOP, Scorer
from finetune.export.adapter_folder import MAX_RANKS
from finetune.export.export import export_model
from finetune.models.adapters.folder import TENSOR_FILE, read_adapter_config
from finetune.models.hub import TEXT_FILES, WEIGHT_FILES, fetch
from finetune.models.safetensors_header import read_header
from finetune.models.tokenizer import load_tokenizer
from finetune.serving.adapters import name_base
from finetune.serving.loading import base_digest, load_template
from finetune.serving.reference import check_served, references
from finetune.serving.scorers import (
    Ask,
    ask_completions,
    ask_llamacpp,
    ask_sglang,
    ask_tensorrt_llm,
    server_scorer,
    unique_texts,
)
from finetune.serving.server import KEY_VARIABLE, address_of, api_key, describe, listen
from finetune.serving.service import adapter_digest
from finetune.serving.supervise import running
from finetune.system.atomic import write_text
from finetune.system.console import log
from finetune.system.errors import ConfigError, MissingExtra
from finetune.system.resources import cache_home

# Settings of `serve` that these programs have too, or that belong to the comparison.
_READ = {
    "max_batch",
    "context_tokens",
    "cache_tokens",
    "check",
    "check_rows",
    "max_kl",
    "drain_seconds",
    "max_adapters",
}
_READY_SECONDS = 5.0
# Source: get_default_trtllm_modules_to_hf_modules in TensorRT-LLM's lora_helper.py.
_TENSORRT_LLM_MODULES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "qkv_proj": "attn_qkv",
    "o_proj": "attn_dense",
    "gate_proj": "mlp_h_to_4h",
    "up_proj": "mlp_gate",
    "gate_up_proj": "mlp_gate_up",
    "down_proj": "mlp_4h_to_h",
}


@dataclass(frozen=True)
class Start:
    """What a program is started with.

    folder: of the base. gguf: a file to serve in place of it. base: name of the base. template: file of the chat
    template, None for the base's own.
    """

    config: RunConfig
    options: ServeOptions
    adapters: Mapping[str, Path]
    folder: Path
    base: str
    template: Path | None
    port: int
    key: str | None
    gguf: Path | None = None


@dataclass(frozen=True)
class Program:
    """Another server: its executable, where to get it, its arguments, and how it is asked for log-probabilities.

    key_variable: environment variable of its API key; empty if `words` has it, None if the server checks no key.
    environment: other variables. names: that requests may ask for.
    """

    executable: str
    advice: str
    words: Callable[[Start], list[str]]
    ask: Callable[[Start, str | None], Ask]
    names: Callable[[Start], list[str]]
    key_variable: str | None = ""
    environment: Mapping[str, str] = field(default_factory=dict)


def serve_external(
    config: RunConfig, options: ServeOptions, adapters: Mapping[str, Path], gguf: Path | None = None
) -> int:
    """Serve with another program until SIGTERM or Ctrl+C, or until it ends; return the exit code.

    Args:
        config: of the base.
        adapters: folders by name.
        gguf: for llama.cpp, a file in place of the base.

    Raises:
        InputError: the port is taken; MissingExtra: the program is not on PATH.
        ConfigError: settings that the program does not have, or an adapter that it cannot serve.
        IntegrityError: a model does not answer as it was trained to.
        FinetuneError: the program ended by itself.
    """
    program = PROGRAMS[options.engine]
    _check_settings(options)
    if shutil.which(program.executable) is None:
        raise MissingExtra(f"engine={options.engine}: {program.executable} is not on PATH\nhelp: {program.advice}")
    key = api_key(options.host)
    if key is not None and program.key_variable is None:
        raise ConfigError(
            f"engine={options.engine}: {program.executable} checks no key, found one in {KEY_VARIABLE}\n"
            "help: unset it, and put a proxy that checks keys before the server"
        )
    with listen(options.host, options.port) as listening:
        port = listening.getsockname()[1]
    base = gguf.stem if gguf is not None else name_base(config.model, adapters)
    probes = references(config, options, adapters, base)
    template = None
    if adapters:
        load_template(config, adapters)  # refuses different ones
        file = next(iter(adapters.values())) / "chat_template.jinja"
        template = file if file.is_file() else None
    folder = fetch(config.model.name, config.model.revision, TEXT_FILES + WEIGHT_FILES, "model.name").folder
    start = Start(config, options, adapters, folder, base, template, port, key, gguf)
    words = [*program.words(start), *options.engine_args]
    environment = dict(program.environment)
    if key and program.key_variable:
        environment[program.key_variable] = key
    url = address_of(options.host, port)
    with running(words, environment, options.serve.drain_seconds) as child:
        child.wait(lambda: _answers(url))
        scorers: dict[str, Scorer] = {
            name: server_scorer(program.ask(start, name if name in adapters else None), url, key) for name in probes
        }
        check_served(probes, scorers, options.serve.max_kl)
        names = program.names(start)
        print("\n".join(describe(url, names, names[0], key)), flush=True)
        child.wait()
    return 0


def _check_settings(options: ServeOptions) -> None:
    given = options.serve.model_dump(exclude_defaults=True)
    if unread := [f"serve.{key}: engine={options.engine} does not read it" for key in given if key not in _READ]:
        raise ConfigError("\n".join([*unread, "help: remove it, or use engine=embedded; engine_args= has its own"]))


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=_READY_SECONDS, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def vllm_words(start: Start) -> list[str]:
    """Return the command line of `vllm serve`. A base that was trained in NF4 is served in NF4."""
    config, settings = start.config, start.options.serve
    words = ["vllm", "serve", str(start.folder), "--served-model-name", start.base]
    words += ["--host", start.options.host, "--port", str(start.port), "--dtype", config.model.dtype]
    words += ["--max-logprobs", str(TOP), "--logprobs-mode", "raw_logprobs", "--max-num-seqs", str(settings.max_batch)]
    if config.quant.type == "nf4":
        words += ["--quantization", "bitsandbytes"]
    if settings.context_tokens is not None:
        words += ["--max-model-len", str(settings.context_tokens)]
    if start.adapters:
        folders = {name: _plain_adapter(start, folder) for name, folder in start.adapters.items()}
        words += ["--enable-lora", "--max-lora-rank", str(_rank(folders)), "--max-loras", str(len(folders))]
        words += ["--lora-modules", *(f"{name}={folder}" for name, folder in folders.items())]
    if start.template is not None:
        words += ["--chat-template", str(start.template)]
    return words


def sglang_words(start: Start) -> list[str]:
    """Return the command line of `sglang serve`."""
    config, settings = start.config, start.options.serve
    words = ["sglang", "serve", "--model-path", str(start.folder), "--served-model-name", start.base]
    words += ["--host", start.options.host, "--port", str(start.port), "--dtype", config.model.dtype]
    words += ["--max-running-requests", str(settings.max_batch)]
    if settings.context_tokens is not None:
        words += ["--context-length", str(settings.context_tokens)]
    if start.adapters:
        folders = {name: _plain_adapter(start, folder) for name, folder in start.adapters.items()}
        words += ["--enable-lora", "--max-lora-rank", str(_rank(folders)), "--max-loras-per-batch", str(len(folders))]
        words += ["--lora-paths", *(f"{name}={folder}" for name, folder in folders.items())]
    if start.template is not None:
        words += ["--chat-template", str(start.template)]
    if start.key is not None:
        words += ["--api-key", start.key]  # it reads no environment variable
    return words


def llamacpp_words(start: Start) -> list[str]:
    """Return the command line of `llama-server`, with the base and its adapters as GGUF files."""
    settings = start.options.serve
    context = settings.cache_tokens or settings.context_tokens or 0  # 0: the model's
    words = ["llama-server", "--model", str(start.gguf or _gguf(start, None)), "--alias", _llamacpp_name(start)]
    words += ["--host", start.options.host, "--port", str(start.port), "--ctx-size", str(context)]
    words += ["--parallel", str(settings.max_batch), "--kv-unified", "--offline"]
    for folder in start.adapters.values():
        words += ["--lora", str(_gguf(start, folder))]
    if len(start.adapters) > 1:
        # Each request says which one it wants; by default all of them would add up.
        words.append("--lora-init-without-apply")
        numbers = ", ".join(f"{name}={number}" for number, name in enumerate(start.adapters))
        log(f'serve: requests choose an adapter by "lora": [{{"id": NUMBER, "scale": 1}}], with {numbers}')
    if start.template is not None:
        words += ["--chat-template-file", str(start.template)]
    return words


def tensorrt_llm_words(start: Start) -> list[str]:
    """Return the command line of `trtllm-serve`. Its YAML file names the adapters, which are served in 16 bit."""
    settings = start.options.serve
    words = ["trtllm-serve", "serve", str(start.folder), "--host", start.options.host, "--port", str(start.port)]
    words += ["--max_batch_size", str(settings.max_batch)]
    if settings.context_tokens is not None:
        words += ["--max_seq_len", str(settings.context_tokens)]
    if start.adapters:
        requests = [_lora_request(start, name) for name in start.adapters]
        folders = {each["lora_name"]: Path(each["lora_path"]) for each in requests}
        lora = {
            "lora_target_modules": _tensorrt_llm_modules(folders),
            "max_lora_rank": _rank(folders),
            "max_loras": len(folders),
            "max_cpu_loras": len(folders),
        }
        # A CUDA graph is captured without adapters: TensorRT-LLM's own test of adapters turns graphs off.
        content = json.dumps({"lora_config": lora, "cuda_graph_config": None}) + "\n"  # JSON is YAML
        file = cache_home("served") / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.yaml"
        write_text(file, content)
        words += ["--config", str(file)]
        for each in requests:
            log(f'serve: requests choose the adapter {each["lora_name"]} by "lora_request": {json.dumps(each)}')
    if start.template is not None:
        words += ["--chat_template", str(start.template)]
    return words


def _lora_request(start: Start, name: str) -> dict[str, Any]:
    """Return what a request to trtllm-serve names an adapter by."""
    number = list(start.adapters).index(name) + 1
    folder = _plain_adapter(start, start.adapters[name])
    return {"lora_name": name, "lora_int_id": number, "lora_path": str(folder)}


def _tensorrt_llm_modules(folders: Mapping[str, Path]) -> list[str]:
    """Return TensorRT-LLM's names of the layers of adapters: with q, k or v it needs all three.

    It infers them only for one adapter. Raises: ConfigError for layers that it does not know.
    """
    layers = set()
    for name, folder in folders.items():
        _, tensors = read_header(folder / TENSOR_FILE)
        found = {tensor.partition(".lora_")[0].rpartition(".")[2] for tensor in tensors}
        if unknown := sorted(found - _TENSORRT_LLM_MODULES.keys()):
            raise ConfigError(
                f"adapters.{name}: engine=tensorrt_llm has no LoRA for {', '.join(unknown)}\n"
                "help: run finetune merge, and serve the merged model"
            )
        layers |= found
    if layers & {"q_proj", "k_proj", "v_proj"}:
        layers |= {"q_proj", "k_proj", "v_proj"}
    return [theirs for ours, theirs in _TENSORRT_LLM_MODULES.items() if ours in layers]


def _ask_tensorrt_llm(start: Start, name: str | None) -> Ask:
    lora = None if name is None else _lora_request(start, name)
    return ask_tensorrt_llm(start.base, lora, unique_texts(load_tokenizer(start.config.model)))


def _llamacpp_name(start: Start) -> str:
    return next(iter(start.adapters)) if len(start.adapters) == 1 else start.base


def _rank(folders: Mapping[str, Path]) -> int:
    """Return the smallest rank that vLLM allows and that holds all adapters."""
    largest = max(read_adapter_config(folder, f"adapters.{name}").get("r", 8) for name, folder in folders.items())
    return next(rank for rank in MAX_RANKS if rank >= largest)


def _plain_adapter(start: Start, adapter: Path) -> Path:
    """Return an adapter as servers read it: one rank and one scale, under their names of modules."""
    return _exported(start, adapter, "adapter", verify=False)


def _gguf(start: Start, adapter: Path | None) -> Path:
    return next(_exported(start, adapter, "gguf", verify=adapter is None).glob("*.gguf"))


def _exported(start: Start, adapter: Path | None, form: str, *, verify: bool) -> Path:
    """Export the base or an adapter, once for the same weights, and return the folder.

    The comparison with the trained model follows in the server itself.
    """
    made_from = [__version__, form, base_digest(start.config), "" if adapter is None else adapter_digest(adapter)]
    out = cache_home("served") / hashlib.sha256("\n".join(made_from).encode()).hexdigest()[:32]
    if not out.is_dir():
        log(f"serve: exporting {adapter or start.config.model.name} for {start.options.engine}: {out}")
        out.parent.mkdir(parents=True, exist_ok=True)
        export_model(
            ExportOptions(
                adapter=None if adapter is None else str(adapter),
                model=str(start.folder),
                format=form,
                out=str(out),
                merge=adapter is None,
                verify=verify,
            )
        )
    return out


PROGRAMS = {
    "vllm": Program(
        "vllm",
        "pip install vllm in an environment of its own, and add its bin folder to PATH",
        vllm_words,
        ask=lambda start, name: ask_completions(name or start.base),
        names=lambda start: [*start.adapters, start.base],
        key_variable="VLLM_API_KEY",
    ),
    "sglang": Program(
        "sglang",
        "pip install sglang in an environment of its own, and add its bin folder to PATH",
        sglang_words,
        ask=lambda start, name: ask_sglang(name),
        names=lambda start: [*(f"{start.base}:{name}" for name in start.adapters), start.base],
    ),
    "llamacpp": Program(
        "llama-server",
        "build llama.cpp, or install a release of it, and add its bin folder to PATH",
        llamacpp_words,
        ask=lambda start, name: ask_llamacpp(None if name is None else list(start.adapters).index(name)),
        names=lambda start: [_llamacpp_name(start)],
        key_variable="LLAMA_API_KEY",
        # Pages of other sites that a browser here shows must not ask. Older versions do not read it.
        environment={"LLAMA_ARG_CORS_ORIGINS": "localhost"},
    ),
    "tensorrt_llm": Program(
        "trtllm-serve",
        "use the container of launch/tensorrt-llm/Dockerfile",
        tensorrt_llm_words,
        ask=_ask_tensorrt_llm,
        names=lambda start: [start.base],
        key_variable=None,
    ),
}
