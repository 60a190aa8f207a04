"""Configurations that come with the package, by name."""

import os
from importlib.resources import files
from pathlib import Path

import yaml

from latent_dmmd.utils.errors import ConfigError, one_line


def bundled_configurations() -> dict[str, Path]:
    """The YAML files that come with the package, by name without ".yaml"; in a checkout those of `configs`."""
    package = Path(str(files("latent_dmmd")))
    folder = next((f for f in (package / "configs", package.parent / "configs") if f.is_dir()), package)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def with_bundled(args: list[str]) -> list[str]:
    """A command line with files for the names of bundled configurations. Raises ConfigError for other names."""
    found, is_value = [], False
    for word in args:
        option, has_value, value = word.partition("=")
        if is_value:
            word = configuration_file(word)
        elif option == "--config" and has_value:
            word = f"--config={configuration_file(value)}"
        is_value = word == "--config" and not is_value
        found.append(word)
    return found


def configuration_file(value: str) -> str:
    """What `--config` was given: a file, lines of YAML, a pipe, whose lines are returned, or a bundled configuration's
    name, whose file is returned.

    Raises ConfigError, with the known names, if it is none of them, or a file that is no YAML.
    """
    bundled = bundled_configurations()
    what = f"a YAML file, or the name of one that is bundled: {', '.join(bundled)}"
    if os.path.isdir(value):
        raise ConfigError(f"--config {value} is a folder; give {what}")
    if os.path.isfile(value):
        try:
            yaml.safe_load(Path(value).read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"--config {value} cannot be read as YAML: {one_line(error)}") from error
        return value
    if os.path.exists(value):  # a pipe, which can be read once
        return Path(value).read_text() or "{}"
    if value.startswith("--") or any(mark in value for mark in ":\n{"):
        return value  # another option, or lines of YAML
    if value.removesuffix(".yaml") in bundled:
        return str(bundled[value.removesuffix(".yaml")])
    raise ConfigError(f"--config {value}: no such file; give {what}")
