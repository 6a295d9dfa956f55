"""A conversation that outlives its context: the oldest turns are what it can lose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

Message = dict[str, str]


@dataclass
class Conversation:
    """What was said so far: `system`, if there is such a message, and whole turns of a user and an
    answer."""

    system: str | None = None
    turns: list[tuple[str, str]] = field(default_factory=list)

    def messages(self, line: str, first: int = 0) -> list[Message]:
        """The conversation from turn `first` on, and `line` as the user's next message."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for user, answer in self.turns[first:]:
            messages += [_message("user", user), _message("assistant", answer)]
        return [*messages, _message("user", line)]

    def fitting(
        self, line: str, encode: Callable[[list[Message]], list[int]], room: int
    ) -> tuple[list[int], int]:
        """Token ids of the conversation with `line`, by `encode`, and how many of the oldest turns
        they had to go without for being at most `room` tokens. If `line` alone is longer, that is
        what is returned."""
        ids = encode(self.messages(line))
        for dropped in range(1, len(self.turns) + 1):
            if len(ids) <= room:
                return ids, dropped - 1
            ids = encode(self.messages(line, dropped))
        return ids, len(self.turns)

    def answered(self, line: str, answer: str, dropped: int) -> None:
        """Add a turn, and forget the oldest `dropped` ones."""
        self.turns = [*self.turns[dropped:], (line, answer)]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
