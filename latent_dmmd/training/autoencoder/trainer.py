"""Autoencoder, discriminator, averaged weights and optimisers of a configuration, and one step of them."""

from copy import deepcopy

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import Dataset

from latent_dmmd.data.autoencoder import Autoencoder, load_autoencoder
from latent_dmmd.data.pixels import random_crops
from latent_dmmd.nn.autoencoder import PatchDiscriminator, build_autoencoder
from latent_dmmd.training.autoencoder.config import AutoencoderTrainingConfig
from latent_dmmd.training.autoencoder.loss import AutoencoderLoss, hinge_loss
from latent_dmmd.training.metrics_file import check_finite
from latent_dmmd.training.trainer import learning_rate_at
from latent_dmmd.utils.errors import ConfigError

DECODER = ("decoder", "post_quant_conv")  # the parts that see latents; all others make them


def build_networks(config: AutoencoderTrainingConfig) -> tuple[Autoencoder, PatchDiscriminator]:
    """The autoencoder that training starts from, and its discriminator. Raises ConfigError if init_from is none."""
    set_seed(config.seed)
    if config.init_from is None:
        vae = build_autoencoder(config.latent_channels, config.width, config.downsampling)
    else:
        try:
            vae = load_autoencoder(config.init_from).train().requires_grad_(True)
        except ValueError as error:
            raise ConfigError(f"init_from: {error}") from error
    return vae, PatchDiscriminator()


def freeze_encoder(vae: Autoencoder) -> None:
    """Leave the encoder as it is, whatever the optimiser does."""
    for name, part in vae.named_children():
        if name not in DECODER:
            part.eval().requires_grad_(False)


class AutoencoderTrainer:
    """Everything that a step of training changes.

    Args:
        config: What to train.
        vae: The autoencoder to start from.
        discriminator: Of patches of its reconstructions.
        accelerator: Device and precision.

    Raises:
        ImportError: If the packages of a perceptual network are missing.
    """

    def __init__(
        self,
        config: AutoencoderTrainingConfig,
        vae: Autoencoder,
        discriminator: nn.Module,
        accelerator: Accelerator,
    ) -> None:
        self.config, self.accelerator = config, accelerator
        self.loss = AutoencoderLoss(config).to(accelerator.device, memory_format=torch.channels_last)
        vae, discriminator = (net.to(memory_format=torch.channels_last) for net in (vae, discriminator))
        if config.trains == "decoder":
            freeze_encoder(vae)
        self.averaged_vae = deepcopy(vae).to(accelerator.device).eval().requires_grad_(False)
        trained = [p for p in vae.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
        optimizer_d = torch.optim.AdamW(discriminator.parameters(), lr=4e-4, betas=(0.5, 0.99))
        prepared = accelerator.prepare(vae, discriminator, optimizer, optimizer_d)
        self.vae, self.discriminator, self.optimizer, self.optimizer_d = prepared
        self.ema = EMAModel(self.vae.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75)
        self.ema.to(accelerator.device)

    def step(self, step: int, images: Dataset) -> dict[str, Tensor]:
        """One step of both networks: the named terms. Raises FloatingPointError, before the update."""
        config, accelerator = self.config, self.accelerator
        torch.clear_autocast_cache()  # which a caller's autocast keeps, with casts of the weights before
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(step, config, floor=0.05)
        flips = (config.data.horizontal_flip, config.data.vertical_flip)
        pixels = random_crops(images, config.batch_size, config.crop_size, generator, *flips)
        pixels = pixels.to(accelerator.device, memory_format=torch.channels_last)

        adversarial = config.adversarial_weight > 0 and step >= config.adversarial_start
        with accelerator.autocast():
            terms, reconstruction = self.loss(self.vae, pixels, generator)
            if adversarial:
                self.discriminator.requires_grad_(False)
                terms["adversarial"] = -config.adversarial_weight * self.discriminator(reconstruction).float().mean()
        total = sum(terms.values())
        self.optimizer.zero_grad()
        accelerator.backward(total)
        check_finite(step, terms, total, accelerator.clip_grad_norm_(self.vae.parameters(), 1.0))
        self.optimizer.step()
        self.ema.step(self.vae.parameters())
        if adversarial:
            terms["discriminator"] = self.step_discriminator(pixels, reconstruction)
        return terms

    def step_discriminator(self, pixels: Tensor, reconstruction: Tensor) -> Tensor:
        """One step of the discriminator: its loss."""
        self.discriminator.requires_grad_(True)
        with self.accelerator.autocast():
            loss = hinge_loss(self.discriminator, pixels, reconstruction)
        self.optimizer_d.zero_grad()
        self.accelerator.backward(loss)
        self.optimizer_d.step()
        return loss

    def averaged(self) -> Autoencoder:
        """The autoencoder with the latest averages; what is not trained, such as running means, as it is now."""
        self.ema.copy_to(self.averaged_vae.parameters())
        for ours, latest in zip(self.averaged_vae.buffers(), self.vae.buffers()):
            ours.copy_(latest)
        return self.averaged_vae
