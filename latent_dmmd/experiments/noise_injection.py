"""Noise injection (Arbel et al., 2019, sec. 4.2): gradients taken at noised particles, to reproduce it.

    Z ← a Z − η ∇f_t(Z + β u),        u ~ N(0, I)

Pipelines do not offer it. These flows take the place of `ExactFlow` and `ApproximateFlow` in an experiment.
"""

import torch
from torch import Tensor

from latent_dmmd.embeddings import LevelEmbeddings
from latent_dmmd.flow import ApproximateFlow, ExactFlow, Flow


class NoiseInjection(Flow):
    """Mixin before a flow: the gradient is taken at particles plus noise, of the witness of the particles themselves.

    Args:
        args, options: As of the flow.
        noise_injection: β ≥ 0.
        generator: Source of the noise u, on the device of the particles.

    Raises:
        ValueError: If `noise_injection` is negative.
    """

    def __init__(self, *args, noise_injection: float, generator: torch.Generator | None = None, **options) -> None:
        super().__init__(*args, **options)
        if noise_injection < 0:
            raise ValueError(f"noise_injection must not be negative; got {noise_injection}")
        self.noise_injection, self.generator = noise_injection, generator
        self._particles: Tensor | None = None

    def gradient(self, z: Tensor, k: int) -> Tensor:
        noise = torch.randn(z.shape, generator=self.generator, device=z.device, dtype=z.dtype)
        self._particles = z
        return super().gradient(z + self.noise_injection * noise, k)


class InjectedExactFlow(NoiseInjection, ExactFlow):
    """`ExactFlow` with noise injection."""

    def shared_witness(self, z: Tensor, level: LevelEmbeddings):
        # of the particles, not of where the gradient is taken
        size = self.chunk_size or len(z)
        with torch.no_grad():
            phi = torch.cat([self.features(chunk, level.t) for chunk in self._particles.split(size)])
        return self.witness(phi, level)


class InjectedApproximateFlow(NoiseInjection, ApproximateFlow):
    """`ApproximateFlow` with noise injection."""
