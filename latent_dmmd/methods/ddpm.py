"""DDPM, on the same U-Net, batches and loop, sampled by DDIM."""

from dataclasses import dataclass

from diffusers import DDIMScheduler, DDPMScheduler
from torch import nn

from latent_dmmd.baselines import DDPM
from latent_dmmd.methods.base import Method, MethodConfig, register
from latent_dmmd.methods.flow_matching import FlowMatchingMethod
from latent_dmmd.schedule import SamplingDefaults


@dataclass
class DDPMConfig(MethodConfig):
    """DDPM has no keys of its own."""

    name: str = "ddpm"


@register
class DDPMMethod(FlowMatchingMethod):
    """`baselines.DDPM`, sampled by DDIM."""

    name, title, config_class = "ddpm", "DDPM", DDPMConfig

    def objective(self, network: nn.Module, averaged_net: nn.Module) -> DDPM:
        return DDPM(network)

    def sampling_options(self, sampling: SamplingDefaults) -> dict:
        return Method.sampling_options(self, sampling)  # of first order

    def scheduler(self) -> DDIMScheduler:
        # particles leave [-1, 1]; "trailing" spacing starts at the last time, where particles are noise
        return DDIMScheduler.from_config(DDPMScheduler().config, clip_sample=False, timestep_spacing="trailing")
