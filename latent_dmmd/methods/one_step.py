"""A generator in one step, distilled from the flow of a trained pipeline."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import nn

from latent_dmmd.data.autoencoder import Autoencoder, same_weights
from latent_dmmd.distillation import OneStep, PairCache, begin_with_features, make_pairs
from latent_dmmd.methods.base import MethodConfig, NetConfig, register
from latent_dmmd.methods.flow_matching import FlowMatchingMethod, velocity_net
from latent_dmmd.pipeline import LatentDMMDPipeline, load_pipeline
from latent_dmmd.schedule import Sampler
from latent_dmmd.utils.errors import ConfigError, check
from latent_dmmd.utils.files import expand_home


@dataclass
class OneStepConfig(MethodConfig):
    """Keys of one-step distillation.

    Args:
        teacher: A saved DMMD pipeline, by folder or bundled name.
        teacher_steps: Function evaluations of its flow.
        teacher_sampler: "exact", "approximate" or "hybrid".
        num_pairs: Particles that it moves, which are learnt from.
    """

    name: str = "one-step"
    teacher: str | None = None
    teacher_steps: int = 10
    teacher_sampler: Sampler = "exact"
    num_pairs: int = 16384

    def __post_init__(self) -> None:
        expand_home(self, "teacher")
        check(self.teacher is not None, "objective.name one-step needs objective.teacher")
        for name in ("teacher_steps", "num_pairs"):
            check(getattr(self, name) > 0, f"objective.{name} must be positive; got {getattr(self, name)}")


@register
class OneStepMethod(FlowMatchingMethod):
    """`distillation.OneStep`, sampled in one step."""

    name, title, config_class, one_step = "one-step", "One-step generator", OneStepConfig, True

    @cached_property
    def teacher(self) -> LatentDMMDPipeline:
        """The pipeline that is distilled. Raises ConfigError if there is none of DMMD."""
        folder = self.options.teacher
        try:
            teacher = load_pipeline(folder)
        except (OSError, ValueError) as error:
            raise ConfigError(f"objective.teacher: {error}") from error
        if not isinstance(teacher, LatentDMMDPipeline):
            raise ConfigError(f"objective.teacher: {folder} holds a {type(teacher).__name__}, not a LatentDMMDPipeline")
        return teacher

    def network(self, net: NetConfig, shape: tuple[int, int, int], num_classes: int = 0) -> nn.Module:
        generator, theirs = velocity_net(net, shape), self.teacher.feature_net.config
        if (theirs.in_channels, theirs.sample_size, theirs.sample_size) != shape:
            raise ConfigError(f"objective.teacher: {self.options.teacher} has particles of another shape than {shape}")
        begin_with_features(generator, self.teacher.feature_net)
        return generator

    def check_autoencoder(self, vae: Autoencoder | None) -> None:
        if not same_weights(vae, self.teacher.vae):
            raise ConfigError(
                f"objective.teacher: {self.options.teacher} has another autoencoder than autoencoder.name_or_path"
            )

    def objective(self, network: nn.Module, averaged_net: nn.Module) -> OneStep:
        return OneStep(network)

    def own_particles(self, folder: Path, seed: int) -> PairCache:
        options = self.options
        sampling = dict(num_inference_steps=options.teacher_steps, sampler=options.teacher_sampler)
        return make_pairs(self.teacher, folder / "pairs", options.num_pairs, seed, **sampling)
