"""What a server counts of its answers."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

from smoe.runtime.serve.request import Generation

# Seconds up to which a token is counted in the same bucket.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass
class Times:
    """How many took how long: `counts` of each bucket and of all beyond, and the `total` of
    seconds."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    total: float = 0.0

    def add(self, seconds: float) -> None:
        """One more."""
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.total += seconds


class Tally:
    """Answers by how they ended, tokens, and seconds to the first of them and between others. From
    any thread."""

    def __init__(self) -> None:
        self.answers: Counter[str] = Counter()
        self.prompt_tokens = self.shared_tokens = self.new_tokens = self.refused = 0
        self.nats = 0.0
        self.first, self.between = Times(), Times()
        self._lock = threading.Lock()

    def token(self, first: bool, seconds: float) -> None:
        """One came so long after its request, or after the one before it."""
        with self._lock:
            self.new_tokens += 1
            (self.first if first else self.between).add(seconds)

    def ended(self, generation: Generation) -> None:
        """Nobody waits for this one any more."""
        with self._lock:
            self.answers[generation.finish or "cancelled"] += 1
            self.prompt_tokens += len(generation.ids)
            self.shared_tokens += generation.shared
            self.nats += generation.nats
