"""What Prometheus reads at /metrics. Nothing of a text is in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from launch.serve.background import BackgroundScoring
from rlhf.serving.batch import MOST_ROWS
from rlhf.serving.model import ServedModel
from rlhf.serving.store import Writer

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    def __init__(
        self,
        models: Mapping[str, ServedModel],
        writer: Writer | None = None,
        scoring: Callable[[], BackgroundScoring | None] = lambda: None,
    ) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Scoring(scoring))
        self._registry.register(_Engines(models))
        if writer is not None:
            self._registry.register(_Store(writer))
        self.requests = Counter(
            "rlhf_serve_requests", "Requests by route and status", ["route", "status"], registry=self._registry
        )
        self.prompt_tokens = Counter("rlhf_serve_prompt_tokens", "Tokens read", ["model"], registry=self._registry)
        self.completion_tokens = Counter(
            "rlhf_serve_completion_tokens", "Tokens sampled", ["model"], registry=self._registry
        )
        self.gone = Counter(
            "rlhf_serve_clients_gone", "Requests whose client did not wait", ["model"], registry=self._registry
        )
        self.reloads = Counter(
            "rlhf_serve_reloads",
            "Moves of an alias, by whether the version could be loaded",
            ["model", "result"],
            registry=self._registry,
        )
        self.guarded = Counter(
            "rlhf_serve_guarded",
            "Prompts and responses by what the guard did",
            ["model", "where", "result"],
            registry=self._registry,
        )
        self.first_token_s = Histogram(
            "rlhf_serve_first_token_seconds",
            "Time to the first token",
            ["model"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self.request_s = Histogram(
            "rlhf_serve_request_seconds", "Time of a request", ["model"], buckets=SECONDS, registry=self._registry
        )

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _Engines(Collector):
    """The present state of the engines."""

    def __init__(self, models: Mapping[str, ServedModel]) -> None:
        self._models = models

    def collect(self) -> Iterable[Metric]:
        running = GaugeMetricFamily("rlhf_serve_running_rows", "Responses that are sampled", labels=["model"])
        waiting = GaugeMetricFamily("rlhf_serve_waiting_rows", "Responses that wait for a slot", labels=["model"])
        slots = GaugeMetricFamily("rlhf_serve_slots", "Responses that can be sampled at once", labels=["model"])
        up = GaugeMetricFamily("rlhf_serve_up", "Whether the engine takes requests", labels=["model"])
        restarts = CounterMetricFamily("rlhf_serve_engine_restarts", "Restarts of the engine", labels=["model"])
        for name, model in self._models.items():
            engine = model.engine
            running.add_metric([name], engine.running)
            waiting.add_metric([name], engine.waiting)
            slots.add_metric([name], MOST_ROWS)
            up.add_metric([name], engine.up)
            restarts.add_metric([name], engine.restarts)
        return [running, waiting, slots, up, restarts]


class _Store(Collector):
    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    def collect(self) -> Iterable[Metric]:
        writer = self._writer
        return [
            GaugeMetricFamily("rlhf_serve_store_up", "Whether the store answers", float(not writer.away)),
            GaugeMetricFamily("rlhf_serve_store_queued", "Rows that wait for the store", writer.queued),
            CounterMetricFamily("rlhf_serve_store_written", "Rows in the store", writer.written),
            CounterMetricFamily("rlhf_serve_store_dropped", "Rows that the store did not get", writer.dropped),
        ]


class _Scoring(Collector):
    def __init__(self, scoring: Callable[[], BackgroundScoring | None]) -> None:
        self._scoring = scoring

    def collect(self) -> Iterable[Metric]:
        scored = CounterMetricFamily("rlhf_serve_scored", "Responses that a reward model has read", labels=["reward"])
        failed = CounterMetricFamily("rlhf_serve_score_failures", "Scores that failed", labels=["reward"])
        scoring = self._scoring()
        if scoring:
            for name in scoring.rewards:
                scored.add_metric([name], scoring.scored[name])
                failed.add_metric([name], scoring.failed[name])
        return [scored, failed]
