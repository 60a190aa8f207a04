"""Real images as the scores see them: features that are extracted once and saved.

A file of them is an `.npz` without Python objects:

    features    float32, with shape (N, d): all scores need them but the Fréchet distance
    mu, sigma   their mean and covariance, under the names that pytorch-fid and guided-diffusion use
    metadata    a line of JSON, see `Metadata`

Other programs' files of `mu` and `sigma` serve for the FID alone.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity.metric_fid import fid_features_to_statistics

from latent_dmmd import __version__
from latent_dmmd.metrics.extractors import CheckedImages, Extractor, ImageSet
from latent_dmmd.metrics.scores import distance_of_statistics, frechet_distance
from latent_dmmd.metrics.sets import READING, SAMPLES, ScoredImages, is_npz, load_set, npz_names, read_npz
from latent_dmmd.utils.errors import DataError
from latent_dmmd.utils.files import write_aside

INCEPTION_FEATURES = 2048
ARRAYS = ("features", "mu", "sigma", "metadata")


@dataclass(frozen=True)
class Metadata:
    """What features are of.

    Args:
        extractor: The network, a key of `EXTRACTORS`.
        num_images: N.
        image_size: Height and width in pixels.
        name: What the set is called.
        preprocessing: How its images were read.
        file_format: As of `ScoredImages`.
        skipped: As of `ScoredImages`.
        reconstruction_distance: Fréchet distance of an autoencoder's reconstructions and the images.
        fingerprint: Of the images as they were read, SHA-256 of their shape and bytes.
        library_version: Of the library that extracted them.
    """

    extractor: str
    num_images: int
    image_size: tuple[int, int]
    name: str | None = None
    preprocessing: str | None = None
    file_format: str | None = None
    skipped: tuple[str, ...] = ()
    reconstruction_distance: float | None = None
    fingerprint: str | None = None
    library_version: str = __version__


@dataclass(frozen=True)
class Reference:
    """Features of real images, or their mean and covariance alone.

    Args:
        features: float32, with shape (N, d); None where another program wrote mean and covariance.
        metadata: What they are of; None there.
        statistics: Mean `mu` (d) and covariance `sigma` (d, d) in float64; None where features are known.
        path: The file that they come from.
    """

    features: Tensor | None
    metadata: Metadata | None
    statistics: dict[str, np.ndarray] | None = None
    path: str | None = None

    @property
    def num_images(self) -> int | None:
        """N; None if it is not known."""
        return None if self.features is None else len(self.features)

    @property
    def name(self) -> str | None:
        """What the set is called; the file where that is not known."""
        return self.path if self.metadata is None else self.metadata.name

    def frechet_distance(self, features: Tensor) -> float:
        """The Fréchet distance of features (M, d) and these."""
        if self.features is not None:
            return frechet_distance(features, self.features)
        statistics = {name: value.astype(np.float64) for name, value in fid_features_to_statistics(features).items()}
        return distance_of_statistics(statistics, self.statistics)

    def check(self, extractor: Extractor, image_size: tuple[int, int]) -> None:
        """Raise ValueError unless it can be compared with features of this network and of images of this size."""
        if self.metadata is None:
            if extractor != "inception-v3":
                raise ValueError(
                    f"{self.path} holds mu and sigma of another program, which serve for the FID alone; "
                    "pass --extractor inception-v3, or the images"
                )
            return
        ours = self.metadata
        if ours.extractor != extractor:
            raise ValueError(f"{self.path} holds features of {ours.extractor}; pass --extractor {ours.extractor}")
        if ours.image_size != image_size:
            sizes = [f"{width} × {height}" for height, width in (ours.image_size, image_size)]
            raise ValueError(f"{self.path} is of images of {sizes[0]} pixels, not {sizes[1]}; pass --resolution alike")

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all; its folder is made. Raises OSError if it cannot be written."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {name: value.astype(np.float64) for name, value in fid_features_to_statistics(self.features).items()}
        arrays |= {"features": self.features.numpy(), "metadata": np.array(json.dumps(asdict(self.metadata)))}

        def write(aside: Path) -> None:
            with aside.open("wb") as file:  # numpy would append .npz to a name
                np.savez(file, **arrays)

        write_aside(path, write)


def extract_reference(
    images: ScoredImages,
    extractor: Extractor,
    extract: Callable[[Dataset], tuple[Tensor, ...]],
    reconstructions: ImageSet | None = None,
) -> Reference:
    """Features of real images; of their reconstructions only the Fréchet distance is kept.

    Args:
        images: The images.
        extractor: Name of the network.
        extract: Gives its features of a set, first of all.
        reconstructions: decode(encode(images)), in the same order.

    Raises:
        ValueError: If images have several sizes.
    """
    checked, distance = CheckedImages(images, "reference"), None
    features = extract(checked)[0]
    if reconstructions is not None:
        checked_reconstructions = CheckedImages(reconstructions, "reconstructed", checked.shape)
        distance = frechet_distance(extract(checked_reconstructions)[0], features)
    metadata = Metadata(
        extractor,
        len(images),
        tuple(checked.shape[1:]),
        name=images.name,
        preprocessing=images.preprocessing,
        file_format=images.file_format,
        skipped=images.skipped,
        reconstruction_distance=distance,
    )
    return Reference(features, metadata)


def fingerprint(images: Dataset[Tensor] | Tensor) -> str:
    """SHA-256 of images: of the shape and the bytes of each, in their order."""
    digest = hashlib.sha256()
    for i in range(len(images)):
        image = images[i]
        digest.update(repr(tuple(image.shape)).encode() + image.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def load_real_set(
    name_or_path: str, extractor: Extractor, resolution: int = 256, **options
) -> ScoredImages | Reference:
    """Real images by name, or what is known of them.

    An `.npz` of another program with samples besides `mu` and `sigma` is read as these where the extractor is
    Inception-v3, as guided-diffusion does for the FID, and as samples otherwise.

    Args:
        name_or_path: As of `load_set`, or a file that `load_reference` reads.
        extractor: The network that is to see them.
        resolution: Side of the images in pixels.
        options: Of `load_set`.

    Raises:
        DataError: As `load_set` and `load_reference`.
        ValueError: If a file holds features of another network, or of images of another size.
    """
    if is_npz(name_or_path):
        names = npz_names(name_or_path)
        if "metadata" in names or ("mu" in names and (extractor == "inception-v3" or SAMPLES not in names)):
            reference = load_reference(name_or_path)
            reference.check(extractor, (resolution, resolution))
            return reference
    return load_set(name_or_path, resolution, **options)


def load_reference(path: str | Path) -> Reference:
    """What `Reference.save` wrote, or another program's mean and covariance of Inception-v3 features.

    Raises:
        DataError: If the file is damaged, holds neither, or features of images that were read otherwise.
    """
    arrays = read_npz(path, ARRAYS)
    if "metadata" in arrays:
        return own_reference(path, arrays)
    if not {"mu", "sigma"} <= arrays.keys():
        raise DataError(
            f"{path} holds no features, no mu and sigma, and no {SAMPLES}; it has {', '.join(npz_names(path))}"
        )
    d = INCEPTION_FEATURES
    if [arrays[name].shape for name in ("mu", "sigma")] != [(d,), (d, d)]:
        raise DataError(
            f"mu and sigma of {path} have shapes {arrays['mu'].shape} and {arrays['sigma'].shape}; those of the FID "
            f"have ({d},) and ({d}, {d})"
        )
    statistics = {name: arrays[name].astype(np.float64) for name in ("mu", "sigma")}
    if not all(np.isfinite(value).all() for value in statistics.values()):
        raise DataError(f"mu or sigma of {path} is not finite")
    return Reference(None, None, statistics, str(path))


def own_reference(path: str | Path, arrays: dict[str, np.ndarray]) -> Reference:
    """The reference in the arrays of a file. Raises DataError if they do not fit together."""
    try:
        values = json.loads(str(arrays["metadata"]))
        values |= {name: tuple(values[name]) for name in ("image_size", "skipped")}
        metadata, features = Metadata(**values), arrays["features"]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} is no file of reference features of this version; make it again") from error
    if features.dtype != np.float32 or features.ndim != 2 or len(features) != metadata.num_images:
        raise DataError(f"{path} is damaged: {metadata.num_images} images, features {features.dtype} {features.shape}")
    if not np.isfinite(features).all():
        raise DataError(f"features of {path} are not finite; make it again")
    if metadata.preprocessing not in (None, READING):
        raise DataError(f"{path} is of images that were read otherwise ({metadata.preprocessing}); make it again")
    return Reference(torch.from_numpy(features), metadata, path=str(path))
