"""Distances of images in the features of EfficientNet-Lite, for the loss of an autoencoder."""

import torch
from einops import reduce
from torch import Tensor, nn

from latent_dmmd.metrics.extractors import block_maps, load_efficientnet_lite
from latent_dmmd.utils.errors import check

NETWORKS = {"lite1": 1, "lite2": 2}
# mean square of pooled features below which it does not divide: 0.03 and more for crops of 48 pixels, 0 for one of 32
MIN_SQUARE = 0.01


def check_networks(names: list[str]) -> None:
    """Raise ConfigError unless these are networks whose distances may be minimised."""
    check("lite0" not in names, "perceptual_networks: lite0 scores the images, so none is trained with it")
    known = bool(names) and len(set(names)) == len(names) and set(names) <= NETWORKS.keys()
    check(known, f"perceptual_networks must be {' or '.join(NETWORKS)}, or both; got {names}")


class PerceptualDistance(nn.Module):
    """Distance of images in the feature maps of an EfficientNet-Lite, trained on ImageNet.

    `forward(x, y)` takes pixels in [-1, 1], with shape (B, 3, H, W), and returns two scalars: the sum over layers of
    the mean squared distance of channel-normalised feature maps (as LPIPS, Zhang et al., 2018), and the mean squared
    distance of pooled features over their mean square. No gradient flows to y.

    Args:
        network: "lite1" or "lite2".

    Raises:
        ImportError: If the packages of the extra `autoencoder` are missing.
    """

    layers = (0, 3, 6, 14, 20)  # the last block at strides 2, 4, 8, 16 and 32, of both networks

    def __init__(self, network: str = "lite2") -> None:
        super().__init__()
        self.net = load_efficientnet_lite(NETWORKS[network])

    def train(self, mode: bool = True) -> "PerceptualDistance":
        return super().train(False)

    def features(self, pixels: Tensor) -> tuple[list[Tensor], Tensor]:
        net = self.net
        maps, h = block_maps(net, pixels, self.layers)
        h = net._swish(net._bn1(net._conv_head(h))).float()
        return [m.float() for m in maps], reduce(h, "b c h w -> b c", "mean")

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            maps_y, pooled_y = self.features(y)
        maps_x, pooled_x = self.features(x)
        distance = x.new_zeros(())
        for a, b in zip(maps_x, maps_y):
            a, b = (m / (m.square().sum(1, keepdim=True) + 1e-6).sqrt() for m in (a, b))
            distance = distance + (a - b).square().sum(1).mean()
        pooled = (pooled_x - pooled_y).square().mean() / pooled_y.square().mean().clamp(min=MIN_SQUARE)
        return distance, pooled
