"""Everything a training run depends on: dataclasses, YAML files and the command line.

Defaults live in these dataclasses, in those of the methods and in `schedule.SamplingDefaults`, once each; files in
`configs/` hold the differences, with their reasons.
"""

import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Literal, TypeVar

import yaml
from jsonargparse import ArgumentParser, Namespace

from latent_dmmd.data.autoencoder import BUNDLED_AUTOENCODER
from latent_dmmd.data.sources import INSTALLED, OnBadImage
from latent_dmmd.methods.base import METHODS, Method, MethodConfig, NetConfig, build_method, method_class
from latent_dmmd.methods.witness_matching import WitnessMatchingConfig
from latent_dmmd.schedule import SamplingDefaults
from latent_dmmd.training.configurations import with_bundled
from latent_dmmd.utils.errors import ConfigError, check, did_you_mean
from latent_dmmd.utils.files import expand_home, write_aside
from latent_dmmd.utils.process import check_precision


def check_seed(name: str, seed: int) -> None:
    """Raise ConfigError unless it is a seed for all generators of random numbers."""
    check(0 <= seed < 2**32, f"{name} must not be negative, and be below 2**32; got {seed}")


def check_apart(output_dir: str, name_or_path: str, key: str = "data.name_or_path") -> None:
    """Raise ConfigError if a run folder lies in the folder of its data, which the key names."""
    images, output = Path(name_or_path).resolve(), Path(output_dir).resolve()
    check(
        not images.is_dir() or images not in (output, *output.parents),
        f"output_dir {output_dir} lies in {key} {name_or_path}: the images of the run would become data; "
        "choose another --output_dir",
    )


@dataclass
class DataConfig:
    """The images.

    Args:
        name_or_path: `elpv:train`, `openmoji:train`, a folder or zip archive of images, parquet files, a folder of
            `save_to_disk`, or a data set on the hub; `:split` after a name chooses a split.
        resolution: Side in pixels.
        image_column: Column of images in tables and hub data.
        horizontal_flip: Whether mirrored images are data as well.
        on_bad_image: What to do about an image that cannot be read: "error" or "skip".
        cache_dir: Folder of the encoded images; one named by its contents if null.
        num_workers: Processes that decode images while they are encoded.
        streaming: Whether tables and hub data are read as they come, without a copy on the disk.
        class_conditional: Whether features know the classes of images: folders, a column `label`, or those of elpv.
    """

    name_or_path: str = "elpv:train"
    resolution: int = 256
    image_column: str = "image"
    horizontal_flip: bool = False
    on_bad_image: OnBadImage = "error"
    cache_dir: str | None = None
    num_workers: int = 0
    streaming: bool = False
    class_conditional: bool = False

    def __post_init__(self) -> None:
        expand_home(self, "name_or_path", "cache_dir")
        check(not (self.streaming and self.class_conditional), "data.class_conditional needs data.streaming=false")
        if self.name_or_path in INSTALLED:
            self.name_or_path += ":train"
        check(self.resolution > 0, f"data.resolution must be positive; got {self.resolution}")
        check(self.num_workers >= 0, f"data.num_workers must not be negative; got {self.num_workers}")


@dataclass
class AutoencoderConfig:
    """The frozen autoencoder.

    Args:
        name_or_path: A diffusers folder or hub name: AutoencoderKL, AutoencoderTiny or AutoencoderDC; a bundled one,
            "elpv-vae", "elpv-vae-f16c16" or "openmoji-vae"; or null: particles are pixels.
        batch_size: Images encoded at once.
    """

    name_or_path: str | None = BUNDLED_AUTOENCODER
    batch_size: int = 8

    def __post_init__(self) -> None:
        expand_home(self, "name_or_path")
        check(self.batch_size > 0, f"autoencoder.batch_size must be positive; got {self.batch_size}")


@dataclass
class TrainingConfig:
    """The loop.

    Args:
        num_steps: Optimiser steps.
        levels_per_step: Noise levels L of a step, stratified over the grid.
        pairs_per_level: Pairs (x_0, x_t) B at each level, on each device.
        learning_rate: Peak learning rate of Adam.
        learning_rate_schedule: After the warm-up: "cosine", to a tenth of the peak at the last step; or "constant",
            with which a finished run can go on under a larger num_steps.
        num_warmup_steps: Steps of linear warm-up.
        max_grad_norm: Gradient norm above which gradients are scaled down.
        ema_decay: Decay of the averaged weights; shorter early on.
        mixed_precision: "no" (in quotes in YAML, where a bare no is false), "bf16", or "auto": bf16 if `accelerate
            launch` was asked for it or the hardware computes in it, "no" elsewhere.
        checkpointing_steps: Steps between checkpoints; there is one at the end as well.
        checkpoints_total_limit: Checkpoints kept.
        log_every: Steps between two lines of metrics.jsonl.
        log_with: A tracker besides metrics.jsonl: "tensorboard", "wandb", or null.
        seed: Seed of weights, data order and noise.
        init_from: A saved or bundled pipeline whose network's weights training begins with; random weights if null.
    """

    num_steps: int = 1850
    levels_per_step: int = 8
    pairs_per_level: int = 8
    learning_rate: float = 2e-3
    learning_rate_schedule: Literal["cosine", "constant"] = "cosine"
    num_warmup_steps: int = 50
    max_grad_norm: float = 1.0
    ema_decay: float = 0.99
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2
    log_every: int = 10
    log_with: Literal["tensorboard", "wandb"] | None = None
    seed: int = 0
    init_from: str | None = None

    def __post_init__(self) -> None:
        expand_home(self, "init_from")
        positive = ("num_steps", "levels_per_step", "learning_rate", "max_grad_norm", "checkpointing_steps")
        for name in (*positive, "checkpoints_total_limit", "log_every"):
            check(getattr(self, name) > 0, f"training.{name} must be positive; got {getattr(self, name)}")
        check(self.pairs_per_level > 1, f"training.pairs_per_level must be at least 2; got {self.pairs_per_level}")
        warmup = self.num_warmup_steps
        check(warmup >= 0, f"training.num_warmup_steps must not be negative; got {warmup}")
        check(0 <= self.ema_decay < 1, f"training.ema_decay must be in [0, 1); got {self.ema_decay}")
        check(math.isfinite(self.learning_rate), f"training.learning_rate must be finite; got {self.learning_rate}")
        check_seed("training.seed", self.seed)
        check_precision("training.mixed_precision", self.mixed_precision)

    def notes(self) -> list[str]:
        """What is legal and perhaps not meant, one line each."""
        steps, notes = self.num_steps, []
        if steps < self.num_warmup_steps:
            rate = f"the learning rate never reaches {self.learning_rate:g}"
            notes.append(f"training.num_warmup_steps={self.num_warmup_steps} exceeds num_steps={steps}: {rate}")
        if steps < self.log_every:
            notes.append(f"training.log_every={self.log_every} exceeds num_steps={steps}: metrics.jsonl gets one line")
        return notes


@dataclass
class SamplingConfig(SamplingDefaults):
    """The images made when training ends.

    Args:
        sampler: "exact", "approximate" or "hybrid".
        num_noise_levels: Noise levels K of the flow.
        steps_per_level: Gradient steps at each.
        solver_order: Order of the steps, 1 or 2; 2 uses the step before as well and costs no evaluation.
        num_images: Particles.
        seed: Seed of the initial particles.
    """

    num_images: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_images", "num_noise_levels", "steps_per_level"):
            check(getattr(self, name) > 0, f"sampling.{name} must be positive; got {getattr(self, name)}")
        check(self.solver_order in (1, 2), f"sampling.solver_order must be 1 or 2; got {self.solver_order}")
        check_seed("sampling.seed", self.seed)


@dataclass
class Config:
    """Train latent DMMD and write a run folder.

    Args:
        output_dir: The run folder.
        resume_from_checkpoint: A checkpoint folder of any name, "latest", or null: the latest if the run folder has
            one.
        dry_run: Whether to check everything, time a few steps, say what would happen and write nothing.
        data: The images.
        autoencoder: The frozen autoencoder.
        feature_net: The network.
        objective: The method and its keys.
        training: The loop.
        sampling: The images made when training ends.
    """

    output_dir: str = "runs/elpv256-latent"
    resume_from_checkpoint: str | None = None
    dry_run: bool = False
    data: DataConfig = field(default_factory=DataConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    feature_net: NetConfig = field(default_factory=NetConfig)
    objective: MethodConfig = field(default_factory=WitnessMatchingConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        expand_home(self, "output_dir", "resume_from_checkpoint")
        method = build_method(self.objective)
        with_classes = [name for name, other in METHODS.items() if other.has_classes]
        check(
            method.has_classes or not self.data.class_conditional,
            f"data.class_conditional needs objective.name {' or '.join(with_classes)}; got {method.name}",
        )
        check(
            method.is_whole_in_pipeline or self.training.init_from is None,
            f"training.init_from: a pipeline of {method.name} holds a part of what is trained; leave it out",
        )
        method.check_sampling(self.sampling)
        check_apart(self.output_dir, self.data.name_or_path)

    @property
    def method(self) -> Method:
        """The method that `objective` describes."""
        return build_method(self.objective)


ConfigClass = TypeVar("ConfigClass")

# jsonargparse's words on the command line, in a group and elsewhere in YAML
UNKNOWN_KEY = (
    r"unrecognized arguments: --([\w.-]+)|Group '(.+)' does not accept option '(.+)'|Option '(.+)' is not accepted"
)


def key_names(config_class: type, prefix: str = "") -> list[str]:
    """Every dotted key of a dataclass of dataclasses; of every method where one is chosen by name."""
    names = []
    for f in fields(config_class):
        names.append(prefix + f.name)
        classes = [method.config_class for method in METHODS.values()] if f.type is MethodConfig else [f.type]
        for nested in filter(is_dataclass, classes):
            names += [name for name in key_names(nested, f"{prefix}{f.name}.") if name not in names]
    return names


def parser_message(message: str, names: list[str], method: str | None = None) -> str:
    """A parser's message in one line, with the nearest existing key to one that does not exist."""
    message = " ".join(message.replace("Parser key ", "").split())
    message = message.replace("Unexpected config:", "a configuration file holds lines of key: value; got")
    unknown = re.search(UNKNOWN_KEY, message)
    if not unknown:
        return message
    name = ".".join(filter(None, unknown.groups()))
    group, _, key = name.partition(".")
    owners = [n for n, m in METHODS.items() if method and group == "objective" and key in field_names(m.config_class)]
    if owners:
        return f"{name} is a key of {', '.join(owners)}, and not of {method}; leave it out or set objective.name"
    return f"no such key: {name}" + did_you_mean(name, names, cutoff=0.4)


def field_names(config_class: type) -> list[str]:
    return [f.name for f in fields(config_class)]


def documents(args: list[str]) -> Iterator[dict]:
    """What the command line says of the objective, in its order: files of `--config`, and its own keys."""
    words = iter(args)
    for word in words:
        key, has_value, value = word.partition("=")
        if key not in ("--config", "--objective", "--objective.name"):
            continue
        value = value if has_value else next(words, "")
        if key == "--objective.name":
            yield {"objective": {"name": value}}
            continue
        try:
            is_file = key == "--config" and "\n" not in value and Path(value).is_file()
            document = yaml.safe_load(Path(value).read_text() if is_file else value)
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            continue  # the parser names it
        if isinstance(document, dict):
            yield document if key == "--config" else {"objective": document}


def chosen_method(args: list[str]) -> type[Method]:
    """The method that the command line and its files name last. Raises ConfigError if there is none of that name."""
    name = WitnessMatchingConfig.name
    for document in documents(args):
        objective = document.get("objective")
        if isinstance(objective, dict) and "name" in objective:
            name = objective["name"]
    return method_class(name)


def parse_config(config_class: type[ConfigClass], args: list[str] | None = None) -> ConfigClass:
    """A configuration from `--config FILE.yaml` (repeatable, later ones win) and `--key value` overrides.

    A bundled configuration is given by its name, as in `--config elpv256_classes`; a local file of that name wins.

    A key of type `MethodConfig` takes the keys of the method that its `name` chooses, and no others.

    Args:
        config_class: The dataclass to fill.
        args: Command line arguments; those of the process if None.

    Raises:
        ConfigError: If a key does not exist, or a value is of the wrong type or out of range.
    """
    args = with_bundled(sys.argv[1:] if args is None else args)
    # no abbreviations: --training.num_step would quietly be taken for num_steps
    usage, description = "%(prog)s [--config FILE] [--KEY VALUE …]", config_class.__doc__.split("\n")[0]
    parser = ArgumentParser(usage=usage, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file of settings, or the name of a bundled one; may be given several times.",
    )
    by_name = {f.name for f in fields(config_class) if f.type is MethodConfig}
    parser.add_class_arguments(config_class, as_group=False, skip=by_name)
    for action in parser._actions:  # --dry_run alone is --dry_run true, and so for every other switch
        if getattr(action, "_typehint", None) is bool:
            action.nargs, action.const = "?", True
    method = None
    if by_name:
        method = chosen_method(args)
        for name in by_name:
            parser.add_class_arguments(method.config_class, name)
    try:
        namespace = parser.parse_args(args)
        for f in fields(config_class):
            is_group = isinstance(namespace[f.name], Namespace)
            check(is_group or not is_dataclass(f.type), f"{f.name} must hold keys; got {namespace[f.name]}")
        values = parser.instantiate(namespace)
    except ConfigError:
        raise
    except Exception as error:  # jsonargparse raises several types for bad input
        message = parser_message(str(error), key_names(config_class), method and method.name)
        raise ConfigError(message) from error
    return config_class(**{f.name: getattr(values, f.name) for f in fields(config_class)})


def as_dict(config: object) -> dict:
    """Nested plain values of a dataclass, to be written as YAML."""
    return {f.name: as_dict(value) if is_dataclass(value := getattr(config, f.name)) else value for f in fields(config)}


def save_config(config: object, path: Path) -> None:
    """Write the resolved configuration. Raises OSError if it cannot be written."""
    text = yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True)
    write_aside(path, lambda aside: aside.write_text(text))
