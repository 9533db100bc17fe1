"""The config to load a base with, for commands that take a run, an adapter or a model alike. Nothing imports torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from finetune.config.compose import load_config, saved_config
from finetune.config.overrides import quoted
from finetune.config.schema import RunConfig
from finetune.models.adapters.folder import CONFIG_FILE, ROUND_FILE, read_adapter_config
from finetune.system.errors import ConfigError, InputError
from finetune.system.manifest import check_files
from finetune.system.resources import packaged


def find_base_config(
    command: str, file: str | None, model: str | None, adapter: Path | None, overrides: Sequence[str]
) -> RunConfig:
    """Return the config to load the base with: the named one, the config of the adapter's run, or lora.yaml.

    Args:
        command: for the message if nothing is named.
        file: a config.
        model: hub id or folder of a base; replaces that of the run.
        adapter: folder of an adapter, a run or a checkpoint.
        overrides: `key=value` words.

    Raises:
        InputError: nothing is named, or the model is an adapter.
        ConfigError: the config is not valid, or the adapter names no base.
    """
    if file is not None:
        return load_config(file, overrides, needs_data=False)
    if model is None and adapter is None:
        raise InputError(f"{command}: adapter=FOLDER, model=NAME or config=X.yaml is missing")
    if model is not None:
        _refuse_run(model)
    chosen = [] if model is None else [f"model.name={quoted(model)}", "model.revision=null"]
    if adapter is not None:
        if (saved := saved_config(adapter, [*chosen, *overrides])) is not None:
            return saved
        if model is None:
            config = read_adapter_config(adapter, f"adapter={adapter}")
            if not (base := config.get("base_model_name_or_path")):
                raise ConfigError(f"adapter={adapter}: adapter_config.json names no base model\nhelp: add model=NAME")
            revision = quoted(config["revision"]) if config.get("revision") else "null"
            chosen = [f"model.name={quoted(base)}", f"model.revision={revision}"]
    return load_config(str(packaged("configs") / "lora.yaml"), [*chosen, *overrides], needs_data=False)


def _refuse_run(model: str) -> None:
    folder = Path(model).expanduser()
    if not (folder / "config.json").is_file() and any(
        (folder / name).is_file() for name in (CONFIG_FILE, "config.yaml")
    ):
        raise InputError(f"model={model}: is a run or an adapter, not a model\nhelp: pass adapter={model}")


def recorded_fingerprint(adapter: Path) -> str | None:
    """Return the fingerprint of the base of an adapter; None if unknown.

    It is in the record of a federated round, or in the run.json of the run or of the checkpoint's run.
    """
    places = (adapter / ROUND_FILE, adapter / "run.json", adapter.parent / "run.json")
    run = next((place for place in places if place.is_file()), None)
    if run is None:
        return None
    check_files(run.parent, [run.name])
    try:
        found = json.loads(run.read_text(encoding="utf-8"))["base"]["fingerprint"]
    except (ValueError, LookupError, TypeError):
        return None  # Another program wrote it.
    return found if isinstance(found, str) else None
