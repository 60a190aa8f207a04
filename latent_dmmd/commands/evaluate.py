"""`latent-dmmd evaluate`: a table of scores, and the same as JSON."""

import sys
from pathlib import Path

import torch
from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt

from latent_dmmd.commands import command_parser
from latent_dmmd.data.autoencoder import bundled_for, load_autoencoder
from latent_dmmd.data.sources import OnBadImage, load_images
from latent_dmmd.metrics.evaluation import evaluate
from latent_dmmd.metrics.extractors import Reconstructions
from latent_dmmd.metrics.reference import Reference, load_real_set
from latent_dmmd.metrics.sets import ScoredImages, check_npz, load_set, save_samples
from latent_dmmd.utils.files import check_writable

# more real images, of the same kind
FLOORS = {"elpv:heldout": "elpv:train", "elpv:validation": "elpv:fit"}
FLOORS |= {"openmoji:heldout": "openmoji:train", "openmoji:validation": "openmoji:fit"}


def main(args: list[str] | None = None) -> None:
    parser = command_parser("evaluate")
    parser.add_argument("generated", help="Folder of images, .npz of samples, elpv:heldout or openmoji:heldout.")
    parser.add_argument("reference", help="The real images, given alike, or what --save_reference wrote.")
    parser.add_argument("--output", type=str, required=True, help="JSON file of the scores.")
    parser.add_argument("--npz", type=str | None, help="File for the generated images, as guided-diffusion reads them.")
    scored = "Whose reconstructions are scored: elpv-vae or openmoji-vae where nothing is said, for their data."
    parser.add_argument("--autoencoder", type=str | None, help=scored)
    parser.add_argument("--resolution", type=PositiveInt, default=256, help="Side in pixels of all images.")
    parser.add_argument("--num_images", type=PositiveInt | None, help="At most so many of each set, at random.")
    parser.add_argument("--on_bad_image", type=OnBadImage, default="error", help="What to do with unreadable images.")
    keys = parser.add_function_arguments(evaluate, skip={"generated", "reference", "reconstructions", "floor_images"})
    args = parser.parse_args(args)
    check_outputs(args)

    reading = {key: args[key] for key in ("resolution", "num_images", "on_bad_image")}
    reading["generator"] = torch.Generator().manual_seed(args.seed)
    generated = load_set(args.generated, **reading)
    reference = load_real_set(args.reference, args.extractor, **reading)
    for images in (generated, reference):
        if isinstance(images, ScoredImages) and images.description:
            print(images.description)
    if isinstance(reference, Reference) and args.autoencoder is not None:
        raise ValueError(f"{args.reference} holds no images to reconstruct; leave out --autoencoder")
    autoencoder = args.autoencoder
    if autoencoder is None:
        autoencoder = bundled_for(args.reference)
    floor_name = FLOORS.get(reference.name)
    if args.npz is not None:
        save_samples(generated, args.npz)
    scores = evaluate(
        generated,
        reference,
        reconstructions=Reconstructions(load_autoencoder(autoencoder), reference) if autoencoder else None,
        floor_images=load_images(floor_name, resolution=args.resolution) if floor_name else None,
        **{key: args[key] for key in keys},
    )
    scores.save(args.output)
    for line in scores.remarks():
        print(f"warning: {line}", file=sys.stderr)
    print(scores)


def check_outputs(args: Namespace) -> None:
    """Raise ValueError or OSError unless all files can be written, and none takes the place of another."""
    check_writable(args.output)
    arrays = [path for path in (args.npz, args.save_reference) if path is not None]
    for path in arrays:
        check_npz(path)
    outputs = [Path(path).resolve() for path in (args.output, *arrays)]
    inputs = {Path(path).resolve() for path in (args.generated, args.reference)}
    if len({*outputs} | inputs) < len(outputs) + len(inputs):
        raise ValueError("--output, --npz, --save_reference and the sets that are scored must be different files")
