"""The error class of this side: a sentence with the value, the limit and the next step."""

from smoe.artifacts import SmoeError


class EngineError(SmoeError):
    """Something the user can mend: a budget, a prompt, an option. The engine lives on."""
