"""Scores of the sets of a comparison: features of real and generated images, and the distances between them.

The training images give two disjoint halves A and B of as many images as are generated. Against held-out images, A and
B themselves are a floor at equal n, and their reconstructions are what perfect latents would score. Against training
images, a generated set is held against A and B, and the reconstructions of A against B and of B against A.
"""

import hashlib
import json
import statistics
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset, Subset

from latent_dmmd.data.autoencoder import autoencoder_folder, load_autoencoder
from latent_dmmd.experiments.compare import Comparison
from latent_dmmd.experiments.exports import disjoint_halves, weights_hash
from latent_dmmd.metrics.extractors import CheckedImages, Reconstructions, images_at_once, load_extractor
from latent_dmmd.metrics.scores import density_and_coverage, frechet_distance, memorised_share, score_features
from latent_dmmd.utils.files import write_aside
from latent_dmmd.utils.process import default_device

NUM_SHOWN = 32


class Scorer:
    """Scores sets by the networks of a comparison; what it needs is loaded when it is first used.

    Args:
        comparison: Whose real images and networks these are.
    """

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison

    @cached_property
    def nets(self) -> list[torch.nn.Module]:
        """The networks, the main one first."""
        return [load_extractor(name) for name in self.comparison.extractors]

    @cached_property
    def real(self) -> list[dict[str, Tensor]]:
        """Features of real images by each network, see `real_features`."""
        return real_features(self.comparison, self.features)

    @torch.no_grad()
    def features(self, images: Dataset | Tensor) -> list[Tensor]:
        """Features (N, d) of uint8 images by each network; every image is read, or made, once."""
        found, at_once = [[] for _ in self.nets], images_at_once(self.nets[0])
        for first in range(0, len(images), at_once):
            last = min(first + at_once, len(images))
            batch = torch.stack([images[i] for i in range(first, last)])
            for net, features in zip(self.nets, found):
                features.append(net(batch.to(next(net.parameters()).device))[0].float().cpu())
        return [torch.cat(features) for features in found]

    def made_for(self, source: str) -> dict[str, str]:
        """What a file of features of generated images says of itself; `source` is what makes the images."""
        config = self.comparison.config
        made_for = {name: str(getattr(config, name)) for name in ("num_images", "batch_size")}
        return made_for | {"extractors": " ".join(self.comparison.extractors), "pipeline": source}

    def make_set(self, path: Path, label: str, seed: int, draw: Callable[[int, torch.Generator], Tensor], source: str):
        """Write features of generated images, and the first images, unless the file holds this set.

        Args:
            path: The file.
            label: What it is called.
            seed: The sampling seed.
            draw: From a number and a generator to uint8 images; called for at most `batch_size` at once.
            source: What makes them, such as a pipeline.
        """
        config, made_for = self.comparison.config, self.made_for(source)
        if holds(path, made_for):
            return
        print(f"{label}, seed {seed}: {config.num_images} images")
        generator, parts, shown = torch.Generator().manual_seed(seed), [], []
        for size in batch_sizes(config.num_images, config.batch_size):
            images = draw(size, generator)
            parts.append(self.features(images))
            shown.append(images[: NUM_SHOWN - sum(map(len, shown))].clone())
        tensors = {f"features_{i}": torch.cat(features) for i, features in enumerate(zip(*parts))}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_aside(path, partial(save_file, {**tensors, "images": torch.cat(shown).contiguous()}, metadata=made_for))

    def score_set(self, path: Path) -> list[dict[str, float]]:
        """Scores of a generated set by each network."""
        tensors = load_file(path)
        return [score_generated(tensors[f"features_{i}"], real) for i, real in enumerate(self.real)]

    def context(self) -> dict[str, dict]:
        """Scores of real and of reconstructed images by each network, by its name."""
        generated = self.comparison.config.num_images
        return {name: context_of(real, generated) for name, real in zip(self.comparison.extractors, self.real)}


def batch_sizes(count: int, largest: int) -> list[int]:
    """Sizes of the fewest batches, as equal as possible."""
    batches = -(-count // largest)
    return [count // batches + (i < count % batches) for i in range(batches)]


def holds(path: Path, made_for: dict[str, str]) -> bool:
    """Whether a file of tensors is there and was made for these settings."""
    if not path.exists():
        return False
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    return all(metadata.get(name) == value for name, value in made_for.items())


def seen_by(comparison: Comparison) -> str:
    """A short hash of what features of real images follow from: the images, as they are read, and the autoencoder."""
    vae = comparison.entries[comparison.config.dmmd].autoencoder.name_or_path
    weights = weights_hash(folder) if (folder := autoencoder_folder(vae)).is_dir() else vae
    sources = [comparison.load_images(name) for name in (comparison.training_data, comparison.config.reference)]
    seen = [(source.name, source.fingerprint, source.resolution) for source in sources]
    return hashlib.sha256(json.dumps([weights, seen]).encode()).hexdigest()[:16]


def real_features(comparison: Comparison, extract: Callable[[Dataset], list[Tensor]]) -> list[dict[str, Tensor]]:
    """Features by each network of the sets `training`, `reference`, and through the autoencoder
    `reconstructed_reference`, `reconstructed_a` and `reconstructed_b`; extracted where they are missing."""
    config, entry = comparison.config, comparison.entries[comparison.config.dmmd]
    paths = [comparison.folder / f"real-{name}.safetensors" for name in comparison.extractors]
    made_for = {"num_images": str(config.num_images), "seen": seen_by(comparison)}
    if not all(holds(path, made_for) for path in paths):
        training, reference = (
            CheckedImages(comparison.load_images(name), name) for name in (comparison.training_data, config.reference)
        )
        vae = load_autoencoder(entry.autoencoder.name_or_path, default_device())
        halves = disjoint_halves(len(training), config.num_images)
        a, b = (Reconstructions(vae, Subset(training, half.tolist())) for half in halves)
        sets = {
            "training": training,
            "reference": reference,
            "reconstructed_reference": Reconstructions(vae, reference),
        }
        tensors = [{} for _ in paths]
        for name, images in {**sets, "reconstructed_a": a, "reconstructed_b": b}.items():
            print(f"features of real images: {name}, {len(images)}")
            for found, features in zip(tensors, extract(images)):
                found[name] = features
        comparison.folder.mkdir(parents=True, exist_ok=True)
        for path, found in zip(paths, tensors):
            write_aside(path, partial(save_file, found, metadata=made_for))
    return [load_file(path) for path in paths]


def against_reference(features: Tensor, real: dict[str, Tensor]) -> dict[str, float]:
    """Scores of a set against held-out images, and its distance to their reconstructions."""
    scores = score_features(features, real["reference"]) | density_and_coverage(features, real["reference"])
    return scores | {"reconstructed_distance": frechet_distance(features, real["reconstructed_reference"])}


def against_training(features: Tensor, others: list[Tensor]) -> dict[str, float]:
    """Scores of a set against halves of the training images, means over them."""
    return {
        "training_distance": statistics.fmean(frechet_distance(features, other) for other in others),
        "training_coverage": statistics.fmean(density_and_coverage(features, other)["coverage"] for other in others),
    }


def score_generated(features: Tensor, real: dict[str, Tensor]) -> dict[str, float]:
    """Scores of a generated set: against held-out images, their reconstructions, and training images."""
    training = real["training"]
    halves = [training[half] for half in disjoint_halves(len(training), len(features))]
    scores = against_reference(features, real) | against_training(features, halves)
    return scores | {"memorised_share": memorised_share(features, training, real["reference"])}


def context_of(real: dict[str, Tensor], num_images: int) -> dict:
    """What the scores of generated sets are held against.

    Returns:
        `floor_distance`, of disjoint training images of the sizes compared; `reconstruction_distance`, of held-out
        images and their reconstructions; and scores of `real_training` and `reconstructed_training` images as of
        generated ones, means over both halves.
    """
    training, m = real["training"], len(real["reference"])
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(0), device="cpu")
    half = len(training) // 2
    a, b = (training[indices] for indices in disjoint_halves(len(training), num_images))
    both = {"real_training": (a, b), "reconstructed_training": (real["reconstructed_a"], real["reconstructed_b"])}
    context = {
        "num_each": len(a),
        "floor_distance": frechet_distance(training[order[: min(num_images, half)]], training[order[-min(m, half) :]]),
        "reconstruction_distance": frechet_distance(real["reconstructed_reference"], real["reference"]),
    }
    for name, (first, second) in both.items():
        # each half against the other: no image is held against itself
        scores = [against_reference(f, real) | against_training(f, [other]) for f, other in ((first, b), (second, a))]
        context[name] = {key: statistics.fmean(score[key] for score in scores) for key in scores[0]}
    return context
