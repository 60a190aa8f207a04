"""What training and sampling cost: seconds and peak memory against batch, particles and resolution."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from latent_dmmd.baselines import FlowMatching, VelocityNet, timed_pairs
from latent_dmmd.data.autoencoder import BUNDLED_AUTOENCODER, decode_pixels, load_autoencoder
from latent_dmmd.discrepancy import get_discrepancy
from latent_dmmd.embeddings import MeanEmbeddings
from latent_dmmd.features import FEATURE_NETS, BilinearFeatures, FeatureNet
from latent_dmmd.flow import get_flow
from latent_dmmd.forward import LinearInterpolant, noise_levels
from latent_dmmd.methods.base import NetConfig
from latent_dmmd.objective import DMMD, Batch, Objective, WitnessMatching
from latent_dmmd.schedule import Sampler, flow_schedule
from latent_dmmd.utils.benchmark import Cost, fitted_exponent, measure
from latent_dmmd.utils.files import write_aside


def random_batch(levels: int, pairs: int, shape: tuple[int, int, int], grid: int, device: torch.device) -> Batch:
    """Standard normal particles in place of latents; costs do not depend on values."""
    generator = torch.Generator().manual_seed(0)
    on_cpu = dict(generator=generator, device="cpu")
    x_0, eps = (torch.randn(levels, pairs, *shape, **on_cpu).to(device) for _ in range(2))
    level = torch.arange(levels, device=device) * grid // levels
    return Batch(x_0, level, eps, torch.rand(levels, pairs, **on_cpu).to(device))


def training_step(objective: Objective, batch: NamedTuple, mixed_precision: bool) -> Callable[[], None]:
    """One step of the training loop: loss, backward, clipping, Adam."""
    optimizer = torch.optim.Adam(objective.net.parameters(), lr=1e-4)

    def step() -> None:
        with torch.autocast(batch.x_0.device.type, torch.bfloat16, enabled=mixed_precision):
            total = objective(batch).total
        total.backward()
        nn.utils.clip_grad_norm_(objective.net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def repeated(task: Callable[[], None], times: int) -> None:
    for _ in range(times):
        task()


def features(device: torch.device, network: dict, architecture: str = "unet") -> BilinearFeatures:
    """A new φ of 64 features, the same at every call."""
    torch.manual_seed(0)
    return FEATURE_NETS[architecture](num_features=64, **network).to(device)


def witness_matching(
    device: torch.device, network: dict, source: str = "running", architecture: str = "unet"
) -> WitnessMatching:
    """The default objective on a new φ and its average."""
    net, averaged = (features(device, network, architecture) for _ in range(2))
    return WitnessMatching(net, LinearInterpolant(), 25, averaged.requires_grad_(False), source).to(device)


def objective_costs(
    device: torch.device,
    network: dict,
    pairs_per_level: int = 8,
    levels_per_step: int = 8,
    repeats: int = 9,
    mixed_precision: bool = False,
) -> dict[str, Cost]:
    """A training step of every objective beside one of flow matching: same U-Net, same batch.

    Args:
        device: Where.
        network: Arguments of `FeatureNet` but for `num_features`, which is 64.
        pairs_per_level: B.
        levels_per_step: L.
        mixed_precision: Whether in bf16, which pays where the processor has it.
        repeats: Rounds.
    """
    shape = (network["in_channels"], network["sample_size"], network["sample_size"])
    batch, process = random_batch(levels_per_step, pairs_per_level, shape, 25, device), LinearInterpolant()

    torch.manual_seed(0)
    velocity = VelocityNet(**{name: size for name, size in network.items() if name != "num_classes"})
    objectives = {"flow matching": FlowMatching(velocity).to(device)}
    objectives |= {
        f"witness matching, {source}": witness_matching(device, network, source)
        for source in ("running", "ema", "batch")
    }
    objectives["witness matching, encoder"] = witness_matching(device, network, architecture="encoder")
    kernels = {
        "dmmd, linear": {},
        "dmmd, gaussian": {"kernel": "gaussian"},
        "dmmd, kale": {"name": "kale"},
    }
    for name, options in kernels.items():
        phi, discrepancy = features(device, network), get_discrepancy(**options)
        objectives[name] = DMMD(phi, process, 25, discrepancy=discrepancy).to(device)
    steps = {
        name: training_step(o, timed_pairs(batch) if name == "flow matching" else batch, mixed_precision)
        for name, o in objectives.items()
    }
    # running means are refreshed at every fourth step: time four at once
    running = ("witness matching, running", "witness matching, encoder")
    fours = {name: partial(repeated, steps[name], 4) for name in running}
    costs = measure(steps | fours, device, repeats)
    return costs | {name: Cost(costs[name].seconds / 4, costs[name].peak_mb) for name in running}


DEFAULT_NETWORK = NetConfig().unet((8, 16, 16))
REPRESENTATIONS = {
    "latents": (DEFAULT_NETWORK, 8, 8),
    "pixels, patches of 32×32": (
        NetConfig(patch_size=32, conv_in_kernel=1).unet((3, 256, 256)) | {"squared_norm": True},
        8,
        8,
    ),
    "pixels, one by one": (
        NetConfig(patch_size=1, block_out_channels=[*6 * [96], 128], attention_levels=[*6 * [False], True]).unet(
            (3, 256, 256)
        ),
        1,
        2,
    ),
}


def representation_costs(
    device: torch.device, representations: dict[str, tuple[dict, int, int]] = REPRESENTATIONS, repeats: int = 1
) -> dict[str, dict[str, float]]:
    """Seconds and peak memory per pair of a step of witness matching, for images of 256 × 256 as latents and as pixels.

    The three U-Nets have their attention on the same 4 × 4 grid. The one that reads pixels one by one is measured with
    2 pairs instead of 64, for the sake of memory.

    Args:
        device: Where.
        representations: Name to arguments of `FeatureNet`, levels per step and pairs per level.
        repeats: Rounds.
    """
    steps, pairs, sizes = {}, {}, {}
    for name, (network, levels, pairs_per_level) in representations.items():
        shape = (network["in_channels"], network["sample_size"], network["sample_size"])
        batch = random_batch(levels, pairs_per_level, shape, 25, device)
        objective = witness_matching(device, network)
        step = training_step(objective, batch, False)
        steps[name] = partial(repeated, step, 4)  # running means are refreshed at every fourth step
        pairs[name], sizes[name] = levels * pairs_per_level, sum(p.numel() for p in objective.net.parameters())
    costs = measure(steps, device, repeats)
    return {
        name: {
            "pairs": pairs[name],
            "seconds_per_pair": cost.seconds / 4 / pairs[name],
            "peak_mb_per_pair": None if cost.peak_mb is None else cost.peak_mb / pairs[name],
            "num_parameters": sizes[name],
        }
        for name, cost in costs.items()
    }


SMALL_NETWORK = dict(
    sample_size=4, in_channels=4, patch_size=2, block_out_channels=(16,), layers_per_block=1, attention_levels=(False,)
)


LINEAR_FACTOR = 8  # linear kernels are measured at sizes so many times larger, where their cost shows over a call's


def training_costs(device: torch.device, sizes: list[int], repeats: int = 3) -> dict[str, dict[int, Cost]]:
    """A step of the paper's objective at one noise level against B, for a φ so small that the kernel's cost shows."""
    costs = {"linear": {}, "gaussian": {}}
    for kernel, factor in (("linear", LINEAR_FACTOR), ("gaussian", 1)):
        for size in (factor * size for size in sizes):
            batch = random_batch(1, size, (4, 4, 4), 25, device)
            torch.manual_seed(0)
            net = FeatureNet(num_features=64, **SMALL_NETWORK).to(device)
            options = {"kernel": kernel, "bandwidth": 10.0}
            objective = DMMD(net, LinearInterpolant(), 25, discrepancy=get_discrepancy(**options)).to(device)
            step = training_step(objective, batch, False)
            costs[kernel][size] = measure({"step": step}, device, repeats)["step"]
    return costs


def random_embeddings(num_points: int, kernel: str, device: torch.device) -> MeanEmbeddings:
    """Embeddings of random values, at 25 levels and with 64 features."""
    torch.manual_seed(0)
    options = {} if kernel == "linear" else {"kernel": kernel, "bandwidth": 10.0}
    embeddings = MeanEmbeddings(25, 64, num_points, discrepancy=options)
    embeddings.levels.copy_(noise_levels(25))
    for buffer in (embeddings.clean, embeddings.noisy):
        buffer.normal_()
    embeddings.gradient_scale.fill_(1e-3)
    return embeddings.to(device)


def measured_gradient(sampler: Sampler, net: FeatureNet, embeddings: MeanEmbeddings, z: Tensor) -> Tensor:
    """The gradient of one step, with everything that is built for a level."""
    return get_flow(sampler, net, embeddings).gradient(z, 12)


def sampling_costs(device: torch.device, sizes: list[int], repeats: int = 3) -> dict[str, dict[int, Cost]]:
    """What one image costs in one step of a flow of N_p particles, for a φ so small that the kernel's cost shows.

    An exact witness needs all N_p particles to be moved for the sake of one; the stored witness moves that one alone.
    """
    net = FeatureNet(num_features=64, **SMALL_NETWORK).to(device).requires_grad_(False)
    stored = {
        kernel: random_embeddings(0 if kernel == "linear" else 128, kernel, device) for kernel in ("linear", "gaussian")
    }
    costs = {"exact, linear": {}, "exact, gaussian": {}, "approximate, linear": {}}
    for name, by_size in costs.items():
        sampler, kernel = name.split(", ")
        for size in ((LINEAR_FACTOR if kernel == "linear" else 1) * size for size in sizes):
            z = torch.randn(size, 4, 4, 4, device=device)[: size if sampler == "exact" else 1]
            task = partial(measured_gradient, sampler, net, stored[kernel], z)
            by_size[size] = measure({"step": task}, device, repeats)["step"]
    return costs


def resolution_costs(
    device: torch.device, resolutions: list[int], network: dict, num_images: int = 16, repeats: int = 3
) -> dict[int, dict[str, float]]:
    """Seconds per image for one NFE of the default φ, exact and approximate, and for decoding, against resolution.

    The autoencoder is the bundled one, which halves the side four times.
    """
    vae = load_autoencoder(BUNDLED_AUTOENCODER, device)
    embeddings, found = random_embeddings(0, "linear", device), {}
    for resolution in resolutions:
        size = resolution // 16
        torch.manual_seed(0)
        net = FeatureNet(**{**network, "sample_size": size}, num_features=64).to(device).requires_grad_(False)
        z = torch.randn(num_images, network["in_channels"], size, size, device=device)
        tasks = {"decoding": lambda: [decode_pixels(vae, chunk) for chunk in z.split(4)]}  # noqa: B023
        for sampler in ("exact", "approximate"):
            flow, steps = get_flow(sampler, net, embeddings), flow_schedule(embeddings, 1, 1)
            tasks[sampler] = partial(flow.run, z, steps)
        with torch.no_grad():
            costs = measure(tasks, device, repeats)
        found[resolution] = {name: cost.seconds / num_images for name, cost in costs.items()}
    return found


def complexity_report(
    device: torch.device,
    batches: list[int],
    particles: list[int],
    resolutions: list[int],
    pairs_per_level: int = 8,
    repeats: int = 3,
) -> dict:
    """All measurements as plain values, with the exponents fitted to the largest sizes.

    Args:
        device: Where.
        batches: Pairs B of a training step, ascending; linear kernels take 8 times as many.
        particles: N_p of a sampling step, ascending, likewise.
        resolutions: Sides in pixels, multiples of 64.
        pairs_per_level: Pairs at each of 8 levels in the step that compares the objectives.
        repeats: Rounds of each measurement; of the representations there is one.
    """
    network = DEFAULT_NETWORK
    objectives = objective_costs(device, network, pairs_per_level, repeats=repeats)
    reference = objectives["flow matching"].seconds
    report = {
        "objectives": {
            name: {**vars(cost), "over_flow_matching": cost.seconds / reference} for name, cost in objectives.items()
        },
        "representations": representation_costs(device),
        "resolution": resolution_costs(device, resolutions, network, repeats=repeats),
    }
    for name, costs in (("training", training_costs), ("sampling", sampling_costs)):
        measured = costs(device, batches if name == "training" else particles, repeats)
        report[name] = {
            series: {
                "sizes": list(by_size),
                "seconds": [cost.seconds for cost in by_size.values()],
                "peak_mb": [cost.peak_mb for cost in by_size.values()],
                "exponent": fitted_exponent(list(by_size), [cost.seconds for cost in by_size.values()]),
            }
            for series, by_size in measured.items()
        }
    return report


def plot_complexity(report: dict, path: str | Path) -> None:
    """Five panels: training seconds and memory against B, sampling against N_p and resolution, objectives."""
    from matplotlib.figure import Figure  # not pyplot, whose backend is the caller's

    figure = Figure(figsize=(20, 3.8), layout="constrained")
    axes = figure.subplots(1, 5)
    for axis, part, values, title, label in (
        (axes[0], "training", "seconds", "training step", "pairs B"),
        (axes[1], "training", "peak_mb", "training step, peak memory", "pairs B"),
        (axes[2], "sampling", "seconds", "sampling step, for one image", "particles N_p"),
    ):
        for name, series in report[part].items():
            if None in series[values]:
                continue
            slope = fitted_exponent(series["sizes"], [max(v, 1e-3) for v in series[values]])
            axis.loglog(series["sizes"], series[values], "o-", label=f"{name}: exponent {slope:.2f}")
        axis.set(title=title, xlabel=label, ylabel="seconds" if values == "seconds" else "MB")
        axis.minorticks_off()
        axis.legend(fontsize=8)
    sides = list(report["resolution"])
    for name in report["resolution"][sides[0]]:
        label = name if name == "decoding" else f"{name}, one NFE"
        axes[3].loglog(sides, [report["resolution"][side][name] for side in sides], "o-", label=label)
    axes[3].set(title="sampling against resolution", xlabel="side in pixels", ylabel="seconds per image")
    axes[3].set_xticks(sides, [str(side) for side in sides])
    axes[3].minorticks_off()
    axes[3].legend(fontsize=8)
    names = list(report["objectives"])
    ratios = [report["objectives"][name]["over_flow_matching"] for name in names]
    bars = axes[4].barh(names, ratios, color="tab:green")
    axes[4].bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    axes[4].set(title="training step, flow matching = 1", xlim=(0, 1.15 * max(ratios)))
    axes[4].invert_yaxis()
    for axis in axes[:4]:
        axis.grid(alpha=0.3)
    write_aside(Path(path), lambda aside: figure.savefig(aside, dpi=100, format="png"))
