"""Where the particles of a flow are, compared with where training expects them.

The witness of level t is trained on draws of the forward process at level t (and on the segments from there to the
data). A flow brings particles to that level by other means. `Diagnosis` stops a flow at every level, just before its
first step there, and once more at the end, t = 0, and compares the particles Z with draws X_t and with data X_0:

- `mmd2_to_forward`: MMD²(φ(Z, t), φ(X_t, t)), U-statistic, and `mmd2_to_data`, likewise for X_0, beside the same of X_t
  (`forward_mmd2_to_data`);
- `noise_level`: the level s at which E f_t(X_s) equals E f_t(Z). The witness falls from noise to data along the forward
  process, which makes it a gauge of the noise that is left;
- `gradient_norm`: s_t E ‖∇f_t(Z)‖ / D^½, the root-mean-square displacement that the stored witness predicts, beside
  that at X_t;
- `std`: the standard deviation of all elements of Z, beside the one of X_t.

At t = 0 the features, the gauge and the gradient are those of the lowest level of the flow.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from latent_dmmd.discrepancy import mmd2
from latent_dmmd.flow import ApproximateFlow
from latent_dmmd.pipeline import LatentDMMDPipeline
from latent_dmmd.schedule import Sampler
from latent_dmmd.utils.files import write_aside, write_json

NUM_GAUGE_LEVELS, NUM_GAUGE_PARTICLES, CHUNK_SIZE = 11, 64, 64


@dataclass(frozen=True)
class Stop:
    """The figures of one stop; see the module's text. `t` is 0 at the end of the flow."""

    t: float
    noise_level: float
    mmd2_to_forward: float
    mmd2_to_data: float
    forward_mmd2_to_data: float
    gradient_norm: float
    forward_gradient_norm: float
    std: float
    forward_std: float


@dataclass(frozen=True)
class Reference:
    """What the forward process is at one stop: features, gradient norm, standard deviation, and the witness's gauge."""

    phi_t: Tensor
    phi_0: Tensor
    gradient_norm: float
    std: float
    gauge: Tensor


class Diagnosis:
    """Compares flows of one pipeline with the forward process, which is evaluated once for all of them.

    Args:
        pipeline: What generates.
        x_0: Standardised clean particles, with shape (2 N, C, H, W): N are noised, N stand for the data, and flows
            have N particles.
        seed: Seed of the initial particles and of the forward draws.

    Raises:
        ValueError: If there are fewer than 4 clean particles, or the pipeline has no witness.
    """

    def __init__(self, pipeline: LatentDMMDPipeline, x_0: Tensor, seed: int = 0) -> None:
        if not isinstance(pipeline, LatentDMMDPipeline):
            raise ValueError(f"a {type(pipeline).__name__} has no witness to diagnose; choose a DMMD pipeline")
        if len(x_0) < 4:
            raise ValueError(f"a diagnosis needs at least 4 clean particles; got {len(x_0)}")
        self.pipeline, self.net, self.embeddings = pipeline, pipeline.feature_net, pipeline.mean_embeddings
        device = self.embeddings.levels.device
        self.noised, self.data = x_0[: len(x_0) // 2 * 2].to(device).chunk(2)
        self.generator = torch.Generator().manual_seed(seed)
        shape = self.noised.shape
        self.z, self.eps = (torch.randn(shape, generator=self.generator, device="cpu").to(device) for _ in range(2))
        self.gauge_levels = torch.linspace(0, 1, NUM_GAUGE_LEVELS, device=device)
        self.reference = cache(self.measure_reference)

    @torch.no_grad()
    def run(self, sampler: Sampler, num_noise_levels: int = 25, steps_per_level: int = 2, **options) -> list[Stop]:
        """Stop a flow at every level.

        Args:
            sampler: Which witness moves the particles.
            num_noise_levels: Noise levels K of the flow.
            steps_per_level: Gradient steps N_s at each.
            options: Further ones of the pipeline's call.

        Returns:
            K + 1 stops, from t = 1 to t = 0.

        Raises:
            ValueError: If an option is out of range.
        """
        levels, visited, arrived = self.embeddings.levels.tolist(), [], [self.z]

        def after_step(_: LatentDMMDPipeline, step: int, t: float, tensors: dict[str, Tensor]) -> dict:
            if step % steps_per_level == 0:
                visited.append(levels.index(t))
            if (step + 1) % steps_per_level == 0:
                arrived.append(tensors["latents"].clone())
            return {}

        self.pipeline(
            batch_size=len(self.z),
            num_noise_levels=num_noise_levels,
            steps_per_level=steps_per_level,
            sampler=sampler,
            latents=self.z,
            generator=self.generator,
            output_type="latent",
            callback_on_step_end=after_step,
            **options,
        )
        stops = [self.stop(z, k, levels[k]) for z, k in zip(arrived, visited)]
        return [*stops, self.stop(arrived[-1], visited[-1], 0.0)]

    def stop(self, z: Tensor, k: int, t: float) -> Stop:
        """The figures of particles at level t, by the features of level k."""
        at, reference = self.embeddings.at_level(k), self.reference(k, t)
        phi, kernel = self.features(z, k), at.discrepancy.kernel
        return Stop(
            t=t,
            noise_level=crossing(at.stored(phi).mean().item(), self.gauge_levels, reference.gauge),
            mmd2_to_forward=mmd2(phi, reference.phi_t, kernel).item(),
            mmd2_to_data=mmd2(phi, reference.phi_0, kernel).item(),
            forward_mmd2_to_data=mmd2(reference.phi_t, reference.phi_0, kernel).item(),
            gradient_norm=self.gradient_norm(z, k),
            forward_gradient_norm=reference.gradient_norm,
            std=z.std().item(),
            forward_std=reference.std,
        )

    def measure_reference(self, k: int, t: float) -> Reference:
        at, x_t, gauge = self.embeddings.at_level(k), self.forward(t), slice(NUM_GAUGE_PARTICLES)
        gauged = (self.features(self.forward(s)[gauge], k) for s in self.gauge_levels.tolist())
        return Reference(
            phi_t=self.features(x_t, k),
            phi_0=self.features(self.data, k),
            gradient_norm=self.gradient_norm(x_t, k),
            std=x_t.std().item(),
            gauge=torch.stack([at.stored(phi_s).mean() for phi_s in gauged]),
        )

    def forward(self, t: float) -> Tensor:
        """X_t, with the same noise at every level."""
        return self.embeddings.process.sample(self.noised, self.eps.new_full((len(self.eps),), t), self.eps)

    def features(self, x: Tensor, k: int) -> Tensor:
        t = self.embeddings.levels[k]
        return torch.cat([self.net(chunk, t) for chunk in x.split(CHUNK_SIZE)])

    def gradient_norm(self, x: Tensor, k: int) -> float:
        flow = ApproximateFlow(self.net, self.embeddings, chunk_size=CHUNK_SIZE)
        g, scale = flow.gradient(x, k), self.embeddings.gradient_scale[-1, k]
        return (g.flatten(1).norm(dim=1).mean() * scale / x[0].numel() ** 0.5).item()


def crossing(value: float, levels: Tensor, curve: Tensor) -> float:
    """The level at which a rising curve takes a value, linear in between, clamped to the first and last level.

    Args:
        value: What the curve should be.
        levels: Ascending, with shape (G).
        curve: The values at the levels, with shape (G); falls are levelled out first.
    """
    curve = curve.cummax(0).values
    i = int(torch.searchsorted(curve, value).clamp(1, len(curve) - 1))
    rise = (curve[i] - curve[i - 1]).item()
    share = (value - curve[i - 1].item()) / rise if rise > 0 else 0.0
    return (levels[i - 1] + min(max(share, 0.0), 1.0) * (levels[i] - levels[i - 1])).item()


def save_diagnosis(flows: dict[str, list[Stop]], settings: dict, folder: str | Path) -> None:
    """Write `diagnosis.json`, with the settings, and `diagnosis.png` for flows by name; the folder is made."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    report = {"settings": settings, "flows": {name: [vars(stop) for stop in stops] for name, stops in flows.items()}}
    write_json(folder / "diagnosis.json", report)
    plot_diagnosis(flows, folder / "diagnosis.png")


def plot_diagnosis(flows: dict[str, list[Stop]], path: str | Path) -> None:
    """Five panels over the noise level: a line for each flow, and a dashed one for the forward process."""
    from matplotlib.figure import Figure  # not pyplot, whose backend is the caller's

    panels = (
        ("mmd2_to_forward", None, "MMD² to the forward process, on φ"),
        ("mmd2_to_data", "forward_mmd2_to_data", "MMD² to the data, on φ"),
        ("noise_level", "t", "noise level by the witness"),
        ("std", "forward_std", "standard deviation"),
        ("gradient_norm", "forward_gradient_norm", "predicted displacement"),
    )
    figure = Figure(figsize=(20, 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for axis, (field, reference, title) in zip(axes, panels):
        for name, stops in flows.items():
            axis.plot([s.t for s in stops], [getattr(s, field) for s in stops], ".-", label=name)
        stops = next(iter(flows.values()))
        values = [getattr(s, reference) if reference else 0.0 for s in stops]
        axis.plot([s.t for s in stops], values, "k--", linewidth=1, label="forward process")
        if field.startswith("mmd2"):
            axis.set_yscale("symlog", linthresh=1)
        axis.set(title=title, xlabel="noise level t of the witness")
        axis.invert_xaxis()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    write_aside(Path(path), lambda aside: figure.savefig(aside, dpi=100, format="png"))
