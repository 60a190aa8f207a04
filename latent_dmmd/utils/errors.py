"""Errors that the user can mend; their message is one line that says how."""


class ConfigError(ValueError):
    """A configuration that cannot be right."""


class DataError(ValueError):
    """Something about the data that cannot be used."""


def check(condition: bool, message: str) -> None:
    """Raise ConfigError with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def one_line(error: Exception) -> str:
    """The message of another library's error, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
