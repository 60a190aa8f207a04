"""Pixels ↔ standardised latents of a frozen diffusers autoencoder.

One adapter for AutoencoderKL, AutoencoderTiny and AutoencoderDC. Latents are standardised per channel with mean and
standard deviation measured on the data set, so the `scaling_factor` and `shift_factor` of an autoencoder's
configuration cancel out and are not used.
"""

from importlib.resources import files
from pathlib import Path

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from einops import rearrange
from torch import Tensor

from latent_dmmd.utils.errors import did_you_mean
from latent_dmmd.utils.images import to_pixels, to_uint8

AUTOENCODERS = {cls.__name__: cls for cls in (AutoencoderKL, AutoencoderTiny, AutoencoderDC)}
Autoencoder = AutoencoderKL | AutoencoderTiny | AutoencoderDC

ROUNDING_ERROR = (2 / 255) ** 2 / 12  # mean square of rounding pixels in [-1, 1] to 8 bits
BUNDLED_AUTOENCODER = "elpv-vae"  # a name, so that saved configurations hold on every machine
ASSETS = Path(str(files("latent_dmmd"))) / "assets"
BUNDLED_AUTOENCODERS = {
    BUNDLED_AUTOENCODER: ASSETS / "elpv-vae",
    "elpv-vae-f16c16": ASSETS / "elpv-dmmd" / "vae",  # 16 × 16 pixels to one latent of 16 channels
    "openmoji-vae": ASSETS / "openmoji-dmmd" / "vae",
}
BUNDLED_FOR = {"elpv": BUNDLED_AUTOENCODER, "openmoji": "openmoji-vae"}


def load_autoencoder(name_or_path: str, device: torch.device | str = "cpu") -> Autoencoder:
    """A frozen autoencoder in float32, by folder or hub name; its class is read from its configuration.

    Args:
        name_or_path: A folder that `save_pretrained` wrote, a name on the hub, or a bundled one's: "elpv-vae",
            "elpv-vae-f16c16", "openmoji-vae".
        device: Where to put it.

    Raises:
        ValueError: If it cannot be found or read, or is of another class; the message is one line.
    """
    if name_or_path in BUNDLED_AUTOENCODERS:
        name_or_path = str(autoencoder_folder(name_or_path))
    try:
        config = AutoencoderKL.load_config(name_or_path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no autoencoder at {name_or_path!r}: give a folder with config.json, or a hub name that can be reached"
            + autoencoder_near(name_or_path)
        ) from error
    class_name = config.get("_class_name")
    if class_name not in AUTOENCODERS:
        raise ValueError(f"{name_or_path!r} is a {class_name}, not one of {', '.join(AUTOENCODERS)}")
    try:
        vae, report = AUTOENCODERS[class_name].from_pretrained(
            name_or_path, torch_dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # diffusers and safetensors raise several types for weights that do not fit
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot load the weights of {name_or_path!r}: {reason}") from error
    if report["missing_keys"]:
        raise ValueError(f"the weights of {name_or_path!r} lack {', '.join(report['missing_keys'][:3])}")
    return freeze(vae.to(device))


def autoencoder_near(name_or_path: str) -> str:
    """The end of a message about a name that is no autoencoder's: "; did you mean …?" with one in that folder, which is
    perhaps a run or a pipeline, or with a bundled one; "" if there is none."""
    inside = (Path(name_or_path) / name for name in ("autoencoder", "vae", "pipeline/vae"))
    found = next((str(path) for path in inside if (path / "config.json").is_file()), None)
    return f"; did you mean {found}?" if found else did_you_mean(name_or_path, BUNDLED_AUTOENCODERS)


def freeze(vae: Autoencoder) -> Autoencoder:
    """The autoencoder itself, made ready for inference; channels last, a third faster on CPUs."""
    return vae.to(memory_format=torch.channels_last).eval().requires_grad_(False)


@torch.no_grad()
def encode_moments(vae: Autoencoder, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the posterior over raw latents; deviation 0 if the encoder is deterministic.

    Args:
        vae: The autoencoder.
        pixels: RGB in [-1, 1], with shape (B, 3, H, W).

    Returns:
        Two tensors with shape (B, C, h, w), in float32.

    Raises:
        ValueError: If images are not of whole latents.
    """
    (height, width), factor = pixels.shape[2:], downsampling_of(vae)
    if height % factor or width % factor:
        raise ValueError(f"{width} × {height} pixels are not of whole latents; give a resolution that {factor} divides")
    output = vae.encode(pixels.to(vae.dtype))
    mean = mean_of(output).float()
    return mean, output.latent_dist.std.float() if hasattr(output, "latent_dist") else torch.zeros_like(mean)


def mean_of(output: object) -> Tensor:
    """Mean of raw latents in what an encoder returns, of its precision, with its gradient."""
    # by the output: a compiled autoencoder is of another class
    if hasattr(output, "latent_dist"):
        return output.latent_dist.mean
    return output.latents if hasattr(output, "latents") else output.latent


def downsampling_of(vae: Autoencoder) -> int:
    """Pixels to one latent along a side."""
    channels = vae.config.get("block_out_channels") or vae.config["encoder_block_out_channels"]
    return 2 ** (len(channels) - 1)


def autoencoder_folder(name_or_path: str) -> Path:
    """The folder of a saved autoencoder, also of a bundled one; for a name on the hub it does not exist."""
    return BUNDLED_AUTOENCODERS.get(name_or_path, Path(name_or_path))


def bundled_for(data: str) -> str | None:
    """The bundled autoencoder of a data set with a name, such as "openmoji:train"; None for other images."""
    return BUNDLED_FOR.get(data.partition(":")[0])


def trained_on(name_or_path: str | None) -> str | None:
    """The data set with a name that bundled weights have seen; None for others."""
    bundled = BUNDLED_AUTOENCODERS.keys() | {folder.name for folder in ASSETS.iterdir()}
    return name_or_path.partition("-")[0] if name_or_path in bundled else None


def same_weights(one: Autoencoder | None, other: Autoencoder | None) -> bool:
    """Whether two autoencoders are the same but for rounding to float16, or neither is there."""
    if one is None or other is None:
        return one is other
    first, second = (getattr(vae, "_orig_mod", vae).state_dict() for vae in (one, other))
    if {name: w.shape for name, w in first.items()} != {name: w.shape for name, w in second.items()}:
        return False
    pairs = ((w.float().cpu(), second[name].float().cpu()) for name, w in first.items())
    return all(torch.allclose(ours, theirs, rtol=1e-2, atol=1e-4) for ours, theirs in pairs)


def decode_pixels(vae: Autoencoder, latents: Tensor) -> Tensor:
    """Raw latents (B, C, h, w) to RGB pixels near [-1, 1], with shape (B, 3, H, W), in float32."""
    return vae.decode(latents.to(vae.dtype)).sample.float()


def standardise(latents: Tensor, mean: Tensor | list[float], std: Tensor | list[float]) -> Tensor:
    """(z − mean) / std per channel; latents (…, C, h, w)."""
    mean, std = (rearrange(torch.as_tensor(a, device=latents.device).to(latents), "c -> c 1 1") for a in (mean, std))
    return (latents - mean) / std


def unstandardise(latents: Tensor, mean: Tensor | list[float], std: Tensor | list[float]) -> Tensor:
    """z · std + mean per channel; latents (…, C, h, w)."""
    mean, std = (rearrange(torch.as_tensor(a, device=latents.device).to(latents), "c -> c 1 1") for a in (mean, std))
    return latents * std + mean


def psnr(reconstruction: Tensor, pixels: Tensor) -> Tensor:
    """10 log10(4 / mean squared error) of each image, in dB, with shape (B); 58.9 dB, that of rounding, at most.

    Args:
        reconstruction: Decoded pixels, which are clamped to [-1, 1], with shape (B, 3, H, W).
        pixels: The originals, in [-1, 1].
    """
    error = (reconstruction.clamp(-1, 1) - pixels).square().mean((1, 2, 3))
    # at an error of 0 a mean over images would be infinite
    return 10 * (4 / error.clamp(min=ROUNDING_ERROR)).log10()


def check_finite_images(names: list[str], *tensors: Tensor) -> None:
    """Raise FloatingPointError with the name of the first image whose row in one of the tensors is not finite."""
    finite = torch.stack([a.isfinite().flatten(1).all(1) for a in tensors]).all(0)
    if not finite.all():
        culprit = names[int(finite.int().argmin())]
        raise FloatingPointError(f"the autoencoder returns values that are not finite for {culprit}; use it in float32")


@torch.no_grad()
def reconstruct(vae: Autoencoder, images_uint8: Tensor) -> Tensor:
    """decode(encode(·)) of images, uint8 to uint8, with shape (B, 3, H, W); the posterior mean, no sampling."""
    device = next(vae.parameters()).device
    mean, _ = encode_moments(vae, to_pixels(images_uint8).to(device))
    return to_uint8(decode_pixels(vae, mean)).cpu()
