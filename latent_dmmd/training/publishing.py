"""What a run leaves for others: the pipeline with its model card, and the images that show it."""

from pathlib import Path

import torch
import yaml
from PIL import Image

from latent_dmmd.data.autoencoder import Autoencoder, reconstruct, trained_on
from latent_dmmd.data.folders import printable
from latent_dmmd.data.particles import Particles
from latent_dmmd.data.sources import ImageSource
from latent_dmmd.pipeline import LatentPipeline
from latent_dmmd.training.config import Config, as_dict
from latent_dmmd.training.first_look import AutoencoderFit
from latent_dmmd.training.trainer import Trainer
from latent_dmmd.utils.files import write_aside
from latent_dmmd.utils.images import labelled_grid, to_uint8

# of data with a name: the licence, and what weights derive from and follow
LICENCES = {
    "elpv": (
        "cc-by-nc-sa-4.0",
        "the ELPV photographs (Buerhop-Lutz et al., 2018; CC BY-NC-SA 4.0) and follow that licence: attribution, "
        "non-commercial use, share alike.",
    ),
    "openmoji": (
        "cc-by-sa-4.0",
        "the drawings of OpenMoji (https://openmoji.org; CC BY-SA 4.0) and follow that licence: attribution, share "
        "alike.",
    ),
}


def save_pipeline(
    pipeline: LatentPipeline, config: Config, folder: Path, num_images: int, fit: AutoencoderFit | None = None
) -> None:
    """Save a pipeline with its model card, in the place of one that is there."""

    def write(aside: Path) -> None:
        pipeline.save_pretrained(aside)
        (aside / "README.md").write_text(model_card(config, num_images, fit))

    write_aside(folder, write)


def model_card(config: Config, num_images: int, fit: AutoencoderFit | None = None) -> str:
    """The README of a saved pipeline; `fit` is how well its autoencoder reconstructs the images."""
    licence, terms = licence_and_terms(config)
    where = "in the latent space of a frozen autoencoder" if config.autoencoder.name_or_path else "on pixels"
    trained = f"Trained on {num_images} images of `{printable(config.data.name_or_path)}`."
    if config.method.makes_particles():
        trained = f"Distilled from {num_images} pairs of noise and images of `{printable(config.objective.teacher)}`."
    reconstructed = f" Their reconstructions by the autoencoder: {fit}." if fit else ""
    settings = yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True)
    return f"""---
library_name: diffusers
license: {licence}
pipeline_tag: unconditional-image-generation
---

# {config.method.title}

{config.method.summary} {config.data.resolution}×{config.data.resolution} images
{where}. {terms}

{trained}{reconstructed}

With the package `latent_dmmd` installed:

```python
from latent_dmmd.pipeline import load_pipeline

pipe = load_pipeline("THIS_FOLDER")
image = pipe().images[0]
```

Or without naming it. `pipeline.py` imports the class from the package, and diffusers asks for consent to run it:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("THIS_FOLDER", trust_remote_code=True)
```

## Configuration

```yaml
{settings}```
"""


def licence_and_terms(config: Config) -> tuple[str, str]:
    """What the weights derive from, and the licence that follows: from the images and from all bundled weights."""
    name = config.data.name_or_path.partition(":")[0]
    licence, origin = LICENCES.get(name, ("other", "the data below and follow their terms."))
    terms, known = f"The weights derive from {origin}", [name]
    others = {
        "the autoencoder": config.autoencoder.name_or_path,
        "training.init_from": config.training.init_from,
        "objective.teacher": getattr(config.objective, "teacher", None),
    }
    for what, weights in others.items():
        seen = trained_on(weights)
        if seen is not None and seen not in known:
            known.append(seen)
            licence, terms = "other", f"{terms} Those of {what} derive from {LICENCES[seen][1]}"
    return licence, terms


def log_samples(trainer: Trainer, particles: Particles, vae: Autoencoder | None, step: int) -> None:
    """Send images of the averaged network to the trackers, always of the same initial noise."""
    pipeline, options = trainer.pipeline(vae, particles), trainer.config.sampling
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        min(8, options.num_images),
        generator=torch.Generator().manual_seed(options.seed),
        output_type="pt",
        **trainer.method.sampling_options(options),
    ).images.cpu()
    for tracker in trainer.accelerator.trackers:
        tracker.log_images({"samples": images}, step=step)


def sample_grid(pipeline: LatentPipeline, source: ImageSource, skipped: tuple[str, ...], config: Config) -> Image.Image:
    """Generated images above real ones, none of the skipped, and their reconstructions."""
    options, sampling = config.sampling, config.method.sampling_options(config.sampling)
    pipeline.set_progress_bar_config(desc="sampling")
    generator = torch.Generator().manual_seed(options.seed)
    generated = pipeline(batch_size=options.num_images, generator=generator, output_type="pt", **sampling).images
    real = source.examples(8, options.seed, skipped, config.data.on_bad_image)
    nfe = sampling.get("num_inference_steps") or options.num_noise_levels * options.steps_per_level
    label = f"generated ({sampling.get('sampler', config.objective.name)}, {nfe} NFE)"
    rows = {label: to_uint8(generated.cpu() * 2 - 1), "real": real}
    if pipeline.vae is not None:
        rows["real, through the autoencoder"] = reconstruct(pipeline.vae, real)
    return labelled_grid(rows)
