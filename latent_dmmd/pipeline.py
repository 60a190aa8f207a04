"""The diffusers pipelines: noise, a flow in latent space, decoded images.

`LatentDMMDPipeline` follows the gradient flow of DMMD; `LatentSchedulerPipeline` a diffusers scheduler, for what DMMD
is compared with. Both are called alike: `pipe(batch_size, num_inference_steps=…, generator=…)`.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, ImagePipelineOutput
from torch import Tensor, nn

from latent_dmmd.baselines import VelocityNet
from latent_dmmd.data.autoencoder import Autoencoder
from latent_dmmd.embeddings import MeanEmbeddings
from latent_dmmd.features import BilinearFeatures, EncoderFeatureNet, FeatureNet
from latent_dmmd.flow import Flow, GuidedFlow, get_flow, rank_and_size, run_in_step
from latent_dmmd.forward import LinearInterpolant
from latent_dmmd.latent_pipeline import (
    Generators,
    LatentPipeline,
    OutputType,
    as_list,
    check_output_type,
    outside_inference,
    read_index,
    take_outside_inference,
)
from latent_dmmd.schedule import (
    FlowStep,
    Multistep,
    Sampler,
    SamplingDefaults,
    SolverOrder,
    check_nfe,
    flow_schedule,
    num_levels_up_to,
    set_sigmas,
    steps_for_nfe,
)
from latent_dmmd.utils.process import default_device

DEFAULT_NUM_INFERENCE_STEPS = 50  # of a scheduler


class LatentDMMDPipeline(LatentPipeline):
    """Generation by the noise-adaptive MMD gradient flow in the latent space of an autoencoder.

    Load a saved one with `LatentDMMDPipeline.from_pretrained(folder)`; nothing but safetensors and JSON is read.

    Args:
        feature_net: The noise-conditional features φ.
        mean_embeddings: Their stored means at every noise level.
        vae: The frozen autoencoder; None if particles are pixels in [-1, 1].
        latents_mean: Mean of raw latents per channel, of length C.
        latents_std: Standard deviation of raw latents per channel, of length C.
        class_names: What the classes are called that the features were trained for, in order; None if there are none.
        sampling: The fields of `SamplingDefaults` that this pipeline has instead of the defaults.

    What is None is what the network remembers of the pipeline it comes from, so that another pipeline of the same
    components generates alike.
    """

    model_cpu_offload_seq = "feature_net->vae"

    def __init__(
        self,
        feature_net: FeatureNet | EncoderFeatureNet,
        mean_embeddings: MeanEmbeddings,
        vae: Autoencoder | None = None,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        class_names: list[str] | dict[str, str] | None = None,
        sampling: dict | None = None,
    ) -> None:
        super().__init__()
        if any(feature_net.config[name] != mean_embeddings.config[name] for name in ("num_features", "num_classes")):
            raise ValueError("mean_embeddings are of other features or classes than feature_net has")
        components = dict(feature_net=feature_net, mean_embeddings=mean_embeddings)
        statistics = dict(latents_mean=latents_mean, latents_std=latents_std)
        self.register(components, vae, **statistics, class_names=as_list(class_names), sampling=sampling)

    @property
    def net(self) -> BilinearFeatures:
        """φ."""
        return self.feature_net

    @property
    def sampling_defaults(self) -> SamplingDefaults:
        """How this pipeline generates where a call does not say; of first order where it was saved without one."""
        return SamplingDefaults(**{"solver_order": 1, **(self.config.sampling or {})})

    def levels_and_steps(self, num_inference_steps: int, start: float = 1.0) -> tuple[int, list[int]]:
        """K and the steps at each level of an NFE, from `start` on. Raises ValueError if one is out of range."""
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

    def flow_of(
        self, label: int | None, sampler: Sampler, guidance_scale: float = 1.0, solver_order: SolverOrder = 1
    ) -> Flow:
        """The flow of one class, or of any if None.

        Raises:
            ValueError: If there is no such sampler or class, or the class cannot be guided, or the order not be had.
        """
        parts = (self.feature_net, self.mean_embeddings, label)
        options = vars(self.flow_options) | {"solver_order": solver_order}
        if guidance_scale == 1:
            return get_flow(sampler, *parts, **options)
        if label is None:
            raise ValueError(f"guidance_scale={guidance_scale} needs class_labels")
        if sampler != "approximate":
            raise ValueError(f"guidance_scale={guidance_scale} needs sampler='approximate'; got {sampler!r}")
        return GuidedFlow(*parts, guidance_scale, **options)

    def trajectory(self, num_inference_steps: int, start: float = 1.0) -> list[float]:
        if not isinstance(self.mean_embeddings.process, LinearInterpolant):
            raise ValueError("only flows of the linear forward process can be edited; see objective.forward_process")
        if self.flow_options.step_size is not None:
            raise ValueError("edits need calibrated steps; leave out step_size in flow_options")
        steps = flow_schedule(self.mean_embeddings, *self.levels_and_steps(num_inference_steps, start), start)
        return [self.mean_embeddings.levels[steps[0].level].item(), *(step.end for step in steps)]

    @torch.inference_mode(False)
    @torch.no_grad()
    def move(
        self,
        z: Tensor,
        num_inference_steps: int | None = None,
        start: float = 1.0,
        callback: Callable | None = None,
        num_noise_levels: int | None = None,
        steps_per_level: int | None = None,
        sampler: Sampler = "approximate",
        class_labels: int | str | list[int | str] | None = None,
        guidance_scale: float = 1.0,
        solver_order: SolverOrder = 1,
    ) -> Tensor:
        """As of `LatentPipeline`, by default without interaction of particles; other arguments as of the call.

        Steps are of first order by default: a callback may move particles off the path of the step before.
        """
        z = outside_inference(z.to(self._execution_device))
        # offloading moves components with their forward, which these lack; by groups, it refuses their own `to`
        nn.Module.to(self.mean_embeddings, z.device)
        for component in (self.feature_net, self.mean_embeddings):
            take_outside_inference(component)
        if num_inference_steps is not None:
            num_noise_levels, steps_per_level = self.levels_and_steps(num_inference_steps, start)
        own = self.sampling_defaults
        counts = (
            own.num_noise_levels if num_noise_levels is None else num_noise_levels,
            own.steps_per_level if steps_per_level is None else steps_per_level,
        )
        steps = flow_schedule(self.mean_embeddings, *counts, start)

        _, num_ranks = rank_and_size(self.flow_options.across_ranks)
        labels = self.labels_of(class_labels, len(z) * num_ranks)
        if len(set(labels)) > 1 and self.flow_options.across_ranks:
            raise ValueError("across_ranks needs the same class for all images")
        own_flow = partial(self.flow_of, sampler=sampler, guidance_scale=guidance_scale, solver_order=solver_order)
        flows = {label: own_flow(label) for label in dict.fromkeys(labels)}

        levels = self.mean_embeddings.levels.tolist()
        with self.progress_bar(total=len(steps)) as progress:

            def after_step(i: int, step: FlowStep, z: Tensor) -> Tensor:
                progress.update()
                return self.after_step(callback, i, levels[step.level], z)

            return run_in_step(flows, labels, z, steps, after_step)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        num_noise_levels: int | None = None,
        steps_per_level: int | None = None,
        sampler: Sampler | None = None,
        class_labels: int | str | list[int | str] | None = None,
        guidance_scale: float = 1.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["LatentDMMDPipeline", int, float, dict], dict] | None = None,
        solver_order: SolverOrder | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate images; num_noise_levels × steps_per_level evaluations of φ and its gradient each.

        What is not given comes from the pipeline's own `sampling`, or else from `SamplingDefaults`. Chunks, the paper's
        constant step and distributed sampling are set by `flow_options`.

        Args:
            batch_size: Number of particles, hence of images. With the exact sampler they interact.
            num_inference_steps: The number of evaluations, instead of levels and steps: all levels if it suffices.
            num_noise_levels: Noise levels K, at most the stored ones.
            steps_per_level: Gradient steps N_s at each.
            sampler: "approximate" (stored mean embeddings, independent particles), "exact" (mean embeddings of the
                particles) or "hybrid" (exact for the last levels).
            class_labels: Class of every image, or one for all, as numbers or names; any class if None.
            guidance_scale: How much more of the class than the data have, γ; 1 is none. Approximate sampler only.
            generator: Source of the initial noise; a list gives every image its own.
            latents: Initial standardised particles, with shape (batch_size, C, h, w), instead of noise.
            output_type: "pil", "np" (B, H, W, 3) in [0, 1], "pt" (B, 3, H, W) in [0, 1], or "latent": the final
                standardised particles.
            return_dict: Whether to return an `ImagePipelineOutput` rather than a tuple.
            callback_on_step_end: Called as f(pipeline, step, t, {"latents": z}); may return {"latents": z'}.
            solver_order: Order of the steps, 1 or 2; 2 needs calibrated steps and the linear forward process.

        Returns:
            The images as `.images`.

        Raises:
            ValueError: If an argument is out of range, `latents` is no tensor of the right shape, there are more or
                fewer generators than images, or the processes cannot share `batch_size` equally.
        """
        check_output_type(output_type)
        z = self.initial_particles(batch_size, generator, latents)
        z = self.move(
            z,
            num_inference_steps,
            callback=callback_on_step_end,
            num_noise_levels=num_noise_levels,
            steps_per_level=steps_per_level,
            sampler=sampler or self.sampling_defaults.sampler,
            class_labels=class_labels,
            guidance_scale=guidance_scale,
            solver_order=self.own_order() if solver_order is None else solver_order,
        )
        return self.output(z, output_type, return_dict)

    def own_order(self) -> SolverOrder:
        """The pipeline's own order of steps, where it can be had."""
        linear = isinstance(self.mean_embeddings.process, LinearInterpolant)
        return self.sampling_defaults.solver_order if linear and self.flow_options.step_size is None else 1


class LatentSchedulerPipeline(LatentPipeline):
    """Unconditional generation by a diffusers scheduler: flow matching, DDPM, and MMD-GAN in one step.

    Args:
        network: Velocity v(x_t, t) or noise ε̂(x_t, t), for t in [0, 1].
        scheduler: What moves the particles by it.
        vae: The frozen autoencoder; None if particles are pixels in [-1, 1].
        latents_mean: Mean of raw latents per channel, of length C.
        latents_std: Standard deviation of raw latents per channel, of length C.
        num_inference_steps: The NFE where a call does not say; 50 if nobody does.
        solver_order: Order of the steps of flow matching where a call does not say; 1 if nobody does.
        one_step: Whether the network has learnt one step from noise and no others.

    What is None is what the network remembers of the pipeline it comes from.
    """

    model_cpu_offload_seq = "network->vae"

    def __init__(
        self,
        network: VelocityNet,
        scheduler: FlowMatchEulerDiscreteScheduler | DDIMScheduler,
        vae: Autoencoder | None = None,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        num_inference_steps: int | None = None,
        solver_order: int | None = None,
        one_step: bool | None = None,
    ) -> None:
        super().__init__()
        statistics = dict(latents_mean=latents_mean, latents_std=latents_std)
        options = dict(num_inference_steps=num_inference_steps, solver_order=solver_order, one_step=one_step)
        self.register(dict(network=network, scheduler=scheduler), vae, **statistics, **options)

    @property
    def net(self) -> VelocityNet:
        """The network."""
        return self.network

    @property
    def matches_flow(self) -> bool:
        """Whether particles follow the linear interpolant: flow matching, and one-step generators."""
        return isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler)

    def trajectory(self, num_inference_steps: int, start: float = 1.0) -> list[float]:
        if self.one_step:
            raise ValueError("a generator in one step has no flow to edit by; use DMMD or flow matching")
        if not self.matches_flow:
            raise ValueError("only flows of the linear forward process can be edited; this pipeline has another")
        return set_sigmas(self.scheduler, num_inference_steps, start)

    @torch.no_grad()
    def move(
        self,
        z: Tensor,
        num_inference_steps: int,
        start: float = 1.0,
        callback: Callable | None = None,
        solver_order: SolverOrder = 1,
    ) -> Tensor:
        """As of `LatentPipeline`; only flow matching can begin below 1, or have steps of second order."""
        multistep, z = Multistep(solver_order), z.to(self._execution_device)
        if self.one_step and num_inference_steps != 1:
            raise ValueError(f"a generator in one step takes num_inference_steps=1; got {num_inference_steps}")
        if self.matches_flow:
            set_sigmas(self.scheduler, num_inference_steps, start, z.device)
        elif start != 1:
            raise ValueError(f"start={start} needs flow matching; this pipeline begins at 1")
        else:
            check_nfe(num_inference_steps)
            self.scheduler.set_timesteps(num_inference_steps, device=z.device)
        if solver_order == 2 and not self.matches_flow:
            raise ValueError("solver_order=2 needs flow matching; this pipeline has a scheduler of another process")
        if not self.matches_flow:
            z = z * self.scheduler.init_noise_sigma
        num_times = self.scheduler.config.num_train_timesteps
        for i, time in enumerate(self.progress_bar(self.scheduler.timesteps)):
            t = (time / num_times).to(z)
            x = z if self.matches_flow else self.scheduler.scale_model_input(z, time)
            chunks = x.split(self.flow_options.chunk_size or len(z))
            prediction = torch.cat([self.network(chunk, t) for chunk in chunks]).to(z)
            if solver_order == 2:
                prediction = multistep(prediction, *self.scheduler.sigmas[i : i + 2].tolist())
            z = self.scheduler.step(prediction, time, z).prev_sample
            z = self.after_step(callback, i, t.item(), z)
        return z

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["LatentSchedulerPipeline", int, float, dict], dict] | None = None,
        solver_order: SolverOrder | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate images; one evaluation of the network per step.

        Args:
            batch_size: Number of images.
            num_inference_steps: Steps of the scheduler, the NFE; the pipeline's own if None.
            generator, latents, output_type, return_dict, callback_on_step_end: As of `LatentDMMDPipeline`.
            solver_order: Order of the steps of flow matching, 1 or 2; the pipeline's own if None.

        Returns:
            The images as `.images`.

        Raises:
            ValueError: If an argument is out of range, `latents` is no tensor of the right shape, there are more or
                fewer generators than images, or the processes cannot share `batch_size` equally.
        """
        check_output_type(output_type)
        if num_inference_steps is None:
            num_inference_steps = self.config.num_inference_steps or DEFAULT_NUM_INFERENCE_STEPS
        z = self.initial_particles(batch_size, generator, latents)
        order = self.own_order() if solver_order is None else solver_order
        z = self.move(z, num_inference_steps, callback=callback_on_step_end, solver_order=order)
        return self.output(z, output_type, return_dict)

    def own_order(self) -> SolverOrder:
        """The pipeline's own order of steps, where it can be had."""
        return self.config.solver_order or 1 if self.matches_flow else 1


PIPELINES = {cls.__name__: cls for cls in (LatentDMMDPipeline, LatentSchedulerPipeline)}


def load_pipeline(name_or_path: str | Path) -> LatentDMMDPipeline | LatentSchedulerPipeline:
    """A saved or bundled pipeline or one on the hub, on this process's GPU if there is one.

    Safetensors and JSON alone are read.

    Raises:
        ValueError: If there is none of ours in the folder.
        OSError: If it has no safetensors.
    """
    name = str(read_index(name_or_path).get("_class_name"))
    # an editor has all parts of the pipeline that it edits with
    cls = next((cls for known, cls in PIPELINES.items() if name.startswith(known.removesuffix("Pipeline"))), None)
    if cls is None:
        raise ValueError(f"{name_or_path} holds a {name}, not one of {', '.join(PIPELINES)}")
    return cls.from_pretrained(name_or_path, use_safetensors=True).to(default_device())
