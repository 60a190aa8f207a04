"""Moving images: a flow at every noise level, and the way from one image to another."""

from pathlib import Path

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from latent_dmmd.pipeline import LatentPipeline
from latent_dmmd.utils.images import labelled_grid, save_animation, save_image, to_pixels, to_uint8


def film(
    pipe: LatentPipeline, num_images: int, num_inference_steps: int, generator: torch.Generator, **options
) -> Tensor:
    """Particles of a flow before its first step and after each, decoded.

    Args:
        pipe: What generates.
        num_images: Particles.
        num_inference_steps: The NFE.
        generator: Source of the initial noise.
        options: Of the pipeline's call.

    Returns:
        Images as uint8, with shape (num_inference_steps + 1, num_images, 3, H, W).

    Raises:
        ValueError: If an option is out of range, or processes share the particles.
    """
    if pipe.flow_options.across_ranks:
        raise ValueError("a film is of the particles of one process; leave across_ranks out of flow_options")
    z = pipe.initial_particles(num_images, generator)
    frames = [z]
    pipe(
        num_images,
        num_inference_steps=num_inference_steps,
        latents=z,
        generator=generator,
        output_type="latent",
        callback_on_step_end=lambda pipe, i, t, tensors: frames.append(tensors["latents"]),
        **options,
    )
    return torch.stack([decoded(pipe, z) for z in frames])


def interpolation(
    pipe: LatentPipeline,
    images_uint8: Tensor,
    num_frames: int = 9,
    strength: float = 0.5,
    num_inference_steps: int = 10,
    generator: torch.Generator | None = None,
    **options,
) -> Tensor:
    """The way from one image to another: latents between theirs, noised alike and flowed back to the data.

    Latents between two encodings are of no image; a flow from noise level `strength` makes them one. At 0 it is a
    plain interpolation of latents, at 1 all frames are the same generated image.

    Args:
        pipe: What generates; a flow of the linear forward process.
        images_uint8: The two images, with shape (2, 3, H, W).
        num_frames: Frames, both ends among them.
        strength: Noise level s, in [0, 1].
        num_inference_steps: The NFE from there.
        generator: Source of the noise.
        options: Of the pipeline's `move`.

    Returns:
        Images as uint8, with shape (num_frames, 3, H, W).

    Raises:
        ValueError: If there are not two images, an option is out of range, or the pipeline has another process.
    """
    if len(images_uint8) != 2 or num_frames < 2:
        raise ValueError(f"interpolate 2 images over at least 2 frames; got {len(images_uint8)} and {num_frames}")
    first, last = pipe.encode_pixels(to_pixels(images_uint8).to(pipe._execution_device))
    z = torch.stack([torch.lerp(first, last, i / (num_frames - 1)) for i in range(num_frames)])
    if strength > 0:
        level = pipe.trajectory(num_inference_steps, strength)[0]
        noise = randn_tensor(first.shape, generator=generator, device=z.device, dtype=z.dtype)
        z = torch.lerp(z, noise.expand_as(z), level)
        z = pipe.move(z, num_inference_steps, strength, **options)
    return decoded(pipe, z)


def decoded(pipe: LatentPipeline, z: Tensor) -> Tensor:
    """Images of particles as uint8, with shape (B, 3, H, W), on the CPU."""
    return to_uint8(pipe.decode(z, "pt") * 2 - 1).cpu()


def save_film(frames: Tensor, folder: str | Path, num_columns: int = 9, side: int = 128) -> None:
    """Write strip.png, a row of frames for each particle, and film.webp, all of them, into a folder, which is created.

    Args:
        frames: uint8, with shape (F, B, 3, H, W).
        folder: Where the files go.
        num_columns: Frames in the strip, first and last among them.
        side: Side of its images.
    """
    folder = Path(folder)
    shown = torch.linspace(0, len(frames) - 1, min(num_columns, len(frames)), device="cpu").round().long()
    numbers = ", ".join(str(i) for i in shown.tolist())
    rows = {f"image {i}, frames {numbers}": frames[shown, i] for i in range(frames.shape[1])}
    save_image(labelled_grid(rows, columns=len(shown), side=side), folder / "strip.png")
    save_animation(frames, folder / "film.webp")
