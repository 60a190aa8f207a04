"""A generator in one step, distilled from a flow.

Particles that a flow has moved from noise ε to x are what G(ε) = ε − v(ε, 1) is regressed on, the targets held fixed:

    L = E ‖G(ε) − x‖² / D

With stored witnesses x is a function of ε, and with exact ones nearly so for many particles at once: G can learn it,
and is not asked for the mean of several x, a blurred image (Luhman & Luhman, 2021, of diffusion). Pairs (ε, x) are made
once and kept in the run folder. G is the U-Net of flow matching and begins with the weights that it shares with φ. It
is saved and sampled as flow matching with one step.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from latent_dmmd.baselines import VelocityNet
from latent_dmmd.latent_pipeline import FlowOptions
from latent_dmmd.objective import Generators, Objective, Terms
from latent_dmmd.pipeline import LatentDMMDPipeline
from latent_dmmd.utils.errors import check
from latent_dmmd.utils.files import changed_keys, write_aside, write_json
from latent_dmmd.utils.hashing import module_hash
from latent_dmmd.utils.randomness import keyed_generator

SHARD_SIZE = 256  # particles that flow together


@dataclass(frozen=True)
class PairCache:
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


def make_pairs(teacher: LatentDMMDPipeline, folder: Path, num_pairs: int, seed: int, **sampling) -> PairCache:
    """Pairs of a flow, in shards on the disk: an interrupted run goes on where it was.

    Args:
        teacher: Whose flow it is.
        folder: Where the shards are kept; of this flow and this seed alone.
        num_pairs: N, rounded up to whole shards.
        seed: Seed of the noise.
        sampling: Arguments of the pipeline's call: the sampler and the steps.

    Raises:
        ConfigError: If the folder holds pairs of another flow.
        OSError: If a shard cannot be written.
    """
    parts = {name: module_hash(teacher.components[name]) for name in ("feature_net", "mean_embeddings")}
    begin_pairs(folder, {"shard_size": SHARD_SIZE, "seed": seed, **parts, **sampling})
    teacher.set_progress_bar_config(disable=True)
    teacher.flow_options = FlowOptions(chunk_size=None)
    shards = []
    for i in tqdm(range(-(-num_pairs // SHARD_SIZE)), desc="pairs of the flow", unit="shard"):
        path = folder / f"{i:05d}.safetensors"
        if not path.exists():
            noise = teacher.initial_particles(SHARD_SIZE, keyed_generator(seed, 0, 0, i), None)
            moved = teacher(SHARD_SIZE, latents=noise, output_type="latent", **sampling).images
            tensors = {"noise": noise.cpu().contiguous(), "moved": moved.cpu().contiguous()}
            write_aside(path, partial(save_file, tensors))
        shards.append(load_file(path))
    noise, moved = (torch.cat([shard[name] for shard in shards]) for name in ("noise", "moved"))
    mean, std = (torch.tensor(teacher.config[name], device="cpu") for name in ("latents_mean", "latents_std"))
    return PairCache(noise, moved, mean, std)


def begin_pairs(folder: Path, made_of: dict) -> None:
    """Make a folder that says what its pairs are made of. Raises ConfigError if they are made of something else."""
    path = folder / "manifest.json"
    changed = changed_keys(path, made_of) if path.exists() else []
    check(
        not changed,
        f"the pairs in {folder} are of another {', '.join(changed)}: the teacher has changed since; choose another "
        "--output_dir",
    )
    write_json(path, made_of)


def begin_with_features(generator: VelocityNet, feature_net: nn.Module) -> None:
    """Give a generator the weights that it shares with φ: all of the U-Net but its last layer."""
    ours = generator.state_dict()
    shared = {name: a for name, a in feature_net.state_dict().items() if name in ours and ours[name].shape == a.shape}
    generator.load_state_dict(shared, strict=False)


class MovedPairs(NamedTuple):
    """Noise, and where a flow brings it: what a step draws. Both have shape (N, C, H, W)."""

    moved: Tensor
    eps: Tensor


class OneStep(Objective):
    """Regression of G(ε) on moved particles: `net` is a `VelocityNet`.

    Terms: `distillation`, the mean square of what is missing.
    """

    def draw(self, particles: PairCache, num_levels: int, num_pairs: int, generators: Generators) -> MovedPairs:
        return MovedPairs(*particles.draw_with_noise(num_levels * num_pairs, generators.own))

    def forward(self, batch: MovedPairs) -> Terms:
        generated = batch.eps - self.net(batch.eps, batch.eps.new_ones(()))
        error = (generated - batch.moved).square().mean()
        return Terms(error, {"distillation": error.detach()})
