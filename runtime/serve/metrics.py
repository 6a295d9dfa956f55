"""What Prometheus reads: counts of the server, its loop and its engine, when it asks."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from smoe.runtime.machine import held_memory
from smoe.runtime.serve.desk import Desk
from smoe.runtime.serve.tally import BUCKETS, Times

TYPE = CONTENT_TYPE_LATEST
# Of `stats.Stats`: the counter's name, and what it says.
STATS = {
    "wanted": "Experts that routers chose, once a layer and step",
    "wanted_hits": "Those of them that were in memory",
    "hits": "Experts that were computed and in memory, after substitution",
    "misses": "Experts that were read for being computed",
    "slots": "Tokens times active experts",
    "substituted": "Slots that got another expert than the router's, or none",
    "bytes_read": "Bytes of experts that were read",
    "stall_seconds": "Seconds of waiting for experts with nothing else to do",
    "nats_spent": "What shortcuts should have cost by their prices",
}


class Metrics:
    """Of one `desk`."""

    def __init__(self, desk: Desk):
        self._desk = desk
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def page(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """As `prometheus_client` asks a collector."""
        loop, engine, tally = self._desk.loop, self._desk.engine, self._desk.tally
        requests = GaugeMetricFamily("smoe_requests", "Requests by what they do", labels=["state"])
        for state, count in loop.counts.items():
            requests.add_metric([state], count)
        answers = CounterMetricFamily("smoe_answers", "Answers by their end", labels=["finish"])
        for finish, count in [*tally.answers.items()]:
            answers.add_metric([finish], count)
        yield from (requests, answers)
        yield CounterMetricFamily("smoe_refused", "Requests without a place", tally.refused)
        yield CounterMetricFamily("smoe_prompt_tokens", "Tokens of prompts", tally.prompt_tokens)
        yield CounterMetricFamily(
            "smoe_shared_tokens", "Those of them that were not computed again", tally.shared_tokens
        )
        yield CounterMetricFamily("smoe_new_tokens", "Tokens of answers", tally.new_tokens)
        yield _times("smoe_first_token_seconds", "Seconds to an answer's first token", tally.first)
        yield _times("smoe_between_tokens_seconds", "Seconds between its tokens", tally.between)
        for name, said in STATS.items():
            yield CounterMetricFamily(f"smoe_{name}", said, getattr(engine.stats, name))
        yield GaugeMetricFamily("smoe_memory_budget_bytes", "Stated bound", engine.plan.budget)
        held = held_memory()
        if held is not None:
            yield GaugeMetricFamily("smoe_memory_bytes", "What the process holds", held)


def _times(name: str, said: str, times: Times) -> Metric:
    buckets, count = [], 0
    for most, more in zip([*map(str, BUCKETS), "+Inf"], times.counts, strict=True):
        count += more
        buckets.append((most, count))
    return HistogramMetricFamily(name, said, buckets=buckets, sum_value=times.total)
