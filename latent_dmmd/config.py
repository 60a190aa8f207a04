"""Everything a training run depends on: dataclasses, YAML files and the command line.

Defaults live here and nowhere else; files in `configs/` hold the differences, with their reasons.
"""

import difflib
import re
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Literal, TypeVar

import yaml
from jsonargparse import ArgumentParser, Namespace

from latent_dmmd.data import OnBadImage, write_aside
from latent_dmmd.discrepancy import get_discrepancy
from latent_dmmd.flow import Sampler
from latent_dmmd.forward import FORWARD_PROCESSES
from latent_dmmd.latents import BUNDLED_AUTOENCODER
from latent_dmmd.objective import MeanEmbeddingSource, Segment
from latent_dmmd.utils.errors import ConfigError, check

ONE_STEP = ("mmd-gan", "one-step")  # objectives whose networks generate in one step


@dataclass
class DataConfig:
    """The pictures.

    Args:
        name_or_path: `elpv:train`, a folder, a parquet file, or a data set on the hub as `name` or `name:split`.
        resolution: Side in pixels.
        image_column: Column of pictures in tables and hub data.
        horizontal_flip: Whether mirrored pictures are data, too.
        on_bad_image: What to do about a picture that cannot be read: "error" or "skip".
        cache_dir: Folder of the encoded pictures; one named by its contents if null.
        num_workers: Processes that decode pictures while they are encoded.
        streaming: Whether tables and hub data are read as they come, without a copy on the disk.
        class_conditional: Whether features know the classes of pictures: folders, a column `label`, those of elpv.
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
        check(not (self.streaming and self.class_conditional), "data.class_conditional needs data.streaming=false")
        if self.name_or_path == "elpv":
            self.name_or_path = "elpv:train"
        check(self.resolution > 0, f"data.resolution must be positive; got {self.resolution}")
        check(self.num_workers >= 0, f"data.num_workers must not be negative; got {self.num_workers}")


@dataclass
class AutoencoderConfig:
    """The frozen autoencoder.

    Args:
        name_or_path: A diffusers folder or hub name: AutoencoderKL, AutoencoderTiny or AutoencoderDC; "elpv-vae", the
            bundled one; or null: particles are pixels.
        batch_size: Pictures encoded at once.
    """

    name_or_path: str | None = BUNDLED_AUTOENCODER
    batch_size: int = 8

    def __post_init__(self) -> None:
        check(self.batch_size > 0, f"autoencoder.batch_size must be positive; got {self.batch_size}")


@dataclass
class FeatureNetConfig:
    """The features φ; the latents' channels and size are read off the autoencoder.

    Args:
        num_features: Dimension F.
        patch_size: Side of the latent patches that become the U-Net's pixels.
        block_out_channels: Width at each level.
        layers_per_block: Residual blocks a level, on the way down and on the way up.
        attention_levels: Whether each level has attention.
        conv_in_kernel: Side of the first convolution in patches, odd; 1 is a plain patch embedding.
        squared_norm: Whether features see the squared norm of their input, for patches with more numbers than features.
    """

    num_features: int = 64
    patch_size: int = 2
    block_out_channels: list[int] = field(default_factory=lambda: [96, 128])
    layers_per_block: int = 2
    attention_levels: list[bool] = field(default_factory=lambda: [False, True])
    conv_in_kernel: int = 3
    squared_norm: bool = False

    def __post_init__(self) -> None:
        for name in ("num_features", "patch_size", "layers_per_block"):
            check(getattr(self, name) > 0, f"feature_net.{name} must be positive; got {getattr(self, name)}")
        check(
            bool(self.block_out_channels) and min(self.block_out_channels) > 0,
            f"feature_net.block_out_channels must be positive widths; got {self.block_out_channels}",
        )
        check(
            self.conv_in_kernel % 2 == 1 and self.conv_in_kernel > 0,
            f"feature_net.conv_in_kernel must be odd; got {self.conv_in_kernel}",
        )
        check(
            len(self.attention_levels) == len(self.block_out_channels),
            f"feature_net.attention_levels needs {len(self.block_out_channels)} entries, one for each of "
            f"block_out_channels; got {len(self.attention_levels)}",
        )


@dataclass
class ObjectiveConfig:
    """What is minimised.

    Args:
        name: "witness-matching"; "dmmd", the paper's; what they are compared with, on the same backbone:
            "flow-matching", "ddpm" or "mmd-gan"; or "one-step", a generator distilled from the flow of `teacher`.
        forward_process: "linear", "vp-cosine", "vp-linear" or "blur".
        discrepancy: "mmd", or "kale": with `name: dmmd`, the features of D-KALE-Flow.
        kernel: Base kernel on features: "linear" (the paper's), "gaussian" or "rational-quadratic".
        bandwidth: Of the Gaussian kernel, a list is summed, "median" is the heuristic; of the rational-quadratic one.
        kernel_alpha: Mixture parameter α of the rational-quadratic kernel.
        kale_lambda: λ of KALE; large is MMD, small is KL.
        num_points: Features stored of each noise level where means are not enough: other kernels, and KALE.
        num_noise_levels: Size T of the grid of noise levels.
        gradient_weight: dmmd, mmd-gan: weight of the gradient penalty.
        gradient_center: dmmd, mmd-gan: norm the penalty asks for, 1 (paper) or 0.
        feature_weight: dmmd: weight of the features' mean square.
        mean_embeddings: witness-matching: "running", "ema" or "batch".
        segment: witness-matching: train the witness of a level from there to the next "level", or on the "whole" way.
        momentum: witness-matching: weight of the past in running means.
        refresh_every: witness-matching: steps between refreshes of the running means.
        teacher: one-step: folder of a saved DMMD pipeline.
        teacher_steps: one-step: function evaluations of its flow.
        teacher_sampler: one-step: "exact", "approximate" or "hybrid".
        num_pairs: one-step: particles that it moves, to be learnt from.
        witness_weight: one-step: weight of the term that moves the generator's own samples by the teacher's witness.
        label_dropout: With classes: share of the noise levels of a step whose pairs are of any class, in [0, 1].
    """

    name: Literal["witness-matching", "dmmd", "flow-matching", "ddpm", "mmd-gan", "one-step"] = "witness-matching"
    forward_process: str = "linear"
    discrepancy: Literal["mmd", "kale"] = "mmd"
    kernel: Literal["linear", "gaussian", "rational-quadratic"] = "linear"
    bandwidth: float | list[float] | Literal["median"] = "median"
    kernel_alpha: float = 1.0
    kale_lambda: float = 1.0
    num_points: int = 128
    num_noise_levels: int = 25
    gradient_weight: float = 1.0
    gradient_center: float = 1.0
    feature_weight: float = 1e-3
    mean_embeddings: MeanEmbeddingSource = "running"
    segment: Segment = "level"
    momentum: float = 0.97
    refresh_every: int = 4
    teacher: str | None = None
    teacher_steps: int = 10
    teacher_sampler: Sampler = "exact"
    num_pairs: int = 16384
    witness_weight: float = 0.0
    label_dropout: float = 0.2

    def __post_init__(self) -> None:
        check(
            self.forward_process in FORWARD_PROCESSES,
            f"objective.forward_process must be one of {', '.join(FORWARD_PROCESSES)}; got {self.forward_process!r}",
        )
        try:
            get_discrepancy(**self.discrepancy_options())
        except ValueError as error:
            raise ConfigError(f"objective: {error}") from error
        check(self.num_points > 1, f"objective.num_points must be at least 2; got {self.num_points}")
        check(self.num_noise_levels > 0, f"objective.num_noise_levels must be positive; got {self.num_noise_levels}")
        check(0 <= self.momentum < 1, f"objective.momentum must be in [0, 1); got {self.momentum}")
        check(self.refresh_every > 0, f"objective.refresh_every must be positive; got {self.refresh_every}")
        check(self.name != "one-step" or self.teacher is not None, "objective.name one-step needs objective.teacher")
        for name in ("teacher_steps", "num_pairs"):
            check(getattr(self, name) > 0, f"objective.{name} must be positive; got {getattr(self, name)}")
        check(0 <= self.label_dropout <= 1, f"objective.label_dropout must be in [0, 1]; got {self.label_dropout}")
        check(self.gradient_center in (0, 1), f"objective.gradient_center must be 0 or 1; got {self.gradient_center}")
        for name in ("gradient_weight", "feature_weight", "witness_weight"):
            check(getattr(self, name) >= 0, f"objective.{name} must not be negative; got {getattr(self, name)}")

    def discrepancy_options(self) -> dict:
        """The arguments of `get_discrepancy`."""
        options = {"name": self.discrepancy, "kernel": self.kernel}
        if self.kernel != "linear":
            options["bandwidth"] = self.bandwidth
        if self.kernel == "rational-quadratic":
            options["alpha"] = self.kernel_alpha
        return options | ({"lam": self.kale_lambda} if self.discrepancy == "kale" else {})


@dataclass
class TrainingConfig:
    """The loop.

    Args:
        num_steps: Optimiser steps.
        levels_per_step: Noise levels L a step, stratified over the grid.
        pairs_per_level: Pairs (x_0, x_t) B at each level, on each device.
        learning_rate: Peak learning rate of Adam.
        learning_rate_schedule: After the warm-up: "cosine", to a tenth of the peak at the last step; or "constant",
            with which a finished run can go on under a larger num_steps.
        num_warmup_steps: Steps of linear warm-up.
        max_grad_norm: Gradient norm above which gradients are scaled down.
        ema_decay: Decay of the averaged weights; shorter early on.
        mixed_precision: "no" (in quotes in YAML, where a bare no is false), "bf16", or "auto": bf16 where the hardware
            computes in it, "no" elsewhere.
        checkpointing_steps: Steps between checkpoints; there is one at the end, too.
        checkpoints_total_limit: Checkpoints kept.
        log_every: Steps between two lines of metrics.jsonl.
        log_with: A tracker besides metrics.jsonl: "tensorboard", "wandb", or null.
        seed: Seed of weights, data order and noise.
        init_from: Folder of a saved pipeline whose network's weights training begins with; at random if null.
    """

    num_steps: int = 1000
    levels_per_step: int = 8
    pairs_per_level: int = 8
    learning_rate: float = 1e-3
    learning_rate_schedule: Literal["cosine", "constant"] = "cosine"
    num_warmup_steps: int = 50
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2
    log_every: int = 10
    log_with: Literal["tensorboard", "wandb"] | None = None
    seed: int = 0
    init_from: str | None = None

    def __post_init__(self) -> None:
        positive = ("num_steps", "levels_per_step", "learning_rate", "max_grad_norm", "checkpointing_steps")
        for name in (*positive, "checkpoints_total_limit", "log_every"):
            check(getattr(self, name) > 0, f"training.{name} must be positive; got {getattr(self, name)}")
        check(self.pairs_per_level > 1, f"training.pairs_per_level must be at least 2; got {self.pairs_per_level}")
        for name in ("num_warmup_steps", "seed"):
            check(getattr(self, name) >= 0, f"training.{name} must not be negative; got {getattr(self, name)}")
        check(0 <= self.ema_decay < 1, f"training.ema_decay must be in [0, 1); got {self.ema_decay}")
        check(
            self.mixed_precision != "fp16",
            "training.mixed_precision=fp16 overflows in the second derivative of the gradient penalty; use bf16 or no",
        )


@dataclass
class SamplingConfig:
    """The pictures made when training ends.

    Args:
        num_images: Particles.
        sampler: "exact", "approximate" or "hybrid".
        num_noise_levels: Noise levels K of the flow.
        steps_per_level: Gradient steps at each.
        seed: Seed of the initial particles.
    """

    num_images: int = 32
    sampler: Sampler = "exact"
    num_noise_levels: int = 25
    steps_per_level: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_images", "num_noise_levels", "steps_per_level"):
            check(getattr(self, name) > 0, f"sampling.{name} must be positive; got {getattr(self, name)}")


@dataclass
class Config:
    """Train latent DMMD and write a run folder.

    Args:
        output_dir: The run folder.
        resume_from_checkpoint: A checkpoint folder, "latest", or null: the latest if the run folder has one.
        data: The pictures.
        autoencoder: The frozen autoencoder.
        feature_net: The features.
        objective: What is minimised.
        training: The loop.
        sampling: The pictures made when training ends.
    """

    output_dir: str = "runs/elpv256-latent"
    resume_from_checkpoint: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    feature_net: FeatureNetConfig = field(default_factory=FeatureNetConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        check(
            not self.data.class_conditional or self.objective.name in ("witness-matching", "dmmd"),
            f"data.class_conditional needs objective.name witness-matching or dmmd; got {self.objective.name}",
        )
        check(
            self.sampling.num_noise_levels <= self.objective.num_noise_levels,
            f"sampling.num_noise_levels={self.sampling.num_noise_levels} exceeds "
            f"objective.num_noise_levels={self.objective.num_noise_levels}",
        )


ConfigClass = TypeVar("ConfigClass")

# jsonargparse's words on the command line, in a group and elsewhere in YAML
UNKNOWN_KEY = (
    r"unrecognized arguments: --([\w.-]+)|Group '(.+)' does not accept option '(.+)'|Option '(.+)' is not accepted"
)


def key_names(config_class: type, prefix: str = "") -> list[str]:
    """Every dotted key of a dataclass of dataclasses."""
    names = []
    for f in fields(config_class):
        names.append(prefix + f.name)
        if is_dataclass(f.type):
            names += key_names(f.type, f"{prefix}{f.name}.")
    return names


def one_line(message: str, names: list[str]) -> str:
    """A parser's message in one line, with the nearest existing key to one that does not exist."""
    message = " ".join(message.replace("Parser key ", "").split())
    message = message.replace("Unexpected config:", "a configuration file holds lines of key: value; got")
    unknown = re.search(UNKNOWN_KEY, message)
    if unknown:
        name = ".".join(filter(None, unknown.groups()))
        known = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        message = f"no such key: {name}" + (f"; did you mean {known[0]}?" if known else "")
    return message


def parse_config(config_class: type[ConfigClass], args: list[str] | None = None) -> ConfigClass:
    """A configuration from `--config FILE.yaml` (repeatable, later ones win) and `--key value` overrides.

    Args:
        config_class: The dataclass to fill.
        args: Command line arguments; those of the process if None.

    Raises:
        ConfigError: If a key does not exist, or a value is of the wrong type or out of range.
    """
    # no abbreviations: --training.num_step would quietly be taken for num_steps
    parser = ArgumentParser(description=config_class.__doc__.split("\n")[0], exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file of settings; may be given several times.")
    parser.add_class_arguments(config_class, as_group=False)
    try:
        namespace = parser.parse_args(args)
        for f in fields(config_class):
            is_group = isinstance(namespace[f.name], Namespace)
            check(is_group or not is_dataclass(f.type), f"{f.name} must hold keys; got {namespace[f.name]}")
        values = parser.instantiate(namespace)
    except ConfigError:
        raise
    except Exception as error:  # jsonargparse raises several types for bad input
        raise ConfigError(one_line(str(error), key_names(config_class))) from error
    return config_class(**{f.name: getattr(values, f.name) for f in fields(config_class)})


def as_dict(config: object) -> dict:
    """Nested plain values of a dataclass, to be written as YAML."""
    return {f.name: as_dict(value) if is_dataclass(value := getattr(config, f.name)) else value for f in fields(config)}


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration. Raises OSError if it cannot be written."""
    text = yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True)
    write_aside(path, lambda aside: aside.write_text(text))


def differing_keys(config: Config, path: Path) -> list[str]:
    """Dotted keys in which a saved configuration differs, but for `resume_from_checkpoint` and `output_dir`."""

    def flatten(values: dict, prefix: str = "") -> dict:
        flat = {}
        for name, value in values.items():
            flat.update(flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
        return flat

    saved, current = flatten(yaml.safe_load(path.read_text()) or {}), flatten(as_dict(config))
    ignored = ("resume_from_checkpoint", "output_dir")
    names = [n for n in {**saved, **current} if n not in ignored]
    return [n for n in names if saved.get(n) != current.get(n)]
