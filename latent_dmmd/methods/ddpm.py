"""DDPM, on the same U-Net, batches and loop, sampled by DDIM."""

from dataclasses import dataclass

from diffusers import DDIMScheduler, DDPMScheduler
from torch import nn

from latent_dmmd.baselines import DDPM
from latent_dmmd.methods.base import MethodConfig, latent_options, register
from latent_dmmd.methods.flow_matching import FlowMatchingMethod
from latent_dmmd.pipeline import LatentSchedulerPipeline


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

    def pipeline(
        self, objective, averaged_net, particles, vae, sampling, seed, class_names=()
    ) -> LatentSchedulerPipeline:
        # particles leave [-1, 1]; "trailing" spacing starts at the last time, where particles are noise
        changes = dict(clip_sample=False, timestep_spacing="trailing")
        scheduler = DDIMScheduler.from_config(DDPMScheduler().config, **changes)
        options = latent_options(particles, vae) | self.sampling_options(sampling)
        return LatentSchedulerPipeline(averaged_net, scheduler, **options)
