"""What a service counts and measures, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from finetune.serving.request import Load
from finetune.system.errors import MissingExtra

# Upper bounds in seconds: from a GPU that answers at once to a CPU that reads a long prompt.
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)
_TOKENS = (16, 64, 256, 1024, 4096, 16384, 65536)


class Metrics:
    """The metrics of one service in a registry of its own.

    Labels are few and known: a name that a client invents is never one.

    load: of the engine, asked for at each reading.
    """

    def __init__(self, load: Callable[[], Load]):
        try:
            from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
        except ImportError as error:
            raise MissingExtra('finetune serve needs: pip install "finetune-qlora[serve]"') from error
        registry = self.registry = CollectorRegistry()
        registry.register(_EngineLoad(load))

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"finetune_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"finetune_{name}", text, buckets=buckets, registry=registry)

        self.requests = counter("requests", "Requests that ended, by protocol.", "endpoint", "model", "status")
        self.answers = counter("answers", "Answers of the engine, by how they ended.", "end")
        self.deadlines_passed = counter("deadlines_passed", "Requests that their deadline ended.")
        self.refused = counter("refused", "Requests that were not accepted.", "reason")
        self.lookups = counter("answer_cache_lookups", "Deterministic requests, by what was found.", "result")
        self.cache_errors = counter("answer_cache_errors", "Failures of the store of answers.")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts that the engine read.", "model")
        self.answer_tokens = counter("answer_tokens", "Tokens that the engine wrote.", "model")
        self.first_token = histogram(
            "time_to_first_token_seconds", "From acceptance to the first token of an answer.", _SECONDS
        )
        self.between_tokens = histogram("time_between_tokens_seconds", "From a token to the next.", _TOKEN_SECONDS)
        self.duration = histogram("answer_seconds", "From acceptance to the end of an answer.", _SECONDS)
        self.answer_length = histogram("answer_length_tokens", "Tokens of an answer.", _TOKENS)
        self.deadline = Gauge("finetune_deadline_seconds", "Time given to the last request.", registry=registry)
        # Series that a dashboard divides by exist from the start.
        for end in ("stop", "length", "cancelled", "deadline", "error"):
            self.answers.labels(end)
        for reason in ("queue", "unavailable"):
            self.refused.labels(reason)
        for result in ("hit", "miss", "shared"):
            self.lookups.labels(result)

    def text(self) -> tuple[bytes, str]:
        """Return the metrics in Prometheus' text format, and its media type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self.registry), CONTENT_TYPE_LATEST


class _EngineLoad:
    """Reads the engine when Prometheus asks."""

    def __init__(self, load: Callable[[], Load]):
        self._load = load

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        now = self._load()
        gauges = {
            "running": (now.running, "Answers being written."),
            "waiting": (now.waiting, "Accepted requests that wait."),
            "kv_tokens": (now.cache_tokens, "Tokens whose keys and values fit."),
            "kv_tokens_used": (now.cache_tokens_used, "Tokens whose keys and values are those of running answers."),
        }
        for name, (value, text) in gauges.items():
            yield GaugeMetricFamily(f"finetune_{name}", text, value=value)
        for name, value in now.counters.items():
            yield CounterMetricFamily(f"finetune_engine_{name}", f"Of the engine: {name}.", value=value)
