"""The noise-adaptive gradient flow: particles down the witness, from noise to data.

    Z ~ N(0, I);   for t in t_K > … > t_1, N_s times:   Z ← Z − η_t ∇f_t(Z)             (Galashov et al., 2025, Alg. 2)

One step is one forward and one backward of φ for every particle; the number of function evaluations (NFE) is K · N_s.

**Witness.** Exact: f_t between the particles' φ(Z, t) and the clean features, so particles interact. Approximate: the
stored f_t between φ(x_t, t) and φ(x_0, t); particles are independent and no data are needed. Hybrid: approximate at
high noise, exact for the last levels.

**Step size.** A measurement after training says how far a gradient of the stored witness reaches:

    s_t ∇f_t(x_t) ≈ x_t − x_0

Witness matching regresses ∇f_t / ‖f_t‖_H on (x_t − x_0) / λ_t, so s_t = λ_t / ‖f_t‖_H should hold; but the averaged
network has shorter gradients than the trained one. Other objectives fix a norm (one-centred penalty) or nothing. So s_t
is measured: the least-squares factor E ⟨∇f_t, x_t − x_0⟩ / E ‖∇f_t‖² on draws of the forward process
(`measure_gradients`), and then lengthened by as much as gradients on a flow's particles are shorter than there
(`calibrate_on_particles`).

A step from noise level s to e, within the level t whose witness is in use, is z ↦ a z − b s_t ∇f_t(z) with (a, b) from
`ForwardProcess.step_coefficients`: the particle that had the distribution of X_s gets that of X_e if the gradient is
right. For the linear interpolant a = 1, and N_s equal steps from t to the next level t' have

    η_t = s_t (1 − t' / t) / N_s,       t' = 0 after the last level.

**Exact witnesses weaken.** The stored witness keeps its length while particles move inside a level; the exact one is
that of the particles' own discrepancy, ‖f_t‖_H = MMD, and shrinks to nothing as they approach the data. When particles
are at noise level s ≤ t it is s / t as long, so a step calibrated at s = t falls behind. `rescale` brings the exact
witness to the stored norm, which makes it the witness of MMD instead of MMD² up to a constant, and one η_t serves both
samplers. Without `rescale` the calibrated step is divided by d(s) / d(t) instead: right on schedule only if the
particles are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from latent_dmmd.discrepancy import MMD, Discrepancy, Witness
from latent_dmmd.features import LevelEmbeddings, MeanEmbeddings
from latent_dmmd.kernels import LinearKernel
from latent_dmmd.objective import across_ranks

Sampler = Literal["exact", "approximate", "hybrid"]
SelfTerm = Literal["include", "leave-one-out", "independent"]


@dataclass(frozen=True)
class FlowStep:
    """One step Z ← scale · Z − step_size ∇f; `level` indexes the stored levels, `exact` picks the witness, and `end` is
    the noise level that the step leads to."""

    level: int
    step_size: float
    exact: bool
    scale: float = 1.0
    end: float = 0.0


@dataclass(frozen=True)
class FlowOptions:
    """How the gradient of a step is taken; the defaults are what the calibration assumes.

    Args:
        rescale: Whether the exact witness is brought to the stored norm; False is the paper's flow.
        self_term: What the exact witness does about a particle's own feature in the particles' mean embedding:
            "include" it; "leave-one-out"; or "independent", where each half of the particles is moved by the witness
            of the other half.
        noise_injection: β ≥ 0; the gradient is taken at Z + β u, u ~ N(0, I) (Arbel et al., 2019, sec. 4.2).
        chunk_size: Particles that pass through φ at once; all if None. The exact witness then takes a second forward
            of φ, and is the same.
        generator: Source of the injected noise.
        across_ranks: Whether every process holds an equal share of the particles, in the order of ranks; exact
            witnesses are those of all of them, and noise is drawn for all of them.

    Raises:
        ValueError: If an argument is out of range.
    """

    rescale: bool = True
    self_term: SelfTerm = "include"
    noise_injection: float = 0.0
    chunk_size: int | None = None
    generator: torch.Generator | list[torch.Generator] | None = None
    across_ranks: bool = False

    def __post_init__(self) -> None:
        if self.self_term not in ("include", "leave-one-out", "independent"):
            raise ValueError(f"self_term must be 'include', 'leave-one-out' or 'independent'; got {self.self_term!r}")
        if self.noise_injection < 0:
            raise ValueError(f"noise_injection must not be negative; got {self.noise_injection}")

    def gathered(self, phi: Tensor) -> Tensor:
        """Features (N, F) of this process, or those of all W that share the particles, with shape (W N, F)."""
        return across_ranks(phi[None])[0] if self.across_ranks else phi


def flow_schedule(
    embeddings: MeanEmbeddings,
    sampler: Sampler = "approximate",
    num_noise_levels: int = 25,
    steps_per_level: int = 4,
    step_size: float | None = None,
    hybrid_level: float = 0.3,
    rescale: bool = True,
    start: float = 1.0,
) -> list[FlowStep]:
    """All steps of a flow, from high noise to low.

    Args:
        embeddings: The stored mean embeddings.
        sampler: Which witness.
        num_noise_levels: K, at most the number of stored levels up to `start`, which are thinned evenly.
        steps_per_level: N_s.
        step_size: A constant η for every level, as in the paper; calibrated if None.
        hybrid_level: The hybrid sampler is exact for levels up to this one, in [0, 1].
        rescale: Whether exact witnesses will be brought to the stored norm; see the module's text.
        start: Noise level of the initial particles, in (0, 1]; the flow begins at the highest stored level up to it.

    Raises:
        ValueError: If an argument is out of range; the message names it.
    """
    available = num_levels_up_to(start, embeddings)
    if sampler not in ("exact", "approximate", "hybrid"):
        raise ValueError(f"sampler must be 'exact', 'approximate' or 'hybrid'; got {sampler!r}")
    if not 1 <= num_noise_levels <= available:
        up_to = "" if available == len(embeddings.levels) else f" up to {start:g}"
        raise ValueError(
            f"num_noise_levels must be in [1, {available}], the stored levels{up_to}; got {num_noise_levels}"
        )
    if steps_per_level < 1:
        raise ValueError(f"steps_per_level must be at least 1; got {steps_per_level}")
    if step_size is not None and step_size <= 0:
        raise ValueError(f"step_size must be positive; got {step_size}")
    levels = [-(-k * available // num_noise_levels) - 1 for k in range(num_noise_levels, 0, -1)]
    times, process = embeddings.levels.double().tolist(), embeddings.process
    steps = []
    for level, following in zip(levels, levels[1:] + [None]):
        t, end = times[level], 0.0 if following is None else times[following]
        exact = sampler == "exact" or (sampler == "hybrid" and t <= hybrid_level)
        for n in range(steps_per_level):
            here, there = (t + (end - t) * i / steps_per_level for i in (n, n + 1))
            if step_size is not None:
                steps.append(FlowStep(level, step_size, exact, end=there))
                continue
            scale, fraction = process.step_coefficients(t, here, there)
            if exact and not rescale:
                both = torch.tensor([t, here], dtype=torch.float64, device="cpu")
                at_t, at_here = process.displacement(both).tolist()
                fraction *= at_t / at_here
            steps.append(FlowStep(level, embeddings.gradient_scale[level].item() * fraction, exact, scale, there))
    return steps


def num_levels_up_to(start: float, embeddings: MeanEmbeddings) -> int:
    """How many stored levels are not above `start`. Raises ValueError if none is."""
    count = int((embeddings.levels <= start + 1e-6).sum())
    if not count or start > 1:
        raise ValueError(f"start must be in [{embeddings.levels.min().item():g}, 1]; got {start}")
    return count


def rank_and_size(across_ranks: bool) -> tuple[int, int]:
    """Rank of this process and number of processes; (0, 1) if not asked for, or if there is no process group."""
    if not across_ranks or not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def steps_for_nfe(nfe: int, num_stored_levels: int) -> tuple[int, int]:
    """K noise levels, as many as are stored and divide the NFE, and N_s steps at each, K · N_s = NFE.

    Raises ValueError if the NFE is not positive.
    """
    if nfe < 1:
        raise ValueError(f"num_inference_steps must be at least 1; got {nfe}")
    levels = max(k for k in range(1, num_stored_levels + 1) if nfe % k == 0)
    return levels, nfe // levels


class ExactWitness:
    """The witness between particles and the clean data, for particles of their own.

    Args:
        particles: Their features, with shape (N, F).
        embeddings: The stored mean embeddings of the level.
        options: Which self-term, and whether to rescale.
    """

    def __init__(self, particles: Tensor, embeddings: LevelEmbeddings, options: FlowOptions) -> None:
        self.particles, self.self_term = particles, options.self_term
        self.means_only = embeddings.discrepancy.needs_means_only
        half = len(particles) // 2
        sources = (particles[half:], particles[:half]) if self.self_term == "independent" else (particles,)
        self.witnesses = [embeddings.exact(source, options.rescale) for source in sources]

    def __call__(self, phi: Tensor, which: slice) -> Tensor:
        """The values at the features φ (n, F) of the particles `which`, with shape (n)."""
        n, first = len(self.particles), self.witnesses[0]
        if self.self_term == "independent":
            in_first_half = torch.arange(n, device=phi.device)[which] < n // 2
            return torch.where(in_first_half, first(phi), self.witnesses[1](phi))
        f = first(phi)
        if self.self_term == "include":
            return f
        # mean over the others = mean over all + (mean over all − own) / (N − 1), in the particles' part of the witness
        kernel, weight = first.kernel, first.weights[0] * (1 if self.means_only else n)
        pooled = self.particles.mean(0, keepdim=True) if isinstance(kernel, LinearKernel) else self.particles
        own = kernel(phi[:, None], self.particles[which][:, None])[:, 0, 0]
        return f + weight * (kernel(phi, pooled).mean(-1) - own) / (n - 1)


def witness_gradient(
    feature_net: nn.Module, z: Tensor, embeddings: MeanEmbeddings, level: int, exact: bool, **options
) -> Tensor:
    """∇f_t at the particles.

    Args:
        feature_net: φ.
        z: Particles, with shape (N, C, H, W).
        embeddings: The stored mean embeddings.
        level: Index of the noise level.
        exact: Whether the witness is that of the particles or the stored one.
        options: How the gradient is taken: the fields of `FlowOptions`.

    Returns:
        The gradients, shaped like z.

    Raises:
        ValueError: If an option is out of range, or `self_term` needs more particles than there are.
    """
    return gradient_at_level(feature_net, z, embeddings.at_level(level), exact, FlowOptions(**options))


def gradient_at_level(
    feature_net: nn.Module, z: Tensor, embeddings: LevelEmbeddings, exact: bool, options: FlowOptions
) -> Tensor:
    """`witness_gradient` for the stored embeddings of one level."""
    rank, num_ranks = rank_and_size(options.across_ranks)
    first, total = rank * len(z), num_ranks * len(z)
    if exact and options.self_term != "include" and total < 2:
        raise ValueError(f"self_term={options.self_term!r} needs at least 2 particles; got {total}")
    size, query, witness = options.chunk_size or len(z), z, None
    if options.noise_injection:
        shape = (total, *z.shape[1:])
        noise = randn_tensor(shape, generator=options.generator, device=z.device, dtype=z.dtype)
        query = z + options.noise_injection * noise[first : first + len(z)]
    if not exact:
        witness = lambda phi, which: embeddings.stored(phi)  # noqa: E731
    elif options.noise_injection or size < len(z):
        with torch.no_grad():
            particles = torch.cat([feature_net(chunk, embeddings.t) for chunk in z.split(size)])
        witness = ExactWitness(options.gathered(particles), embeddings, options)
    gradients = []
    for start in range(0, len(z), size):
        which = slice(first + start, first + min(start + size, len(z)))
        with torch.enable_grad():
            chunk = query[start : start + size].detach().requires_grad_()
            phi = feature_net(chunk, embeddings.t)
            # all particles of this process in one chunk: their features are at hand
            witness = witness or ExactWitness(options.gathered(phi.detach()), embeddings, options)
            (gradient,) = torch.autograd.grad(witness(phi, which).sum(), chunk)
        gradients.append(gradient)
    return torch.cat(gradients)


def gradient_flow(
    feature_net: nn.Module,
    z: Tensor,
    embeddings: MeanEmbeddings,
    steps: list[FlowStep],
    callback: Callable[[int, FlowStep, Tensor], Tensor] | None = None,
    **options,
) -> Tensor:
    """Move particles through all steps of a schedule.

    Args:
        feature_net: φ.
        z: Initial particles, with shape (N, C, H, W).
        embeddings: The stored mean embeddings.
        steps: From `flow_schedule`.
        callback: Called after each step with its index, the step and the particles; returns the particles to go on.
        options: How gradients are taken: the fields of `FlowOptions`.

    Returns:
        The final particles, shaped like z.

    Raises:
        ValueError: If an option is out of range, or `self_term` needs more particles than there are.
    """
    level, stored, options = None, None, FlowOptions(**options)
    for i, step in enumerate(steps):
        if step.level != level:
            level, stored = step.level, embeddings.at_level(step.level)
        gradient = gradient_at_level(feature_net, z, stored, step.exact, options)
        z = step.scale * z - step.step_size * gradient
        if callback is not None:
            z = callback(i, step, z)
    return z


@torch.no_grad()
def measure_embeddings(
    feature_net: nn.Module,
    pairs: list[tuple[Tensor, Tensor]],
    t: Tensor,
    discrepancy: Discrepancy | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean embeddings of one level, from pairs of the forward process.

    Args:
        feature_net: φ.
        pairs: Batches of (x_0, x_t), each with shape (B, C, H, W); N pairs in all.
        t: The level, with shape ().
        discrepancy: Whose witness it is; the MMD of the linear kernel by default.

    Returns:
        The mean embeddings of X_0 and X_t, as means with shape (F) where these are enough and as features with shape
        (N, F) where not.
    """
    clean = torch.cat([feature_net(x_0, t) for x_0, _ in pairs])
    noisy = torch.cat([feature_net(x_t, t) for _, x_t in pairs])
    if (discrepancy or MMD()).needs_means_only:
        return clean.mean(0), noisy.mean(0)
    return clean, noisy


def measure_gradients(
    feature_net: nn.Module, pairs: list[tuple[Tensor, Tensor]], t: Tensor, witness: Witness
) -> tuple[float, float]:
    """How far the gradients g of a witness reach on the forward process, at x_t.

    Args:
        feature_net: φ.
        pairs: Batches of (x_0, x_t), each with shape (B, C, H, W).
        t: The level, with shape ().
        witness: The witness of that level.

    Returns:
        The least-squares scale s = Σ ⟨g, x_t − x_0⟩ / Σ ‖g‖², which is 0 where the gradients do not point along
        x_t − x_0 at all, so that the flow stands still; and the root mean square of ‖g‖.
    """
    inner = square = count = 0.0
    for x_0, x_t in pairs:
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            (g,) = torch.autograd.grad(witness(feature_net(x, t)).sum(), x)
        inner += (g * (x_t - x_0)).sum().item()
        square += g.square().sum().item()
        count += len(x)
    return (max(0.0, inner / square) if square > 0 else 0.0), (square / count) ** 0.5


@torch.no_grad()
def calibrate_on_particles(
    feature_net: nn.Module, embeddings: MeanEmbeddings, gradient_norm: list[float], z: Tensor
) -> None:
    """Make steps as long on the particles of a flow as on the forward process; `embeddings.gradient_scale` changes.

    Particles lag behind the forward process, and where they are, gradients are shorter; steps calibrated on the forward
    process alone then let the lag grow. Particles flow down the stored witness, a step a level, and at each level the
    scale is multiplied by the ratio of the root mean squares of ‖∇f_t‖ on the forward process and on the particles,
    within [1/2, 2].

    Args:
        feature_net: φ.
        embeddings: The stored mean embeddings, with the scales of `measure_gradients`.
        gradient_norm: Root mean square of ‖∇f_t‖ at x_t for every level, T numbers.
        z: Initial particles, with shape (N, C, H, W).
    """
    for step in flow_schedule(embeddings, "approximate", len(embeddings.levels), steps_per_level=1):
        gradient = gradient_at_level(feature_net, z, embeddings.at_level(step.level), False, FlowOptions())
        norm = gradient.flatten(1).square().sum(1).mean().sqrt().item()
        ratio = min(2.0, max(0.5, gradient_norm[step.level] / norm)) if norm > 0 else 1.0
        embeddings.gradient_scale[step.level] *= ratio
        z = step.scale * z - ratio * step.step_size * gradient
