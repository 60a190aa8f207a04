"""What the methods that train a witness share: keys, network, and the measurements that sampling needs."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from latent_dmmd.calibration import measure_all
from latent_dmmd.data.autoencoder import Autoencoder
from latent_dmmd.data.particles import Particles
from latent_dmmd.discrepancy import get_discrepancy
from latent_dmmd.embeddings import MeanEmbeddings
from latent_dmmd.features import FEATURE_NETS, BilinearFeatures
from latent_dmmd.forward import FORWARD_PROCESSES, get_forward_process
from latent_dmmd.methods.base import Method, MethodConfig, NetConfig, draw_pairs, latent_options
from latent_dmmd.objective import RunningEmbeddings, WeightingScheme, WitnessObjective
from latent_dmmd.pipeline import LatentDMMDPipeline
from latent_dmmd.schedule import SamplingDefaults
from latent_dmmd.utils.errors import ConfigError, check
from latent_dmmd.utils.randomness import keyed_generator

NUM_MEASURED_PAIRS, NUM_CALIBRATION_PARTICLES = 128, 64


@dataclass
class DiscrepancyConfig(MethodConfig):
    """Keys of methods with a discrepancy.

    Args:
        discrepancy: "mmd" or "kale".
        kernel: Base kernel on features: "linear" (the paper's), "gaussian" or "rational-quadratic".
        bandwidth: Of the Gaussian kernel, where a list is summed and "median" is the heuristic; or of the
            rational-quadratic one, a number.
        kernel_alpha: Mixture parameter α of the rational-quadratic kernel.
        kale_lambda: λ of KALE; large is MMD, small is KL.
    """

    discrepancy: Literal["mmd", "kale"] = "mmd"
    kernel: Literal["linear", "gaussian", "rational-quadratic"] = "linear"
    bandwidth: float | list[float] | Literal["median"] = "median"
    kernel_alpha: float = 1.0
    kale_lambda: float = 1.0

    def __post_init__(self) -> None:
        try:
            get_discrepancy(**self.discrepancy_options())
        except ValueError as error:
            raise ConfigError(f"objective: {error}") from error

    def discrepancy_options(self) -> dict:
        """The arguments of `get_discrepancy`."""
        options = {"name": self.discrepancy, "kernel": self.kernel}
        if self.kernel != "linear":
            options["bandwidth"] = self.bandwidth
        if self.kernel == "rational-quadratic":
            options["alpha"] = self.kernel_alpha
        return options | ({"lam": self.kale_lambda} if self.discrepancy == "kale" else {})


@dataclass
class WitnessConfig(DiscrepancyConfig):
    """Keys of methods that train a witness at every noise level.

    Args:
        forward_process: "linear", "vp-cosine", "vp-linear" or "blur".
        num_noise_levels: Size T of the grid of noise levels.
        num_points: Features stored of each noise level where means are not enough: other kernels, and KALE.
        label_dropout: With classes: share of a step's noise levels whose pairs are of any class, in [0, 1].
        weighting_scheme: Density of training levels, as diffusers calls it: uniform if "none", or "logit_normal".
    """

    forward_process: str = "linear"
    num_noise_levels: int = 25
    num_points: int = 128
    label_dropout: float = 0.2
    weighting_scheme: WeightingScheme = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.forward_process in FORWARD_PROCESSES,
            f"objective.forward_process must be one of {', '.join(FORWARD_PROCESSES)}; got {self.forward_process!r}",
        )
        check(self.num_points > 1, f"objective.num_points must be at least 2; got {self.num_points}")
        check(self.num_noise_levels > 0, f"objective.num_noise_levels must be positive; got {self.num_noise_levels}")
        check(0 <= self.label_dropout <= 1, f"objective.label_dropout must be in [0, 1]; got {self.label_dropout}")


@dataclass
class PenaltyConfig:
    """Keys of methods with a gradient penalty.

    Args:
        gradient_weight: Weight λ_∇ of the gradient penalty.
        gradient_center: Norm that the penalty asks of the witness gradient, 1 (paper) or 0.
    """

    gradient_weight: float = 1.0
    gradient_center: float = 1.0

    def check_penalty(self) -> None:
        """Raise ConfigError if a value is out of range."""
        check(self.gradient_center in (0, 1), f"objective.gradient_center must be 0 or 1; got {self.gradient_center}")
        check(self.gradient_weight >= 0, f"objective.gradient_weight must not be negative; got {self.gradient_weight}")


def feature_net(net: NetConfig, shape: tuple[int, int, int], num_classes: int = 0) -> BilinearFeatures:
    """φ on particles of shape (C, h, w)."""
    options = dict(num_features=net.num_features, squared_norm=net.squared_norm)
    return FEATURE_NETS[net.architecture](**net.unet(shape, num_classes), **options)


class WitnessMethod(Method):
    """Base class: features that are trained by their witness, and sampled by its gradient flow."""

    summary = "Noise-conditional features whose MMD gradient flow generates"
    has_classes: ClassVar[bool] = True
    samplers: ClassVar[dict[str, dict]] = {name: {"sampler": name} for name in ("exact", "approximate")}
    options: WitnessConfig

    def network(self, net: NetConfig, shape: tuple[int, int, int], num_classes: int = 0) -> BilinearFeatures:
        return feature_net(net, shape, num_classes)

    def objective_options(self) -> dict:
        """The arguments that every witness objective has besides φ."""
        return dict(
            process=get_forward_process(self.options.forward_process),
            num_noise_levels=self.options.num_noise_levels,
            discrepancy=get_discrepancy(**self.options.discrepancy_options()),
            label_dropout=self.options.label_dropout,
            weighting_scheme=self.options.weighting_scheme,
        )

    def check_sampling(self, sampling: SamplingDefaults) -> None:
        check(
            sampling.num_noise_levels <= self.options.num_noise_levels,
            f"sampling.num_noise_levels={sampling.num_noise_levels} exceeds "
            f"objective.num_noise_levels={self.options.num_noise_levels}",
        )

    def sampling_options(self, sampling: SamplingDefaults) -> dict:
        options = {name: getattr(sampling, name) for name in ("num_noise_levels", "steps_per_level", "sampler")}
        return options | {"solver_order": sampling.solver_order if self.options.forward_process == "linear" else 1}

    def pipeline(
        self,
        objective: WitnessObjective,
        averaged_net: nn.Module,
        particles: Particles,
        vae: Autoencoder | None,
        sampling: SamplingDefaults,
        seed: int,
        class_names: tuple[str, ...] = (),
    ) -> LatentDMMDPipeline:
        embeddings = self.embeddings(objective, averaged_net, particles, seed)
        own = dict(class_names=list(class_names) or None, sampling=self.sampling_options(sampling))
        options = latent_options(particles, vae) | own
        return LatentDMMDPipeline(averaged_net, embeddings, **options)

    @torch.no_grad()
    def embeddings(
        self, objective: WitnessObjective, feature_net: BilinearFeatures, particles: Particles, seed: int
    ) -> MeanEmbeddings:
        """The stored mean embeddings: the running ones where the objective keeps them, measured on the data otherwise;
        and the scale of their witness's gradient, measured on the data."""
        levels, means_only = objective.levels, objective.discrepancy.needs_means_only
        embeddings = MeanEmbeddings(
            len(levels),
            feature_net.config.num_features,
            num_points=0 if means_only else self.options.num_points,
            forward_process=self.options.forward_process,
            discrepancy=self.options.discrepancy_options(),
            num_classes=particles.num_classes(),
            target=getattr(objective, "target", "displacement"),
        ).to(levels.device)
        embeddings.levels.copy_(levels)
        source = getattr(objective, "source", None)
        running = isinstance(source, RunningEmbeddings) and bool(source.num_updates.all())
        if running:
            embeddings.clean.copy_(source.clean)
            embeddings.noisy.copy_(source.noisy)
        num_pairs = NUM_MEASURED_PAIRS if running or means_only else self.options.num_points
        config = feature_net.config
        shape = (NUM_CALIBRATION_PARTICLES, config.in_channels, config.sample_size, config.sample_size)
        z = torch.randn(shape, generator=keyed_generator(seed, 0, len(levels)), device="cpu").to(levels.device)
        measure_all(
            feature_net,
            embeddings,
            lambda k, label: draw_pairs(objective, particles, k, num_pairs, keyed_generator(seed, 0, k), label),
            z,
            measured=not running,
        )
        return embeddings
