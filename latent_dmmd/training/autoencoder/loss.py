"""The loss of an autoencoder, in named terms.

With x̂ = decode(noised encode(x)), and e = x̂ − x:

    l1            mean |e|
    squared       w · mean e²
    perceptual    w · Σ_l d_l(x, x̂) on feature maps, as LPIPS (Zhang et al., 2018), mean over networks
    pooled        w · relative squared distance of pooled features, mean over networks
    gradient      w · mean of |e(i + 1, j) − e(i, j)| and |e(i, j + 1) − e(i, j)|
    equivariance  w · mean |decode(half z) − half x|, where half is 2 × 2 average pooling (after EQ-VAE, Kouzelis et
                  al., 2025)
    latent        w · mean over channels of (mean z² − 1)²
    adversarial   − w · mean logit of x̂ by the patch discriminator, which minimises the hinge loss

Terms of weight 0 are left out and cost nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latent_dmmd.data.autoencoder import Autoencoder, mean_of
from latent_dmmd.training.autoencoder.config import AutoencoderTrainingConfig
from latent_dmmd.training.autoencoder.perceptual import PerceptualDistance


def noised(latents: Tensor, config: AutoencoderTrainingConfig, generator: torch.Generator) -> Tensor:
    """Latents (B, C, h, w) with noise: z + a s ε, or (1 − a) z + a s ε (l-DeTok, Yang et al., 2025).

    Here a is uniform in [0, latent_noise], one for each image, and s each channel's standard deviation.
    """
    std = latents.detach().float().std((0, 2, 3), keepdim=True)
    level = config.latent_noise * torch.rand(len(latents), 1, 1, 1, generator=generator, device="cpu")
    noise = (level * torch.randn(latents.shape, generator=generator, device="cpu")).to(std.device) * std
    if config.noise_kind == "interpolate":
        latents = (1 - level.to(std.device)) * latents
    return latents + noise


def gradient_distance(error: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels of an error (B, 3, H, W), over both directions."""
    return (error.diff(dim=3).abs().mean() + error.diff(dim=2).abs().mean()) / 2


class AutoencoderLoss(nn.Module):
    """`forward(vae, pixels, generator)` is the named terms on pixels in [-1, 1], (B, 3, H, W), and x̂.

    Args:
        config: Weights and kinds.

    Raises:
        ImportError: If the packages of a perceptual network are missing.
    """

    def __init__(self, config: AutoencoderTrainingConfig) -> None:
        super().__init__()
        self.config = config
        wanted = config.perceptual_networks if config.perceptual_weight or config.pooled_weight else []
        self.perceptual = nn.ModuleList(map(PerceptualDistance, wanted))

    def forward(self, vae: Autoencoder, pixels: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
        config = self.config
        with torch.set_grad_enabled(config.trains == "both"):
            latents = mean_of(vae.encode(pixels))
        reconstruction = vae.decode(noised(latents, config, generator)).sample
        error = reconstruction.float() - pixels
        terms = {"l1": error.abs().mean(), "squared": config.squared_weight * error.square().mean()}
        if self.perceptual:
            terms |= self.perceptual_terms(reconstruction, pixels)
        if config.gradient_weight:
            terms["gradient"] = config.gradient_weight * gradient_distance(error)
        if config.equivariance_weight:
            terms["equivariance"] = config.equivariance_weight * self.equivariance(vae, latents, pixels)
        if config.latent_weight:
            terms["latent"] = config.latent_weight * (latents.float().square().mean((0, 2, 3)) - 1).square().mean()
        return terms, reconstruction

    def perceptual_terms(self, reconstruction: Tensor, pixels: Tensor) -> dict[str, Tensor]:
        maps, pooled = zip(*(distance(reconstruction, pixels) for distance in self.perceptual))
        maps, pooled = (torch.stack(values).mean() for values in (maps, pooled))
        return {"perceptual": self.config.perceptual_weight * maps, "pooled": self.config.pooled_weight * pooled}

    def equivariance(self, vae: Autoencoder, latents: Tensor, pixels: Tensor) -> Tensor:
        small = vae.decode(F.avg_pool2d(latents, 2)).sample
        return (small.float() - F.avg_pool2d(pixels, 2)).abs().mean()


def hinge_loss(discriminator: nn.Module, pixels: Tensor, reconstruction: Tensor) -> Tensor:
    """What the discriminator minimises: mean max(0, 1 − logit of x) + mean max(0, 1 + logit of x̂)."""
    both = torch.cat([pixels, reconstruction.detach().to(pixels.dtype)])
    real, fake = discriminator(both).float().chunk(2)
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
