"""Upload an adapter or a model folder to the model hub through huggingface_hub."""

from __future__ import annotations

import re
from pathlib import Path

from finetune.config.command_options import PushOptions
from finetune.models.adapters.folder import check_adapter_folder, read_adapter_config
from finetune.system.errors import ConfigError, InputError, ResourceError

# What a server or a person loads; checkpoints, metrics and logs stay here.
_PATTERNS = (
    "*.safetensors *.safetensors.index.json *.gguf *.onnx *.onnx.data run.py *config.json tokenizer* vocab.json "
    "merges.txt *.jinja *.tiktoken special_tokens_map.json added_tokens.json Modelfile README.md".split()
)
_REPO = re.compile(r"[\w.-]+/[\w.-]+")


def push(options: PushOptions) -> str:
    """Upload the files of a folder in one commit, and return the address of the repository.

    Args:
        options: as on the command line. The token is that of `hf auth login` or HF_TOKEN.

    Raises:
        ConfigError: the folder holds nothing to upload, or its adapter names a base that others cannot load.
        ResourceError: the hub refuses or cannot be reached; nothing was committed.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if not _REPO.fullmatch(options.repo):
        raise InputError(f"repo={options.repo}: write it as USER/NAME")
    folder = _folder(options)
    # Names, not patterns: those would match the files of checkpoint folders too.
    names = [file.name for file in folder.iterdir() if any(file.match(pattern) for pattern in _PATTERNS)]
    api = HfApi(library_name="finetune")
    try:
        address = api.create_repo(options.repo, private=options.private, exist_ok=True)
        api.upload_folder(
            repo_id=options.repo, folder_path=folder, allow_patterns=names, commit_message=options.message
        )
    except HfHubHTTPError as error:
        advice = "hf auth login, or set HF_TOKEN to a token that may write" if _is_refusal(error) else "try again"
        raise ResourceError(f"repo={options.repo}: the hub refuses: {_first_line(error)}\nhelp: {advice}") from error
    except OSError as error:
        raise ResourceError(f"repo={options.repo}: the hub cannot be reached: {_first_line(error)}") from error
    return str(address)


def _folder(options: PushOptions) -> Path:
    if (options.adapter is None) == (options.model is None):
        raise InputError(
            "finetune push: give adapter=RUN or model=FOLDER\nhelp: finetune push adapter=outputs/mine repo=USER/NAME"
        )
    key = "adapter" if options.adapter is not None else "model"
    folder = Path(options.adapter or options.model or "").expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{key}={folder}: is not a folder")
    if key == "model" and not [file for file in folder.iterdir() if file.suffix in (".safetensors", ".gguf", ".onnx")]:
        raise ConfigError(f"model={folder}: holds no model (safetensors, gguf or onnx)")
    if key == "adapter":
        check_adapter_folder(folder, "adapter")
        base = str(read_adapter_config(folder, f"adapter={folder}").get("base_model_name_or_path"))
        if Path(base).expanduser().exists() or not _REPO.fullmatch(base):
            raise ConfigError(
                f"adapter={folder}: its base {base} is a folder of this machine, which others cannot load\n"
                "help: put the base's hub id into adapter_config.json, or push the merged model"
            )
        from finetune.models.adapters.files import check_adapter  # imports torch

        check_adapter(folder)
    return folder


def _is_refusal(error: Exception) -> bool:
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None) in (401, 403)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
