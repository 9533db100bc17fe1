"""The settings of an answer: their limits, and how they choose tokens."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from finetune.serving.request import Sampling
from finetune.serving.settings import AnswerSettings


def test_settings_say_how_tokens_are_chosen():
    settings = AnswerSettings.model_validate({"max_tokens": 3, "temperature": 0.5, "top_k": -1, "seed": 4})
    assert settings.sampling() == Sampling(temperature=0.5, seed=4)


def test_null_is_absent_and_one_stop_text_stands_without_a_list():
    settings = AnswerSettings.model_validate({"temperature": None, "stop": "\n"})
    assert settings == AnswerSettings.model_validate({"stop": ["\n"]})


@pytest.mark.parametrize(
    ("values", "keys"),
    [
        ({"temperature": "hot"}, ["temperature"]),
        ({"temperature": float("nan"), "top_p": 0}, ["temperature", "top_p"]),
        ({"max_tokens": True}, ["max_tokens"]),
        ({"seed": 2**63}, ["seed"]),
        ({"stop": [""]}, ["stop"]),
        ({"stop": 3}, ["stop"]),
        ({"temprature": 1}, ["temprature"]),
    ],
)
def test_an_error_names_every_wrong_key(values, keys):
    with pytest.raises(ValidationError) as error:
        AnswerSettings.model_validate(values)
    assert [problem["loc"][0] for problem in error.value.errors()] == keys
