"""Errors that the user can mend; their message is one line that says how."""

from collections.abc import Iterable
from difflib import get_close_matches


class ConfigError(ValueError):
    """A configuration that cannot be right."""


class DataError(ValueError):
    """Something about the data that cannot be used."""


def check(condition: bool, message: str) -> None:
    """Raise ConfigError with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The end of a message about a name that does not exist: "; did you mean …?" with the nearest; "" if none is near.

    Args:
        name: What was given.
        known: The names that exist.
        cutoff: How alike they must be, in [0, 1], as of `difflib.get_close_matches`.
    """
    near = get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]}?" if near else ""


def one_line(error: Exception) -> str:
    """The message of another library's error, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
