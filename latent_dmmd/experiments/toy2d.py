"""Two dimensions, where everything can be seen: fixed kernels, the best bandwidth, learned noise-adaptive features.

Between P = N(μ, σ² I) and Q = N(0, σ² I) in d dimensions, with the normalised Gaussian kernel
k(x, y) = α^(−d) exp(−‖x − y‖² / 2α²) (Galashov et al., 2025, sec. 3),

    MMD² = 2 c^(−d/2) (1 − exp(−‖μ‖² / 2c)),   c = α² + 2σ²,      and   ‖∂MMD² / ∂μ‖ is largest at
    α*² = max(0, ‖μ‖² / (d + 2) − 2σ²)

so a kernel that is best far away is too wide close by, and one that is best close by has no gradient far away. A flow
with a fixed kernel stalls or blurs; one whose kernel shrinks with the gap arrives. DMMD learns that shrinking.
"""

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from latent_dmmd.baselines import FlowMatching, euler, timed_pairs
from latent_dmmd.calibration import measure_embeddings, measure_gradients
from latent_dmmd.discrepancy import mmd2, witness
from latent_dmmd.embeddings import MeanEmbeddings
from latent_dmmd.flow import get_flow
from latent_dmmd.forward import LinearInterpolant
from latent_dmmd.kernels import GaussianKernel
from latent_dmmd.objective import DMMD, Batch, Objective, WitnessMatching
from latent_dmmd.schedule import Sampler, flow_schedule

NUM_NOISE_LEVELS = 25
Draw = Callable[[int, torch.Generator], Tensor]


def gaussian_mmd2(gap: Tensor | float, sigma: float, alpha: Tensor | float, dim: int = 2) -> Tensor:
    """MMD² between N(μ, σ² I) and N(0, σ² I) of the normalised Gaussian kernel of bandwidth α, for ‖μ‖ = gap."""
    gap, alpha = torch.as_tensor(gap, device="cpu"), torch.as_tensor(alpha, device="cpu")
    c = alpha**2 + 2 * sigma**2
    return 2 * c ** (-dim / 2) * -torch.expm1(-(gap**2) / (2 * c))


def optimal_bandwidth(gap: float, sigma: float, dim: int = 2) -> float:
    """α*, the bandwidth of the steepest MMD²; 0, a degenerate kernel, once the gap is below σ (2 (d + 2))^½."""
    return max(0.0, gap**2 / (dim + 2) - 2 * sigma**2) ** 0.5


def measured_bandwidth(gap: float, sigma: float, alphas: Tensor, num_samples: int, seed: int, dim: int = 2) -> float:
    """The bandwidth among `alphas` of the steepest MMD² (U-statistic) of samples, by autograd."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (sigma * torch.randn(num_samples, dim, generator=generator, device="cpu") for _ in range(2))
    slopes = []
    for alpha in alphas.tolist():
        mu = torch.zeros(dim, device="cpu")
        mu[0] = gap
        mu.requires_grad_()
        (slope,) = torch.autograd.grad(alpha**-dim * mmd2(x + mu, y, GaussianKernel(alpha)), mu)
        slopes.append(slope.norm())
    return alphas[int(torch.stack(slopes).argmax())].item()


@dataclass(frozen=True)
class Target:
    """A mixture of Gaussians N(c, s² I) of equal weight: its centres (M, 2) and s."""

    centres: Tensor
    std: float

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Samples, with shape (n, 2)."""
        which = torch.randint(len(self.centres), (n,), generator=generator, device="cpu")
        return self.centres[which] + self.std * torch.randn(n, 2, generator=generator, device="cpu")

    def modes_hit(self, z: Tensor) -> tuple[float, int]:
        """The share of particles within 3 s of a centre, and the number of centres with one in 3 M of them or more."""
        distance, nearest = torch.cdist(z, self.centres).min(1)
        near = distance < 3 * self.std
        counts = torch.bincount(nearest[near], minlength=len(self.centres))
        return near.float().mean().item(), int((counts >= len(z) / (3 * len(self.centres))).sum())


def ring(num_modes: int = 8, radius: float = 2.0, centre: float = 5.0) -> Tensor:
    angle = 2 * torch.pi * torch.arange(num_modes, device="cpu") / num_modes
    return torch.stack([centre + radius * angle.cos(), radius * angle.sin()], dim=1)


TARGETS = {
    "Gaussian": Target(torch.tensor([[5.0, 0.0]], device="cpu"), 0.2),
    "eight modes": Target(ring(), 0.15),
}


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E‖x − y‖ − E‖x − x'‖ − E‖y − y'‖ without the zeros of a point with itself; about 0 at equality."""
    n, m = len(x), len(y)
    within = torch.cdist(x, x).sum() / (n * (n - 1)) + torch.cdist(y, y).sum() / (m * (m - 1))
    return (2 * torch.cdist(x, y).mean() - within).item()


def kernel_flow(
    target: Target,
    bandwidth: Callable[[Tensor, Tensor], float],
    relative_step: float,
    num_steps: int,
    num_particles: int,
    seed: int,
    record: Callable[[Tensor], None] = lambda z: None,
) -> Tensor:
    """MMD flow with a Gaussian kernel on the particles themselves: Z ← Z − c α² ∇f(Z), with fresh target samples.

    Args:
        target: Where to.
        bandwidth: α from particles and target samples, each (N, 2).
        relative_step: c; the gradient scales as 1 / α².
        num_steps: Steps.
        num_particles: N, of particles and of target samples per step.
        seed: Seed of the particles, N(0, I), and of the samples.
        record: Sees the particles before each step and at the end.
    """
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(num_particles, 2, generator=generator, device="cpu")
    for _ in range(num_steps):
        record(z)
        y = target.draw(num_particles, generator)
        alpha = bandwidth(z, y)
        query = z.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(witness(query, z, y, GaussianKernel(alpha)).sum(), query)
        z = z - relative_step * alpha**2 * gradient
    record(z)
    return z


def adaptive_bandwidth(factor: float = 4.0, floor: float = 0.2) -> Callable[[Tensor, Tensor], float]:
    """α = factor · α*(gap, σ = 0), at least `floor`, where gap is the transport distance between particles and target.

    For clouds of points, σ = 0, and the gap is their 2-Wasserstein distance, sliced along 16 directions, instead of the
    distance of their means. α* is the best bandwidth to move a mean; a cloud, whose points also repel each other, wants
    a wider kernel: the factor was chosen among 1, 2 and 4 with the seed that chooses the steps.
    """
    angle = torch.arange(16, device="cpu") * torch.pi / 16
    directions = torch.stack([angle.cos(), angle.sin()])

    def bandwidth(z: Tensor, y: Tensor) -> float:
        difference = (z @ directions).sort(0).values - (y @ directions).sort(0).values
        gap = (2 * difference.square().mean()).sqrt().item()  # E ⟨v, θ⟩² = ‖v‖² / d
        return max(floor, factor * optimal_bandwidth(gap, 0.0))

    return bandwidth


def mean_flow(
    gap: float, sigma: float, bandwidth: Callable[[float], float], step_size: float, num_steps: int
) -> list[float]:
    """‖μ‖ along μ ← μ − η ∂MMD²/∂μ in closed form, where N(μ, σ² I) keeps its shape; num_steps + 1 values."""
    gaps = [gap]
    for _ in range(num_steps):
        g = torch.tensor(gaps[-1], dtype=torch.float64, device="cpu", requires_grad=True)
        (slope,) = torch.autograd.grad(gaussian_mmd2(g, sigma, bandwidth(gaps[-1])), g)
        gaps.append(max(0.0, gaps[-1] - step_size * slope.item()))
    return gaps


class PointNet(nn.Module):
    """A smooth multi-layer perceptron on points (B, 2, 1, 1) and noise levels: φ, or the velocity of flow matching."""

    def __init__(self, num_outputs: int, width: int = 128, velocity: bool = False) -> None:
        super().__init__()
        self.config = SimpleNamespace(in_channels=2, sample_size=1, num_features=num_outputs)
        self.velocity = velocity
        self.register_buffer("frequencies", torch.arange(1, 5) * torch.pi / 2)
        layers = []
        for inputs in (2 + 9, width, width):
            layers += [nn.Linear(inputs, width), nn.Tanh()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, num_outputs))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = t.expand(len(x))[:, None]
        angles = t * self.frequencies
        out = self.layers(torch.cat([0.5 * x.flatten(1), t, angles.sin(), angles.cos()], dim=1))
        return out[:, :, None, None] if self.velocity else out


def train_toy(
    name: str, target: Target, num_steps: int, seed: int = 0, levels: int = 8, pairs: int = 32
) -> tuple[Objective, nn.Module, float]:
    """Train on a target: "flow matching", the paper's "DMMD", "witness matching" level by level, or on the "whole way".

    Returns:
        The objective, the averaged network and the seconds taken.
    """
    torch.manual_seed(seed)
    net = PointNet(2, velocity=True) if name == "flow matching" else PointNet(32)
    averaged, process = deepcopy(net).requires_grad_(False), LinearInterpolant()
    objective = {
        "flow matching": lambda: FlowMatching(net),
        "witness matching": lambda: WitnessMatching(net, process, NUM_NOISE_LEVELS, averaged, segment="level"),
        "whole way": lambda: WitnessMatching(net, process, NUM_NOISE_LEVELS, averaged, segment="whole"),
        "DMMD": lambda: DMMD(net, process, NUM_NOISE_LEVELS),
    }[name]()
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps, eta_min=2e-4)
    ema = EMAModel(net.parameters(), decay=0.99, use_ema_warmup=True, power=0.75)
    generator, start = torch.Generator().manual_seed(seed), time.perf_counter()
    for _ in range(num_steps):
        x_0 = target.draw(levels * pairs, generator).reshape(levels, pairs, 2, 1, 1)
        strata = torch.arange(levels, device="cpu") + torch.rand(levels, generator=generator, device="cpu")
        level = (strata * NUM_NOISE_LEVELS / levels).long()
        eps = torch.randn(x_0.shape, generator=generator, device="cpu")
        batch = Batch(x_0, level, eps, torch.rand(levels, pairs, generator=generator, device="cpu"))
        ema.copy_to(averaged.parameters())
        objective(timed_pairs(batch) if name == "flow matching" else batch).total.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        ema.step(net.parameters())
    ema.copy_to(averaged.parameters())
    return objective, averaged, time.perf_counter() - start


def toy_embeddings(objective: Objective, net: nn.Module, target: Target, num_pairs: int = 1024) -> MeanEmbeddings:
    """The stored mean embeddings and gradient scales, measured on the target."""
    stored, generator = MeanEmbeddings(NUM_NOISE_LEVELS, net.config.num_features), torch.Generator().manual_seed(1)
    stored.levels.copy_(objective.levels)
    for k, t in enumerate(objective.levels):
        x_0 = target.draw(num_pairs, generator)[:, :, None, None]
        eps = torch.randn(x_0.shape, generator=generator, device="cpu")
        x_t = objective.process.sample(x_0, t.expand(num_pairs), eps)
        stored.clean[0, k], stored.noisy[0, k] = measure_embeddings(net, [(x_0, x_t)], t)
        stored.gradient_scale[0, k], _ = measure_gradients(net, [(x_0, x_t)], t, stored.at_level(k).stored)
    return stored


def learned_flow(
    net: nn.Module,
    stored: MeanEmbeddings,
    sampler: Sampler,
    nfe: int,
    num_particles: int,
    seed: int,
    record: Callable[[Tensor], None] = lambda z: None,
) -> Tensor:
    """The noise-adaptive flow from N(0, I) with `nfe` steps, in multiples of 25."""
    z = torch.randn(num_particles, 2, 1, 1, generator=torch.Generator().manual_seed(seed), device="cpu")
    steps, flow = flow_schedule(stored, NUM_NOISE_LEVELS, nfe // NUM_NOISE_LEVELS), get_flow(sampler, net, stored)
    record(z.flatten(1))
    return flow.run(z, steps, lambda i, step, z: (record(z.flatten(1)), z)[1]).flatten(1)


def velocity_flow(
    net: nn.Module, nfe: int, num_particles: int, seed: int, record: Callable[[Tensor], None] = lambda z: None
) -> Tensor:
    """Euler steps of flow matching from N(0, I)."""
    z = torch.randn(num_particles, 2, 1, 1, generator=torch.Generator().manual_seed(seed), device="cpu")
    record(z.flatten(1))
    return euler(net, z, nfe, lambda z: record(z.flatten(1))).flatten(1)
