"""A method: its keys, its network, its objective, its pipeline, and how it is sampled."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from latent_dmmd.data.autoencoder import Autoencoder
from latent_dmmd.data.particles import Particles
from latent_dmmd.nn.unet import UNetConfig
from latent_dmmd.objective import Objective
from latent_dmmd.pipeline import LatentPipeline
from latent_dmmd.schedule import SamplingDefaults
from latent_dmmd.utils.errors import ConfigError, check, did_you_mean


@dataclass
class NetConfig:
    """The network; the channels and size of the particles are read off the autoencoder.

    Args:
        num_features: Dimension F of φ.
        patch_size: Side of the patches of latents that become the U-Net's pixels.
        block_out_channels: Width at each scale.
        layers_per_block: Residual blocks per scale, on the way down and on the way up.
        architecture: φ from the way down of the U-Net alone, the "encoder", or from all of it, the "unet"; networks of
            other methods are whole.
        attention_levels: Whether each scale has attention.
        conv_in_kernel: Side of the first convolution in patches, odd; 1 is a plain patch embedding.
        squared_norm: Whether φ sees the squared norm of its input, for patches with more numbers than features.
    """

    num_features: int = 64
    patch_size: int = 2
    block_out_channels: list[int] = field(default_factory=lambda: [96, 128])
    layers_per_block: int = 2
    attention_levels: list[bool] = field(default_factory=lambda: [False, True])
    conv_in_kernel: int = 3
    squared_norm: bool = False
    architecture: Literal["unet", "encoder"] = "encoder"

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

    def unet(self, shape: tuple[int, int, int], num_classes: int = 0) -> dict:
        """Arguments of `UNetConfig` for particles of shape (C, h, w), as networks take them.

        Raises ConfigError if the particles are not square or the sizes do not fit them.
        """
        channels, height, width = shape
        check(height == width, f"feature_net: latents must be square; got {height}x{width}")
        try:
            unet = UNetConfig(
                height,
                channels,
                self.patch_size,
                tuple(self.block_out_channels),
                self.layers_per_block,
                tuple(self.attention_levels),
                conv_in_kernel=self.conv_in_kernel,
                num_classes=num_classes,
            )
        except ValueError as error:
            raise ConfigError(f"feature_net: {error}") from error
        return asdict(unet)


@dataclass
class MethodConfig:
    """Base class of every method's keys.

    Args:
        name: The method.
    """

    name: str = ""


class Method:
    """Base class: one way to train and to generate.

    Attributes:
        name: What `objective.name` calls it.
        title: What a model card calls it.
        summary: How a model card begins.
        config_class: Its keys.
        has_classes: Whether it can be trained for classes.
        samplers: Ways to sample it that a comparison tells apart: name to arguments of the pipeline's call.
        one_step: Whether it generates in one step.
        is_whole_in_pipeline: Whether its pipeline holds all that was trained, so that training can begin with it.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    summary: ClassVar[str] = "A baseline that generates"
    config_class: ClassVar[type[MethodConfig]]
    has_classes: ClassVar[bool] = False
    samplers: ClassVar[dict[str, dict]] = {"": {}}
    one_step: ClassVar[bool] = False
    is_whole_in_pipeline: ClassVar[bool] = True

    def __init__(self, options: MethodConfig) -> None:
        self.options = options

    def network(self, net: NetConfig, shape: tuple[int, int, int], num_classes: int = 0) -> nn.Module:
        """What is trained on particles of shape (C, h, w). Raises ConfigError if they do not fit."""
        raise NotImplementedError

    def objective(self, network: nn.Module, averaged_net: nn.Module) -> Objective:
        """What is minimised.

        Args:
            network: From `network`.
            averaged_net: Its average (EMA).
        """
        raise NotImplementedError

    def pipeline(
        self,
        objective: Objective,
        averaged_net: nn.Module,
        particles: Particles,
        vae: Autoencoder | None,
        sampling: SamplingDefaults,
        seed: int,
        class_names: tuple[str, ...] = (),
    ) -> LatentPipeline:
        """The pipeline of a trained network, whose averaged weights it uses.

        Args:
            objective: From `objective`, trained.
            averaged_net: The averaged network.
            particles: What was trained on.
            vae: The autoencoder; None if particles are pixels.
            sampling: How the pipeline generates where a call does not say.
            seed: Seed of what is measured for it.
            class_names: Names of the classes; empty if there are none.
        """
        raise NotImplementedError

    def own_particles(self, folder: Path, seed: int) -> Particles | None:
        """What to train on instead of the data, kept in the run folder; None if it is the data."""
        return None

    @classmethod
    def makes_particles(cls) -> bool:
        """Whether `own_particles` are what it trains on."""
        return cls.own_particles is not Method.own_particles

    def check_autoencoder(self, vae: Autoencoder | None) -> None:
        """Raise ConfigError if the method cannot be trained in the latent space of this one; None is pixels."""

    def check_sampling(self, sampling: SamplingDefaults) -> None:
        """Raise ConfigError if the method cannot be sampled so."""

    def sampling_options(self, sampling: SamplingDefaults) -> dict:
        """Arguments of the pipeline's call that sample as a configuration asks."""
        return {"num_inference_steps": 1 if self.one_step else sampling.num_noise_levels * sampling.steps_per_level}


METHODS: dict[str, type[Method]] = {}


def register(method: type[Method]) -> type[Method]:
    """Class decorator: make a method known by its name. Raises ValueError if the name is taken."""
    known = METHODS.get(method.name, method)
    if (known.__module__, known.__qualname__) != (method.__module__, method.__qualname__):  # a module may be reloaded
        raise ValueError(f"a method {method.name!r} is registered already")
    METHODS[method.name] = method
    return method


def method_class(name: str) -> type[Method]:
    """The method of that name. Raises ConfigError, with the nearest name, if there is none."""
    if name not in METHODS:
        hint = did_you_mean(str(name), METHODS)
        raise ConfigError(f"objective.name must be one of {', '.join(METHODS)}; got {name!r}{hint}")
    return METHODS[name]


def build_method(options: MethodConfig) -> Method:
    """The method that a configuration describes."""
    return method_class(options.name)(options)


def latent_options(particles: Particles, vae: Autoencoder | None) -> dict:
    """What every pipeline is told about its latents."""
    mean, std = particles.channel_mean, particles.channel_std
    return dict(vae=vae, latents_mean=mean.tolist(), latents_std=std.tolist())


def draw_pairs(
    objective: Objective, particles: Particles, k: int, num_pairs: int, generator: torch.Generator, label: int | None
) -> list[tuple[Tensor, Tensor]]:
    """Batches of (x_0, x_t) of level k, of one class or of any if None, on the device of the objective."""
    device, pairs = objective.levels.device, []
    for size in map(len, torch.arange(num_pairs, device="cpu").split(32)):
        x_0 = particles.draw(size, generator, label)
        eps = torch.randn(x_0.shape, generator=generator, device="cpu")
        x_t = objective.process.sample(x_0, objective.levels[k].cpu().expand(size), eps)
        pairs.append((x_0.to(device), x_t.to(device)))
    return pairs
