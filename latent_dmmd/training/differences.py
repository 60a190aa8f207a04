"""What changed between the configuration of a run folder and the one of a command."""

from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path

import yaml

from latent_dmmd.training.config import as_dict
from latent_dmmd.utils.errors import ConfigError, one_line

# keys of a call, not of what is trained
CALL = ("output_dir", "resume_from_checkpoint", "dry_run")
# what was done before a key existed, where that is not the key's default
BEFORE = {
    "feature_net.architecture": "unet",
    "objective.segment": "whole",
    "objective.target": "displacement",
    "objective.weighting_scheme": "none",
    "sampling.solver_order": 1,
}
ABSENT = "absent"


def flatten(values: dict, prefix: str = "") -> dict:
    """Dotted keys of nested dictionaries."""
    flat = {}
    for name, value in values.items():
        flat.update(flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return flat


def defaults(config: object) -> dict:
    """Nested defaults of a dataclass; of a group that is one of several classes, those of the one it is."""
    nested = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            nested[f.name] = defaults(value)
        else:
            nested[f.name] = f.default_factory() if f.default is MISSING else f.default
    return nested


def saved_values(config: object, path: Path) -> dict:
    """Dotted keys of a saved configuration. A key that it lacks has the value that was in force before the key was.

    Raises ConfigError if the file cannot be read.
    """
    try:
        saved = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {one_line(error)}; choose another --output_dir") from error
    if not isinstance(saved, dict):
        raise ConfigError(f"{path} holds no configuration; choose another --output_dir")
    values = flatten(defaults(config))
    return values | {name: value for name, value in BEFORE.items() if name in values} | flatten(saved)


def differing_keys(config: object, path: Path) -> dict[str, str]:
    """Dotted keys in which a configuration differs from a saved one, each with its values: "9 (was 6)".

    Keys of a call, such as `output_dir`, do not count, nor do keys of other methods, which 0.1 saved with every run.
    If the method is another, its keys are not listed as well.
    """
    saved, current = saved_values(config, path), flatten(as_dict(config))
    names = [n for n in {**saved, **current} if n not in CALL]
    names = [n for n in names if n in current or not n.startswith("objective.")]
    names = [n for n in names if saved.get(n, ABSENT) != current.get(n, ABSENT)]
    method = "objective.name"
    names = [n for n in names if n == method or method not in names or not n.startswith("objective.")]
    return {n: f"{shown(current.get(n, ABSENT))} (was {shown(saved.get(n, ABSENT))})" for n in names}


def shown(value: object) -> str:
    """A value as the command line takes it."""
    return value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).split("\n")[0]
