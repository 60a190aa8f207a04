"""The noise-adaptive gradient flow: particles down the witness, from noise to data.

    Z ~ N(0, I);   for t in t_K > … > t_1, N_s times:   Z ← Z − η_t ∇f_t(Z)             (Galashov et al., 2025, Alg. 2)

One step is one forward and one backward of φ for every particle; the number of function evaluations (NFE) is K · N_s.

**Witness.** Exact: Δ_t = mean φ(Z, t) − E φ(x_0, t), so particles interact. Approximate: Δ_t is the stored difference
E φ(x_t, t) − E φ(x_0, t); particles are independent and no data are needed. Hybrid: approximate at high noise, exact
for the last levels.

**Step size.** Training says how far a gradient reaches: s_t ∇f_t(x_t) ≈ x_t − x_0 for the stored Δ_t. The forward
process is d(t) away from the data, so going from level t to the next one, t', takes the fraction 1 − d(t') / d(t) of
that way, in N_s equal parts:

    η_t = s_t (1 − d(t') / d(t)) / N_s,       d(t') = 0 after the last level.

The stored witness keeps its length while particles move inside a level; the exact one shrinks with Δ_t, and would fall
behind. It is therefore rescaled to the stored norm, f = ⟨φ, Δ_t⟩ · ‖Δ_t stored‖ / ‖Δ_t‖, which makes it the witness of
MMD instead of MMD² up to a constant, and both samplers obey the same η_t.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from latent_dmmd.discrepancy import linear_witness
from latent_dmmd.features import MeanEmbeddings

Sampler = Literal["exact", "approximate", "hybrid"]


@dataclass(frozen=True)
class FlowStep:
    """One gradient step: `level` indexes the stored levels, `step_size` is η, `exact` picks the witness."""

    level: int
    step_size: float
    exact: bool


def flow_schedule(
    embeddings: MeanEmbeddings,
    sampler: Sampler = "approximate",
    num_noise_levels: int = 25,
    steps_per_level: int = 4,
    step_size: float | None = None,
    hybrid_level: float = 0.3,
) -> list[FlowStep]:
    """All steps of a flow, from high noise to low.

    Args:
        embeddings: The stored mean embeddings.
        sampler: Which witness.
        num_noise_levels: K, at most the number T of stored levels, which are thinned evenly.
        steps_per_level: N_s.
        step_size: A constant η for every level, as in the paper; calibrated if None.
        hybrid_level: The hybrid sampler is exact for levels up to this one, in [0, 1].

    Raises:
        ValueError: If an argument is out of range; the message names it.
    """
    available = len(embeddings.levels)
    if sampler not in ("exact", "approximate", "hybrid"):
        raise ValueError(f"sampler must be 'exact', 'approximate' or 'hybrid'; got {sampler!r}")
    if not 1 <= num_noise_levels <= available:
        raise ValueError(f"num_noise_levels must be in [1, {available}], the stored levels; got {num_noise_levels}")
    if steps_per_level < 1:
        raise ValueError(f"steps_per_level must be at least 1; got {steps_per_level}")
    if step_size is not None and step_size <= 0:
        raise ValueError(f"step_size must be positive; got {step_size}")
    levels = [-(-k * available // num_noise_levels) - 1 for k in range(num_noise_levels, 0, -1)]
    distances = embeddings.displacement.double().tolist()
    steps = []
    for level, following in zip(levels, levels[1:] + [None]):
        remaining = 0.0 if following is None else distances[following] / distances[level]
        calibrated = embeddings.gradient_scale[level].item() * (1 - remaining) / steps_per_level
        exact = sampler == "exact" or (sampler == "hybrid" and embeddings.levels[level].item() <= hybrid_level)
        steps += [FlowStep(level, step_size or calibrated, exact)] * steps_per_level
    return steps


def witness_gradient(
    feature_net: nn.Module,
    z: Tensor,
    embeddings: MeanEmbeddings,
    level: int,
    exact: bool,
    rescale: bool = True,
    chunk_size: int | None = None,
) -> Tensor:
    """∇f_t at the particles.

    Args:
        feature_net: φ.
        z: Particles, with shape (N, C, H, W).
        embeddings: The stored mean embeddings.
        level: Index of the noise level.
        exact: Whether Δ_t is that of the particles or the stored one.
        rescale: Whether the exact Δ_t is brought to the stored norm.
        chunk_size: Particles that pass through φ at once; all if None. The exact witness then takes a second forward.

    Returns:
        The gradients, shaped like z.
    """
    t = embeddings.levels[level]
    chunks = z.split(chunk_size or len(z))
    delta = embeddings.delta[level]
    if exact and len(chunks) > 1:
        with torch.no_grad():
            total = sum(feature_net(chunk, t).sum(0) for chunk in chunks)
        delta = rescaled(total / len(z) - embeddings.clean[level], delta, rescale)
    gradients = []
    for chunk in chunks:
        with torch.enable_grad():
            chunk = chunk.detach().requires_grad_()
            phi = feature_net(chunk, t)
            if exact and len(chunks) == 1:
                delta = rescaled(phi.detach().mean(0) - embeddings.clean[level], delta, rescale)
            (gradient,) = torch.autograd.grad(linear_witness(phi, delta).sum(), chunk)
        gradients.append(gradient)
    return torch.cat(gradients)


def rescaled(delta: Tensor, stored: Tensor, rescale: bool) -> Tensor:
    """The particles' Δ_t at the norm of the stored one."""
    return delta * (stored.norm() / delta.norm().clamp(min=1e-12)) if rescale else delta


def gradient_flow(
    feature_net: nn.Module,
    z: Tensor,
    embeddings: MeanEmbeddings,
    steps: list[FlowStep],
    rescale: bool = True,
    chunk_size: int | None = None,
    callback: Callable[[int, FlowStep, Tensor], Tensor] | None = None,
) -> Tensor:
    """Move particles through all steps of a schedule.

    Args:
        feature_net: φ.
        z: Initial particles, with shape (N, C, H, W).
        embeddings: The stored mean embeddings.
        steps: From `flow_schedule`.
        rescale: Whether the exact witness is brought to the stored norm; False is the paper's flow.
        chunk_size: Particles that pass through φ at once; all if None.
        callback: Called after each step with its index, the step and the particles; returns the particles to go on.

    Returns:
        The final particles, shaped like z.
    """
    for i, step in enumerate(steps):
        gradient = witness_gradient(feature_net, z, embeddings, step.level, step.exact, rescale, chunk_size)
        z = z - step.step_size * gradient
        if callback is not None:
            z = callback(i, step, z)
    return z


@torch.no_grad()
def measure_embeddings(
    feature_net: nn.Module, pairs: list[tuple[Tensor, Tensor]], t: Tensor
) -> tuple[Tensor, Tensor, float]:
    """Mean embeddings and gradient scale of one level, from pairs of the forward process.

    Args:
        feature_net: φ.
        pairs: Batches of (x_0, x_t), each with shape (B, C, H, W).
        t: The level, with shape ().

    Returns:
        E φ(x_0, t) and E φ(x_t, t), with shape (F), and the least-squares scale s = Σ ⟨g, x_t − x_0⟩ / Σ ‖g‖² of the
        gradients g of ⟨φ, Δ⟩ at x_t; 0 where they do not point along x_t − x_0 at all, so that the flow stands still.
    """
    clean = torch.cat([feature_net(x_0, t) for x_0, _ in pairs]).mean(0)
    noisy = torch.cat([feature_net(x_t, t) for _, x_t in pairs]).mean(0)
    inner = square = 0.0
    for x_0, x_t in pairs:
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            (g,) = torch.autograd.grad(linear_witness(feature_net(x, t), noisy - clean).sum(), x)
        inner += (g * (x_t - x_0)).sum().item()
        square += g.square().sum().item()
    return clean, noisy, max(0.0, inner / square) if square > 0 else 0.0
