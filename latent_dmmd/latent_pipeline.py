"""What every pipeline shares: bundled names, particles and images, initial noise."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from latent_dmmd.data.autoencoder import (
    Autoencoder,
    decode_pixels,
    encode_moments,
    freeze,
    standardise,
    unstandardise,
)
from latent_dmmd.flow import rank_and_size
from latent_dmmd.nn.unet import PatchUNet
from latent_dmmd.utils.images import to_pixels

OutputType = Literal["pil", "np", "pt", "latent"]
ASSETS = files("latent_dmmd") / "assets"


@dataclass(frozen=True)
class FlowOptions:
    """What few calls change; set it as `pipe.flow_options = FlowOptions(…)`.

    Args:
        chunk_size: Particles that pass through the network or the decoder at once; all if None.
        across_ranks: Whether the processes of a distributed run share the particles: each returns its part, in the
            order of ranks, of what one process would have made.
        step_size: DMMD: a constant η instead of the calibrated one, and exact witnesses of the particles' own length:
            the paper's flow.
    """

    chunk_size: int | None = 64
    across_ranks: bool = False
    step_size: float | None = None


def bundled_pipelines() -> list[str]:
    """Names of the pipelines that come with the package."""
    return sorted(folder.name for folder in ASSETS.iterdir() if (folder / "model_index.json").is_file())


def pipeline_folder(name_or_path: str | Path) -> str | Path:
    """Where a bundled pipeline lies, by its name; anything else as it is. A folder of that name wins."""
    if str(name_or_path) in bundled_pipelines() and not Path(name_or_path).exists():
        return str(ASSETS / str(name_or_path))
    return name_or_path


class LatentPipeline(DiffusionPipeline):
    """Base class: particles ↔ images, through a frozen autoencoder or as they are."""

    _optional_components = ["vae"]
    flow_options = FlowOptions()

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **options) -> "LatentPipeline":
        """As of `DiffusionPipeline`; also by the name of a bundled pipeline, such as "elpv-dmmd"."""
        return super().from_pretrained(pipeline_folder(name_or_path), **options)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **options) -> "LatentPipeline":
        """As of `DiffusionPipeline`; `flow_options` come along."""
        made = super().from_pipe(pipeline, **options)
        made.flow_options = getattr(pipeline, "flow_options", cls.flow_options)
        return made

    def register_latents(
        self,
        net: PatchUNet,
        vae: Autoencoder | None,
        latents_mean: list[float] | None,
        latents_std: list[float] | None,
    ) -> None:
        """Check that network, autoencoder and statistics fit each other, and keep the statistics."""
        channels = net.config.in_channels
        latents_mean = latents_mean if latents_mean is not None else [0.0] * channels
        latents_std = latents_std if latents_std is not None else [1.0] * channels
        expected = vae.config.latent_channels if vae is not None else channels
        if not len(latents_mean) == len(latents_std) == channels == expected:
            raise ValueError(
                f"the autoencoder has {expected} latent channels, the features take {channels}, the statistics have "
                f"{len(latents_mean)}; use the autoencoder that the features were trained with"
            )
        if vae is not None:
            freeze(vae)
        self.register_to_config(latents_mean=list(latents_mean), latents_std=list(latents_std))
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @property
    def net(self) -> PatchUNet:
        """The network that moves particles."""
        raise NotImplementedError

    @property
    @torch.no_grad()
    def resolution(self) -> int:
        """Side of the images in pixels."""
        config = self.net.config
        if self.vae is None:
            return config.sample_size
        shape = (1, config.in_channels, config.sample_size, config.sample_size)
        return decode_pixels(self.vae, torch.zeros(shape, device=self._execution_device)).shape[-1]

    def initial_particles(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Standard normal particles in float32, or those given; the share of this process if processes share them.

        Raises ValueError if they have the wrong shape, or do not divide among the processes.
        """
        rank, num_ranks = rank_and_size(self.flow_options.across_ranks)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        if batch_size % num_ranks:
            raise ValueError(f"batch_size={batch_size} must be a multiple of the {num_ranks} processes")
        config = self.net.config
        shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents must have shape {shape}; got {tuple(latents.shape)}")
        return latents.to(device=self._execution_device, dtype=torch.float32).chunk(num_ranks)[rank]

    def move(self, z: Tensor, num_inference_steps: int, start: float = 1.0, callback: Callable | None = None) -> Tensor:
        """Particles (B, C, h, w) after a flow from a noise level to the data, one evaluation of the network per step.

        Args:
            z: The particles.
            num_inference_steps: The NFE.
            start: Noise level of the particles, in (0, 1]; DMMD begins at the highest stored level up to it.
            callback: As `callback_on_step_end` of the call.

        Raises:
            ValueError: If an argument is out of range.
        """
        raise NotImplementedError

    def trajectory(self, num_inference_steps: int, start: float = 1.0) -> list[float]:
        """Noise levels of the linear interpolant before the first step of `move`, and after each.

        Args:
            num_inference_steps: As of `move`.
            start: As of `move`.

        Raises:
            ValueError: If an argument is out of range, or particles follow another forward process.
        """
        raise NotImplementedError

    @torch.no_grad()
    def encode(self, images_uint8: Tensor, chunk_size: int = 16) -> Tensor:
        """Standardised particles (B, C, h, w), on the CPU, of images (B, 3, H, W): means of the posterior."""
        chunks = to_pixels(images_uint8).split(chunk_size)
        return torch.cat([self.encode_pixels(chunk.to(self._execution_device)).cpu() for chunk in chunks])

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Standardised particles (B, C, h, w) of pixels in [-1, 1], with shape (B, 3, H, W), in one chunk."""
        raw = pixels if self.vae is None else encode_moments(self.vae, pixels)[0]
        return standardise(raw, self.config.latents_mean, self.config.latents_std)

    @torch.no_grad()
    def decode_to_pixels(self, z: Tensor) -> Tensor:
        """Pixels near [-1, 1], with shape (B, 3, H, W), of standardised particles, in one chunk."""
        raw = unstandardise(z, self.config.latents_mean, self.config.latents_std)
        return raw if self.vae is None else decode_pixels(self.vae, raw)

    @torch.no_grad()
    def decode(self, z: Tensor, output_type: OutputType = "pil") -> Tensor | list:
        """Images of standardised particles (B, C, h, w), in the chunks of `flow_options`."""
        chunks = z.split(self.flow_options.chunk_size or len(z))
        pixels = torch.cat([self.decode_to_pixels(chunk) for chunk in chunks])
        return self.image_processor.postprocess(pixels, output_type=output_type)

    def after_step(self, callback: Callable | None, i: int, t: float, z: Tensor) -> Tensor:
        """The particles after a step: a callback sees them, and may replace them."""
        if callback is None:
            return z
        returned = callback(self, i, t, {"latents": z})
        return (returned or {}).get("latents", z)

    def output(self, z: Tensor, output_type: OutputType, return_dict: bool) -> ImagePipelineOutput | tuple:
        """What a call returns for its final particles."""
        images = z if output_type == "latent" else self.decode(z, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def check_output_type(output_type: str, latent: bool = True) -> None:
    """Raise ValueError unless it is one of `OutputType`; `latent` only where it can be had."""
    kinds = ("pil", "np", "pt", "latent") if latent else ("pil", "np", "pt")
    if output_type not in kinds:
        raise ValueError(f"output_type must be one of {', '.join(kinds)}; got {output_type!r}")
