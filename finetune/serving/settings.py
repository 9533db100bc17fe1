"""The settings of an answer under OpenAI's names, with their limits: what every protocol reads into a `Sampling`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from finetune.serving.request import Sampling

# Seeds are 64-bit integers in OpenAI's API.
_SEED = 2**63


def _as_tuple(value: Any) -> Any:
    """One stop text may stand without a list; JSON has no tuples."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


StopText = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
StopTexts = Annotated[tuple[StopText, ...], Field(max_length=16), BeforeValidator(_as_tuple)]


class AnswerSettings(BaseModel):
    """How one answer is written. `top_k`, `repetition_penalty` and `ignore_eos` have vLLM's names.

    max_tokens: None: the rest of the context. top_k: 0 or -1 for all tokens. ignore_eos: write max_tokens tokens.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    max_tokens: int | None = Field(None, ge=0)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, lt=2**31)
    seed: int | None = Field(None, ge=-_SEED, lt=_SEED)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    stop: StopTexts = ()
    ignore_eos: bool = False

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, values: Any) -> Any:
        """OpenAI's clients send null for a setting that is not given."""
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, Mapping) else values

    def sampling(self) -> Sampling:
        """Return how the tokens are chosen."""
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            seed=self.seed,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
        )
