"""Answers that a vLLM server samples: it gets the adapter before each round, and never the base's weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from finetune.config.schema import RunConfig
from finetune.data.encoded import Prompt
from finetune.evaluation.generation import SampledIds
from finetune.export.adapter_folder import MAX_RANKS
from finetune.system.errors import ConfigError, ResourceError

_SECONDS = 120


class RolloutServer:
    """A `write` of `Rollouts` that asks a server, through TRL's client.

    The server's base may be stored and computed otherwise than the one in training, so its probabilities differ: by
    the `sampling_gap` of each step.
    """

    def __init__(self, cfg: RunConfig, save: Callable[[Path], None], accelerator: Accelerator):
        """Connect to `reward.url`.

        Args:
            save: writes the adapter in training into a folder.
            accelerator: its main rank hands the adapter over, and the others wait for it.

        Raises:
            ConfigError: TRL's client lacks vLLM.
            ResourceError: no server answers.
        """
        self._cfg, self._save, self._accelerator = cfg, save, accelerator
        self._folder = Path(cfg.output_dir) / "rollout-adapters"  # the server reads it
        self._client = connect(cfg)
        self._loaded = 0

    def write(self, prompts: Sequence[Prompt], draws: Sequence[np.ndarray]) -> list[list[SampledIds]]:
        """Sample answers as `sample_answers` does; the first draw seeds the server."""
        reward, copies = self._cfg.reward, self._cfg.reward.group_size
        self._hand_over()
        found = self._ask(
            self._client.generate,
            [prompt.ids.tolist() for prompt in prompts],
            n=copies,
            temperature=reward.temperature,
            max_tokens=reward.max_new_tokens,
            generation_kwargs={"seed": int(draws[0].flat[0] * 2**31)},
        )
        answers = [
            SampledIds(np.array(ids, dtype=np.int32), np.array([score for score, *_ in scores], dtype=np.float32))
            for ids, scores in zip(found["completion_ids"], found["logprobs"], strict=True)
        ]
        return [answers[i * copies : (i + 1) * copies] for i in range(len(prompts))]

    def _hand_over(self) -> None:
        """Give the server the current adapter, under a new name: it keeps no answer or cache of an older one."""
        before, self._loaded = self._loaded, self._loaded + 1
        name, folder = f"finetune-{self._loaded}", (self._folder / f"round-{self._loaded}").absolute()
        if self._accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self._save(folder)
            self._post("load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        self._accelerator.wait_for_everyone()
        self._client.model = name
        if self._accelerator.is_main_process and before:
            self._post("unload_lora_adapter", {"lora_name": f"finetune-{before}"})
            shutil.rmtree(self._folder / f"round-{before}", ignore_errors=True)

    def _post(self, action: str, body: dict[str, Any]) -> None:
        # The answer is a sentence, not JSON.
        url = f"{self._client.base_url}/v1/{action}"
        answer = self._ask(self._client.session.post, url, json=body, timeout=_SECONDS)
        if answer.status_code != 200:
            raise ResourceError(
                f"reward.url: {url} answers {answer.status_code}: {answer.text[:300]}\nhelp: {start_command(self._cfg)}"
            )

    def _ask(self, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        try:
            return call(*args, **options)
        # TRL raises Exception for every answer that is no success.
        except Exception as error:
            raise ResourceError(f"reward.url: {self._cfg.reward.url} fails: {error}\nhelp: see its log") from error


def connect(cfg: RunConfig) -> Any:
    """Return TRL's client of the server at `reward.url`. Raises: as `RolloutServer`."""
    from trl.generation.vllm_client import VLLMClient

    try:
        return VLLMClient(base_url=cfg.reward.url)
    except ImportError as error:
        raise ConfigError(
            f"reward.engine: server needs vLLM here too, whose client TRL uses\n"
            f"help: pip install 'trl[vllm]'; then start the server: {start_command(cfg)}"
        ) from error
    except Exception as error:
        raise ResourceError(
            f"reward.url: no server answers at {cfg.reward.url}: {error}\nhelp: start it: {start_command(cfg)}"
        ) from error


def start_command(cfg: RunConfig) -> str:
    """Return the command that starts a server for a run."""
    rank = next(allowed for allowed in MAX_RANKS if allowed >= cfg.lora.rank)
    return (
        f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve {cfg.model.name} --enable-lora --max-lora-rank {rank} "
        "--max-loras 2 --logprobs-mode processed_logprobs"
    )
