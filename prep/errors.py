"""The error classes of this side: a sentence with the value, the limit and the next step."""

from smoe.artifacts import SmoeError


class PrepError(SmoeError):
    """Something the user can mend: a path, a text, an option, or a model that cannot be "
    "prepared."""


class NotDifferentiableError(PrepError):
    """The model has no gradients, so a bundle of it has no prices; all else goes on without."""
