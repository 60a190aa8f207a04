"""Forward processes x_t | x_0, from data at t = 0 to noise at t = 1.

DMMD needs draws of x_t and nothing else: no derivative in t, no density. A process is therefore one method,
`sample(x_0, t, eps)`, and one number a level, the root-mean-square displacement d(t), which calibrates step sizes.
Latents are standardised, so E x_0 = 0 and E x_0² = 1 per element.
"""

import math

import torch
from torch import Tensor


def expand_as(t: Tensor, x: Tensor) -> Tensor:
    """t of shape (B) as (B, 1, …, 1), to multiply x of shape (B, …)."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


class ForwardProcess:
    """Base class: `sample` draws x_t, `displacement` is the root-mean-square distance it moves an element."""

    def sample(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        raise NotImplementedError

    def displacement(self, t: Tensor) -> Tensor:
        raise NotImplementedError


class GaussianProcess(ForwardProcess):
    """x_t = α_t x_0 + σ_t ε with ε ~ N(0, I); subclasses give α_t and σ_t."""

    def alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def sample(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Draws of x_t given x_0.

        Args:
            x_0: Clean particles, with shape (B, C, H, W).
            t: Noise levels in [0, 1], with shape (B).
            eps: Standard normal noise, shaped like x_0.

        Returns:
            x_t, shaped like x_0.
        """
        return expand_as(self.alpha(t), x_0) * x_0 + expand_as(self.sigma(t), x_0) * eps

    def displacement(self, t: Tensor) -> Tensor:
        """d(t) = (E ‖x_t − x_0‖² / D)^½ = ((1 − α_t)² + σ_t²)^½ for standardised x_0; shaped like t."""
        return ((1 - self.alpha(t)).square() + self.sigma(t).square()).sqrt()


class LinearInterpolant(GaussianProcess):
    """x_t = (1 − t) x_0 + t ε, as in flow matching (Lipman et al., 2023)."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t


class VPCosine(GaussianProcess):
    """α_t = cos(π t / 2), σ_t = sin(π t / 2): variance preserving (Nichol & Dhariwal, 2021, without offset)."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(0.5 * math.pi * t)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(0.5 * math.pi * t)


class VPLinear(GaussianProcess):
    """α_t = exp(−½ ∫₀ᵗ β), β linear from 0.1 to 20: the paper's, DDPM's (Ho et al., 2020) in continuous time."""

    beta_min, beta_max = 0.1, 20.0

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-0.5 * (self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t.square()))

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - self.alpha(t).square()).clamp(min=0).sqrt()


FORWARD_PROCESSES = {"linear": LinearInterpolant, "vp-cosine": VPCosine, "vp-linear": VPLinear}


def get_forward_process(name: str) -> ForwardProcess:
    """The forward process of that name. Raises ValueError if there is none."""
    if name not in FORWARD_PROCESSES:
        raise ValueError(f"no forward process {name!r}; choose one of {', '.join(FORWARD_PROCESSES)}")
    return FORWARD_PROCESSES[name]()


def noise_levels(num_levels: int) -> Tensor:
    """The uniform grid t_1 < … < t_T = 1, with t_k = k / T and shape (T)."""
    return torch.arange(1, num_levels + 1) / num_levels
