"""Which requests are accepted, and how long one may take: a bounded queue, and deadlines from measured times."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable

from finetune.config.command_options import ServeSettings
from finetune.serving.request import Request
from finetune.system.errors import FinetuneError

_HISTORY = 512  # requests that a quantile or a rate is measured on
_FEWEST = 20  # requests before a quantile is believed
_RETRY_SECONDS = (1, 60)  # least and most of a Retry-After


class Overloaded(FinetuneError):
    """The queue is full: the same request may succeed later (HTTP 429).

    retry_after_seconds: whole seconds after which a place is likely.
    """

    def __init__(self, retry_after_seconds: int, message: str = "the queue of requests is full"):
        super().__init__(f"{message}; try again in {retry_after_seconds} s")
        self.retry_after_seconds = retry_after_seconds


class Unavailable(Overloaded):
    """The service is starting or ending and answers nobody: another replica may (HTTP 503)."""

    def __init__(self, retry_after_seconds: int = 1):
        super().__init__(retry_after_seconds, "the service is not ready")


class DeadlineExceeded(FinetuneError):
    """The time of a request passed before its first token (HTTP 504)."""

    def __init__(self, seconds: float):
        super().__init__(f"the request had no answer within its {seconds:.1f} s")
        self.seconds = seconds


class Admission:
    """A bound on the requests between acceptance and their end: those of a full batch and those of the queue.

    clock: returns seconds, as time.monotonic does.
    """

    def __init__(self, settings: ServeSettings, clock: Callable[[], float] = time.monotonic):
        self._limit = settings.max_batch + settings.queue
        self._queue = settings.queue
        self._clock = clock
        self._ends: deque[float] = deque(maxlen=_HISTORY)
        self.count = 0

    def enter(self) -> None:
        """Accept a request. Raises: Overloaded."""
        if self.count >= self._limit:
            raise Overloaded(self.retry_after_seconds())
        self.count += 1

    def leave(self) -> None:
        """Note the end of a request that entered."""
        self.count -= 1
        self._ends.append(self._clock())

    def retry_after_seconds(self) -> int:
        """Return in how many seconds a queue as long as allowed empties, at the measured rate of ends."""
        least, most = _RETRY_SECONDS
        if len(self._ends) < _FEWEST:
            return least
        rate = len(self._ends) / max(self._clock() - self._ends[0], 1e-3)
        return min(most, max(least, math.ceil(self._queue / rate)))


class Deadlines:
    """The time that a request is given: a factor times what requests of its size took at most, 99 times of 100.

    A whole duration says nothing about a longer answer. Two times do: that from acceptance to the first token, for each
    chunk of the prompt (serve.prefill_tokens), and that from one token to the next.
    """

    def __init__(self, settings: ServeSettings):
        self._settings = settings
        self._first: deque[float] = deque(maxlen=_HISTORY)  # seconds to the first token, per chunk of the prompt
        self._next: deque[float] = deque(maxlen=_HISTORY)  # seconds from token to token, mean of an answer

    def seconds(self, request: Request) -> float:
        """Return the time for a request, within serve.deadline_floor_seconds and serve.deadline_seconds."""
        settings = self._settings
        most = max(settings.deadline_seconds, settings.deadline_floor_seconds)
        if len(self._first) < _FEWEST or (request.max_tokens > 1 and len(self._next) < _FEWEST):
            return most
        expected = self._chunks(request) * _p99(self._first)
        if request.max_tokens > 1:
            expected += (request.max_tokens - 1) * _p99(self._next)
        return min(most, max(settings.deadline_floor_seconds, settings.deadline_factor * expected))

    def note(self, request: Request, first_seconds: float, tokens: int, seconds: float) -> None:
        """Remember an answer that ended by itself, or that its deadline cut.

        One that was cut took longer than it had: without it, deadlines could not follow a rising load.

        Args:
            first_seconds: from acceptance to the first token, or to the deadline.
            tokens: of the answer.
            seconds: from the first token to the end.
        """
        self._first.append(first_seconds / self._chunks(request))
        if tokens > 1:
            self._next.append(seconds / (tokens - 1))

    def _chunks(self, request: Request) -> int:
        return math.ceil(len(request.ids) / self._settings.prefill_tokens)


def _p99(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[math.ceil(0.99 * len(ordered)) - 1]
