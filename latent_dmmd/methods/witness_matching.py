"""Witness matching, the default: the witness gradient regressed on the way to the data."""

from dataclasses import dataclass

from torch import nn

from latent_dmmd.features import BilinearFeatures
from latent_dmmd.methods.base import register
from latent_dmmd.methods.witness import WitnessConfig, WitnessMethod
from latent_dmmd.objective import MeanEmbeddingSource, Segment, Target, WeightingScheme, WitnessMatching
from latent_dmmd.utils.errors import check


@dataclass
class WitnessMatchingConfig(WitnessConfig):
    """Keys of witness matching.

    Args:
        mean_embeddings: Source of the mean embeddings in training: "running", "ema" or "batch".
        segment: Train the witness of a level from there to the next "level", or on the "whole" way to the data.
        target: Regress the gradient on the way that is left, from below the level to above it, "restoring", or on the
            "displacement" of the level, x_t − x_0.
        momentum: Weight of the past in running means.
        refresh_every: Steps between refreshes of the running means.
        weighting_scheme: As of `WitnessConfig`; here "logit_normal".
    """

    name: str = "witness-matching"
    mean_embeddings: MeanEmbeddingSource = "running"
    segment: Segment = "level"
    target: Target = "restoring"
    momentum: float = 0.97
    refresh_every: int = 4
    weighting_scheme: WeightingScheme = "logit_normal"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.momentum < 1, f"objective.momentum must be in [0, 1); got {self.momentum}")
        check(self.refresh_every > 0, f"objective.refresh_every must be positive; got {self.refresh_every}")


@register
class WitnessMatchingMethod(WitnessMethod):
    """`objective.WitnessMatching`, sampled by the flow of DMMD."""

    name, title, config_class = "witness-matching", "Deep MMD gradient flow", WitnessMatchingConfig

    def objective(self, network: BilinearFeatures, averaged_net: nn.Module) -> WitnessMatching:
        options = self.options
        return WitnessMatching(
            network,
            **self.objective_options(),
            averaged_net=averaged_net,
            mean_embeddings=options.mean_embeddings,
            momentum=options.momentum,
            refresh_every=options.refresh_every,
            num_points=options.num_points,
            segment=options.segment,
            target=options.target,
            num_classes=network.config.num_classes,
        )
