"""The rewards that a config names. Each is built from the section `reward`, and has TRL's signature.

TRL is imported where it is used: that takes a second.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from jsonschema.protocols import Validator
from jsonschema.validators import validator_for
from referencing import Registry, Resource
from referencing.exceptions import Unresolvable
from referencing.jsonschema import specification_with

from finetune.config.sections import RewardConfig
from finetune.data.sources.json_rows import DECODER
from finetune.evaluation.generation import Answer
from finetune.evaluation.metrics import Metric, find_metric
from finetune.objectives.user_rewards import RewardFunction
from finetune.system.errors import ConfigError, DataError


@dataclass(frozen=True)
class Compared:
    """A reward of 1 where a metric of both texts is 1: the answer and the expected one."""

    metric: Metric

    def __call__(self, completions: Sequence[Any], solution: Sequence[Any], **_: Any) -> list[float | None]:
        pairs = zip(solution, _texts(completions), strict=True)
        return [self.metric.score(Answer("", str(expected), text)) for expected, text in pairs]

    def can_compare(self, expected: str) -> bool:
        """Return whether an expected answer holds what is compared."""
        part = self.metric.part
        return bool(expected.strip()) if part is None else part(expected) is not None


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
        validator = _validator(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"reward.json_schema: {file} cannot be read as JSON: {error}") from error
    except (SchemaError, Unresolvable) as error:
        reason = error.message if isinstance(error, SchemaError) else f"the file holds no {error.ref}"
        raise ConfigError(f"reward.json_schema: {file} is no valid schema: {reason}") from error

    def score(text: str) -> float:
        try:
            return float(validator.is_valid(DECODER.decode(text)))
        except (DataError, ValueError, RecursionError):
            return 0.0

    return lambda completions, **_: [score(text) for text in _texts(completions)]


def _validator(schema: Any) -> Validator:
    """Build the validator of a schema. Raises: SchemaError; Unresolvable for a reference to elsewhere."""
    kind = validator_for(schema, default=Draft202012Validator)
    kind.check_schema(schema)
    # A registry without a way to retrieve: no schema is ever downloaded.
    registry: Registry[Any] = Registry()
    resource = Resource.from_contents(schema, specification_with(str(kind.META_SCHEMA["$schema"])))
    resolver = registry.resolver_with_root(resource)
    pending = [schema]
    while pending:
        part = pending.pop()
        if isinstance(part, dict) and isinstance(reference := part.get("$ref"), str):
            resolver.lookup(reference)
        pending += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return kind(schema, registry=registry)


def _length(cfg: RewardConfig) -> RewardFunction:
    """Build TRL's punishment of long answers. Source: DAPO, arXiv:2503.14476, equation 13."""
    from trl.rewards import get_soft_overlong_punishment

    longest = cfg.max_new_tokens
    return get_soft_overlong_punishment(longest, longest - (cfg.length or 0))


def _texts(completions: Sequence[Any]) -> list[str]:
    return [completion[0]["content"] for completion in completions]


BUILT_IN: dict[str, Callable[[RewardConfig], RewardFunction]] = {
    "exact": lambda cfg: Compared(find_metric("exact_match", None)),
    "number": lambda cfg: Compared(find_metric("number", None)),
    "regex": lambda cfg: Compared(find_metric("regex", cfg.pattern)),
    "json_schema": _json_schema,
    "length": _length,
    "format": _format,
}
