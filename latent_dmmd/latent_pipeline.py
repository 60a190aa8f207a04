"""What every pipeline shares: bundled names, index, particles and images, initial noise, and the habits of diffusers.

Particles, kernels and mean embeddings are in float32. Network and autoencoder run in their own type: what goes in is
cast at their border, and what comes out is float32 again.
"""

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import diffusers
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import CommitInfo, ModelCard, create_repo, hf_hub_download
from torch import Tensor, nn

from latent_dmmd.data.autoencoder import (
    ASSETS,
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
Generators = torch.Generator | list[torch.Generator] | None


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


def pipeline_folder(name_or_path: str | Path) -> str:
    """Where a bundled pipeline lies, by its name; anything else as it is. A folder of that name wins."""
    if str(name_or_path) in bundled_pipelines() and not Path(name_or_path).exists():
        return str(ASSETS / str(name_or_path))
    return str(name_or_path)


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

    @property
    def one_step(self) -> bool:
        """Whether the network has learnt one step from noise, and no others."""
        return bool(self.config.get("one_step"))

    @torch.inference_mode(False)
    def register(self, components: dict, vae: Autoencoder | None, **options) -> None:
        """Keep components and options; the network remembers the options for other pipelines of the same components.

        An option that is None is what the network remembers. Statistics that nobody knows are 0 and 1.

        Args:
            components: All but the autoencoder.
            vae: The autoencoder.
            options: `latents_mean`, `latents_std` and a pipeline's own.

        Raises:
            ValueError: If network, autoencoder and statistics do not fit each other.
        """
        self.register_modules(**components, vae=vae)
        remembered = self.net.config.get("_pipeline", {})
        options = {name: remembered.get(name) if value is None else value for name, value in options.items()}
        channels = self.net.config.in_channels
        for name, default in (("latents_mean", 0.0), ("latents_std", 1.0)):
            options[name] = [default] * channels if options[name] is None else list(options[name])
        expected = vae.config.latent_channels if vae is not None else channels
        if not len(options["latents_mean"]) == len(options["latents_std"]) == channels == expected:
            raise ValueError(
                f"the autoencoder has {expected} latent channels, the features take {channels}, the statistics have "
                f"{len(options['latents_mean'])}; use the autoencoder that the features were trained with"
            )
        for component in self.components.values():
            if isinstance(component, nn.Module):
                take_outside_inference(component)
        if vae is not None:
            freeze(vae)
        self.net.register_to_config(_pipeline={**remembered, **options})
        self.register_to_config(**options)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    def __repr__(self) -> str:
        """As of `DiffusionPipeline`, with long lists of numbers cut."""
        shown = {
            name: [*value[:3], f"… {len(value)} numbers"] if isinstance(value, list) and len(value) > 8 else value
            for name, value in json.loads(self.to_json_string()).items()
        }
        return f"{type(self).__name__} {json.dumps(shown, indent=2, ensure_ascii=False)}\n"

    def to_json_file(self, json_file_path: str | Path) -> None:
        """Save the index, and beside it the modules by which `DiffusionPipeline` finds our classes.

        diffusers runs them only with `trust_remote_code=True`; our own classes never do.
        """
        index, folder = json.loads(self.to_json_string()), Path(json_file_path).parent
        modules = {"pipeline.py": (type(self).__module__, type(self).__name__)}
        for name in self.components:
            library, class_name = index[name]
            if library not in (None, "diffusers", "transformers"):
                modules[f"{name}/{library}.py"] = library, class_name
        for path, (module, class_name) in modules.items():
            if (folder / path).parent.is_dir():
                (folder / path).write_text(f"from {module} import {class_name}  # noqa: F401\n")
        index["_class_name"] = ["pipeline", index["_class_name"]]
        if index.get("class_names"):  # diffusers takes a list of strings for a component that it must download
            index["class_names"] = dict(enumerate(index["class_names"]))
        Path(json_file_path).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
    ) -> CommitInfo:
        """As of `DiffusionPipeline`, with the model card of the folder that it was loaded from, if there is one.

        diffusers' own takes a class with "Scheduler" in its name for a scheduler, and drops the variant.
        """
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        own_card = self.name_or_path and Path(self.name_or_path) / "README.md"
        has_card = own_card and own_card.is_file()
        card = ModelCard.load(own_card) if has_card else load_or_create_model_card(repo_id, token, is_pipeline=True)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization, variant)
            populate_model_card(card).save(Path(folder) / "README.md")
            return self._upload_folder(folder, repo_id, token, commit_message, create_pr)

    @classmethod
    def _dict_from_json_file(cls, json_file: str | Path, **options) -> dict:
        """The index as our own classes read it, which need no code of a folder to find their components."""
        index = super()._dict_from_json_file(json_file, **options)
        if isinstance(index.get("_class_name"), list):
            index["_class_name"] = index["_class_name"][-1]
        for name, value in index.items():
            if isinstance(value, list) and value and str(value[0]).startswith("latent_dmmd."):
                # diffusers looks for a module of this name in the folder, unless it is one of its own
                own = value[0].replace(".", ":")
                setattr(diffusers.pipelines, own, importlib.import_module(value[0]))
                index[name] = [own, *value[1:]]
        return index

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

    def initial_particles(self, batch_size: int, generator: Generators, latents: Tensor | None = None) -> Tensor:
        """Standard normal particles in float32, or those given; the share of this process if processes share them.

        Raises ValueError if they are no tensor of the right shape, if generators are not as many, or if the processes
        cannot share them equally.
        """
        rank, num_ranks = rank_and_size(self.flow_options.across_ranks)
        if not isinstance(batch_size, Integral) or batch_size < 1:
            raise ValueError(f"batch_size must be a whole number, at least 1; got {batch_size!r}")
        check_generators(generator, batch_size)
        if batch_size % num_ranks:
            raise ValueError(f"batch_size={batch_size} must be a multiple of the {num_ranks} processes")
        config = self.net.config
        shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        if not torch.is_tensor(latents) or not latents.is_floating_point():
            kind = latents.dtype if torch.is_tensor(latents) else type(latents).__name__
            raise ValueError(f"latents must be a tensor of floating-point numbers; got {kind}")
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
        self.check_finite(raw)
        return standardise(raw, self.config.latents_mean, self.config.latents_std)

    @torch.no_grad()
    def decode_to_pixels(self, z: Tensor) -> Tensor:
        """Pixels near [-1, 1], with shape (B, 3, H, W), of standardised particles, in one chunk."""
        raw = unstandardise(z, self.config.latents_mean, self.config.latents_std)
        pixels = raw if self.vae is None else decode_pixels(self.vae, raw)
        self.check_finite(pixels)
        return pixels

    def check_finite(self, values: Tensor) -> None:
        """Raise FloatingPointError for latents or pixels that would become black images."""
        if not values.isfinite().all():
            halves = self.vae is not None and self.vae.dtype == torch.float16
            advice = "; its autoencoder overflows in float16: use bfloat16, or pipe.vae.float()" if halves else ""
            raise FloatingPointError(f"this pipeline has made values that are not finite{advice}")

    @torch.no_grad()
    def decode(self, z: Tensor, output_type: OutputType = "pil") -> Tensor | list:
        """Images of standardised particles (B, C, h, w), in the chunks of `flow_options`."""
        chunks = z.to(self._execution_device).split(self.flow_options.chunk_size or len(z))
        pixels = torch.cat([self.decode_to_pixels(chunk) for chunk in chunks])
        return self.image_processor.postprocess(pixels, output_type=output_type)

    def after_step(self, callback: Callable | None, i: int, t: float, z: Tensor) -> Tensor:
        """The particles after a step: a callback sees them, and may replace them."""
        if callback is None:
            return z
        returned = callback(self, i, t, {"latents": z})
        return outside_inference((returned or {}).get("latents", z).to(z))

    def output(self, z: Tensor, output_type: OutputType, return_dict: bool) -> ImagePipelineOutput | tuple:
        """What a call returns for its final particles."""
        images = z if output_type == "latent" else self.decode(z, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def read_index(name_or_path: str | Path) -> dict:
    """What a saved pipeline says of itself, by folder, bundled name or name on the hub.

    Raises ValueError if there is none, or the hub cannot be reached.
    """
    folder, name = Path(pipeline_folder(name_or_path)), LatentPipeline.config_name
    try:
        index = folder / name if folder.exists() else hf_hub_download(str(name_or_path), name)
        index = LatentPipeline._dict_from_json_file(index)
        return {**index, "class_names": as_list(index.get("class_names"))}
    except (OSError, ValueError) as error:  # ValueError: no name on the hub, or no JSON
        raise ValueError(
            f"no pipeline in {name_or_path}; give the folder that training wrote, runs/NAME/pipeline, the name of one "
            f"on the hub that can be reached, or a bundled one: {', '.join(bundled_pipelines())}"
        ) from error


def as_list(class_names: list[str] | dict[str, str] | None) -> list[str] | None:
    """Names of classes as they are in an index, where they have numbers."""
    return [class_names[i] for i in sorted(class_names, key=int)] if isinstance(class_names, dict) else class_names


def outside_inference(z: Tensor) -> Tensor:
    """A tensor that can be differentiated: a copy of what was made under `torch.inference_mode()`."""
    return z.clone() if z.is_inference() else z


@torch.no_grad()
def take_outside_inference(module: nn.Module) -> None:
    """Let a module be differentiated and cast whose weights were made under `torch.inference_mode()`."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.is_inference():
                part.register_parameter(name, nn.Parameter(parameter.clone(), parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, outside_inference(buffer))


def check_generators(generator: Generators, num_images: int) -> None:
    """Raise ValueError unless it is None, a generator, or a list of one for every image."""
    several = generator if isinstance(generator, list) else [generator]
    wrong = next((g for g in several if not isinstance(g, torch.Generator)), None)
    if wrong is not None or (isinstance(generator, list) and None in generator):
        raise ValueError(
            f"generator must be a torch.Generator or a list of them; got {wrong!r}: pass "
            "torch.Generator().manual_seed(seed)"
        )
    if isinstance(generator, list) and len(generator) != num_images:
        raise ValueError(f"generator is a list of {len(generator)}, but there are {num_images} images; give as many")


def check_output_type(output_type: str, latent: bool = True) -> None:
    """Raise ValueError unless it is one of `OutputType`; `latent` only where it can be had."""
    kinds = ("pil", "np", "pt", "latent") if latent else ("pil", "np", "pt")
    if output_type not in kinds:
        raise ValueError(f"output_type must be one of {', '.join(kinds)}; got {output_type!r}")
