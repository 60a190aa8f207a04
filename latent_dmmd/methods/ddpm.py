"""DDPM, on the same U-Net, batches and loop, sampled by DDIM."""

from dataclasses import dataclass
from typing import Literal

from diffusers import DDIMScheduler, DDPMScheduler
from torch import nn

from latent_dmmd.baselines import DDPM
from latent_dmmd.methods.base import Method, MethodConfig, register
from latent_dmmd.methods.flow_matching import FlowMatchingMethod
from latent_dmmd.schedule import SamplingDefaults


@dataclass
class DDPMConfig(MethodConfig):
    """Keys of DDPM.

    Args:
        prediction_type: What the network predicts, as diffusers calls it: "epsilon" or "v_prediction". By the noise, an
            error at the first steps of sampling is one of brightness, up to 157 times as large.
    """

    name: str = "ddpm"
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"


@register
class DDPMMethod(FlowMatchingMethod):
    """`baselines.DDPM`, sampled by DDIM."""

    name, title, config_class = "ddpm", "DDPM", DDPMConfig

    def objective(self, network: nn.Module, averaged_net: nn.Module) -> DDPM:
        return DDPM(network, self.training_scheduler())

    def sampling_options(self, sampling: SamplingDefaults) -> dict:
        return Method.sampling_options(self, sampling)  # of first order

    def training_scheduler(self) -> DDPMScheduler:
        """The forward process, and what is predicted."""
        return DDPMScheduler(prediction_type=self.options.prediction_type)

    def scheduler(self) -> DDIMScheduler:
        # particles leave [-1, 1]; "trailing" spacing starts at the last time, where particles are noise
        how = {"clip_sample": False, "timestep_spacing": "trailing"}
        return DDIMScheduler.from_config(self.training_scheduler().config, **how)
