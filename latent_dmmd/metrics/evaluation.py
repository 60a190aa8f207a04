"""Scores of generated images against real ones, computed by torch-fidelity on features of a frozen network.

The Fréchet distance of finite sets is biased upwards, visibly so below 2,048 images, and the bias depends on their
sizes. So every distance is reported with its two sizes, and beside it stands the floor: the distance of two disjoint
sets of real images, which no generator is expected to beat at those sizes.

Nothing is cached on disk: torch-fidelity's cache knows a set by its name only, and would score yesterday's samples.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Subset
from torch_fidelity import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD
from torch_fidelity.metric_isc import isc_features_to_metric

from latent_dmmd.metrics.extractors import (
    EXTRACTORS,
    CheckedImages,
    Extractor,
    ImageSet,
    extract_features,
    load_extractor,
)
from latent_dmmd.metrics.scores import frechet_distance, score_features
from latent_dmmd.utils.files import write_aside

NUM_SCORE_SPLITS = 10
SMALL_BELOW = 2048


@dataclass(frozen=True)
class Evaluation:
    """The scores of one set of generated images.

    Args:
        extractor: The network whose features were compared, a key of `EXTRACTORS`.
        n_generated: Number of generated images.
        n_reference: Number of real images they were compared with.
        frechet_distance: Fréchet distance of generated and reference images, ≥ 0 up to rounding.
        floor_distance: Fréchet distance of two disjoint sets of real images.
        n_floor: Sizes of these two sets, which stand for the generated and for the reference images.
        reconstruction_distance: Fréchet distance of the autoencoder's reconstructions of the reference images and
            these, n_reference each; None without an autoencoder.
        kid_mean: Mean over subsets of the unbiased MMD², which may be slightly negative.
        kid_std: Its standard deviation over subsets.
        kid_subset_size: Images of each set in one subset.
        precision: Share of generated images near real ones, in [0, 1].
        recall: Share of real images near generated ones, in [0, 1].
        inception_style_score_mean: Mean over splits of the generated images, in [1, number of classes].
        inception_style_score_std: Its standard deviation over splits.
        seed: Seed of the floor's sets, the subsets and the splits.
        seconds: Time taken.
    """

    extractor: str
    n_generated: int
    n_reference: int
    frechet_distance: float
    floor_distance: float
    n_floor: tuple[int, int]
    reconstruction_distance: float | None
    kid_mean: float
    kid_std: float
    kid_subset_size: int
    precision: float
    recall: float
    inception_style_score_mean: float
    inception_style_score_std: float
    seed: int
    seconds: float

    @property
    def distance_name(self) -> str:
        """`fd_effnetlite0`, or `fid_inception_v3` on the features of the FID."""
        return EXTRACTORS[self.extractor].distance_name

    def as_dict(self) -> dict:
        """The fields, where every Fréchet distance carries the name of its features, e.g. `fd_effnetlite0_floor`."""
        suffixes = {"frechet_distance": "", "floor_distance": "_floor", "reconstruction_distance": "_reconstruction"}
        return {
            self.distance_name + suffixes[name] if name in suffixes else name: value
            for name, value in vars(self).items()
        }

    def to_json(self) -> str:
        """`as_dict()` as strict JSON, indented."""
        return json.dumps(self.as_dict(), indent=2, allow_nan=False)

    def save(self, path: str | Path) -> None:
        """Write `to_json()` to a file, complete or not at all; its parent folders are made."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_aside(path, lambda aside: aside.write_text(self.to_json() + "\n"))

    def __str__(self) -> str:
        sizes = (self.n_generated, self.n_reference)
        rows = [
            (self.distance_name, f"{self.frechet_distance:.4g}", "n = {} / {}".format(*sizes)),
            ("  floor, real / real", f"{self.floor_distance:.4g}", "n = {} / {}".format(*self.n_floor)),
        ]
        if self.reconstruction_distance is not None:
            n = f"n = {self.n_reference} / {self.n_reference}"
            rows.append(("  reconstructions / real", f"{self.reconstruction_distance:.4g}", n))
        kid = f"{self.kid_mean:.3g} ± {self.kid_std:.2g}"
        score = f"{self.inception_style_score_mean:.4g} ± {self.inception_style_score_std:.2g}"
        rows += [
            ("KID", kid, f"subsets of {self.kid_subset_size}"),
            ("precision", f"{self.precision:.3f}", f"n = {self.n_generated}"),
            ("recall", f"{self.recall:.3f}", f"n = {self.n_reference}"),
            ("inception-style score", score, f"n = {self.n_generated}"),
        ]
        lines = [f"{self.extractor}: {sizes[0]} generated / {sizes[1]} real images, {self.seconds:.0f} s"]
        lines += [f"  {name:<26}{figure:<20}{note}" for name, figure, note in rows]
        if min(*sizes, *self.n_floor) < SMALL_BELOW:
            lines.append(f"  Fréchet distances below n = {SMALL_BELOW} are biased upwards: compare at equal n only.")
        return "\n".join(lines)


def evaluate(
    generated: ImageSet,
    reference: ImageSet,
    *,
    extractor: Extractor = "efficientnet-lite0",
    inception_weights: str | None = None,
    kid_subset_size: int | None = None,
    batch_size: int = 64,
    reconstructions: ImageSet | None = None,
    floor_images: ImageSet | None = None,
    seed: int = 0,
) -> Evaluation:
    """Score generated images against real ones; the features of each set are extracted once.

    The floor takes two disjoint sets from a random permutation of real images: one as large as `generated`, one as
    large as `reference`, or at most half of the images each.

    Args:
        generated: Generated images: `generated[i]` is uint8 RGB in [0, 255], with shape (3, H, W).
        reference: Real images, of the same shape. A uint8 tensor (N, 3, H, W) is also a set.
        extractor: `efficientnet-lite0` or `inception-v3`.
        inception_weights: Path of torch-fidelity's weights of Inception-v3; downloaded once when None.
        kid_subset_size: Images of each set in one of the 100 subsets of KID; when None min(1000, n // 2), where n
            is the size of the smaller set.
        batch_size: Images in one forward pass.
        reconstructions: decode(encode(reference)), in the same order, for the distance that the autoencoder alone
            leaves.
        floor_images: A larger pool of real images for the floor; the reference itself when None.
        seed: Seed of the floor's sets, the subsets of KID and the splits of the inception-style score.

    Raises:
        ValueError: If a set has fewer than 4 images or another image size, `reconstructions` another length than
            `reference`, or `kid_subset_size` is no number from 2 to n; and as `load_extractor`.
        ImportError, OSError: As `load_extractor`.
    """
    start = time.perf_counter()
    reference = CheckedImages(reference, "reference")
    generated = CheckedImages(generated, "generated", reference.shape)
    n_generated, n_reference = len(generated), len(reference)
    if reconstructions is not None:
        reconstructions = CheckedImages(reconstructions, "reconstructed", reference.shape)
        if len(reconstructions) != n_reference:
            raise ValueError(f"{len(reconstructions)} reconstructions for {n_reference} reference images; pass all")
    pool = reference if floor_images is None else CheckedImages(floor_images, "floor", reference.shape)
    n = min(n_generated, n_reference)
    kid_subset_size = min(1000, n // 2) if kid_subset_size is None else kid_subset_size
    if kid_subset_size > n:
        raise ValueError(f"kid_subset_size={kid_subset_size} exceeds {n} images; pass --kid_subset_size {n // 2}")
    if kid_subset_size < 2:
        raise ValueError(f"kid_subset_size={kid_subset_size} leaves no pairs; pass --kid_subset_size {n // 2}")

    net = load_extractor(extractor, inception_weights)
    features, logits = extract_features(generated, net, batch_size)
    features_real, _ = extract_features(reference, net, batch_size)

    n_floor = (min(n_generated, len(pool) // 2), min(n_reference, len(pool) // 2))
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(pool), generator=draw, device="cpu")[: sum(n_floor)]
    if floor_images is None:
        features_floor = features_real[order]
    else:
        features_floor, _ = extract_features(Subset(pool, order.tolist()), net, batch_size)
    reconstruction_distance = None
    if reconstructions is not None:
        features_reconstructed, _ = extract_features(reconstructions, net, batch_size)
        reconstruction_distance = frechet_distance(features_reconstructed, features_real)

    scores = score_features(features, features_real, kid_subset_size=kid_subset_size, seed=seed)
    # an empty split would score NaN
    score = isc_features_to_metric(logits, splits=min(NUM_SCORE_SPLITS, n_generated), rng_seed=seed)
    return Evaluation(
        extractor=extractor,
        n_generated=n_generated,
        n_reference=n_reference,
        **scores,
        floor_distance=frechet_distance(*features_floor.split(n_floor)),
        n_floor=n_floor,
        reconstruction_distance=reconstruction_distance,
        kid_subset_size=kid_subset_size,
        inception_style_score_mean=score[KEY_METRIC_ISC_MEAN],
        inception_style_score_std=score[KEY_METRIC_ISC_STD],
        seed=seed,
        seconds=round(time.perf_counter() - start, 1),
    )
