"""The stages of a comparison: each leaves files in its folder and is skipped where these are there.

A killed comparison goes on where it was:

    measure_costs     costs.json              seconds of a training step of each entry, measured in turns
    train_entries     entries/NAME.yaml       the configuration of each entry, for `scripts/train_latent.py --config`
                      runs/NAME/              its run folder
    generate_sets     samples/…               features of the generated images, and the first images
    score_sets        real.safetensors        features of held-out and training images and of reconstructions
    measure_speed     speed.json              seconds of one NFE per image, measured in turns

`summary.py` makes the results of them without further work, and `report.py` the page. Training time is steps times
measured seconds per step: other work on the machine leaves its mark on the wall clock.
"""

import json
from collections.abc import Callable
from functools import cache as cached
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Subset
from torch_fidelity import FeatureExtractorBase

from latent_dmmd.baselines import GaussianFit
from latent_dmmd.data.autoencoder import load_autoencoder, standardise
from latent_dmmd.data.sources import load_images
from latent_dmmd.experiments.compare import GAUSSIAN, CompareConfig, Comparison
from latent_dmmd.experiments.summary import summarise
from latent_dmmd.experiments.workers import in_a_process, sampling_costs, step_costs, train_and_measure
from latent_dmmd.latent_pipeline import FlowOptions, LatentPipeline
from latent_dmmd.metrics.extractors import (
    CheckedImages,
    Reconstructions,
    extract_features,
    load_extractor,
)
from latent_dmmd.metrics.scores import memorised_share, score_features
from latent_dmmd.pipeline import load_pipeline
from latent_dmmd.training.config import save_config
from latent_dmmd.training.setup import load_particles
from latent_dmmd.utils.files import write_aside, write_json
from latent_dmmd.utils.images import to_uint8
from latent_dmmd.utils.process import default_device

NUM_SHOWN = 32


def measure_costs(comparison: Comparison) -> dict[str, dict]:
    """Seconds and parameters of a training step of every entry to train, measured in turns, once."""
    path = comparison.folder / "costs.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if not set(comparison.to_train) <= set(known):
        # all of them again: only figures of one measurement are compared
        known = in_a_process(step_costs, {name: comparison.entries[name] for name in comparison.to_train})
        write_json(path, known)
    return known


def train_entries(comparison: Comparison, costs: dict[str, dict]) -> None:
    """Train every entry to train to its number of steps, each in a process of its own."""
    for name, steps in comparison.num_steps(costs).items():
        config = comparison.entry(name, steps)
        record = comparison.folder / "runs" / name / "trained.json"
        if record.exists() and json.loads(record.read_text())["num_steps"] == steps:
            continue
        print(f"{name}: training, {steps} steps")
        (comparison.folder / "entries").mkdir(parents=True, exist_ok=True)
        save_config(config, comparison.folder / "entries" / f"{name}.yaml")
        peak_mb = in_a_process(train_and_measure, config)
        write_json(record, {"num_steps": steps, "peak_mb": peak_mb})


def generate_sets(comparison: Comparison, costs: dict[str, dict]) -> dict[str, dict[tuple[int, int], Path]]:
    """Generate the sets that are missing, and extract their features; the files of all."""
    config, files = comparison.config, comparison.set_files(comparison.num_steps(costs))
    net = cached(partial(load_extractor, config.extractor))
    for name in config.entries:
        pipe = cached(partial(load_for_sets, comparison.pipeline_folder(name)))
        for label, options in comparison.ways(name).items():
            for (nfe, seed), path in files[label].items():
                draw = partial(generate, pipe, {"num_inference_steps": nfe, **options})
                make_set(config, net, path, f"{label}, {nfe} NFE", seed, draw, config.trained.get(name))
    gaussian = cached(partial(fit_gaussian, comparison))
    for (_, seed), path in files[GAUSSIAN].items():
        make_set(config, net, path, GAUSSIAN, seed, lambda n, generator: gaussian()(n, generator))
    return files


def load_for_sets(folder: Path | str) -> LatentPipeline:
    """A pipeline that takes all particles in one chunk: the exact witness needs no second forward then."""
    pipe = load_pipeline(folder)
    pipe.flow_options = FlowOptions(chunk_size=None)
    return pipe


def generate(pipe: Callable[[], LatentPipeline], sampling: dict, n: int, generator: torch.Generator) -> Tensor:
    """Images in [0, 1], with shape (n, 3, R, R)."""
    return pipe()(n, generator=generator, output_type="pt", **sampling).images


def fit_gaussian(comparison: Comparison) -> Callable[[int, torch.Generator], Tensor]:
    """A sampler of images from the Gaussian fitted to the training latents."""
    name = comparison.config.dmmd
    pipe = load_pipeline(comparison.pipeline_folder(name))
    cache = load_particles(pipe.vae, comparison.load_images(comparison.training_data), comparison.entries[name])
    fit = GaussianFit(standardise(cache.mean[:, 0], cache.channel_mean, cache.channel_std))
    return lambda n, generator: pipe.decode(fit.draw(n, generator).to(pipe.device), "pt")


def make_set(
    config: CompareConfig,
    net: Callable[[], FeatureExtractorBase],
    path: Path,
    label: str,
    seed: int,
    draw: Callable[[int, torch.Generator], Tensor],
    pipeline: str | None = None,
) -> None:
    """Features of generated images, and the first images, in a file.

    Nothing is done if the file holds as many images, of the same loaded pipeline, seen by the same network.
    """
    made_for = {"num_images": str(config.num_images), "extractor": config.extractor}
    if pipeline is not None:
        made_for["pipeline"] = pipeline
    if holds(path, made_for):
        return
    print(f"{label}, seed {seed}: {config.num_images} images")
    images = draw(config.num_images, torch.Generator().manual_seed(seed))
    images_uint8 = to_uint8(images.cpu() * 2 - 1)
    features, _ = extract_features(CheckedImages(images_uint8, label), net())
    tensors = {"features": features, "images": images_uint8[:NUM_SHOWN].contiguous()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, partial(save_file, tensors, metadata=made_for))


def holds(path: Path, made_for: dict[str, str]) -> bool:
    """Whether a file of tensors is there and was made for these settings."""
    if not path.exists():
        return False
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    return all(metadata.get(name) == value for name, value in made_for.items())


def real_features(comparison: Comparison) -> dict[str, Tensor]:
    """Features of real images: `training`, `reference`, and these through the autoencoder (`reconstructions`), and as
    many training images through it as are generated (`reconstructed_training`); extracted where they are missing."""
    config, entry = comparison.config, comparison.entries[comparison.config.dmmd]
    path = comparison.folder / "real.safetensors"
    made_for = {name: str(getattr(config, name)) for name in ("num_images", "extractor", "reference")}
    made_for |= {"training": comparison.training_data, "autoencoder": entry.autoencoder.name_or_path}
    if not holds(path, made_for):
        training, reference = (
            CheckedImages(load_images(name, entry.data.resolution), name)
            for name in (comparison.training_data, config.reference)
        )
        order = torch.randperm(len(training), generator=torch.Generator().manual_seed(0), device="cpu").tolist()
        vae = load_autoencoder(entry.autoencoder.name_or_path, default_device())
        sets = {
            "training": training,
            "reference": reference,
            "reconstructions": Reconstructions(vae, reference),
            "reconstructed_training": Reconstructions(vae, Subset(training, order[: config.num_images])),
        }
        tensors, net = {}, load_extractor(config.extractor)
        for name, images in sets.items():
            print(f"features of real images: {name}, {len(images)}")
            tensors[name] = extract_features(images, net)[0]
        write_aside(path, partial(save_file, tensors, metadata=made_for))
    return load_file(path)


def score_sets(
    files: dict[str, dict[tuple[int, int], Path]], real: dict[str, Tensor]
) -> dict[str, dict[int, dict[str, list[float]]]]:
    """Scores of the generated sets: label to NFE to score to a list over seeds."""
    scores = {}
    for label, sets in files.items():
        for (nfe, _), path in sets.items():
            features = load_file(path)["features"]
            score = score_features(features, real["reference"])
            score |= {"memorised_share": memorised_share(features, real["training"], real["reference"])}
            of = scores.setdefault(label, {}).setdefault(nfe, {name: [] for name in score})
            for name, value in score.items():
                of[name].append(value)
    return scores


def measure_speed(comparison: Comparison) -> dict[str, dict]:
    """Seconds of one NFE per image, without decoding, for every label, and of decoding one; measured in turns."""
    path, entries = comparison.folder / "speed.json", comparison.config.entries
    known = json.loads(path.read_text()) if path.exists() else {}
    ways = {label: (name, options) for name in entries for label, options in comparison.ways(name).items()}
    if not {*ways, "decode"} <= set(known):
        # all of them again: only figures of one measurement are compared
        folders = {name: comparison.pipeline_folder(name) for name in entries}
        known = in_a_process(sampling_costs, folders, ways, comparison.config.dmmd)
        write_json(path, known)
    return known


def run_comparison(comparison: Comparison) -> dict:
    """All stages, and the results."""
    costs = measure_costs(comparison)
    train_entries(comparison, costs)
    files, real = generate_sets(comparison, costs), real_features(comparison)
    return summarise(comparison, costs, score_sets(files, real), real, measure_speed(comparison))
