"""What the training of an autoencoder leaves for others: the autoencoder and a card whose figures were measured."""

import shlex
from pathlib import Path

import torch
import yaml
from torch import Tensor
from torch.utils.data import Dataset

from latent_dmmd.data.autoencoder import Autoencoder, load_autoencoder, trained_on
from latent_dmmd.data.folders import printable
from latent_dmmd.data.sources import counted
from latent_dmmd.metrics.autoencoders import AutoencoderScores, evaluate_autoencoder
from latent_dmmd.training.autoencoder.config import AutoencoderTrainingConfig
from latent_dmmd.training.config import as_dict
from latent_dmmd.training.publishing import LICENCES
from latent_dmmd.utils.files import write_aside

START = {"both": "Fine-tuned from", "decoder": "Its decoder was fine-tuned, and its encoder left as it was, from"}


def save_autoencoder(
    vae: Autoencoder,
    config: AutoencoderTrainingConfig,
    folder: Path,
    validation: Dataset[Tensor],
    num_images: int,
    skipped: tuple[str, ...] = (),
) -> AutoencoderScores:
    """Save an autoencoder in float16, measure what was saved, and write both with a card, or nothing.

    Where the encoder is frozen and its weights are no float16 numbers, all are saved in float32: latents stay as they
    are.

    Args:
        vae: The autoencoder in float32; its weights are rounded.
        config: How it was trained.
        folder: Where to save it, in the place of one that is there.
        validation: Images that it was not trained on.
        num_images: Number of those that it was trained on.
        skipped: Names of images that could not be read.

    Raises:
        FloatingPointError: If what was saved gives values that are not finite.
        OSError: If it cannot be written.
    """
    scores = None

    def write(aside: Path) -> None:
        nonlocal scores
        (vae if rounding_shifts_latents(vae, config) else vae.half()).save_pretrained(aside)
        scores = evaluate_autoencoder(
            load_autoencoder(str(aside)),
            validation,
            autoencoder=str(folder),
            data=validation_name(config),
            skipped=skipped,
            folder=aside,
        )
        (aside / "README.md").write_text(autoencoder_card(config, folder, scores, num_images))

    write_aside(folder, write)
    return scores


def rounding_shifts_latents(vae: Autoencoder, config: AutoencoderTrainingConfig) -> bool:
    """Whether the encoder was to stay as it is, and would not in float16."""
    if config.trains == "both":
        return False
    encoder = (w for name, w in vae.state_dict().items() if not name.startswith(("decoder.", "post_quant_conv.")))
    return any(not torch.equal(w.half().float(), w) for w in encoder)


def validation_name(config: AutoencoderTrainingConfig) -> str:
    """What the figures are of."""
    name = config.validation or f"{config.data.name_or_path}, the tenth that is not trained on"
    return printable(name)


def evaluation_command(config: AutoencoderTrainingConfig, folder: Path) -> str:
    """The command that measures the same figures on the same images."""
    data = config.data
    words = ["latent-dmmd", "evaluate-autoencoder", str(folder), config.validation or data.name_or_path]
    words += [] if config.validation else ["--part", "validation"]
    words += ["--resolution", str(data.resolution)]
    words += [] if data.image_column == "image" else ["--image_column", data.image_column]
    words += [] if data.on_bad_image == "error" else ["--on_bad_image", data.on_bad_image]
    return printable(shlex.join(words))


def licence(config: AutoencoderTrainingConfig) -> str:
    """That of the data and of the weights it started from, where they are known."""
    sources = {config.data.name_or_path.partition(":")[0]}
    if config.init_from is not None:
        sources.add(trained_on(config.init_from))
    found = {LICENCES[name][0] if name in LICENCES else "other" for name in sources}
    return found.pop() if len(found) == 1 else "other"


def autoencoder_card(
    config: AutoencoderTrainingConfig, folder: Path, scores: AutoencoderScores, num_images: int
) -> str:
    """The README of a saved autoencoder, whose figures are those that the command in it prints."""
    start = f"{START[config.trains]} `{config.init_from}`" if config.init_from else "Trained from random weights"
    settings = yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True)
    table = "\n".join(f"| {what} | {figure} |" for what, figure in scores.rows())
    return f"""---
library_name: diffusers
license: {licence(config)}
---

# {scores.autoencoder_class}

{start}, for {config.num_steps} steps of {config.batch_size} crops of {config.crop_size} pixels, on
{num_images} images of `{printable(config.data.name_or_path)}` at {config.data.resolution} × {config.data.resolution}
pixels. Transparent images stood on white. The weights derive from these images and follow their terms.

```python
from diffusers import {scores.autoencoder_class}

vae = {scores.autoencoder_class}.from_pretrained("THIS_FOLDER")
```

## Figures

On {counted(scores.n, "image")} of `{scores.data}`, by

```sh
{evaluation_command(config, folder)}
```

| measured | figure |
|---|---|
{table}

PSNR is that of the mean squared error of 8-bit images. The Fréchet distance is biased upwards at this n: compare at
equal n only.

## Configuration

```yaml
{settings}```
"""
