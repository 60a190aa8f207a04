"""Scores of generated images against real ones, computed by torch-fidelity on features of a frozen network.

The Fréchet distance of finite sets is biased upwards, visibly so below 2,048 images, and the bias depends on their
sizes. So every distance is reported with its two sizes, and beside it stands the floor: the distance of two disjoint
sets of real images, which no generator is expected to beat at those sizes.

Nothing is cached on disk: torch-fidelity's cache knows a set by its name only, and would score yesterday's samples.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torch_fidelity import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD
from torch_fidelity.metric_isc import isc_features_to_metric

from latent_dmmd import __version__
from latent_dmmd.metrics.extractors import (
    EXTRACTORS,
    CheckedImages,
    Extractor,
    ImageSet,
    extract_features,
    load_extractor,
)
from latent_dmmd.metrics.reference import Reference, extract_reference, fingerprint
from latent_dmmd.metrics.scores import frechet_distance, score_features
from latent_dmmd.metrics.sets import ScoredImages, check_npz, compression_warnings
from latent_dmmd.utils.files import write_aside

NUM_SCORE_SPLITS = 10
SMALL_BELOW = 2048


@dataclass(frozen=True)
class Evaluation:
    """The scores of one set of generated images.

    Against another program's mean and covariance there is a Fréchet distance only; what needs features is None then.

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
        generated: Name of the generated images.
        reference: Name of the reference images, or of another program's file.
        image_size: Height and width of all images in pixels.
        preprocessing: How the generated images were read; None where that is not known.
        reference_fingerprint: SHA-256 of the reference images, where their features come from a file.
        skipped: Names of images that cannot be read and were left out, of `generated` and of `reference`.
        warnings: What makes the scores hard to compare.
        library_version: Of this library.
    """

    extractor: str
    n_generated: int
    n_reference: int | None
    frechet_distance: float
    floor_distance: float | None
    n_floor: tuple[int, int] | None
    reconstruction_distance: float | None
    kid_mean: float | None
    kid_std: float | None
    kid_subset_size: int | None
    precision: float | None
    recall: float | None
    inception_style_score_mean: float
    inception_style_score_std: float
    seed: int
    seconds: float
    generated: str | None
    reference: str | None
    image_size: tuple[int, int]
    preprocessing: str | None
    reference_fingerprint: str | None
    skipped: dict[str, tuple[str, ...]]
    warnings: list[str]
    library_version: str = __version__

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

    def remarks(self) -> list[str]:
        """Lines to say once: images that were left out, and what makes the scores hard to compare."""
        left_out = [
            f"{len(names)} {name} images cannot be read and are left out: {', '.join(names)}"
            for name, names in self.skipped.items()
            if names
        ]
        return left_out + self.warnings

    def to_json(self) -> str:
        """`as_dict()` as strict JSON, indented."""
        return json.dumps(self.as_dict(), indent=2, allow_nan=False)

    def save(self, path: str | Path) -> None:
        """Write `to_json()` to a file, complete or not at all; its parent folders are made."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_aside(path, lambda aside: aside.write_text(self.to_json() + "\n"))

    def __str__(self) -> str:
        n, m = self.n_generated, "unknown" if self.n_reference is None else self.n_reference
        rows = [(self.distance_name, f"{self.frechet_distance:.4g}", f"n = {n} / {m}")]
        if self.floor_distance is not None:
            rows.append(("  floor, real / real", f"{self.floor_distance:.4g}", "n = {} / {}".format(*self.n_floor)))
        if self.reconstruction_distance is not None:
            rows.append(("  reconstructions / real", f"{self.reconstruction_distance:.4g}", f"n = {m} / {m}"))
        if self.kid_mean is not None:
            rows += [
                ("KID", f"{self.kid_mean:.3g} ± {self.kid_std:.2g}", f"subsets of {self.kid_subset_size}"),
                ("precision", f"{self.precision:.3f}", f"n = {n}"),
                ("recall", f"{self.recall:.3f}", f"n = {m}"),
            ]
        score = f"{self.inception_style_score_mean:.4g} ± {self.inception_style_score_std:.2g}"
        rows.append(("inception-style score", score, f"n = {n}"))
        lines = [f"{self.extractor}: {n} generated / {m} real images, {self.seconds:.0f} s"]
        lines += [f"  {name:<26}{figure:<20}{note}" for name, figure, note in rows]
        if min(n, *(self.n_floor or ()), self.n_reference or n) < SMALL_BELOW:
            lines.append(f"  Fréchet distances below n = {SMALL_BELOW} are biased upwards: compare at equal n only.")
        return "\n".join(lines)


def evaluate(
    generated: ImageSet | ScoredImages,
    reference: ImageSet | ScoredImages | Reference,
    *,
    extractor: Extractor = "efficientnet-lite0",
    inception_weights: str | None = None,
    kid_subset_size: int | None = None,
    batch_size: int | None = None,
    reconstructions: ImageSet | None = None,
    floor_images: ImageSet | None = None,
    save_reference: str | None = None,
    seed: int = 0,
) -> Evaluation:
    """Score generated images against real ones; the features of each set are extracted once.

    The floor takes two disjoint sets from a random permutation of real images: one as large as `generated`, one as
    large as `reference`, or at most half of the images each.

    Args:
        generated: Generated images: `generated[i]` is uint8 RGB in [0, 255], with shape (3, H, W).
        reference: Real images, of the same shape, or features of them. A uint8 tensor (N, 3, H, W) is also a set.
        extractor: `efficientnet-lite0`, `efficientnet-lite1` or `inception-v3`.
        inception_weights: Path of torch-fidelity's weights of Inception-v3; downloaded once when None.
        kid_subset_size: Images of each set in one of the 100 subsets of KID; when None min(1000, n // 2), where n
            is the size of the smaller set.
        batch_size: Images in one forward pass; when None 64 on a GPU and 4, which is faster, on a CPU.
        reconstructions: decode(encode(reference)), in the same order, for the distance that the autoencoder alone
            leaves.
        floor_images: A larger pool of real images for the floor; the reference itself when None.
        save_reference: An .npz file for the features of the reference, which is then a `reference` for later calls.
        seed: Seed of the floor's sets, the subsets of KID and the splits of the inception-style score.

    Raises:
        ValueError: If a set has fewer than 4 images or another image size, `reconstructions` another length than
            `reference`, or `kid_subset_size` is no number from 2 to n; if features of real images are of another
            network, or reconstructed or saved again; and as `load_extractor`.
        ImportError, OSError: As `load_extractor`; OSError if features cannot be saved.
    """
    start = time.perf_counter()
    if not isinstance(generated, ScoredImages):
        generated = ScoredImages(generated)
    if not isinstance(reference, ScoredImages | Reference):
        reference = ScoredImages(reference)
    shape = common_shape(generated, reference, extractor, reconstructions, save_reference)
    checked = CheckedImages(generated, "generated", shape)
    pool = None if floor_images is None else CheckedImages(floor_images, "floor", shape)
    kid_subset_size = checked_subset_size(kid_subset_size, len(checked), reference.num_images)

    net = load_extractor(extractor, inception_weights)
    extract = partial(extract_features, net=net, batch_size=batch_size)
    if isinstance(reference, ScoredImages):
        images, reference = reference, extract_reference(reference, extractor, extract, reconstructions)
        if save_reference is not None:
            save_features(reference, images, save_reference)
    features, logits = extract(checked)
    # an empty split would score NaN
    score = isc_features_to_metric(logits, splits=min(NUM_SCORE_SPLITS, len(checked)), rng_seed=seed)
    return Evaluation(
        extractor=extractor,
        n_generated=len(checked),
        n_reference=reference.num_images,
        **scores_against(reference, features, kid_subset_size, seed),
        **floor_of(reference, pool, len(checked), extract, seed),
        kid_subset_size=kid_subset_size,
        inception_style_score_mean=score[KEY_METRIC_ISC_MEAN],
        inception_style_score_std=score[KEY_METRIC_ISC_STD],
        seed=seed,
        image_size=tuple(shape[1:]),
        **origins(generated, reference),
        seconds=round(time.perf_counter() - start, 1),
    )


def common_shape(
    generated: ScoredImages,
    reference: ScoredImages | Reference,
    extractor: Extractor,
    reconstructions: ImageSet | None,
    save_reference: str | None,
) -> torch.Size:
    """The shape (3, H, W) that all images must have. Raises ValueError or OSError for sets that do not go together."""
    if isinstance(reference, Reference):
        if reconstructions is not None or save_reference is not None:
            raise ValueError(f"{reference.path} holds features; pass the images to reconstruct or save them")
        shape = CheckedImages(generated, "generated").shape
        reference.check(extractor, tuple(shape[1:]))
    else:
        shape = CheckedImages(reference, "reference").shape
        if reconstructions is not None and len(reconstructions) != len(reference):
            raise ValueError(f"{len(reconstructions)} reconstructions for {len(reference)} reference images; pass all")
    if save_reference is not None:
        check_npz(save_reference)
    return shape


def save_features(reference: Reference, images: ScoredImages, path: str) -> None:
    """Write features with a fingerprint of their images. Raises OSError if they cannot be written."""
    metadata = replace(reference.metadata, fingerprint=fingerprint(images))
    replace(reference, metadata=metadata).save(path)


def checked_subset_size(kid_subset_size: int | None, n_generated: int, n_reference: int | None) -> int | None:
    """Images of a subset of KID, as `evaluate` says; None where there are no features of real images."""
    if n_reference is None:
        if kid_subset_size is not None:
            raise ValueError("mu and sigma give no KID; leave out --kid_subset_size, or pass the images")
        return None
    n = min(n_generated, n_reference)
    kid_subset_size = min(1000, n // 2) if kid_subset_size is None else kid_subset_size
    if kid_subset_size > n:
        raise ValueError(f"kid_subset_size={kid_subset_size} exceeds {n} images; pass --kid_subset_size {n // 2}")
    if kid_subset_size < 2:
        raise ValueError(f"kid_subset_size={kid_subset_size} leaves no pairs; pass --kid_subset_size {n // 2}")
    return kid_subset_size


def scores_against(
    reference: Reference, features: Tensor, kid_subset_size: int | None, seed: int
) -> dict[str, float | None]:
    """Scores of generated features (N, d) against real ones, as fields of `Evaluation`."""
    if reference.features is None:
        scores = dict.fromkeys(("kid_mean", "kid_std", "precision", "recall"))
        return scores | {"frechet_distance": reference.frechet_distance(features), "reconstruction_distance": None}
    scores = score_features(features, reference.features, kid_subset_size=kid_subset_size, seed=seed)
    return scores | {"reconstruction_distance": reference.metadata.reconstruction_distance}


def floor_of(
    reference: Reference,
    pool: CheckedImages | None,
    n_generated: int,
    extract: Callable[[Dataset], tuple[Tensor, ...]],
    seed: int,
) -> dict[str, float | tuple[int, int] | None]:
    """The floor and its sizes, as fields of `Evaluation`: of a pool of real images, or of the reference itself."""
    if reference.features is None:
        return {"floor_distance": None, "n_floor": None}
    num_real = reference.num_images if pool is None else len(pool)
    n_floor = (min(n_generated, num_real // 2), min(reference.num_images, num_real // 2))
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(num_real, generator=draw, device="cpu")[: sum(n_floor)]
    features = reference.features[order] if pool is None else extract(Subset(pool, order.tolist()))[0]
    return {"floor_distance": frechet_distance(*features.split(n_floor)), "n_floor": n_floor}


def origins(generated: ScoredImages, reference: Reference) -> dict:
    """Where the two sets come from, as fields of `Evaluation`."""
    ours = reference.metadata
    if ours is None:
        warnings = [f"{reference.path} does not say which images and network its mu and sigma are of, nor how many"]
    else:
        warnings = compression_warnings(generated.file_format, ours.file_format)
    return {
        "generated": generated.name,
        "reference": reference.name,
        "preprocessing": generated.preprocessing,
        "reference_fingerprint": None if ours is None else ours.fingerprint,
        "skipped": {"generated": generated.skipped, "reference": () if ours is None else ours.skipped},
        "warnings": warnings,
    }
