"""MMD-GAN: a generator against the same features as critic."""

from dataclasses import dataclass

from torch import nn

from latent_dmmd.baselines import MMDGAN, GeneratorAndCritic, VelocityNet
from latent_dmmd.discrepancy import get_discrepancy
from latent_dmmd.methods.base import NetConfig, register
from latent_dmmd.methods.flow_matching import FlowMatchingMethod, velocity_net
from latent_dmmd.methods.witness import DiscrepancyConfig, PenaltyConfig, feature_net


@dataclass
class MMDGANConfig(PenaltyConfig, DiscrepancyConfig):
    """Keys of MMD-GAN."""

    name: str = "mmd-gan"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_penalty()


@register
class MMDGANMethod(FlowMatchingMethod):
    """`baselines.MMDGAN`, sampled in one step."""

    name, title, config_class, one_step = "mmd-gan", "MMD-GAN", MMDGANConfig, True
    is_whole_in_pipeline = False  # without the critic

    def network(self, net: NetConfig, shape: tuple[int, int, int], num_classes: int = 0) -> GeneratorAndCritic:
        return GeneratorAndCritic(velocity_net(net, shape), feature_net(net, shape))

    def objective(self, network: GeneratorAndCritic, averaged_net: nn.Module) -> MMDGAN:
        options = self.options
        return MMDGAN(
            network,
            gradient_weight=options.gradient_weight,
            gradient_center=options.gradient_center,
            discrepancy=get_discrepancy(**options.discrepancy_options()),
        )

    def generator(self, averaged_net: GeneratorAndCritic) -> VelocityNet:
        return averaged_net.generator
