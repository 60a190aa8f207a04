"""Flow matching, on the same U-Net, batches and loop."""

from dataclasses import dataclass

from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import nn

from latent_dmmd.baselines import FlowMatching, VelocityNet
from latent_dmmd.methods.base import Method, MethodConfig, NetConfig, latent_options, register
from latent_dmmd.objective import Objective, WeightingScheme
from latent_dmmd.pipeline import LatentSchedulerPipeline
from latent_dmmd.schedule import SamplingDefaults


def velocity_net(net: NetConfig, shape: tuple[int, int, int]) -> VelocityNet:
    """The U-Net whose maps are its output."""
    sizes = net.unet(shape)
    del sizes["num_classes"]
    return VelocityNet(**sizes)


@dataclass
class FlowMatchingConfig(MethodConfig):
    """Keys of flow matching.

    Args:
        weighting_scheme: Density of training times, as diffusers calls it: "logit_normal", or uniform if "none".
    """

    name: str = "flow-matching"
    weighting_scheme: WeightingScheme = "logit_normal"


@register
class FlowMatchingMethod(Method):
    """`baselines.FlowMatching`, sampled by Euler steps."""

    name, title, config_class = "flow-matching", "Flow matching", FlowMatchingConfig

    def network(self, net: NetConfig, shape: tuple[int, int, int], num_classes: int = 0) -> nn.Module:
        return velocity_net(net, shape)

    def objective(self, network: nn.Module, averaged_net: nn.Module) -> Objective:
        return FlowMatching(network, self.options.weighting_scheme)

    def pipeline(
        self, objective, averaged_net, particles, vae, sampling, seed, class_names=()
    ) -> LatentSchedulerPipeline:
        options = latent_options(particles, vae) | self.sampling_options(sampling) | {"one_step": self.one_step or None}
        return LatentSchedulerPipeline(self.generator(averaged_net), self.scheduler(), **options)

    def sampling_options(self, sampling: SamplingDefaults) -> dict:
        order = {} if self.one_step else {"solver_order": sampling.solver_order}
        return super().sampling_options(sampling) | order

    def scheduler(self) -> SchedulerMixin:
        """What moves particles by the network."""
        return FlowMatchEulerDiscreteScheduler()

    def generator(self, averaged_net: nn.Module) -> VelocityNet:
        """The part of the averaged network that generates."""
        return averaged_net
