"""The rewards that a config names. Each is built from the section `reward`, and has TRL's signature.

TRL is imported where it is used: that takes a second.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator, validators
from jsonschema.exceptions import SchemaError
from referencing import Registry

from finetune.config.sections import RewardConfig
from finetune.evaluation.generation import Answer
from finetune.evaluation.metrics import Metric, find_metric
from finetune.objectives.rewards import RewardFunction
from finetune.system.errors import ConfigError


def _compared(metric: Metric) -> RewardFunction:
    def reward(completions: Sequence[Any], solution: Sequence[Any], **_: Any) -> list[float | None]:
        texts = _texts(completions)
        return [metric.score(Answer("", str(one), text)) for one, text in zip(solution, texts, strict=True)]

    return reward


def _format(cfg: RewardConfig) -> RewardFunction:
    """Build the reward of a form; by default TRL's: reasoning in one pair of <think> tags, then any text."""
    if cfg.format is None:
        from trl.rewards import think_format_reward

        return think_format_reward
    pattern = re.compile(cfg.format, re.DOTALL)
    return lambda completions, **_: [float(pattern.fullmatch(text) is not None) for text in _texts(completions)]


def _json_schema(cfg: RewardConfig) -> RewardFunction:
    file = Path(cfg.json_schema or "").expanduser()
    try:
        schema = json.loads(file.read_text(encoding="utf-8"))
        kind = validators.validator_for(schema, default=Draft202012Validator)
        kind.check_schema(schema)
    except (OSError, ValueError, SchemaError) as error:
        raise ConfigError(f"reward.json_schema: {file} is no JSON schema: {error}") from error
    # An empty registry: a schema elsewhere is never downloaded.
    validator = kind(schema, registry=Registry())

    def score(text: str) -> float:
        try:
            return float(validator.is_valid(json.loads(text)))
        except (ValueError, RecursionError):
            return 0.0

    return lambda completions, **_: [score(text) for text in _texts(completions)]


def _length(cfg: RewardConfig) -> RewardFunction:
    """Build TRL's punishment of long answers. Source: DAPO, arXiv:2503.14476, equation 13."""
    from trl.rewards import get_soft_overlong_punishment

    longest = cfg.max_new_tokens
    return get_soft_overlong_punishment(longest, longest - (cfg.length or 0))


def _texts(completions: Sequence[Any]) -> list[str]:
    return [completion[0]["content"] for completion in completions]


BUILT_IN: dict[str, Callable[[RewardConfig], RewardFunction]] = {
    "exact": lambda cfg: _compared(find_metric("exact_match", None)),
    "number": lambda cfg: _compared(find_metric("number", None)),
    "regex": lambda cfg: _compared(find_metric("regex", cfg.pattern)),
    "json_schema": _json_schema,
    "length": _length,
    "format": _format,
}
