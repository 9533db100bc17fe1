"""The settings of an answer under OpenAI's names, with their limits: what every protocol reads into a `Request`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from finetune.serving.request import Request, Sampling
from finetune.system.console import printable
from finetune.system.errors import InputError

_SHOWN_CHARACTERS = 100
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

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """Check values by name. Raises: InputError naming every key that is wrong."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise InputError(described(error)) from error

    def request(
        self, ids: Sequence[int], *, stop_ids: Sequence[int], context_tokens: int, adapter: str | None = None
    ) -> Request:
        """Return the request of one answer.

        Args:
            ids: of the prompt.
            stop_ids: tokens that end an answer; `ignore_eos` sets them aside.
            context_tokens: most tokens of prompt and answer together.
            adapter: its name; None: the base alone.

        Raises:
            InputError: the prompt is empty, or the context has no room for it and `max_tokens`.
        """
        if not ids:
            raise InputError("the prompt is empty; it must have at least one token")
        room_tokens = context_tokens - len(ids)
        least_tokens = 1 if self.max_tokens is None else self.max_tokens
        if room_tokens < least_tokens:
            raise InputError(
                f"max_tokens: the context has {context_tokens:,} tokens, the prompt needs {len(ids):,} of them and the "
                f"answer {least_tokens:,}"
            )
        return Request(
            ids=tuple(ids),
            max_tokens=room_tokens if self.max_tokens is None else self.max_tokens,
            adapter=adapter,
            stop_ids=frozenset() if self.ignore_eos else frozenset(stop_ids),
            sampling=self.sampling(),
        )

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


def described(error: ValidationError) -> str:
    """Return the problems of values, each as `key: what is wrong, found value`."""
    problems = []
    for found in error.errors(include_url=False, include_context=False):
        key = ".".join(map(str, found["loc"]))
        shown = repr(found["input"])[:_SHOWN_CHARACTERS]
        text = "no setting has this name" if found["type"] == "extra_forbidden" else found["msg"].lower()
        problems.append(printable(f"{key}: {text}, found {shown}", one_line=True))
    return "; ".join(problems)
