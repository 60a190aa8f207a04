"""Edits of images by a trained flow, which is held to what is given of them: inpainting and super-resolution.

Nothing is trained. A step that brings a particle z from noise level s to s' says which clean particle it makes for,
x̂_0 = z − s dz/ds, and which noise it takes z to hold, ε̂ = (z − (1 − s) x̂_0) / s. The image of x̂_0 is replaced by the
nearest one, Π, that agrees with what is given,

    x̂_0 ← x̂_0 + E(Π(D(x̂_0))) − E(D(x̂_0)),      z ← (1 − s') x̂_0 + s' ((1 − η²)^½ ε̂ + η ε),      ε ~ N(0, I)

This is DDNM (Wang et al., 2023) through a frozen autoencoder, with its encoder E in the place of the decoder's inverse;
the difference of two encodings leaves a particle alone where its image agrees, although E ∘ D is not the identity.
Fresh noise, η > 0, lets what is made grow together with what is given. The image at the end is Π(D(z)).

A step of any flow of the linear forward process will do, whether of DMMD or of flow matching. The witness is the stored
one: an exact witness would pull the mean embedding of the edited particles towards the mean embedding of all data.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from latent_dmmd.latent_pipeline import Generators, LatentPipeline, OutputType, check_generators, check_output_type
from latent_dmmd.pipeline import LatentDMMDPipeline, LatentSchedulerPipeline


@dataclass(frozen=True)
class KnownPixels:
    """Π for inpainting: the given pixels where the mask is 0.

    Args:
        pixels: In [-1, 1], with shape (B, 3, H, W).
        mask: 1 where pixels are to be made, 0 where they are given, with shape (B, 1, H, W).
    """

    pixels: Tensor
    mask: Tensor

    def __call__(self, x: Tensor, which: slice = slice(None)) -> Tensor:
        return torch.where(self.mask[which] > 0, x, self.pixels[which])


@dataclass(frozen=True)
class SmallerImage:
    """Π for super-resolution: images that shrink to the given ones, by back-projection (Irani & Peleg, 1991).

    Args:
        small: Pixels in [-1, 1], with shape (B, 3, h, w).
        num_iterations: Of the back-projection, which is not exact: bicubic enlarging does not invert shrinking.
    """

    small: Tensor
    num_iterations: int = 3

    def __call__(self, x: Tensor, which: slice = slice(None)) -> Tensor:
        for _ in range(self.num_iterations):
            x = x + resized(self.small[which] - resized(x, self.small.shape[-1]), x.shape[-1])
        return x


def resized(pixels: Tensor, side: int) -> Tensor:
    """Bicubic, with antialiasing: (B, 3, H, W) to (B, 3, side, side)."""
    return F.interpolate(pixels, (side, side), mode="bicubic", antialias=True, align_corners=False)


ImageInput = Image.Image | list[Image.Image] | np.ndarray | Tensor
CHUNK_SIZE = 16  # images that pass through the autoencoder at once


class Editing(LatentPipeline):
    """Mixin before a pipeline class, whose flow it holds to what is given."""

    def edit(
        self,
        pixels: Tensor,
        constrain: Callable[[Tensor, slice], Tensor],
        strength: float,
        num_inference_steps: int,
        eta: float,
        generator: Generators,
        callback: Callable | None,
    ) -> Tensor:
        """Pixels that agree with what is given; see the module's text.

        Args:
            pixels: What the flow begins with, noised to `strength`, in [-1, 1], with shape (B, 3, H, W).
            constrain: Π, from pixels of the images of a slice to pixels.
            strength, num_inference_steps, eta, generator, callback: As of the calls.
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be in [0, 1]; got {eta}")
        check_generators(generator, len(pixels))
        levels = self.trajectory(num_inference_steps, strength)
        chunks = [slice(i, i + CHUNK_SIZE) for i in range(0, len(pixels), CHUNK_SIZE)]
        x_0 = torch.cat([self.encode_pixels(pixels[chunk]) for chunk in chunks])

        def noise() -> Tensor:
            return randn_tensor(x_0.shape, generator=generator, device=x_0.device, dtype=x_0.dtype)

        def corrected(clean: Tensor) -> Tensor:
            changes = []
            for chunk in chunks:
                decoded = self.decode_to_pixels(clean[chunk])
                changes.append(self.encode_pixels(constrain(decoded, chunk)) - self.encode_pixels(decoded))
            return clean + torch.cat(changes)

        before = torch.lerp(x_0, noise(), levels[0])

        def after_step(_: LatentPipeline, i: int, t: float, tensors: dict[str, Tensor]) -> dict:
            nonlocal before
            s, end = levels[i], levels[i + 1]
            clean = torch.lerp(before, tensors["latents"], s / (s - end))
            implied = (before - (1 - s) * clean) / s
            eps = (1 - eta**2) ** 0.5 * implied + eta * noise() if end else implied
            before = self.after_step(callback, i, t, (1 - end) * corrected(clean) + end * eps)
            return {"latents": before}

        z = self.move(before, num_inference_steps, strength, after_step)
        return torch.cat([constrain(self.decode_to_pixels(z[chunk]), chunk) for chunk in chunks])

    def given_pixels(self, image: ImageInput, side: int, num_variations: int, what: str = "image") -> Tensor:
        """Pixels in [-1, 1] of given images, each `num_variations` times; a mask: 0 or 1, with one channel.

        PIL images are resized. Raises ValueError if others are not of this side, or `num_variations` is not positive.
        """
        if num_variations < 1:
            raise ValueError(f"num_variations must be at least 1; got {num_variations}")
        mask = what == "mask_image"
        kinds = dict(do_convert_grayscale=True, do_binarize=True, do_normalize=False) if mask else {}
        is_pil = isinstance(image[0] if isinstance(image, list) else image, Image.Image)
        processor = VaeImageProcessor(do_resize=is_pil, vae_scale_factor=1, do_convert_rgb=not mask, **kinds)
        pixels = processor.preprocess(image, side, side).to(self._execution_device, torch.float32)
        if pixels.shape[1:] != (1 if mask else 3, side, side):
            raise ValueError(f"{what} must have {side} × {side} pixels; got {tuple(pixels.shape[1:])}")
        return pixels.repeat_interleave(num_variations, dim=0)

    def edited(self, pixels: Tensor, output_type: OutputType, return_dict: bool) -> ImagePipelineOutput | tuple:
        """What a call returns for its pixels."""
        images = self.image_processor.postprocess(pixels, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


class Inpainting(Editing):
    """Mixin: the masked parts of images are replaced."""

    @torch.no_grad()
    def __call__(
        self,
        image: ImageInput,
        mask_image: ImageInput,
        strength: float = 1.0,
        num_inference_steps: int = 25,
        num_variations: int = 1,
        eta: float = 0.8,
        generator: Generators = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[LatentPipeline, int, float, dict], dict] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Replace the masked parts of images; all other pixels stay as they are.

        Args:
            image: Images: PIL, or arrays (B, H, W, 3) or tensors (B, 3, H, W) in [0, 1]. PIL images are resized.
            mask_image: Masks of the same kinds, with one channel; what is above one half is replaced.
            strength: Noise level that the flow begins at, in (0, 1]; at 1, what is under the mask has no influence.
            num_inference_steps: Evaluations of the network.
            num_variations: Images made of each given one; they follow each other in the result.
            eta: Share of fresh noise after a step, in [0, 1]; 0 is deterministic.
            generator: Source of the noise; a list gives every image of the result its own.
            output_type: "pil", "np" (B, H, W, 3) in [0, 1] or "pt" (B, 3, H, W) in [0, 1].
            return_dict: Whether to return an `ImagePipelineOutput` rather than a tuple.
            callback_on_step_end: Called as f(pipeline, step, t, {"latents": z}); may return {"latents": z'}.

        Returns:
            The images as `.images`.

        Raises:
            ValueError: If an argument is out of range, there are more or fewer generators than images, or images and
                masks do not fit each other and the pipeline.
        """
        check_output_type(output_type, latent=False)
        side = self.resolution
        pixels = self.given_pixels(image, side, num_variations)
        mask = self.given_pixels(mask_image, side, num_variations, "mask_image")
        if len(mask) not in (1, num_variations, len(pixels)):
            raise ValueError(f"{len(pixels)} images need as many masks, or one; got {len(mask)}")
        known = KnownPixels(pixels, mask.repeat(len(pixels) // len(mask), 1, 1, 1))
        begin = pixels if strength < 1 else known(torch.zeros_like(pixels))
        settings = (strength, num_inference_steps, eta, generator, callback_on_step_end)
        return self.edited(self.edit(begin, known, *settings), output_type, return_dict)


class Upscaling(Editing):
    """Mixin: small images are enlarged."""

    @torch.no_grad()
    def __call__(
        self,
        image: ImageInput,
        scale: int = 4,
        strength: float = 1.0,
        num_inference_steps: int = 25,
        num_variations: int = 1,
        eta: float = 0.8,
        generator: Generators = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[LatentPipeline, int, float, dict], dict] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Enlarge small images to the pipeline's resolution; made smaller again, they are the given ones.

        Args:
            image: Images: PIL, or arrays (B, h, w, 3) or tensors (B, 3, h, w) in [0, 1]. PIL images are resized
                to the pipeline's resolution divided by `scale`.
            scale: Factor.
            strength: Noise level that the flow begins at, in (0, 1], with the image enlarged bicubically.
            num_inference_steps, num_variations, eta, generator, output_type, return_dict, callback_on_step_end: As for
                inpainting.

        Returns:
            The images as `.images`.

        Raises:
            ValueError: If an argument is out of range, there are more or fewer generators than images, or images do not
                fit the pipeline.
        """
        check_output_type(output_type, latent=False)
        side = self.resolution
        if scale < 2 or side % scale:
            raise ValueError(f"scale must be at least 2 and divide {side}; got {scale}")
        small = self.given_pixels(image, side // scale, num_variations)
        settings = (strength, num_inference_steps, eta, generator, callback_on_step_end)
        pixels = self.edit(resized(small, side), SmallerImage(small), *settings)
        return self.edited(pixels, output_type, return_dict)


class LatentDMMDInpaintPipeline(Inpainting, LatentDMMDPipeline):
    """`LatentDMMDPipeline` for inpainting: load any saved one with `from_pretrained`."""


class LatentDMMDUpscalePipeline(Upscaling, LatentDMMDPipeline):
    """`LatentDMMDPipeline` for super-resolution: load any saved one with `from_pretrained`."""


class LatentSchedulerInpaintPipeline(Inpainting, LatentSchedulerPipeline):
    """`LatentSchedulerPipeline` of flow matching for inpainting."""


class LatentSchedulerUpscalePipeline(Upscaling, LatentSchedulerPipeline):
    """`LatentSchedulerPipeline` of flow matching for super-resolution."""


EDITORS = {
    (LatentDMMDPipeline, "inpaint"): LatentDMMDInpaintPipeline,
    (LatentDMMDPipeline, "upscale"): LatentDMMDUpscalePipeline,
    (LatentSchedulerPipeline, "inpaint"): LatentSchedulerInpaintPipeline,
    (LatentSchedulerPipeline, "upscale"): LatentSchedulerUpscalePipeline,
}


def editor_of(pipe: LatentPipeline, task: str) -> Editing:
    """A pipeline for "inpaint" or "upscale" that has a loaded one's parts, configuration and `flow_options`."""
    cls = EDITORS[type(pipe), task]
    options = {name: pipe.config[name] for name in inspect.signature(cls.__init__).parameters if name in pipe.config}
    editor = cls(**{**options, **pipe.components})
    editor.flow_options = pipe.flow_options
    return editor
