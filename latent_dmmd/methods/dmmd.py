"""The paper's objective: the discrepancy itself, under a gradient penalty; with KALE, D-KALE-Flow."""

from dataclasses import dataclass

from torch import nn

from latent_dmmd.features import BilinearFeatures
from latent_dmmd.methods.base import register
from latent_dmmd.methods.witness import PenaltyConfig, WitnessConfig, WitnessMethod
from latent_dmmd.objective import DMMD
from latent_dmmd.utils.errors import check


@dataclass
class DMMDConfig(PenaltyConfig, WitnessConfig):
    """Keys of the paper's objective.

    Args:
        feature_weight: Weight λ_ℓ2 of the features' mean square.
    """

    name: str = "dmmd"
    feature_weight: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_penalty()
        check(self.feature_weight >= 0, f"objective.feature_weight must not be negative; got {self.feature_weight}")


@register
class DMMDMethod(WitnessMethod):
    """`objective.DMMD`, sampled by the flow of DMMD."""

    name, title, config_class = "dmmd", "Deep MMD gradient flow", DMMDConfig

    def objective(self, network: BilinearFeatures, averaged_net: nn.Module) -> DMMD:
        options = self.options
        return DMMD(
            network,
            **self.objective_options(),
            gradient_weight=options.gradient_weight,
            gradient_center=options.gradient_center,
            feature_weight=options.feature_weight,
        )
