"""The report of the 2-D experiment: every flow on every target with its figures, the best bandwidth, and their plot."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from latent_dmmd.experiments.toy2d import (
    NUM_NOISE_LEVELS,
    TARGETS,
    Target,
    adaptive_bandwidth,
    energy_distance,
    gaussian_mmd2,
    kernel_flow,
    learned_flow,
    mean_flow,
    measured_bandwidth,
    optimal_bandwidth,
    toy_embeddings,
    train_toy,
    velocity_flow,
)
from latent_dmmd.utils.files import write_aside

FIXED_BANDWIDTHS = (0.3, 1.5, 6.0)
RELATIVE_STEPS = (0.3, 1.0, 3.0)


class ToyFlow(NamedTuple):
    """`run(seed, record)` returns the last particles and shows all before them to `record`; `details` are reported."""

    run: Callable[[int, Callable[[Tensor], None]], Tensor]
    details: dict


def toy_report(
    num_steps: int = 100,
    num_particles: int = 256,
    training_steps: int = 800,
    seeds: tuple[int, ...] = (0, 1, 2),
    scoring_samples: int = 2000,
) -> tuple[dict, dict[str, dict[str, Tensor]], dict[str, dict[str, list]]]:
    """Every method on every target.

    Args:
        num_steps: Steps of every flow, a multiple of 25.
        num_particles: Particles of every flow.
        training_steps: Training steps of the learned methods.
        seeds: Seeds of particles and samples; the step of a kernel flow is chosen on another one.
        scoring_samples: Fresh target samples that the energy distance is taken to.

    Returns:
        Figures as plain values; the last particles of the first seed; and, for the same seed, energy distances along
        the flow as (share of the steps, distance).

    Raises:
        ValueError: If `num_steps` is no multiple of 25.
    """
    if num_steps % NUM_NOISE_LEVELS or num_steps < 1:
        raise ValueError(f"the flows' steps must be a multiple of {NUM_NOISE_LEVELS}; got {num_steps}")
    report, particles, curves = {}, {}, {}
    for target_name, target in TARGETS.items():
        flows = kernel_flows(target, num_steps, num_particles, scoring_samples)
        flows |= learned_flows(target, num_steps, num_particles, training_steps)
        flows["target itself"] = no_flow(target, num_particles)
        report[target_name], particles[target_name], curves[target_name] = {}, {}, {}
        for name, flow in flows.items():
            figures, z, curve = score_flow(flow, target, seeds, scoring_samples)
            report[target_name][name], particles[target_name][name], curves[target_name][name] = figures, z, curve
    return report, particles, curves


def kernel_flows(target: Target, num_steps: int, num_particles: int, scoring_samples: int) -> dict[str, ToyFlow]:
    """Flows with fixed and adaptive kernels, each with the relative step that is best on a seed of its own."""
    reference = target.draw(scoring_samples, torch.Generator().manual_seed(10_001))

    def with_best_step(bandwidth: Callable[[Tensor, Tensor], float]) -> ToyFlow:
        trial = {
            c: energy_distance(kernel_flow(target, bandwidth, c, num_steps, num_particles, 10_000), reference)
            for c in RELATIVE_STEPS
        }
        best = min(trial, key=trial.get)
        return ToyFlow(
            lambda seed, record: kernel_flow(target, bandwidth, best, num_steps, num_particles, seed, record),
            {"relative_step": best, "energy_distance_by_step": trial},
        )

    bandwidths = {f"fixed, α = {alpha:g}": (lambda z, y, alpha=alpha: alpha) for alpha in FIXED_BANDWIDTHS}
    bandwidths["adaptive, α ∝ gap"] = adaptive_bandwidth()
    return {name: with_best_step(bandwidth) for name, bandwidth in bandwidths.items()}


def learned_flows(target: Target, num_steps: int, num_particles: int, training_steps: int) -> dict[str, ToyFlow]:
    """Flows of trained networks: three objectives of features, by one or both samplers, and flow matching."""
    flows = {}
    for name in ("DMMD", "whole way", "witness matching"):
        objective, net, seconds = train_toy(name, target, training_steps)
        stored = toy_embeddings(objective, net, target)
        for sampler in ("exact",) if name == "whole way" else ("exact", "approximate"):
            flows[f"{name}, {sampler}"] = ToyFlow(
                lambda seed, record, parts=(net, stored, sampler): learned_flow(
                    *parts, num_steps, num_particles, seed, record
                ),
                {"training_seconds": seconds},
            )
    _, velocity, seconds = train_toy("flow matching", target, training_steps)
    flows["flow matching"] = ToyFlow(
        lambda seed, record: velocity_flow(velocity, num_steps, num_particles, seed, record),
        {"training_seconds": seconds},
    )
    return flows


def no_flow(target: Target, num_particles: int) -> ToyFlow:
    """Samples of the target itself, the yardstick."""
    return ToyFlow(
        lambda seed, record: target.draw(num_particles, torch.Generator().manual_seed(20_000 + seed)), details={}
    )


def score_flow(
    flow: ToyFlow, target: Target, seeds: tuple[int, ...], scoring_samples: int
) -> tuple[dict, Tensor, list[tuple[float, float]]]:
    """Figures over all seeds; the last particles of the first; and its curve, as of `toy_report`."""
    distances, hits, trace = [], [], []
    for i, seed in enumerate(seeds):
        y = target.draw(scoring_samples, torch.Generator().manual_seed(30_000 + seed))
        z = flow.run(seed, trace.append if i == 0 else lambda z: None)
        distances.append(energy_distance(z, y))
        hits.append(target.modes_hit(z))
        if i == 0:
            first, shown = z, range(0, len(trace), max(1, len(trace) // 20))
            curve = [(j / max(1, len(trace) - 1), energy_distance(trace[j], y)) for j in shown]
    values = torch.tensor(distances, device="cpu")
    figures = {
        "energy_distance": values.mean().item(),
        "standard_error": (values.std() / len(seeds) ** 0.5).item() if len(seeds) > 1 else None,
        "share_near_a_mode": sum(share for share, _ in hits) / len(hits),
        "modes": [count for _, count in hits],
        **flow.details,
    }
    return figures, first, curve


def bandwidth_report(sigma: float = 0.5, num_samples: int = 400, seed: int = 0) -> dict:
    """α* by formula and by search, on the closed form and on samples, against the gap; and flows of the mean."""
    gaps = torch.linspace(0.5, 6, 12, device="cpu").tolist()
    alphas = torch.linspace(0.05, 3.5, 139, device="cpu")
    report = {"sigma": sigma, "num_samples": num_samples, "gap": gaps, "formula": [], "closed_form": [], "samples": []}
    for gap in gaps:
        g = torch.full_like(alphas, gap, requires_grad=True)
        (slopes,) = torch.autograd.grad(gaussian_mmd2(g, sigma, alphas).sum(), g)
        report["formula"].append(optimal_bandwidth(gap, sigma))
        report["closed_form"].append(alphas[int(slopes.argmax())].item())
        report["samples"].append(measured_bandwidth(gap, sigma, alphas[::6], num_samples, seed))
    rules = {f"α = {alpha:g}": (lambda gap, alpha=alpha: alpha) for alpha in FIXED_BANDWIDTHS}
    rules["α*"] = lambda gap: optimal_bandwidth(gap, sigma)
    flows = {name: mean_flow(5.0, sigma, rule, step_size=2.0, num_steps=200) for name, rule in rules.items()}
    return report | {"mean_flow": flows}


def plot_toy(
    particles: dict[str, dict[str, Tensor]], curves: dict[str, dict[str, list]], bandwidths: dict, path: str
) -> None:
    """Particles of every method on every target, energy distance along the flows, and α*."""
    from matplotlib.figure import Figure  # not pyplot, whose backend is the caller's

    names = [name for name in next(iter(particles.values())) if name != "target itself"]
    figure = Figure(figsize=(18, 8.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    for axes, (target_name, by_method) in zip(top.subplots(len(particles), len(names)), particles.items()):
        for axis, name in zip(axes, names):
            axis.scatter(*by_method["target itself"].T, s=2, color="0.75")
            axis.scatter(*by_method[name].T, s=2, color="tab:blue")
            axis.set(xlim=(-3.5, 9.5), ylim=(-6.5, 6.5), xticks=[], yticks=[], aspect="equal")
            axis.set_title(name.replace(", ", ",\n"), fontsize=9)
        axes[0].set_ylabel(target_name)
    panels = bottom.subplots(1, 4)
    for axis, (target_name, by_method) in zip(panels, curves.items()):
        for name, curve in by_method.items():
            if len(curve) > 2:
                style = {"fixed": "--", "flow matching": ":"}.get(name.split(",")[0], "-")
                axis.plot(*zip(*[(share, max(d, 1e-3)) for share, d in curve]), style, label=name)
        axis.set(yscale="log", xlabel="share of the flow", title=f"energy distance: {target_name}")
    bottom.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=6, fontsize=8)
    for name, gaps in bandwidths["mean_flow"].items():
        panels[2].plot(gaps, "-" if name == "α*" else "--", label=name)
    panels[2].set(xlabel="step", ylabel="‖μ‖", title="gap of two Gaussians, flow of the mean")
    axis = panels[3]
    axis.plot(bandwidths["gap"], bandwidths["samples"], "x", label=f"steepest, {bandwidths['num_samples']} samples")
    axis.plot(bandwidths["gap"], bandwidths["closed_form"], "o", mfc="none", label="steepest, closed form")
    axis.plot(bandwidths["gap"], bandwidths["formula"], "k-", label="α*, formula")
    axis.set(xlabel="‖μ‖", ylabel="α", title=f"best bandwidth, σ = {bandwidths['sigma']}")
    for axis in panels:
        axis.grid(alpha=0.3)
    for axis in panels[2:]:
        axis.legend(fontsize=8)
    write_aside(Path(path), lambda aside: figure.savefig(aside, dpi=80, format="png"))
