"""The client of `distill.teacher.placement=server` reads the scores of our own server."""

from __future__ import annotations

import math

import numpy as np
import pytest

from finetune.distill.server import LogprobServer
from finetune.serving.request import Finished, Load, PromptScores, Token, TokenScore
from finetune.system.errors import ConfigError


class Scorer:
    """Scores prompts with one distribution for each position: the next id has 1/2, the one after it 1/4, and so on."""

    context_tokens = 64

    def submit(self, request, put) -> None:
        if request.prompt_log_probs is not None:
            top = [self._top(before)[: request.prompt_log_probs] for before in request.ids[:-1]]
            own = [self._score(before, token) for before, token in zip(request.ids, request.ids[1:], strict=False)]
            put(PromptScores([None, *own], [(), *top]))
        for _ in range(request.max_tokens):
            put(Token(5))
        put(Finished("length"))

    def _top(self, before: int) -> tuple[TokenScore, ...]:
        return tuple(TokenScore(before + step, -step * math.log(2)) for step in range(1, 20))

    def _score(self, before: int, token: int) -> TokenScore:
        return TokenScore(token, -abs(token - before) * math.log(2) if token > before else -math.inf)

    def cancel(self, handle) -> None:
        pass

    def load(self) -> Load:
        return Load()

    def close(self) -> None:
        pass


def test_scores_of_the_teacher_are_those_of_the_engine(listen):
    url, _ = listen(engine=Scorer())
    teacher = LogprobServer(url, "base", 3)
    teacher.check()
    # The fourth token is not among the three most probable ones, and the fifth is impossible.
    ids = np.array([10, 11, 13, 30, 20, 21])
    found = list(teacher.score_many([(ids, np.array([0, 2, 4])), (ids, np.array([1]))]))
    np.testing.assert_array_equal(found[0].ids, [[11, 12, 13], [14, 15, 16], [21, 22, 23]])
    np.testing.assert_allclose(found[0].log_probs, np.tile(-np.log([2, 4, 8]), (3, 1)), rtol=1e-6)
    np.testing.assert_array_equal(found[1].ids, [[12, 13, 14]])


@pytest.mark.parametrize(("name", "top", "words"), [("missing", 3, "missing"), ("base", 5000, "lower distill.top_k")])
def test_the_teachers_help_fits_our_refusals(listen, name, top, words):
    url, _ = listen(engine=Scorer())
    teacher = LogprobServer(url, name, top)
    with pytest.raises(ConfigError, match=words):
        teacher.check()
        teacher.score(np.array([10, 11, 13]), np.array([0]))


def test_the_teachers_help_at_a_long_document_names_the_length(listen):
    url, _ = listen(engine=Scorer())
    with pytest.raises(ConfigError, match=r"data\.max_length"):
        LogprobServer(url, "base", 3).score(np.arange(10, 110), np.array([0]))
