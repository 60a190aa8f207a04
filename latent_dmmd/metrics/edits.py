"""Scores of edited images against the originals, for inpainting and super-resolution.

    PSNR                 10 log10(255² / mean squared error), over what was made, and over what was given
    perceptual distance  Σ_l mean ‖φ_l(x)/‖φ_l(x)‖ − φ_l(y)/‖φ_l(y)‖‖² over positions of maps of EfficientNet-Lite0, as
                         LPIPS (Zhang et al., 2018) without its learned weights; comparable with nothing published
    diversity            standard deviation over variations of the same image, in grey levels

All on 8-bit images.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latent_dmmd.data.autoencoder import Autoencoder, reconstruct
from latent_dmmd.editing import Editing, SmallerImage, resized
from latent_dmmd.metrics.extractors import block_maps, load_extractor
from latent_dmmd.utils.images import to_pixels, to_uint8

LAYERS = (0, 2, 4, 10, 15)  # the last block at strides 2, 4, 8, 16 and 32


@dataclass(frozen=True)
class EditScores:
    """Means over images and variations.

    Args:
        psnr: Over what was made, in dB.
        perceptual: Perceptual distance over what was made.
        consistency: PSNR over what was given, pooled over images, in dB; None if they have it exactly.
        diversity: Over what was made, in grey levels; None with one variation.
    """

    psnr: float
    perceptual: float
    consistency: float | None
    diversity: float | None


def psnr(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """Of uint8 images (B, 3, H, W), where the mask (B, 1, H, W) is 1, in dB, with shape (B); infinite if equal."""
    error = ((x.float() - y.float()).square().mean(1) * mask[:, 0]).flatten(1).sum(1)
    return 10 * torch.log10(255**2 * mask.flatten(1).sum(1) / error)


def pooled(values: Tensor) -> float:
    """The PSNR, in dB, of the mean squared error of several."""
    return -10 * torch.log10((10 ** (-values / 10)).mean()).item()


@torch.no_grad()
def feature_maps(net: nn.Module, images_uint8: Tensor) -> list[Tensor]:
    """Maps of `LAYERS`, with unit length over channels, of images (B, 3, H, W)."""
    x = F.interpolate(images_uint8.float(), (224, 224), mode="bilinear", antialias=True, align_corners=False)
    maps, _ = block_maps(net, (x - 127) / 128, LAYERS)
    return [F.normalize(m, dim=1) for m in maps]


def perceptual_distance(net: nn.Module, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """Of uint8 images (B, 3, H, W), averaged over the mask (B, 1, H, W), with shape (B).

    Args:
        net: EfficientNet-Lite0.
        x, y: The images.
        mask: 1 where they are compared.
    """
    device = next(net.parameters()).device
    x, y, mask = (a.to(device) for a in (x, y, mask))
    total = torch.zeros(len(x), device=device)
    for a, b in zip(feature_maps(net, x), feature_maps(net, y)):
        weights = F.interpolate(mask.float(), a.shape[-2:], mode="area")
        distance = (a - b).square().sum(1, keepdim=True)
        total += (distance * weights).flatten(1).sum(1) / weights.flatten(1).sum(1)
    return total.cpu()


def random_boxes(count: int, side: int, generator: torch.Generator) -> Tensor:
    """Masks with shape (count, 1, side, side): 1 in a box of a quarter to a half of the side, anywhere."""
    masks = torch.zeros(count, 1, side, side, device="cpu")
    uniform = dict(generator=generator, device="cpu")
    for mask in masks:
        height, width = torch.randint(side // 4, side // 2 + 1, (2,), **uniform).tolist()
        top, left = (int(torch.randint(side - length + 1, (), **uniform)) for length in (height, width))
        mask[:, top : top + height, left : left + width] = 1
    return masks


def smooth_fill(pixels: Tensor, mask: Tensor) -> Tensor:
    """The masked parts filled bicubically from coarser and coarser averages of the others: push-pull (Gortler et al.,
    1996). Pixels (B, 3, H, W), masks (B, 1, H, W)."""
    if not mask.any() or max(pixels.shape[-2:]) == 1:
        return pixels
    share = F.avg_pool2d(1 - mask, 2, ceil_mode=True)
    coarse = F.avg_pool2d(pixels * (1 - mask), 2, ceil_mode=True) / share.clamp(min=1e-6)
    coarse = smooth_fill(coarse, (share == 0).float())
    filled = F.interpolate(coarse, scale_factor=2, mode="bicubic", align_corners=False)
    return torch.where(mask > 0, filled[..., : pixels.shape[-2], : pixels.shape[-1]], pixels)


class EditComparison:
    """The same edits of the same images by several ways.

    Args:
        images_uint8: Originals, with shape (N, 3, H, W), H = W.
        task: "inpaint", random boxes, or "upscale", by `scale`.
        scale: Factor of super-resolution.
        seed: Seed of the boxes.

    Attributes:
        mask: 1 where pixels are made, with shape (N, 1, H, W).
        given: What is given: images with grey boxes, or small ones, uint8.
    """

    def __init__(self, images_uint8: Tensor, task: str, scale: int = 4, seed: int = 0) -> None:
        if task not in ("inpaint", "upscale"):
            raise ValueError(f"task must be 'inpaint' or 'upscale'; got {task!r}")
        self.originals, self.task = images_uint8, task
        count, side = len(images_uint8), images_uint8.shape[-1]
        if task == "inpaint":
            self.mask = random_boxes(count, side, torch.Generator().manual_seed(seed))
            grey = torch.full_like(images_uint8, 128)
            self.given = torch.where(self.mask > 0, grey, images_uint8)
        else:
            self.mask = torch.ones(count, 1, side, side, device="cpu")
            self.given = to_uint8(resized(to_pixels(images_uint8), side // scale))
        self.net = load_extractor().net

    def plain(self, vae: Autoencoder | None) -> dict[str, Tensor]:
        """Edits without any model, uint8, by name; and the originals through the autoencoder, as a yardstick."""
        given, side = to_pixels(self.given), self.mask.shape[-1]
        if self.task == "inpaint":
            sets = {"smooth fill": to_uint8(smooth_fill(given, self.mask))}
        else:
            enlarged = resized(given, side)
            sets = {"bicubic": to_uint8(enlarged), "back-projection": to_uint8(SmallerImage(given)(enlarged))}
        if vae is not None:
            chunks = [reconstruct(vae, chunk) for chunk in self.originals.split(16)]
            sets["reconstruction"] = self.composed(torch.cat(chunks))
        return sets

    def edited(self, pipe: Editing, **options) -> Tensor:
        """What an editing pipeline makes of what is given, uint8; `options` of its call."""
        masks = {"mask_image": self.mask} if self.task == "inpaint" else {}
        images = pipe(image=self.given / 255, **masks, output_type="pt", **options).images
        return to_uint8(images.cpu() * 2 - 1)

    def composed(self, images_uint8: Tensor) -> Tensor:
        """Images with the given pixels put in, for inpainting; as they are, for super-resolution."""
        return torch.where(self.mask > 0, images_uint8, self.given) if self.task == "inpaint" else images_uint8

    def score(self, edited: Tensor) -> EditScores:
        """Scores of edited images (N V, 3, H, W), the V variations of an image following each other."""
        count = len(edited) // len(self.originals)
        originals, given, mask = (a.repeat_interleave(count, 0) for a in (self.originals, self.given, self.mask))
        if self.task == "inpaint":
            consistency = psnr(edited, given, 1 - mask)
        else:
            small = to_uint8(resized(to_pixels(edited), given.shape[-1]))
            consistency = psnr(small, given, torch.ones_like(given[:, :1]))
        variations = edited.unflatten(0, (-1, count)).float()
        diversity = None
        if count > 1:  # pooled over images: the larger box weighs more
            deviation = variations.std(1).mean(1, keepdim=True) * self.mask
            diversity = (deviation.sum() / self.mask.sum()).item()
        return EditScores(
            psnr=psnr(edited, originals, mask).mean().item(),
            perceptual=perceptual_distance(self.net, edited, originals, mask).mean().item(),
            consistency=None if consistency.isinf().all() else pooled(consistency),
            diversity=diversity,
        )
