"""Errors that a user can act on: a sentence with the value, the limit and the next step. Commands print them bare."""


class SmoeError(Exception):
    """What every command catches and prints without a traceback."""


class BundleError(SmoeError):
    """A bundle that cannot be opened, or a file in it that is not what its manifest says."""
