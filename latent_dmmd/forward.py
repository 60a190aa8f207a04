"""Forward processes x_t | x_0, from data at t = 0 to noise at t = 1.

DMMD needs draws of x_t and nothing else: no derivative in t, no density. A process is therefore one method,
`sample(x_0, t, eps)`, and one number per level, the root-mean-square displacement d(t), which calibrates step sizes.
Latents are standardised, so E x_0 = 0 and E x_0² = 1 per element. Every process ends in x_1 ~ N(0, I), where the flow
starts.
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
        """Draws of x_t given x_0.

        Args:
            x_0: Clean particles, with shape (B, C, H, W).
            t: Noise levels in [0, 1], with shape (B).
            eps: Standard normal noise, shaped like x_0.

        Returns:
            x_t, shaped like x_0.
        """
        raise NotImplementedError

    def displacement(self, t: Tensor) -> Tensor:
        """d(t) = (E ‖x_t − x_0‖² / D)^½ for standardised x_0; shaped like t."""
        raise NotImplementedError

    def step_coefficients(self, t: float, start: float, end: float) -> tuple[float, float]:
        """(a, b) such that z ↦ a z − b (x_t − x_0) moves a particle from level `start` to `end`, t ≥ start > end ≥ 0.

        The difference x_t − x_0 belongs to level t, whose witness is in use. In general the particle goes straight
        towards x_0, in proportion to the displacement: a = 1, b = (d(start) − d(end)) / d(t).
        """
        times = torch.tensor([t, start, end], dtype=torch.float64, device="cpu")
        d_t, d_start, d_end = self.displacement(times).tolist()
        return 1.0, (d_start - d_end) / d_t


class GaussianProcess(ForwardProcess):
    """x_t = α_t x_0 + σ_t ε with ε ~ N(0, I); subclasses give α_t and σ_t."""

    def alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def sample(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        return expand_as(self.alpha(t), x_0) * x_0 + expand_as(self.sigma(t), x_0) * eps

    def displacement(self, t: Tensor) -> Tensor:
        """d(t) = ((1 − α_t)² + σ_t²)^½ for standardised x_0; shaped like t."""
        return ((1 - self.alpha(t)).square() + self.sigma(t).square()).sqrt()

    def step_coefficients(self, t: float, start: float, end: float) -> tuple[float, float]:
        """(a, b) such that z ↦ a z − b (x_t − x_0) keeps to the process: from α_s x_0 + σ_s ε to α_e x_0 + σ_e ε.

        With s = start and e = end, z = α_s x_0 + σ_s ε and x_t − x_0 = (α_t − 1) x_0 + σ_t ε are two equations for x_0
        and ε. Their solution gives, with δ = α_s σ_t + σ_s (1 − α_t),

            a = (α_e σ_t + σ_e (1 − α_t)) / δ,      b = (α_e σ_s − σ_e α_s) / δ

        For the linear interpolant a = 1 and b = (s − e) / t, a plain gradient step. A variance-preserving process
        changes scale as well, and a particle that only went straight towards x_0 would be too small on the way.
        """
        times = torch.tensor([t, start, end], dtype=torch.float64, device="cpu")
        (alpha, alpha_s, alpha_e), (sigma, sigma_s, sigma_e) = self.alpha(times).tolist(), self.sigma(times).tolist()
        delta = alpha_s * sigma + sigma_s * (1 - alpha)
        return (alpha_e * sigma + sigma_e * (1 - alpha)) / delta, (alpha_e * sigma_s - sigma_e * alpha_s) / delta


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


class Blur(ForwardProcess):
    """x_t = (1 − t) B_t x_0 + t ε: a blur that takes fine structure first, as in cold diffusion, under noise.

    B_t is the heat equation with reflecting borders, run until a standard deviation of t · `max_scale` pixels: it
    multiplies the cosine transform at frequency ω ∈ [0, π)² by exp(−½ ‖ω‖² t² max_scale²) (Bansal et al., 2022;
    Rissanen et al., 2023). Not of the form α_t x_0 + σ_t ε: every frequency has its own signal-to-noise ratio.
    """

    max_scale = 1.0

    def attenuation(self, t: Tensor, height: int, width: int) -> Tensor:
        """Factors of the cosine transform, with shape (B, H, W), for t of shape (B)."""
        y, x = (math.pi * torch.arange(n, dtype=t.dtype, device=t.device) / n for n in (height, width))
        square = y.square()[:, None] + x.square()[None, :]
        return torch.exp(-0.5 * square * (t * self.max_scale).square()[:, None, None])

    def sample(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        rows, columns = (cosine_basis(n).to(x_0) for n in x_0.shape[-2:])
        spectrum = rows @ x_0 @ columns.T * self.attenuation(t, *x_0.shape[-2:])[:, None]
        t = expand_as(t, x_0)
        return (1 - t) * (rows.T @ spectrum @ columns) + t * eps

    def displacement(self, t: Tensor) -> Tensor:
        """d(t) for standardised x_0 with a flat spectrum, an upper estimate for smooth ones; shaped like t."""
        kept = (1 - t)[:, None, None] * self.attenuation(t, 64, 64)
        return ((1 - kept).square().mean((1, 2)) + t.square()).sqrt()


def cosine_basis(n: int) -> Tensor:
    """The orthonormal discrete cosine transform (type II) as a matrix (n, n), one frequency a row."""
    frequency = torch.arange(n, dtype=torch.float64, device="cpu")
    basis = torch.cos(math.pi / n * frequency[:, None] * (frequency + 0.5)) * (2 / n) ** 0.5
    basis[0] *= 0.5**0.5
    return basis


FORWARD_PROCESSES = {"linear": LinearInterpolant, "vp-cosine": VPCosine, "vp-linear": VPLinear, "blur": Blur}


def get_forward_process(name: str) -> ForwardProcess:
    """The forward process of that name. Raises ValueError if there is none."""
    if name not in FORWARD_PROCESSES:
        raise ValueError(f"no forward process {name!r}; choose one of {', '.join(FORWARD_PROCESSES)}")
    return FORWARD_PROCESSES[name]()


def noise_levels(num_levels: int, device: torch.device | str = "cpu") -> Tensor:
    """The uniform grid t_1 < … < t_T = 1, with t_k = k / T and shape (T)."""
    return torch.arange(1, num_levels + 1, device=device) / num_levels
