"""From a configuration to a network, an objective and a pipeline: DMMD and what it is compared with, one code path."""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from tqdm.auto import tqdm

from latent_dmmd.baselines import DDPM, MMDGAN, FlowMatching, GeneratorAndCritic, VelocityNet
from latent_dmmd.cache import LatentCache, PixelCache
from latent_dmmd.config import Config
from latent_dmmd.data import keyed_generator
from latent_dmmd.discrepancy import get_discrepancy
from latent_dmmd.distillation import OneStep, PairCache, begin_with_features, make_pairs
from latent_dmmd.features import FeatureNet, MeanEmbeddings
from latent_dmmd.flow import calibrate_on_particles, measure_embeddings, measure_gradients
from latent_dmmd.forward import get_forward_process
from latent_dmmd.latents import Autoencoder
from latent_dmmd.objective import DMMD, Objective, RunningEmbeddings, WitnessMatching
from latent_dmmd.pipeline import LatentDMMDPipeline, LatentPipeline, LatentSchedulerPipeline, load_pipeline
from latent_dmmd.utils.errors import ConfigError

NUM_MEASURED_PAIRS, NUM_CALIBRATION_PARTICLES = 128, 64


def build_network(config: Config, shape: tuple[int, int, int], num_classes: int = 0) -> nn.Module:
    """What is trained on particles of shape (C, h, w). Raises ConfigError if they are not square or do not fit it."""
    channels, height, width = shape
    net = config.feature_net
    sizes = dict(
        sample_size=height,
        in_channels=channels,
        patch_size=net.patch_size,
        block_out_channels=tuple(net.block_out_channels),
        layers_per_block=net.layers_per_block,
        attention_levels=tuple(net.attention_levels),
        conv_in_kernel=net.conv_in_kernel,
    )
    features = dict(num_features=net.num_features, squared_norm=net.squared_norm)
    try:
        if height != width:
            raise ValueError(f"latents must be square; got {height}x{width}")
        if config.objective.name in ("flow-matching", "ddpm"):
            return VelocityNet(**sizes)
        if config.objective.name == "one-step":
            generator = VelocityNet(**sizes)
            begin_with_features(generator, load_teacher(config, shape).feature_net)
            return generator
        if config.objective.name == "mmd-gan":
            return GeneratorAndCritic(VelocityNet(**sizes), FeatureNet(**sizes, **features))
        return FeatureNet(**sizes, **features, num_classes=num_classes)
    except ValueError as error:
        raise ConfigError(f"feature_net: {error}") from error


def load_teacher(config: Config, shape: tuple[int, int, int]) -> LatentDMMDPipeline:
    """The pipeline that a generator is distilled from. Raises ConfigError if it is none, or of other particles."""
    folder = config.objective.teacher
    try:
        teacher = load_pipeline(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"objective.teacher: {error}") from error
    if not isinstance(teacher, LatentDMMDPipeline):
        raise ConfigError(f"objective.teacher: {folder} holds a {type(teacher).__name__}, not a LatentDMMDPipeline")
    net = teacher.feature_net.config
    if (net.in_channels, net.sample_size, net.sample_size) != shape:
        raise ConfigError(f"objective.teacher: {folder} has particles of another shape than {shape}")
    return teacher


def teacher_pairs(config: Config, folder: Path) -> PairCache:
    """Pairs of the teacher's flow, kept in the run folder. Raises OSError if they cannot be written."""
    options, teacher = config.objective, load_pipeline(config.objective.teacher)
    how = dict(num_inference_steps=options.teacher_steps, sampler=options.teacher_sampler)
    return make_pairs(teacher, folder / "pairs", options.num_pairs, config.training.seed, **how)


def begin_with(network: nn.Module, folder: str) -> None:
    """Give a network the weights of a saved pipeline's; what only one of them has for classes is left as it is.

    Raises ConfigError if there is no pipeline, or its network is another.
    """
    try:
        weights = load_pipeline(folder).net.state_dict()
    except (OSError, ValueError) as error:
        raise ConfigError(f"training.init_from: {error}") from error
    ours, extra = network.state_dict(), "class_embedding.weight"
    weights = {name: weight for name, weight in weights.items() if name != extra or name in ours}
    fits = weights.keys() | {extra} == ours.keys() | {extra}
    if not fits or any(weight.shape != ours[name].shape for name, weight in weights.items()):
        raise ConfigError(
            f"training.init_from: the network of {folder} is another than the one that feature_net describes"
        )
    network.load_state_dict(weights, strict=False)


def build_objective(config: Config, network: nn.Module, averaged_net: nn.Module) -> Objective:
    """The objective that the configuration names."""
    options = config.objective
    common = (network, get_forward_process(options.forward_process), options.num_noise_levels)
    discrepancy = get_discrepancy(**options.discrepancy_options())
    penalty = dict(gradient_weight=options.gradient_weight, gradient_center=options.gradient_center)
    if options.name == "flow-matching":
        return FlowMatching(*common)
    if options.name == "ddpm":
        return DDPM(*common)
    if options.name == "one-step":
        teacher = load_pipeline(options.teacher) if options.witness_weight else None
        return OneStep(*common, teacher=teacher, witness_weight=options.witness_weight)
    if options.name == "mmd-gan":
        return MMDGAN(*common, **penalty, discrepancy=discrepancy)
    if options.name == "dmmd":
        return DMMD(*common, **penalty, feature_weight=options.feature_weight, discrepancy=discrepancy)
    return WitnessMatching(
        *common,
        averaged_net=averaged_net,
        mean_embeddings=options.mean_embeddings,
        momentum=options.momentum,
        refresh_every=options.refresh_every,
        discrepancy=discrepancy,
        num_points=options.num_points,
        segment=options.segment,
        num_classes=network.config.num_classes,
    )


def build_pipeline(
    config: Config,
    objective: Objective,
    averaged_net: nn.Module,
    vae: Autoencoder | None,
    cache: LatentCache | PixelCache,
    device: torch.device,
    class_names: tuple[str, ...] = (),
) -> LatentPipeline:
    """The pipeline of a trained network, whose averaged weights it uses."""
    latents = dict(vae=vae, latents_mean=cache.channel_mean.tolist(), latents_std=cache.channel_std.tolist())
    name = config.objective.name
    if name in ("flow-matching", "one-step"):
        return LatentSchedulerPipeline(averaged_net, FlowMatchEulerDiscreteScheduler(), **latents)
    if name == "mmd-gan":
        return LatentSchedulerPipeline(averaged_net.generator, FlowMatchEulerDiscreteScheduler(), **latents)
    if name == "ddpm":
        # particles leave [-1, 1]; "trailing" spacing starts at the last time, where particles are noise
        options = dict(clip_sample=False, timestep_spacing="trailing")
        return LatentSchedulerPipeline(
            averaged_net, DDIMScheduler.from_config(DDPMScheduler().config, **options), **latents
        )
    embeddings = embeddings_for_sampling(objective, averaged_net, cache, config, device)
    return LatentDMMDPipeline(averaged_net, embeddings, **latents, class_names=list(class_names) or None)


@torch.no_grad()
def embeddings_for_sampling(
    objective: Objective,
    feature_net: FeatureNet,
    cache: LatentCache | PixelCache,
    config: Config,
    device: torch.device,
) -> MeanEmbeddings:
    """The stored mean embeddings: the running ones where the objective keeps them, measured on the data otherwise; and
    the scale of their witness's gradient, measured on the data."""
    levels, options, num_classes = objective.levels, config.objective, len(cache.members)
    means_only = objective.discrepancy.needs_means_only
    embeddings = MeanEmbeddings(
        len(levels),
        feature_net.config.num_features,
        num_points=0 if means_only else options.num_points,
        forward_process=options.forward_process,
        discrepancy=options.discrepancy_options(),
        num_classes=num_classes,
    ).to(device)
    embeddings.levels.copy_(levels)
    embeddings.displacement.copy_(objective.process.displacement(levels))
    source = getattr(objective, "source", None)
    running = isinstance(source, RunningEmbeddings) and bool(source.num_updates.all())
    num_pairs = options.num_points if not (running or means_only) else NUM_MEASURED_PAIRS
    labels = [*range(num_classes), None]
    progress = tqdm(total=len(labels) * len(levels), desc="measuring the witness", unit="level")
    still = set()
    for row, label in enumerate(labels):
        of_class, gradient_norm = embeddings.of_class(label), []
        net = partial(feature_net, label=label) if num_classes else feature_net
        for k in range(len(levels)):
            pairs = draw_pairs(objective, cache, k, num_pairs, config, label)
            pairs = [tuple(x.to(device) for x in pair) for pair in pairs]
            at = row * len(levels) + k
            means = (source.clean[at], source.noisy[at]) if running else None
            clean, noisy = means or measure_embeddings(net, pairs, levels[k], objective.discrepancy)
            of_class.clean[k], of_class.noisy[k] = clean, noisy
            scale, norm = measure_gradients(net, pairs, levels[k], of_class.at_level(k).stored)
            of_class.gradient_scale[k] = scale
            gradient_norm.append(norm)
            progress.update()
        still |= {f"{t:.2f}" for t, scale in zip(levels.tolist(), of_class.gradient_scale.tolist()) if scale == 0}
        generator = keyed_generator(config.training.seed, 0, len(levels))
        shape = (NUM_CALIBRATION_PARTICLES, *pairs[0][0].shape[1:])
        z = torch.randn(shape, generator=generator, device="cpu").to(device)
        calibrate_on_particles(net, of_class, gradient_norm, z)
    if still:
        at = ", ".join(sorted(still))
        print(f"the witness does not point towards the data at t = {at}: train longer", file=sys.stderr)
    return embeddings


def draw_pairs(
    objective: Objective,
    cache: LatentCache | PixelCache,
    k: int,
    num_pairs: int,
    config: Config,
    label: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of (x_0, x_t) of level k, of one class or of any if None, a function of the seed and the level."""
    generator = keyed_generator(config.training.seed, 0, k)
    for size in map(len, torch.arange(num_pairs, device="cpu").split(32)):
        x_0 = cache.draw(size, generator, label)
        eps = torch.randn(x_0.shape, generator=generator, device="cpu")
        yield x_0, objective.process.sample(x_0, objective.levels[k].cpu().expand(size), eps)
