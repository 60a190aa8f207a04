"""The commands of `latent-dmmd`, one module each; `scripts/*.py` call the same functions.

This module imports no PyTorch, so that `latent-dmmd --help` answers at once.
"""

import re
import sys
from argparse import ArgumentError
from pathlib import Path
from typing import NamedTuple

from jsonargparse import ArgumentParser, Namespace

from latent_dmmd.utils.errors import did_you_mean
from latent_dmmd.utils.files import expand_home


class Command(NamedTuple):
    """What `--help` says of a command.

    Args:
        group: The heading it stands under.
        summary: What it does.
        example: What follows `latent-dmmd` in an example.
    """

    group: str
    summary: str
    example: str


COMMANDS = {
    "train": Command(
        "Train",
        "Train latent DMMD or another method and write a run folder.",
        "train --data.name_or_path IMAGES --autoencoder.name_or_path AUTOENCODER --output_dir runs/mine",
    ),
    "train-autoencoder": Command(
        "Train",
        "Train an autoencoder on images of your own, or fine-tune a saved one.",
        "train-autoencoder --data.name_or_path IMAGES --output_dir runs/my-vae",
    ),
    "sample": Command(
        "Generate",
        "Sample images from a saved pipeline.",
        "sample --pipeline elpv-dmmd --num_images 16 --output_dir samples",
    ),
    "edit": Command(
        "Generate",
        "Inpaint an image, or enlarge it, without training.",
        "edit --pipeline elpv-dmmd --image cell.png --mask_image mask.png --output_dir edited",
    ),
    "film": Command(
        "Generate",
        "Film a flow, or the way from one image to another.",
        "film --pipeline elpv-dmmd --output_dir film",
    ),
    "demo": Command("Generate", "Open a page to play with trained pipelines.", "demo --server_port 7860"),
    "info": Command(
        "Inspect",
        "Say what a folder is, a run, checkpoint, cache or pipeline, and what to do with it.",
        "info runs/mine",
    ),
    "diagnose": Command(
        "Inspect",
        "Compare the particles of a flow with the forward process at every noise level.",
        "diagnose --pipeline elpv-dmmd --data elpv:train --output_dir diagnosis",
    ),
    "evaluate": Command(
        "Evaluate",
        "Score generated images against real ones.",
        "evaluate samples/images elpv:heldout --output scores.json",
    ),
    "evaluate-autoencoder": Command(
        "Evaluate",
        "Measure how well an autoencoder gives back images.",
        "evaluate-autoencoder elpv-vae elpv:heldout --output scores.json",
    ),
    "evaluate-classes": Command(
        "Evaluate",
        "Score whether generated images show the class that was asked for.",
        "evaluate-classes --pipeline runs/elpv256-classes/pipeline --output_dir classes",
    ),
    "evaluate-edits": Command(
        "Evaluate",
        "Score inpainting and super-resolution of several pipelines.",
        'evaluate-edits --pipelines "{DMMD: elpv-dmmd}" --data elpv:heldout --output_dir edits',
    ),
    "compare": Command(
        "Study",
        "Train, sample and score DMMD and its alternatives alike, and write a page.",
        "compare --config compare_elpv256 --minutes 20",
    ),
    "complexity": Command(
        "Study",
        "Measure what training and sampling cost.",
        "complexity --output_dir costs",
    ),
    "toy2d": Command(
        "Study",
        "Run the 2-D experiment with fixed kernels, adaptive kernels and learned features.",
        "toy2d --output_dir toy2d",
    ),
}


class CommandParser(ArgumentParser):
    """A parser whose values may begin with `~`, which a shell leaves alone behind "=", and that knows near misses."""

    def parse_args(self, args: list[str] | None = None, **options) -> Namespace:
        """As of `ArgumentParser`. Raises ArgumentError if there is no such option, or a value cannot be used."""
        try:
            parsed = super().parse_args(args, **options)
        except ArgumentError as error:
            unknown = re.match(r"unrecognized arguments: (--[\w.-]+)", str(error))
            near = did_you_mean(unknown[1], self._option_string_actions) if unknown else ""
            raise ArgumentError(None, f"{error}{near}") if near else error from None
        expand_home(parsed, *(name for name, value in parsed.items() if isinstance(value, str)))
        return parsed


def command_parser(name: str) -> CommandParser:
    """The parser of a command, with its summary and its example."""
    command = COMMANDS[name]
    return CommandParser(
        prog=Path(sys.argv[0]).name,
        description=command.summary,
        epilog=f"Example: latent-dmmd {command.example}",
        allow_abbrev=False,
        exit_on_error=False,
    )
