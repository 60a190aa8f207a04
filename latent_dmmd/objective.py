"""Training objectives for the features: the paper's, and witness matching.

A step sees L noise levels and B pairs (x_0, x_t) at each. The witness f_t of level t comes from a discrepancy between
the features of X_t and of X_0; with MMD and the linear kernel f_t(z) = ⟨φ(z, t), Δ_t⟩, Δ_t = E φ(x_t, t) − E φ(x_0, t).
Its gradient is looked at on the segments of the forward path, x̃_u = (1 − u) x_0 + u x_t with u ~ U[0, 1].

**DMMD** (Galashov et al., 2025) maximises the discrepancy D, MMD² or KALE, under a gradient penalty:

    L = −D[x_t, x_0] + λ_∇ E (‖∇f_t(x̃_u)‖ − c)² + λ_ℓ2 (E ‖φ(x_0, t)‖² + E ‖φ(x_t, t)‖²),      c = 1 or 0

**Witness matching** is the same objective for c = 0 with a far better estimator. Along every pair
f(x_t) − f(x_0) = ∫₀¹ ⟨∇f(x̃_u), x_t − x_0⟩ du, hence for any λ

    −(E f(x_t) − E f(x_0)) + ½ λ E ‖∇f(x̃_u)‖² = ½ λ E ‖∇f(x̃_u) − (x_t − x_0) / λ‖² − E ‖x_t − x_0‖² / (2λ)

and the right-hand side needs φ at x̃_u alone: a least-squares regression of the witness gradient on the displacement,
that is, flow matching restricted to gradients of witnesses. Two choices make it well scaled: the witness is normalised,
f / ‖f‖_H, the unit-ball witness of MMD instead of MMD², and λ_t = (E ‖x_t − x_0‖²)^½, so that the regression target has
unit length at every level and the loss is the unexplained fraction of the displacement.

**Segments.** The same holds for the part of the segment with u ≥ u_k. Where u_k = d(t_{k−1}) / d(t_k), that part is the
piece of the way on which the flow uses the witness of level t_k, from x_t to the next level's x_t'. The objective is
then one of neighbouring levels, and φ(·, t_k) need not represent the field at all lower levels as well.

**A restoring target.** The displacement is the same wherever x̃_u is on its segment, so the field does not react to how
noisy a particle is. The way that is left is u times as long, x̃_u − x_0 = u (x_t − x_0), and grows where particles lag.
It is the other target, with u ∈ [d(t_{k−1}), d(t_{k+1})] / d(t_k), from the next level below to the next one above
(at most 1.5). By parts, ∫_a^b u ⟨∇f(x̃_u), x_t − x_0⟩ du = b f(x̃_b) − a f(x̃_a) − ∫_a^b f(x̃_u) du: the regression is
then the zero-centred penalty of a witness between X̃_b and the mixture of the path below it.

**Levels.** Those of a step are stratified, one in each of L strata of equal probability, by a density that is uniform
over the grid or logit-normal: more of the levels in the middle (`stratified_times`).

**Mean embeddings.** The witness depends on the distributions of X_t and X_0 at level t, which one of three sources
estimates: `embedding_sources.py`.
"""

from typing import Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

from latent_dmmd.discrepancy import MMD, Discrepancy, Witness
from latent_dmmd.embedding_sources import AveragedEmbeddings, BatchEmbeddings, RunningEmbeddings
from latent_dmmd.embeddings import TARGETS, Target
from latent_dmmd.forward import ForwardProcess, noise_levels

MeanEmbeddingSource = Literal["running", "ema", "batch"]
Segment = Literal["level", "whole"]
WeightingScheme = Literal["none", "logit_normal"]  # densities of training times, as diffusers calls them
MAX_OVERSHOOT = 1.5  # u of a restoring target; twice the lowest level is far from where its witness is used


class Particles(Protocol):
    """What objectives draw from; `latent_dmmd.data.particles` has the implementations."""

    labels: Tensor | None

    def num_classes(self) -> int: ...

    def draw(self, count: int, generator: torch.Generator, label: int | None = None) -> Tensor: ...

    def draw_with_noise(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]: ...


class Generators(NamedTuple):
    """Where one step's randomness comes from: `shared` is the same on every rank, `own` differs."""

    shared: torch.Generator
    own: torch.Generator


class Batch(NamedTuple):
    """Pairs at noise levels: what a step of a witness objective draws.

    Attributes:
        x_0: Clean particles, with shape (L, B, C, H, W).
        level: Indices into the noise levels, with shape (L).
        eps: Standard normal noise, shaped like x_0.
        u: Positions on the segments in [0, 1], with shape (L, B).
        label: The class of the pairs at each level, with shape (L), where C is any class; None without classes.
    """

    x_0: Tensor
    level: Tensor
    eps: Tensor
    u: Tensor
    label: Tensor | None = None


class Terms(NamedTuple):
    """A loss: `total` is minimised, `named` holds its parts and diagnostics as detached scalars, to be logged."""

    total: Tensor
    named: dict[str, Tensor]


def across_ranks(phi: Tensor) -> Tensor:
    """Features (L, B, F) of all W ranks as (L, W B, F), with gradient.

    MMD is a statistic of the whole batch: the mean of the ranks' own estimates is another, noisier one. Summed over
    ranks, the backward pass gives W times the gradient, which the averaging of gradients over ranks undoes.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return phi
    return torch.cat(all_gather(phi.contiguous()), dim=1)


class Objective(nn.Module):
    """Base class of everything that is trained: a network, the batch of one step, and its loss.

    The whole loss is computed in `forward`, so that wrappers which synchronise gradients see every use of the network.

    Args:
        net: The network.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.register_load_state_dict_pre_hook(rename_net)

    def draw(self, particles: Particles, num_levels: int, num_pairs: int, generators: Generators) -> NamedTuple:
        """The batch of one step on one rank, on the CPU.

        Args:
            particles: What to draw from.
            num_levels: L.
            num_pairs: B, pairs per level; objectives without noise levels draw L · B pairs.
            generators: Sources of randomness.
        """
        raise NotImplementedError

    def forward(self, batch: NamedTuple) -> Terms:
        """The loss of a batch from `draw`."""
        raise NotImplementedError


def rename_net(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Let checkpoints of 0.1, which call every network `feature_net`, be resumed."""
    old = prefix + "feature_net."
    for name in [name for name in state if name.startswith(old)]:
        state[prefix + "net." + name.removeprefix(old)] = state.pop(name)


def stratified_times(count: int, weighting_scheme: WeightingScheme, generator: torch.Generator) -> Tensor:
    """Times in [0, 1] on the CPU, one in each of `count` strata of equal probability, in ascending order.

    Args:
        count: How many.
        weighting_scheme: Their density: uniform if "none", that of the sigmoid of N(0, 1) if "logit_normal" (Esser et
            al., 2024, section 3.1).
        generator: Source of randomness.
    """
    quantiles = (torch.arange(count, device="cpu") + torch.rand(count, generator=generator, device="cpu")) / count
    return quantiles if weighting_scheme == "none" else torch.special.ndtri(quantiles).sigmoid()


class WitnessObjective(Objective):
    """Base class of objectives on a witness: features, forward process, grid of noise levels and discrepancy.

    Args:
        feature_net: φ, from (B, C, H, W) and (B) to (B, F).
        process: The forward process.
        num_noise_levels: Size T of the grid t_k = k / T.
        discrepancy: Whose witness it is; the MMD of the linear kernel by default.
        label_dropout: With classes: share of a step's noise levels whose pairs are of any class, in [0, 1].
        weighting_scheme: Density of a step's noise levels, see `stratified_times`.
    """

    def __init__(
        self,
        feature_net: nn.Module,
        process: ForwardProcess,
        num_noise_levels: int,
        discrepancy: Discrepancy | None = None,
        label_dropout: float = 0.0,
        weighting_scheme: WeightingScheme = "none",
    ) -> None:
        super().__init__(feature_net)
        self.process = process
        self.discrepancy = discrepancy or MMD()
        self.label_dropout, self.weighting_scheme = label_dropout, weighting_scheme
        levels = noise_levels(num_noise_levels, torch.empty(0).device)  # where parameters are made as well
        self.register_buffer("levels", levels, persistent=False)

    def draw(self, particles: Particles, num_levels: int, num_pairs: int, generators: Generators) -> Batch:
        """Levels, stratified, and classes are the same on every rank."""
        shared, own = generators
        grid = len(self.levels)
        level = (stratified_times(num_levels, self.weighting_scheme, shared) * grid).long().clamp(max=grid - 1)
        label = None
        if particles.labels is None:
            drawn = particles.draw_with_noise(num_levels * num_pairs, own)
            x_0, eps = (a.unflatten(0, (num_levels, num_pairs)) for a in drawn)
        else:
            num_classes = particles.num_classes()
            label = torch.randint(num_classes, (num_levels,), generator=shared, device="cpu")
            label[torch.rand(num_levels, generator=shared, device="cpu") < self.label_dropout] = num_classes
            wanted = [c if c < num_classes else None for c in label.tolist()]
            x_0 = torch.stack([particles.draw(num_pairs, own, c) for c in wanted])
            eps = torch.randn(x_0.shape, generator=own, device="cpu")
        return Batch(x_0, level, eps, torch.rand(num_levels, num_pairs, generator=own, device="cpu"), label)

    def noisy(self, batch: Batch) -> Tensor:
        """x_t of the batch, with shape (L, B, C, H, W)."""
        t = self.levels[batch.level].repeat_interleave(batch.x_0.shape[1])
        x_t = self.process.sample(batch.x_0.flatten(0, 1), t, batch.eps.flatten(0, 1))
        return x_t.unflatten(0, batch.x_0.shape[:2])

    def features(self, batch: Batch, x: Tensor, net: nn.Module | None = None) -> Tensor:
        """φ at the batch's levels and for its classes: (L, B, C, H, W) to (L, B, F)."""
        t = self.levels[batch.level].repeat_interleave(x.shape[1])
        labels = () if batch.label is None else (batch.label.repeat_interleave(x.shape[1]),)
        return (net or self.net)(x.flatten(0, 1), t, *labels).unflatten(0, x.shape[:2])

    def both_features(self, batch: Batch, x_t: Tensor, net: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """φ(x_0, t) and φ(x_t, t) of all W ranks, each with shape (L, W B, F)."""
        phi = self.features(batch, torch.cat([batch.x_0, x_t], dim=1), net)
        phi_0, phi_t = (across_ranks(half) for half in phi.chunk(2, dim=1))
        return phi_0, phi_t

    def witness_gradient(self, batch: Batch, x_t: Tensor, witness: Witness) -> Tensor:
        """∇f_t at x̃_u, with shape (L, B, D), differentiable, for the witnesses of the L levels."""
        u = rearrange(batch.u, "l b -> l b 1 1 1")
        x_u = ((1 - u) * batch.x_0 + u * x_t).detach().requires_grad_()
        f = witness(self.features(batch, x_u))
        (gradient,) = torch.autograd.grad(f.sum(), x_u, create_graph=True)
        return gradient.to(torch.promote_types(gradient.dtype, torch.float32)).flatten(2)


class DMMD(WitnessObjective):
    """The paper's objective (Galashov et al., 2025, Algorithm 1); with KALE the features of D-KALE-Flow.

    Terms: the discrepancy by its name, `mmd2` (U-statistic) or `kale`; `gradient_penalty`; `feature_penalty`; and the
    diagnostic `gradient_norm`.

    Args:
        gradient_weight: λ_∇.
        gradient_center: c, the norm the penalty asks of the witness gradient: 1 (paper) or 0.
        feature_weight: λ_ℓ2.
    """

    def __init__(
        self,
        feature_net: nn.Module,
        process: ForwardProcess,
        num_noise_levels: int,
        gradient_weight: float = 1.0,
        gradient_center: float = 1.0,
        feature_weight: float = 1e-3,
        discrepancy: Discrepancy | None = None,
        label_dropout: float = 0.0,
        weighting_scheme: WeightingScheme = "none",
    ) -> None:
        super().__init__(feature_net, process, num_noise_levels, discrepancy, label_dropout, weighting_scheme)
        self.gradient_weight, self.gradient_center = gradient_weight, gradient_center
        self.feature_weight = feature_weight

    def forward(self, batch: Batch) -> Terms:
        x_t = self.noisy(batch)
        phi_0, phi_t = self.both_features(batch, x_t)
        value = self.discrepancy.value(phi_t, phi_0).mean()
        penalty, norm = self.gradient_penalty(batch, x_t, phi_0, phi_t)
        features = self.feature_weight * (phi_0.square().sum(-1).mean() + phi_t.square().sum(-1).mean())
        named = {
            self.discrepancy.name: value,
            "gradient_penalty": penalty,
            "feature_penalty": features,
            "gradient_norm": norm.mean(),
        }
        return Terms(-value + penalty + features, {name: term.detach() for name, term in named.items()})

    def gradient_penalty(self, batch: Batch, x_t: Tensor, phi_0: Tensor, phi_t: Tensor) -> tuple[Tensor, Tensor]:
        """λ_∇ E (‖∇f_t(x̃_u)‖ − c)², and the norms, with shape (L, B)."""
        gradient = self.witness_gradient(batch, x_t, self.discrepancy.witness(phi_t, phi_0))
        norm = (gradient.square().sum(-1) + 1e-12).sqrt()  # the plain norm has no derivative at 0
        return self.gradient_weight * (norm - self.gradient_center).square().mean(), norm


class WitnessMatching(WitnessObjective):
    """Regression of the normalised witness gradient on the displacement x_t − x_0.

    Terms: `matching`, the unexplained share of the target, about 1 for the zero field; and the diagnostics `mmd` (or
    `kale`), the norm ‖f_t‖_H of the witness, and `cosine`, between witness gradient and displacement.

    Args:
        averaged_net: The averaged network (EMA of φ); needed for "ema" and "running".
        mean_embeddings: The source: "running", "ema" or "batch".
        momentum: See `RunningEmbeddings`.
        refresh_every: See `RunningEmbeddings`.
        num_points: Features that "running" keeps of each level where means are not enough.
        segment: Where the witness of level t_k is trained: "level", from x_t to the next level, on which the flow
            uses it; or "whole", from x_t to the data, the identity's own.
        num_classes: Classes of particles; 0 if there are none.
        target: What the gradient at x̃_u is regressed on: the "displacement" x_t − x_0, or the way that is left,
            u (x_t − x_0), which is "restoring". Segments of one level then begin at the next level above.

    Raises:
        ValueError: If `mean_embeddings`, `segment` or `target` is none of these, or the averaged network is missing.
    """

    def __init__(
        self,
        feature_net: nn.Module,
        process: ForwardProcess,
        num_noise_levels: int,
        averaged_net: nn.Module | None = None,
        mean_embeddings: MeanEmbeddingSource = "running",
        momentum: float = 0.97,
        refresh_every: int = 4,
        discrepancy: Discrepancy | None = None,
        num_points: int = 128,
        segment: Segment = "level",
        num_classes: int = 0,
        label_dropout: float = 0.0,
        target: Target = "displacement",
        weighting_scheme: WeightingScheme = "none",
    ) -> None:
        super().__init__(feature_net, process, num_noise_levels, discrepancy, label_dropout, weighting_scheme)
        if target not in TARGETS:
            raise ValueError(f"target must be 'displacement' or 'restoring'; got {target!r}")
        self.target = target
        if segment not in ("level", "whole"):
            raise ValueError(f"segment must be 'level' or 'whole'; got {segment!r}")
        self.segment = segment
        if mean_embeddings not in ("running", "ema", "batch"):
            raise ValueError(f"mean_embeddings must be 'running', 'ema' or 'batch'; got {mean_embeddings!r}")
        if mean_embeddings != "batch" and averaged_net is None:
            raise ValueError(f"mean_embeddings={mean_embeddings!r} needs the averaged network")
        if mean_embeddings == "batch":
            self.source = BatchEmbeddings()
        elif mean_embeddings == "ema":
            self.source = AveragedEmbeddings(averaged_net)
        else:
            points = 0 if self.discrepancy.needs_means_only else num_points
            features = feature_net.config.num_features
            self.source = RunningEmbeddings(
                averaged_net, num_noise_levels, features, num_classes, points, momentum, refresh_every
            )

    def forward(self, batch: Batch) -> Terms:
        x_t = self.noisy(batch)
        witness = self.source(self, batch, x_t)
        norm = witness.norm()
        if self.segment == "level":
            start, end = (ends[batch.level][:, None].to(batch.u) for ends in self.segment_ends())
            batch = batch._replace(u=start + (end - start) * batch.u)
        gradient = self.witness_gradient(batch, x_t, witness.scaled(1 / norm))
        displacement = (x_t - batch.x_0).flatten(2)
        if self.target == "restoring":
            displacement = rearrange(batch.u, "l b -> l b 1") * displacement
        target = displacement / rearrange(self.gradient_length()[batch.level], "l -> l 1 1")
        matching = (gradient - target).square().sum(-1).mean()
        with torch.no_grad():
            cosine = torch.cosine_similarity(gradient, displacement, dim=-1).mean()
        name = self.discrepancy.name.removesuffix("2")
        return Terms(matching, {"matching": matching.detach(), name: norm.detach().mean(), "cosine": cosine})

    def segment_ends(self) -> tuple[Tensor, Tensor]:
        """The lowest and highest u of each level's segment, each with shape (T).

        d(t_{k−1}) / d(t_k), which is 0 for the lowest level; and 1, or d(t_{k+1}) / d(t_k), at most 1.5, where the
        target is restoring: particles that lag must be sent back from above.
        """
        displacement = self.process.displacement(self.levels)
        start = torch.cat([displacement.new_zeros(1), displacement[:-1] / displacement[1:]])
        end = torch.ones_like(start)
        if self.target == "restoring":
            end[:-1] = (displacement[1:] / displacement[:-1]).clamp(max=MAX_OVERSHOOT)
        return start, end

    def gradient_length(self) -> Tensor:
        """λ_t = (E ‖x_t − x_0‖²)^½ = d(t) D^½, with shape (T)."""
        config = self.net.config
        dimension = config.in_channels * config.sample_size**2
        return self.process.displacement(self.levels) * dimension**0.5
