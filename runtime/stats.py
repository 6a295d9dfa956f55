"""What an engine counts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from smoe.runtime.sizes import show_size


@dataclass
class Stats:
    """Counters since the engine was opened, or reset. Times are in seconds of wall clock.

    Hits and misses count each expert once per layer and step: `wanted` ones as the router chose
    them, `hits` and `misses` as they were after substitution, which is what was computed. A prompt
    is one step, however long."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    slots: int = 0  # token x active expert
    substituted: int = 0  # slots that got another expert than the router's, or none
    nats_spent: float = 0.0  # what shortcuts should have cost by their prices, over all tokens
    wanted: int = 0
    wanted_hits: int = 0
    hits: int = 0
    misses: int = 0
    loads: int = 0  # reads, of whole records or of more planes
    bytes_read: int = 0
    shards_buffered: int = 0  # files that could not be read directly, as they were to be
    guesses_read: int = 0  # records read on a guess
    guesses_used: int = 0  # guesses that a step used before they were evicted
    prefill_seconds: float = 0.0
    decode_steps: int = 0
    guesses_checked: int = 0  # tokens of drafts
    guesses_right: int = 0
    decode_seconds: float = 0.0  # in the engine: what the caller does between tokens does not count
    # Parts of both above: waiting for records with nothing left to compute, and computing what the
    # next layer may want.
    stall_seconds: float = 0.0
    foresight_seconds: float = 0.0
    finish: str = ""  # of the last generation: length, end, stop or cancelled

    def reset(self) -> None:
        """Count from zero."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, field.default)

    @property
    def hit_rate(self) -> float:
        """Of what was computed."""
        return self.hits / max(1, self.hits + self.misses)

    @property
    def wanted_hit_rate(self) -> float:
        """Of what the router chose: before substitution."""
        return self.wanted_hits / max(1, self.wanted)

    @property
    def substituted_share(self) -> float:
        """Of all slots."""
        return self.substituted / max(1, self.slots)

    @property
    def decoded(self) -> int:
        """Tokens of one sequence that steps gave."""
        return self.decode_steps + self.guesses_right

    def line(self) -> str:
        """For people."""
        rate = f"{self.decoded / self.decode_seconds:.1f} tok/s" if self.decode_steps else ""
        if self.guesses_checked:
            rate += f", {self.guesses_right} of {self.guesses_checked} guesses right"
        decoded = ", ".join(filter(None, (rate or "no decode", self.finish)))
        buffered = self.shards_buffered
        refused = f", {buffered} shards could not be read directly" if buffered else ""
        return (
            f"{self.prompt_tokens} prompt tokens in {self.prefill_seconds:.2f} s, "
            f"{self.new_tokens} new ({decoded}); experts: {self.hits} hits, {self.misses} misses "
            f"({self.hit_rate:.1%} hit), {show_size(self.bytes_read)} read, "
            f"{self.stall_seconds:.2f} s waiting{refused}"
        )

    def as_dict(self) -> dict[str, float | int | str]:
        """For `--json`."""
        return dataclasses.asdict(self) | {
            "hit_rate": self.hit_rate,
            "wanted_hit_rate": self.wanted_hit_rate,
            "substituted_share": self.substituted_share,
        }
