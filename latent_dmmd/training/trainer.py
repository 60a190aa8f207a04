"""Network, averaged network, objective and optimiser of a configuration, and one step of them."""

import math
from copy import deepcopy
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from latent_dmmd.data.autoencoder import Autoencoder
from latent_dmmd.data.particles import Particles
from latent_dmmd.objective import Generators, Terms
from latent_dmmd.pipeline import LatentPipeline, load_pipeline
from latent_dmmd.training.config import Config, TrainingConfig
from latent_dmmd.training.metrics_file import check_finite
from latent_dmmd.utils.errors import ConfigError
from latent_dmmd.utils.randomness import keyed_generator


def learning_rate_at(step: int, config: TrainingConfig, floor: float = 0.1) -> float:
    """Linear warm-up, then a cosine from the peak to `floor` times it."""
    warmup = min(1.0, (step + 1) / max(1, config.num_warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / config.num_steps)))
    return config.learning_rate * warmup * (floor + (1 - floor) * cosine)


def step_generators(seed: int, rank: int, step: int) -> Generators:
    """The randomness of one step on one rank, a function of these three numbers: a resumed run draws the same."""
    return Generators(keyed_generator(seed, 0, step), keyed_generator(seed, 1 + rank, step))


def begin_with(network: nn.Module, name_or_path: str) -> None:
    """Give a network the weights of a saved pipeline's; what only one of them has for classes is left as it is.

    Raises ConfigError if there is no pipeline, or its network is another.
    """
    try:
        weights = load_pipeline(name_or_path).net.state_dict()
    except (OSError, ValueError) as error:
        raise ConfigError(f"training.init_from: {error}") from error
    ours, extra = network.state_dict(), "class_embedding.weight"
    weights = {name: weight for name, weight in weights.items() if name != extra or name in ours}
    fits = weights.keys() | {extra} == ours.keys() | {extra}
    if not fits or any(weight.shape != ours[name].shape for name, weight in weights.items()):
        raise ConfigError(
            f"training.init_from: the network of {name_or_path} is another than the one that feature_net describes"
        )
    network.load_state_dict(weights, strict=False)


class Trainer:
    """Everything that a step of training changes.

    Args:
        config: What to train.
        shape: Shape (C, h, w) of the particles.
        accelerator: Devices, ranks and precision.
        class_names: Names of the particles' classes; empty if there are none.

    Raises:
        ConfigError: If the network does not fit the particles, or the weights it should begin with.
    """

    def __init__(
        self,
        config: Config,
        shape: tuple[int, int, int],
        accelerator: Accelerator,
        class_names: tuple[str, ...] = (),
    ) -> None:
        self.config, self.accelerator, options = config, accelerator, config.training
        self.class_names, self.method = class_names, config.method
        set_seed(options.seed)
        self.network = self.method.network(config.feature_net, shape, len(class_names))
        if options.init_from is not None:
            begin_with(self.network, options.init_from)
        self.averaged_net = deepcopy(self.network).to(accelerator.device).eval().requires_grad_(False)
        objective = self.method.objective(self.network, self.averaged_net)
        optimizer = torch.optim.Adam(self.network.parameters(), lr=options.learning_rate, betas=(0.9, 0.99))
        self.objective, self.optimizer = accelerator.prepare(objective, optimizer)
        self.ema = EMAModel(self.network.parameters(), decay=options.ema_decay, use_ema_warmup=True, power=0.75)
        self.ema.to(accelerator.device)

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step."""
        options = self.config.training
        return learning_rate_at(step, options, floor=1.0 if options.learning_rate_schedule == "constant" else 0.1)

    def draw(self, particles: Particles, step: int) -> NamedTuple:
        """The batch of a step on this rank, on its device."""
        options, objective = self.config.training, self.accelerator.unwrap_model(self.objective)
        generators = step_generators(options.seed, self.accelerator.process_index, step)
        batch = objective.draw(particles, options.levels_per_step, options.pairs_per_level, generators)
        return type(batch)(*(None if a is None else a.to(self.accelerator.device) for a in batch))

    def step(self, step: int, particles: Particles) -> tuple[Terms, Tensor]:
        """One optimiser step: its loss and the norm of its gradient. Raises FloatingPointError, before the update."""
        torch.clear_autocast_cache()  # which a caller's autocast keeps, with casts of the weights before
        batch = self.draw(particles, step)
        self.averaged()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        terms = self.objective(batch)
        self.accelerator.backward(terms.total)
        norm = self.accelerator.clip_grad_norm_(self.network.parameters(), self.config.training.max_grad_norm)
        check_finite(step, terms.named, terms.total, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.network.parameters())
        return terms, norm

    def averaged(self) -> nn.Module:
        """The averaged network, with the latest averages."""
        self.ema.copy_to(self.averaged_net.parameters())
        return self.averaged_net

    def pipeline(self, vae: Autoencoder | None, particles: Particles) -> LatentPipeline:
        """The pipeline of the averaged network."""
        objective, config = self.accelerator.unwrap_model(self.objective), self.config
        parts = (objective, self.averaged(), particles, vae, config.sampling, config.training.seed)
        return self.method.pipeline(*parts, class_names=self.class_names)
