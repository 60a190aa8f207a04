"""What the training of an autoencoder depends on."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from latent_dmmd.nn.autoencoder import check_architecture
from latent_dmmd.training.autoencoder.perceptual import check_networks
from latent_dmmd.training.config import DataConfig, check_apart, check_seed
from latent_dmmd.utils.errors import check
from latent_dmmd.utils.files import expand_home

# without init_from; with it the architecture is the saved one's, and so is the scale of latents
FROM_SCRATCH = {"latent_channels": 8, "width": 32, "downsampling": 16, "latent_weight": 0.01}
ARCHITECTURE = ("latent_channels", "width", "downsampling")
WEIGHTS = ("squared", "perceptual", "pooled", "gradient", "equivariance", "adversarial", "latent")


@dataclass
class CropDataConfig(DataConfig):
    """The images that crops are cut from.

    Args:
        name_or_path: `elpv:train`, `openmoji:train`, a folder or zip archive of images, parquet files, a folder of
            `save_to_disk`, or a data set on the hub; `:split` after a name chooses a split.
        resolution: Side in pixels.
        image_column: Column of images in tables and hub data.
        horizontal_flip: Whether half of the crops are mirrored, left to right.
        on_bad_image: What to do about an image that cannot be read: "error" or "skip".
        cache_dir: Folder of the decoded images; one named by its contents if null.
        num_workers: Processes that decode images before training.
        streaming: Does not apply.
        class_conditional: Does not apply.
        vertical_flip: Whether half of the crops are mirrored, top to bottom.
    """

    horizontal_flip: bool = True
    vertical_flip: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("streaming", "class_conditional"):
            check(not getattr(self, name), f"data.{name} does not apply to an autoencoder; leave it out")


@dataclass
class AutoencoderTrainingConfig:
    """Train an autoencoder on images of your own, or fine-tune a saved one.

    Args:
        output_dir: Run folder; an existing one with the same configuration is resumed.
        data: The images.
        validation: Images that are not trained on, named like the data; a fixed random tenth of the data, at most 256
            images, if null.
        init_from: A saved autoencoder to start from, a folder or hub name of an AutoencoderKL, AutoencoderTiny or
            AutoencoderDC, or a bundled name, such as "elpv-vae"; one with random weights is built if null.
        latent_channels: Channels of latents, a divisor of 4 · width; 8 by default, and only without init_from.
        width: Channels at half resolution, a multiple of 8 up to 256, and up to four times as many further down; 32 by
            default, and only without init_from.
        downsampling: Pixels to one latent along a side, 8 or 16; 16 by default, and only without init_from.
        trains: "both", or "decoder": the encoder, and so every latent, stays as init_from has it.
        num_steps: Optimiser steps.
        batch_size: Crops per step.
        crop_size: Side of a crop in pixels, a multiple of the downsampling.
        learning_rate: Peak learning rate of AdamW, decayed to a twentieth by a cosine.
        num_warmup_steps: Steps of linear warm-up.
        ema_decay: Decay of the averaged weights, which are the ones saved.
        latent_noise: Largest level a of the noise on latents, drawn for each crop.
        noise_kind: "add", z + a · std · ε, or "interpolate", (1 − a) z + a · std · ε; std is each channel's own.
        latent_weight: Weight of the pull of the latents' mean square towards 1; 0.01, or 0 with init_from, by default.
        squared_weight: Weight of the mean squared error, which PSNR measures.
        perceptual_weight: Weight of the distances of feature maps.
        pooled_weight: Weight of the distance of pooled features.
        perceptual_networks: EfficientNets of both distances, "lite1", "lite2" or both: then their mean.
        gradient_weight: Weight of the L1 distance of differences between neighbouring pixels, which fine grain has.
        equivariance_weight: Weight of the L1 distance of the decoded latents at half their size and the image at half
            its size.
        adversarial_weight: Weight of the patch discriminator; 0 leaves it out.
        adversarial_start: Step at which the discriminator joins.
        mixed_precision: "auto", "no" or "bf16", as of `training.config.TrainingConfig`.
        checkpointing_steps: Steps between checkpoints, each with PSNR and reconstructions of validation images.
        seed: Seed of weights, crops and noise.
    """

    output_dir: str = "runs/elpv-vae"
    data: CropDataConfig = field(default_factory=CropDataConfig)
    validation: str | None = None
    init_from: str | None = None
    latent_channels: int | None = None
    width: int | None = None
    downsampling: int | None = None
    trains: Literal["both", "decoder"] = "both"
    num_steps: int = 5500
    batch_size: int = 8
    crop_size: int = 128
    learning_rate: float = 1e-3
    num_warmup_steps: int = 100
    ema_decay: float = 0.998
    latent_noise: float = 0.05
    noise_kind: Literal["add", "interpolate"] = "add"
    latent_weight: float | None = None
    squared_weight: float = 5.0
    perceptual_weight: float = 0.15
    pooled_weight: float = 0.3
    perceptual_networks: list[str] = field(default_factory=lambda: ["lite2"])
    gradient_weight: float = 0.0
    equivariance_weight: float = 0.0
    adversarial_weight: float = 0.0
    adversarial_start: int = 1000
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    checkpointing_steps: int = 250
    seed: int = 0

    def __post_init__(self) -> None:
        expand_home(self, "output_dir", "validation", "init_from")
        positive = ("num_steps", "batch_size", "crop_size", "num_warmup_steps", "checkpointing_steps")
        for name in (*positive, "learning_rate"):
            check(getattr(self, name) > 0, f"{name} must be positive; got {getattr(self, name)}")
        self.resolve()
        for name in ("latent_noise", *(f"{name}_weight" for name in WEIGHTS), "learning_rate"):
            value = getattr(self, name)
            check(math.isfinite(value) and value >= 0, f"{name} must be finite and not negative; got {value}")
        check(0 <= self.ema_decay < 1, f"ema_decay must be in [0, 1); got {self.ema_decay}")
        interpolates = self.noise_kind == "interpolate"
        check(not interpolates or self.latent_noise <= 1, f"latent_noise must be at most 1; got {self.latent_noise}")
        check_networks(self.perceptual_networks)
        check_seed("seed", self.seed)
        check_apart(self.output_dir, self.data.name_or_path)
        if self.validation is not None:
            check_apart(self.output_dir, self.validation, "validation")
        if self.data.cache_dir is not None:
            output, cache = Path(self.output_dir).resolve(), Path(self.data.cache_dir).resolve()
            apart = output not in (cache, *cache.parents)  # decoded before there is a run folder
            check(apart, f"data.cache_dir {self.data.cache_dir} lies in output_dir; choose another --data.cache_dir")

    def resolve(self) -> None:
        """Fill in what depends on where training starts. Raises ConfigError for what would be ignored."""
        if self.init_from is not None:
            given = [name for name in ARCHITECTURE if getattr(self, name) is not None]
            theirs = f"the architecture is that of init_from {self.init_from}"
            check(not given, f"{', '.join(given)}: {theirs}; leave out one or the other")
            self.latent_weight = self.latent_weight or 0.0
            frozen = self.trains == "decoder" and self.latent_weight > 0
            check(not frozen, "latent_weight has nothing to pull at with trains=decoder; leave it out")
            return
        check(self.trains == "both", "trains=decoder needs init_from: a random encoder would stay as it is")
        for name, value in FROM_SCRATCH.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        check_architecture(*(getattr(self, name) for name in ARCHITECTURE))
        self.check_sizes(self.downsampling)

    def check_sizes(self, downsampling: int) -> None:
        """Raise ConfigError unless crops and images are of whole latents."""
        resolution, factor = self.data.resolution, downsampling * (2 if self.equivariance_weight else 1)
        why = ", twice the downsampling, since equivariance halves the latents" if self.equivariance_weight else ""
        check(
            self.crop_size > 0 and self.crop_size % factor == 0,
            f"crop_size must be a positive multiple of {factor}{why}; got {self.crop_size}",
        )
        latents = self.batch_size * (self.crop_size // downsampling) ** 2
        check(latents > 1, "a batch is one latent, which has no deviation; raise --batch_size or --crop_size")
        check(
            resolution % downsampling == 0,
            f"data.resolution must be a multiple of the downsampling, {downsampling}; got {resolution}",
        )
        check(
            self.crop_size <= resolution, f"crop_size={self.crop_size} exceeds data.resolution={resolution}; lower it"
        )
