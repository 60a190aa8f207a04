"""The diffusers pipelines: noise, a flow in latent space, decoded pictures.

`LatentDMMDPipeline` follows the gradient flow of DMMD; `LatentSchedulerPipeline` a diffusers scheduler, for what DMMD
is compared with. Both are called alike: `pipe(batch_size, num_inference_steps=…, generator=…)`.
"""

import inspect
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from latent_dmmd.baselines import VelocityNet
from latent_dmmd.features import FeatureNet, MeanEmbeddings, PatchUNet
from latent_dmmd.flow import (
    FlowStep,
    Sampler,
    SelfTerm,
    flow_schedule,
    gradient_flow,
    num_levels_up_to,
    rank_and_size,
    steps_for_nfe,
)
from latent_dmmd.forward import LinearInterpolant
from latent_dmmd.latents import (
    Autoencoder,
    decode_pixels,
    encode_moments,
    freeze,
    standardise,
    to_pixels,
    unstandardise,
)
from latent_dmmd.utils.process import default_device

OutputType = Literal["pil", "np", "pt", "latent"]


class LatentPipeline(DiffusionPipeline):
    """Base class: particles ↔ pictures, through a frozen autoencoder or as they are."""

    _optional_components = ["vae"]

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
        """Side in pixels of the pictures."""
        config = self.net.config
        if self.vae is None:
            return config.sample_size
        shape = (1, config.in_channels, config.sample_size, config.sample_size)
        return decode_pixels(self.vae, torch.zeros(shape, device=self._execution_device)).shape[-1]

    def initial_particles(
        self, batch_size: int, generator: object, latents: Tensor | None, across_ranks: bool = False
    ) -> Tensor:
        """Standard normal particles in float32, or those given; with `across_ranks`, the share of this process.

        Raises ValueError if they have the wrong shape, or do not divide among the processes.
        """
        rank, num_ranks = rank_and_size(across_ranks)
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

    def trajectory(self, num_inference_steps: int, start: float = 1.0) -> list[float]:
        """Noise levels of the linear interpolant before the first step of a call, and after each.

        Args:
            num_inference_steps: As of the call.
            start: As of the call.

        Raises:
            ValueError: If an argument is out of range, or particles follow another forward process.
        """
        raise NotImplementedError

    @torch.no_grad()
    def encode(self, images_uint8: Tensor, chunk_size: int = 16) -> Tensor:
        """Standardised particles (B, C, h, w), on the CPU, of pictures (B, 3, H, W): means of the posterior."""
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
    def decode(self, z: Tensor, output_type: OutputType = "pil", chunk_size: int | None = 64) -> Tensor | list:
        """Pictures of standardised particles (B, C, h, w), `chunk_size` at a time."""
        pixels = torch.cat([self.decode_to_pixels(chunk) for chunk in z.split(chunk_size or len(z))])
        return self.image_processor.postprocess(pixels, output_type=output_type)

    def after_step(self, callback: Callable | None, i: int, t: float, z: Tensor) -> Tensor:
        """The particles after a step: a callback sees them, and may replace them."""
        if callback is None:
            return z
        returned = callback(self, i, t, {"latents": z})
        return (returned or {}).get("latents", z)

    def output(self, z: Tensor, output_type: OutputType, chunk_size: int | None, return_dict: bool):
        """What a call returns for its final particles."""
        images = z if output_type == "latent" else self.decode(z, output_type, chunk_size)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def check_output_type(output_type: str, latent: bool = True) -> None:
    """Raise ValueError unless it is one of `OutputType`; `latent` only where it can be had."""
    kinds = ("pil", "np", "pt", "latent") if latent else ("pil", "np", "pt")
    if output_type not in kinds:
        raise ValueError(f"output_type must be one of {', '.join(kinds)}; got {output_type!r}")


class LatentDMMDPipeline(LatentPipeline):
    """Generation by the noise-adaptive MMD gradient flow in the latent space of an autoencoder.

    Load a saved one with `LatentDMMDPipeline.from_pretrained(folder)`; nothing but safetensors and JSON is read.

    Args:
        feature_net: The noise-conditional features φ.
        mean_embeddings: Their stored means at every noise level.
        vae: The frozen autoencoder; None if particles are pixels in [-1, 1].
        latents_mean: Mean of raw latents per channel, of length C.
        latents_std: Standard deviation of raw latents per channel, of length C.
        class_names: What the classes are called that the features were trained for; None if there are none.
    """

    model_cpu_offload_seq = "feature_net->vae"

    def __init__(
        self,
        feature_net: FeatureNet,
        mean_embeddings: MeanEmbeddings,
        vae: Autoencoder | None = None,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        class_names: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.register_to_config(class_names=class_names)
        self.register_modules(feature_net=feature_net, mean_embeddings=mean_embeddings, vae=vae)
        self.register_latents(feature_net, vae, latents_mean, latents_std)

    @property
    def net(self) -> FeatureNet:
        """φ."""
        return self.feature_net

    def levels_and_steps(self, num_inference_steps: int, start: float) -> tuple[int, int]:
        """K and N_s of an NFE, from `start` on. Raises ValueError if one of them is out of range."""
        return steps_for_nfe(num_inference_steps, num_levels_up_to(start, self.mean_embeddings))

    def labels_of(self, class_labels: int | str | list[int | str] | None, batch_size: int) -> list[int | None]:
        """A class for every particle, as its number, or None for any. Raises ValueError if there is no such class."""
        given = class_labels if isinstance(class_labels, list) else [class_labels] * batch_size
        if len(given) != batch_size:
            raise ValueError(f"class_labels must be one class, or {batch_size}; got {len(given)}")
        names = self.config.class_names or []
        unknown = [label for label in given if isinstance(label, str) and label not in names]
        if unknown:
            raise ValueError(f"no class {unknown[0]!r}; the pipeline has {', '.join(names) or 'no classes'}")
        return [names.index(label) if isinstance(label, str) else label for label in given]

    def of_class(self, label: int | None, guidance_scale: float = 1.0) -> tuple[Callable, MeanEmbeddings]:
        """φ and the mean embeddings of one class, or of any if None.

        With s_c ∇f_c the displacement that the class predicts and s_∅ ∇f_∅ that of any class, the guided one is
        s_∅ ∇f_∅ + γ (s_c ∇f_c − s_∅ ∇f_∅) (Ho & Salimans, 2022): that of the features of both, side by side.

        Args:
            label: The class.
            guidance_scale: γ; 1 is no guidance.

        Raises:
            ValueError: If there is no such class, or the kernel cannot be guided.
        """
        stored = self.mean_embeddings.of_class(label)
        if label is None:
            if guidance_scale != 1:
                raise ValueError(f"guidance_scale={guidance_scale} needs class_labels")
            return self.feature_net, stored
        net = partial(self.feature_net, label=label)
        if guidance_scale == 1:
            return net, stored
        if not stored.discrepancy.needs_means_only:
            raise ValueError("guidance needs the linear kernel and MMD; pass guidance_scale=1")
        options = {name: stored.config[name] for name in ("num_noise_levels", "num_features", "forward_process")}
        guided, anything = MeanEmbeddings(**{**options, "num_features": 2 * options["num_features"]}), self.feature_net
        guided.to(stored.levels.device)
        guided.levels, guided.displacement = stored.levels, stored.displacement
        guided.gradient_scale.fill_(1.0)
        unconditional = self.mean_embeddings.of_class(None)
        for name in ("clean", "noisy"):
            ours, theirs = (a.gradient_scale[:, None] * getattr(a, name) for a in (stored, unconditional))
            getattr(guided, name).copy_(torch.cat([guidance_scale * ours, (1 - guidance_scale) * theirs], dim=1))
        return lambda x, t: torch.cat([net(x, t), anything(x, t)], dim=1), guided

    def trajectory(self, num_inference_steps: int, start: float = 1.0) -> list[float]:
        if not isinstance(self.mean_embeddings.process, LinearInterpolant):
            raise ValueError("only flows of the linear forward process can be edited; see objective.forward_process")
        counts = self.levels_and_steps(num_inference_steps, start)
        steps = flow_schedule(self.mean_embeddings.of_class(), "approximate", *counts, start=start)
        return [self.mean_embeddings.levels[steps[0].level].item(), *(step.end for step in steps)]

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_noise_levels: int = 25,
        steps_per_level: int = 4,
        sampler: Sampler = "approximate",
        num_inference_steps: int | None = None,
        class_labels: int | str | list[int | str] | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        start: float = 1.0,
        step_size: float | None = None,
        self_term: SelfTerm = "include",
        noise_injection: float = 0.0,
        chunk_size: int | None = 64,
        across_ranks: bool = False,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["LatentDMMDPipeline", int, float, dict], dict] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate pictures; num_noise_levels × steps_per_level evaluations of φ and its gradient each.

        Args:
            batch_size: Number of particles, hence of pictures. With the exact sampler they interact.
            num_noise_levels: Noise levels K, at most the stored ones.
            steps_per_level: Gradient steps N_s at each.
            sampler: "approximate" (stored mean embeddings, independent particles), "exact" (mean embeddings of the
                particles) or "hybrid" (exact for the last levels).
            num_inference_steps: The number of evaluations, instead of levels and steps: as many levels as divide it.
            class_labels: Class of every picture, or one for all, as numbers or names; any class if None.
            guidance_scale: How much more of the class than the data have, γ; 1 is none. Stored witnesses only.
            generator: Source of the initial noise, and of the injected; a list gives every picture its own.
            latents: Initial standardised particles, with shape (batch_size, C, h, w), instead of noise.
            start: Noise level of `latents`, in (0, 1]; the flow begins at the highest stored level up to it.
            step_size: A constant η instead of the calibrated one, and exact witnesses of the particles' own length: the
                paper's flow.
            self_term: The exact witness at a particle may "include" its own feature, "leave-one-out", or be that of the
                other half of the particles, "independent".
            noise_injection: β ≥ 0; gradients are taken at the particle plus β times standard normal noise.
            chunk_size: Particles that pass through φ or the decoder at once; all if None.
            across_ranks: Whether the processes of a distributed run share the particles: each returns its part, in the
                order of ranks, of what one process would have made.
            output_type: "pil", "np" (B, H, W, 3) in [0, 1], "pt" (B, 3, H, W) in [0, 1], or "latent": the final
                standardised particles.
            return_dict: Whether to return an `ImagePipelineOutput` rather than a tuple.
            callback_on_step_end: Called as f(pipeline, step, t, {"latents": z}); may return {"latents": z'}.

        Returns:
            The pictures as `.images`.

        Raises:
            ValueError: If an argument is out of range, `latents` has the wrong shape, or the processes cannot share
                `batch_size` equally.
        """
        # 1. check, and draw the initial particles
        check_output_type(output_type)
        z = self.initial_particles(batch_size, generator, latents, across_ranks)
        if num_inference_steps is not None:
            num_noise_levels, steps_per_level = self.levels_and_steps(num_inference_steps, start)
        labels = self.labels_of(class_labels, batch_size)
        if guidance_scale != 1 and sampler != "approximate":
            raise ValueError(f"guidance_scale={guidance_scale} needs sampler='approximate'; got {sampler!r}")
        if len(set(labels)) > 1 and (across_ranks or noise_injection):
            raise ValueError("across_ranks and noise_injection need the same class for all pictures")

        # 2. a schedule for each class
        groups = []
        for label in dict.fromkeys(labels):
            which = torch.tensor([i for i, other in enumerate(labels) if other == label], device=z.device)
            net, stored = self.of_class(label, guidance_scale)
            schedule = (stored, sampler, num_noise_levels, steps_per_level, step_size)
            groups.append((which, net, stored, flow_schedule(*schedule, start=start)))
        steps = groups[0][3]

        # 3. flow
        options = dict(
            rescale=step_size is None,
            self_term=self_term,
            noise_injection=noise_injection,
            chunk_size=chunk_size,
            generator=generator,
            across_ranks=across_ranks,
        )
        levels = self.mean_embeddings.levels.tolist()
        with self.progress_bar(total=len(steps)) as progress:

            def after_step(i: int, step: FlowStep, z: Tensor) -> Tensor:
                progress.update()
                return self.after_step(callback_on_step_end, i, levels[step.level], z)

            if len(groups) == 1:
                _, net, stored, _ = groups[0]
                z = gradient_flow(net, z, stored, steps, callback=after_step, **options)
            else:  # in step with each other, for the callback
                for i, step in enumerate(steps):
                    moved = z.clone()
                    for which, net, stored, schedule in groups:
                        moved[which] = gradient_flow(net, z[which], stored, schedule[i : i + 1], **options)
                    z = after_step(i, step, moved)

        # 4. decode
        return self.output(z, output_type, chunk_size, return_dict)


class LatentSchedulerPipeline(LatentPipeline):
    """Unconditional generation by a diffusers scheduler: flow matching, DDPM, and MMD-GAN in one step.

    Args:
        network: Velocity v(x_t, t) or noise ε̂(x_t, t), for t in [0, 1].
        scheduler: What moves the particles by it.
        vae: The frozen autoencoder; None if particles are pixels in [-1, 1].
        latents_mean: Mean of raw latents per channel, of length C.
        latents_std: Standard deviation of raw latents per channel, of length C.
    """

    model_cpu_offload_seq = "network->vae"

    def __init__(
        self,
        network: VelocityNet,
        scheduler: FlowMatchEulerDiscreteScheduler | DDIMScheduler,
        vae: Autoencoder | None = None,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(network=network, scheduler=scheduler, vae=vae)
        self.register_latents(network, vae, latents_mean, latents_std)

    @property
    def net(self) -> VelocityNet:
        """The network."""
        return self.network

    @property
    def matches_flow(self) -> bool:
        """Whether particles follow the linear interpolant: flow matching, and one-step generators."""
        return "sigmas" in inspect.signature(self.scheduler.set_timesteps).parameters

    def trajectory(self, num_inference_steps: int, start: float = 1.0) -> list[float]:
        if not self.matches_flow:
            raise ValueError("only flows of the linear forward process can be edited; this pipeline has another")
        if not 0 < start <= 1:
            raise ValueError(f"start must be in (0, 1]; got {start}")
        return np.linspace(start, 0, num_inference_steps + 1).tolist()

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        start: float = 1.0,
        chunk_size: int | None = 64,
        across_ranks: bool = False,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["LatentSchedulerPipeline", int, float, dict], dict] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate pictures; one evaluation of the network a step.

        Args:
            batch_size: Number of pictures.
            num_inference_steps: Steps of the scheduler, the NFE.
            generator: Source of the initial noise; a list gives every picture its own.
            latents: Initial standardised particles, with shape (batch_size, C, h, w), instead of noise.
            start: Flow matching: noise level of `latents`, in (0, 1].
            chunk_size: Particles that pass through the network or the decoder at once; all if None.
            across_ranks: Whether the processes of a distributed run share the particles: each returns its part, in the
                order of ranks, of what one process would have made.
            output_type: "pil", "np" (B, H, W, 3) in [0, 1], "pt" (B, 3, H, W) in [0, 1], or "latent": the final
                standardised particles.
            return_dict: Whether to return an `ImagePipelineOutput` rather than a tuple.
            callback_on_step_end: Called as f(pipeline, step, t, {"latents": z}); may return {"latents": z'}.

        Returns:
            The pictures as `.images`.

        Raises:
            ValueError: If an argument is out of range, `latents` has the wrong shape, or the processes cannot share
                `batch_size` equally.
        """
        check_output_type(output_type)
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1; got {num_inference_steps}")
        z = self.initial_particles(batch_size, generator, latents, across_ranks)
        if self.matches_flow:
            # equal steps from start to 0; the scheduler's own end one early, at its smallest sigma
            sigmas = self.trajectory(num_inference_steps, start)[:-1]
            self.scheduler.set_timesteps(sigmas=sigmas, device=z.device)
        elif start != 1:
            raise ValueError(f"start={start} needs flow matching; this pipeline begins at 1")
        else:
            self.scheduler.set_timesteps(num_inference_steps, device=z.device)
        num_times = self.scheduler.config.num_train_timesteps
        for i, time in enumerate(self.progress_bar(self.scheduler.timesteps)):
            t = (time / num_times).to(z)
            prediction = torch.cat([self.network(chunk, t) for chunk in z.split(chunk_size or len(z))])
            z = self.scheduler.step(prediction, time, z).prev_sample
            z = self.after_step(callback_on_step_end, i, t.item(), z)
        return self.output(z, output_type, chunk_size, return_dict)


PIPELINES = {cls.__name__: cls for cls in (LatentDMMDPipeline, LatentSchedulerPipeline)}


def read_index(folder: str | Path) -> dict:
    """What a saved pipeline says of itself. Raises ValueError if there is none in the folder."""
    index = Path(folder) / "model_index.json"
    if not index.exists():
        raise ValueError(f"no pipeline in {folder}; give the folder that training wrote, runs/NAME/pipeline")
    return json.loads(index.read_text())


def load_pipeline(folder: str | Path) -> LatentDMMDPipeline | LatentSchedulerPipeline:
    """A saved pipeline, on this process's GPU if there is one; safetensors and JSON alone are read.

    Raises:
        ValueError: If there is none of ours in the folder.
        OSError: If it has no safetensors.
    """
    name = read_index(folder).get("_class_name")
    if name not in PIPELINES:
        raise ValueError(f"{folder} holds a {name}, not one of {', '.join(PIPELINES)}")
    return PIPELINES[name].from_pretrained(folder, use_safetensors=True).to(default_device())
