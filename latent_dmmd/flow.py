"""The noise-adaptive gradient flow: particles down the witness, from noise to data.

    Z ~ N(0, I);   for t in t_K > … > t_1, N_s times:   Z ← Z − η_t ∇f_t(Z)             (Galashov et al., 2025, Alg. 2)

One step is one forward and one backward pass of φ for every particle; the number of function evaluations (NFE) is
K · N_s. `flow_schedule` lists the steps, a `Flow` takes them:

- `ExactFlow`: f_t is the witness between the particles' φ(Z, t) and the clean features, so particles interact.
- `ApproximateFlow`: f_t is the stored witness between φ(x_t, t) and φ(x_0, t); particles are independent and no data
  are needed.
- `HybridFlow`: approximate at high noise, exact for the last levels.
- `GuidedFlow`: approximate, for one class, with classifier-free guidance.

**Step size.** A measurement after training (`calibration.py`) says how far a gradient of the stored witness reaches:

    s_t ∇f_t(x_t) ≈ x_t − x_0

A step from noise level s to e, within the level t whose witness is in use, is z ↦ a z − b s_t ∇f_t(z) with (a, b) from
`ForwardProcess.step_coefficients`: the particle that had the distribution of X_s gets that of X_e if the gradient is
right. For the linear interpolant a = 1, and N_s equal steps from t to the next level t' have

    η_t = s_t (1 − t' / t) / N_s,       t' = 0 after the last level.

A step of a fraction δ of the remaining way is up to r_t times as long, `LevelEmbeddings.step_scale`: many short steps
would fall behind, and a single step to the data is best as it is.

**Restoring witnesses.** Trained on the way that is left, s_t ∇f_t(z) ≈ z − x_0 at any level s of the particle near t,
and not the displacement of level t. A step then goes the fraction of the remaining way, with t = s in the
coefficients: η = s_t (1 − e / s) for the linear interpolant.

**Exact witnesses weaken.** The stored witness keeps its length while particles move inside a level; the exact one is
that of the particles' own discrepancy, ‖f_t‖_H = MMD, and shrinks to nothing as they approach the data. When particles
are at noise level s ≤ t it is s / t as long, so a step calibrated at s = t falls behind. `rescale` brings the exact
witness to the stored norm, which makes it the witness of MMD instead of MMD² up to a constant, and one η_t serves both
samplers. Without `rescale` the calibrated step is divided by d(s) / d(t) instead: right on schedule only if the
particles are. With restoring witnesses the norm falls as (d(s) / d(t))², and so does what the step is divided by.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from latent_dmmd.discrepancy import Witness
from latent_dmmd.embeddings import LevelEmbeddings, MeanEmbeddings
from latent_dmmd.forward import LinearInterpolant
from latent_dmmd.objective import across_ranks as gather
from latent_dmmd.schedule import FlowStep, Multistep, Sampler, SolverOrder


def rank_and_size(across_ranks: bool) -> tuple[int, int]:
    """Rank of this process and number of processes; (0, 1) if not asked for, or if there is no process group."""
    if not across_ranks or not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


class Flow:
    """Base class: particles down the witnesses of one class, step by step.

    What is built for a level is kept while the flow stays there: make a new flow when the embeddings have changed.

    Args:
        net: φ.
        embeddings: The stored mean embeddings.
        label: The class; any class if None.
        step_size: A constant η for every step, as in the paper; calibrated if None.
        chunk_size: Particles that pass through φ at once; all if None.
        across_ranks: Whether every process holds an equal share of the particles, in the order of ranks; exact
            witnesses are then those of all particles.
        solver_order: Order of the steps, 1 or 2; 2 needs calibrated steps and the linear forward process.

    Raises:
        ValueError: If `step_size` is not positive, there is no such class, or the order cannot be had.
    """

    def __init__(
        self,
        net: nn.Module,
        embeddings: MeanEmbeddings,
        label: int | None = None,
        step_size: float | None = None,
        chunk_size: int | None = None,
        across_ranks: bool = False,
        solver_order: SolverOrder = 1,
    ) -> None:
        if step_size is not None and step_size <= 0:
            raise ValueError(f"step_size must be positive; got {step_size}")
        if solver_order == 2 and (step_size is not None or not isinstance(embeddings.process, LinearInterpolant)):
            raise ValueError("solver_order=2 needs calibrated steps of the linear forward process; pass solver_order=1")
        embeddings.row(label)
        self.net, self.embeddings, self.label = net, embeddings, label
        self.step_size, self.chunk_size, self.across_ranks = step_size, chunk_size, across_ranks
        self.multistep = Multistep(solver_order)
        self._level: tuple[int, LevelEmbeddings] | None = None

    def run(
        self,
        z: Tensor,
        steps: list[FlowStep],
        callback: Callable[[int, FlowStep, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Particles (N, C, H, W) after all steps of a schedule.

        Args:
            z: Initial particles, with shape (N, C, H, W).
            steps: From `flow_schedule`.
            callback: Called after each step with its index, the step and the particles; returns the particles to go on
                with.
        """
        for i, step in enumerate(steps):
            z = self.step(z, step)
            if callback is not None:
                z = callback(i, step, z)
        return z

    def step(self, z: Tensor, step: FlowStep) -> Tensor:
        """Particles (N, C, H, W) after one step, z ↦ a z − η ∇f_t(z), or one of second order after another."""
        scale, step_size = self.coefficients(step)
        move, length = step_size * self.gradient(z, step.level), step.start - step.end
        if self.multistep.order == 2:
            move = length * self.multistep(move / length, step.start, step.end)
        return scale * z - move

    def coefficients(self, step: FlowStep) -> tuple[float, float]:
        """(a, η) of a step: the calibrated ones, or (1, the constant η)."""
        if self.step_size is not None:
            return 1.0, self.step_size
        restoring = self.embeddings.config.target == "restoring"
        t = step.start if restoring else self.embeddings.levels[step.level].double().item()
        process = self.embeddings.process
        scale, fraction = process.step_coefficients(t, step.start, step.end)
        at_start, at_end = process.displacement(torch.tensor([step.start, step.end], device="cpu")).tolist()
        return scale, self.level(step.level).step_scale(1 - at_end / at_start) * fraction

    def level(self, k: int) -> LevelEmbeddings:
        """The embeddings of level k, built once while the flow stays there."""
        if self._level is None or self._level[0] != k:
            self._level = k, self.build_level(k)
        return self._level[1]

    def build_level(self, k: int) -> LevelEmbeddings:
        return self.embeddings.at_level(k, self.label)

    def features(self, z: Tensor, t: Tensor) -> Tensor:
        """φ of particles, with shape (N, F)."""
        return self.net(z, t) if self.label is None else self.net(z, t, self.label)

    def witness(self, phi: Tensor, level: LevelEmbeddings) -> Witness:
        """The witness of a level for particles whose features φ (N, F) are all of this process."""
        raise NotImplementedError

    def shared_witness(self, z: Tensor, level: LevelEmbeddings) -> Witness | None:
        """The witness of a level for all chunks of particles; None if the only chunk gives it with its features."""
        return None

    def gradient(self, z: Tensor, k: int) -> Tensor:
        """∇f_t at particles (N, C, H, W) for the stored level with index k, shaped like them."""
        level = self.level(k)
        witness, gradients = self.shared_witness(z, level), []
        for chunk in z.split(self.chunk_size or len(z)):
            with torch.enable_grad():
                x = chunk.detach().requires_grad_()
                phi = self.features(x, level.t)
                f = (witness or self.witness(phi.detach(), level))(phi)
                (gradient,) = torch.autograd.grad(f.sum(), x)
            gradients.append(gradient)
        return torch.cat(gradients)


class ApproximateFlow(Flow):
    """Particles down the stored witness, independent of each other."""

    def witness(self, phi: Tensor, level: LevelEmbeddings) -> Witness:
        return level.stored


class ExactFlow(Flow):
    """Particles down the witness between themselves and the clean data.

    Args:
        net, embeddings, options: As of `Flow`. Particles in several chunks take a second forward pass of φ.
        rescale: Whether the witness is brought to the stored norm; by default it is, unless `step_size` is given,
            which makes the flow the paper's.
    """

    def __init__(
        self, net: nn.Module, embeddings: MeanEmbeddings, *args, rescale: bool | None = None, **options
    ) -> None:
        super().__init__(net, embeddings, *args, **options)
        self.rescale = self.step_size is None if rescale is None else rescale

    def coefficients(self, step: FlowStep) -> tuple[float, float]:
        scale, step_size = super().coefficients(step)
        if self.step_size is None and not self.rescale:
            process, t = self.embeddings.process, self.embeddings.levels[step.level].double().item()
            times = torch.tensor([t, step.start], dtype=torch.float64, device="cpu")
            at_t, at_start = process.displacement(times).tolist()
            step_size *= (at_t / at_start) ** (2 if self.embeddings.config.target == "restoring" else 1)
        return scale, step_size

    def witness(self, phi: Tensor, level: LevelEmbeddings) -> Witness:
        phi = gather(phi[None])[0] if self.across_ranks else phi
        return level.exact(phi, self.rescale)

    def shared_witness(self, z: Tensor, level: LevelEmbeddings) -> Witness | None:
        if self.chunk_size is None or self.chunk_size >= len(z):
            return None
        with torch.no_grad():
            phi = torch.cat([self.features(chunk, level.t) for chunk in z.split(self.chunk_size)])
        return self.witness(phi, level)


class HybridFlow(Flow):
    """Approximate above a noise level, exact from there on.

    Args:
        net, embeddings, options: As of `Flow`.
        exact_below: The highest noise level of exact witnesses, in [0, 1].
    """

    def __init__(self, net: nn.Module, embeddings: MeanEmbeddings, *args, exact_below: float = 0.3, **options) -> None:
        super().__init__(net, embeddings, *args, **options)
        self.exact_below = exact_below
        self.exact = ExactFlow(net, embeddings, *args, **options)
        self.approximate = ApproximateFlow(net, embeddings, *args, **options)

    def at(self, k: int) -> Flow:
        """The flow in use at the stored level with index k."""
        return self.exact if self.embeddings.levels[k].item() <= self.exact_below + 1e-6 else self.approximate

    def coefficients(self, step: FlowStep) -> tuple[float, float]:
        return self.at(step.level).coefficients(step)

    def gradient(self, z: Tensor, k: int) -> Tensor:
        return self.at(k).gradient(z, k)


class GuidedFlow(ApproximateFlow):
    """Particles down the guided witness of a class.

    With s_c ∇f_c the displacement that the class predicts and s_∅ ∇f_∅ the one that any class predicts, the guided one
    is s_∅ ∇f_∅ + γ (s_c ∇f_c − s_∅ ∇f_∅) (Ho & Salimans, 2022): a witness on the features of both, side by side.

    Args:
        net, embeddings, label, options: As of `Flow`.
        guidance_scale: γ; 1 is no guidance.

    Raises:
        ValueError: If the kernel is not linear, or there is no such class.
    """

    def __init__(
        self, net: nn.Module, embeddings: MeanEmbeddings, label: int, guidance_scale: float, **options
    ) -> None:
        super().__init__(net, embeddings, label, **options)
        if not embeddings.discrepancy.needs_means_only:
            raise ValueError("guidance needs the linear kernel and MMD; pass guidance_scale=1")
        self.guidance_scale = guidance_scale

    def features(self, z: Tensor, t: Tensor) -> Tensor:
        return torch.cat([self.net(z, t, self.label), self.net(z, t)], dim=1)

    def build_level(self, k: int) -> LevelEmbeddings:
        stored, scales = self.embeddings, self.embeddings.gradient_scale
        ours, theirs = scales[stored.row(self.label), k], scales[stored.row(None), k]
        clean, noisy = (
            torch.cat([self.guidance_scale * (ours * a), (1 - self.guidance_scale) * (theirs * b)], dim=1)
            for a, b in zip(stored.points(k, self.label), stored.points(k))
        )
        lengthening = stored.lengthening[stored.row(self.label), k].item()
        return LevelEmbeddings.build(stored.levels[k], stored.discrepancy, clean, noisy, 1.0, lengthening)


FLOWS: dict[str, type[Flow]] = {"exact": ExactFlow, "approximate": ApproximateFlow, "hybrid": HybridFlow}


def get_flow(sampler: Sampler, net: nn.Module, embeddings: MeanEmbeddings, *args, **options) -> Flow:
    """The flow of that name, with the arguments of `Flow`. Raises ValueError if there is none."""
    if sampler not in FLOWS:
        raise ValueError(f"sampler must be 'exact', 'approximate' or 'hybrid'; got {sampler!r}")
    return FLOWS[sampler](net, embeddings, *args, **options)


def run_in_step(
    flows: dict[int | None, Flow],
    labels: list[int | None],
    z: Tensor,
    steps: list[FlowStep],
    callback: Callable[[int, FlowStep, Tensor], Tensor],
) -> Tensor:
    """Particles of several classes down the flow of each, step by step with each other.

    Args:
        flows: The flow of each class, or of any class, None.
        labels: The class of every particle.
        z, steps, callback: As of `Flow.run`; the callback sees the particles of all classes.
    """
    if len(flows) == 1:
        return next(iter(flows.values())).run(z, steps, callback)
    rows = {c: torch.tensor([i for i, label in enumerate(labels) if label == c], device=z.device) for c in flows}
    for i, step in enumerate(steps):
        moved = z.clone()
        for label, flow in flows.items():
            moved[rows[label]] = flow.step(z[rows[label]], step)
        z = callback(i, step, moved)
    return z
