"""A generator in one step, distilled from a flow.

Particles that a flow has moved from noise ε to x are what G(ε) = ε − v(ε, 1) is regressed on, the targets held fixed:

    L = E ‖G(ε) − x‖² / D

With stored witnesses x is a function of ε, and with exact ones nearly so for many particles at once: G can learn it,
and is not asked for the mean of several x, a blurred picture (Luhman & Luhman, 2021, of diffusion). Pairs (ε, x) are
made once and kept in the run folder. With a weight w, the generator's own samples x = G(ε) are moved, too, down the
witness that tells them, noised to a random level t_k, from noised data:

    L + w E ‖G(ε) − [x − s_k ∇f_k(z)]‖² / D,   z = α_k x + σ_k ε',   f_k(z) = E' k(φ(z'), φ(z)) − E k(φ(x_t), φ(z))

E' is over the other samples, s_k the pipeline's measured scale, and what is in brackets is held fixed: its gradient is
that of the flow. G is the U-Net of flow matching and begins with the weights that it shares with φ;
it is saved and sampled as flow matching with one step.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from latent_dmmd.baselines import VelocityNet
from latent_dmmd.cache import Particles
from latent_dmmd.data import keyed_generator, write_aside
from latent_dmmd.flow import FlowOptions, gradient_at_level
from latent_dmmd.forward import ForwardProcess
from latent_dmmd.objective import Batch, Objective, Terms
from latent_dmmd.pipeline import LatentDMMDPipeline

SHARD_SIZE = 256  # particles that flow together


@dataclass(frozen=True)
class PairCache(Particles):
    """Noise, and where a flow brings it.

    Attributes:
        noise: Initial particles, with shape (N, C, h, w).
        moved: Final particles, shaped alike.
        channel_mean, channel_std: Statistics of the raw latents of the flow's pipeline, with shape (C).
    """

    noise: Tensor
    moved: Tensor
    channel_mean: Tensor
    channel_std: Tensor
    skipped: tuple[str, ...] = ()
    labels: None = None

    def __len__(self) -> int:
        return len(self.noise)

    def draw_with_noise(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random pairs: the moved particles and the noise they were, each with shape (count, C, h, w)."""
        index = torch.randint(len(self), (count,), generator=generator, device="cpu")
        return self.moved[index], self.noise[index]


def make_pairs(teacher: LatentDMMDPipeline, folder: Path, num_pairs: int, seed: int, **how) -> PairCache:
    """Pairs of a flow, in shards on the disk: an interrupted run goes on where it was.

    Args:
        teacher: Whose flow it is.
        folder: Where the shards are kept; of this flow and this seed alone.
        num_pairs: N, rounded up to whole shards.
        seed: Seed of the noise.
        how: Arguments of the pipeline's call: the sampler and the steps.

    Raises:
        OSError: If a shard cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    teacher.set_progress_bar_config(disable=True)
    shards = []
    for i in tqdm(range(-(-num_pairs // SHARD_SIZE)), desc="pairs of the flow", unit="shard"):
        path = folder / f"{i:05d}.safetensors"
        if not path.exists():
            noise = teacher.initial_particles(SHARD_SIZE, keyed_generator(seed, 0, 0, i), None)
            moved = teacher(SHARD_SIZE, latents=noise, output_type="latent", chunk_size=None, **how).images
            tensors = {"noise": noise.cpu().contiguous(), "moved": moved.cpu().contiguous()}
            write_aside(path, partial(save_file, tensors))
        shards.append(load_file(path))
    noise, moved = (torch.cat([shard[name] for shard in shards]) for name in ("noise", "moved"))
    mean, std = (torch.tensor(teacher.config[name], device="cpu") for name in ("latents_mean", "latents_std"))
    return PairCache(noise, moved, mean, std)


def begin_with_features(generator: VelocityNet, feature_net: nn.Module) -> None:
    """Give a generator the weights of φ that it has, too: all of the U-Net but its last layer."""
    ours = generator.state_dict()
    shared = {name: a for name, a in feature_net.state_dict().items() if name in ours and ours[name].shape == a.shape}
    generator.load_state_dict(shared, strict=False)


class OneStep(Objective):
    """Regression of G(ε) on moved particles, in the place of a DMMD objective: `feature_net` is a `VelocityNet`.

    A batch's x_0 is where its ε was moved to. Terms: `distillation`, the mean square of what is missing; and, with a
    teacher, `witness`, the mean square of how far its witness moves the generator's samples.

    Args:
        teacher: Whose witness moves the generator's own samples; None leaves that term out.
        witness_weight: Its weight w.
    """

    def __init__(
        self,
        feature_net: nn.Module,
        process: ForwardProcess,
        num_noise_levels: int,
        teacher: LatentDMMDPipeline | None = None,
        witness_weight: float = 1.0,
    ) -> None:
        super().__init__(feature_net, process, num_noise_levels)
        self.teacher, self.witness_weight = teacher, witness_weight

    def forward(self, batch: Batch) -> Terms:
        moved, eps = batch.x_0.flatten(0, 1), batch.eps.flatten(0, 1)
        generated = eps - self.feature_net(eps, eps.new_ones(()))
        error = (generated - moved).square().mean()
        if self.teacher is None:
            return Terms(error, {"distillation": error.detach()})
        # another pair's noise is as good as fresh for a sample; u is uniform, and drawn anew at every step
        target = self.moved_by_witness(generated.detach(), eps.roll(1, 0), float(batch.u.flatten()[0]))
        own = (generated - target).square().mean()
        return Terms(error + self.witness_weight * own, {"distillation": error.detach(), "witness": own.detach()})

    def moved_by_witness(self, x: Tensor, eps: Tensor, u: float) -> Tensor:
        """Samples moved down the witness between them and data at one noise level.

        Args:
            x: The samples, with shape (N, C, h, w), N at least 2.
            eps: Noise, shaped like x, independent of it.
            u: Which of the teacher's levels, in [0, 1).

        Returns:
            x − s_k ∇f_k, shaped like x, without gradient.
        """
        embeddings = self.teacher.mean_embeddings.of_class(None)
        k = int(u * len(embeddings.levels))
        level = embeddings.at_level(k)
        z = embeddings.process.sample(x, level.t.expand(len(x)), eps)
        noised_data = replace(level, clean=embeddings.noisy[k].reshape(level.clean.shape))
        options = FlowOptions(rescale=False, self_term="leave-one-out")
        gradient = gradient_at_level(self.teacher.feature_net, z, noised_data, True, options)
        return x - embeddings.gradient_scale[k] * gradient
