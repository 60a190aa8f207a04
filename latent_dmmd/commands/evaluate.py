"""`latent-dmmd evaluate`: a table of scores, and the same as JSON."""

import torch
from jsonargparse.typing import PositiveInt
from torch.utils.data import Subset

from latent_dmmd.commands import command_parser
from latent_dmmd.data.autoencoder import BUNDLED_AUTOENCODER, load_autoencoder
from latent_dmmd.data.sources import load_images
from latent_dmmd.metrics.evaluation import evaluate
from latent_dmmd.metrics.extractors import Reconstructions


def main(args: list[str] | None = None) -> None:
    parser = command_parser("evaluate")
    parser.add_argument("generated", help="Folder of images, elpv:train or elpv:heldout.")
    parser.add_argument("reference", help="The real images, given alike.")
    parser.add_argument("--output", type=str, required=True, help="JSON file of the scores.")
    parser.add_argument("--autoencoder", type=str | None, help="Folder or hub name; scores its reconstructions.")
    parser.add_argument("--resolution", type=PositiveInt, default=256, help="Side in pixels of all images.")
    parser.add_argument("--num_images", type=PositiveInt | None, help="At most so many of each set, at random.")
    keys = parser.add_function_arguments(evaluate, skip={"generated", "reference", "reconstructions", "floor_images"})
    args = parser.parse_args(args)

    sets = [load_images(name, resolution=args.resolution) for name in (args.generated, args.reference)]
    floor_name = {"elpv:heldout": "elpv:train", "elpv:validation": "elpv:fit"}.get(args.reference)
    floor = load_images(floor_name, resolution=args.resolution) if floor_name else None
    if args.num_images is not None:
        draw = torch.Generator().manual_seed(args.seed)
        sets = [Subset(s, torch.randperm(len(s), generator=draw)[: args.num_images].tolist()) for s in sets]
    autoencoder = args.autoencoder or (BUNDLED_AUTOENCODER if args.reference.startswith("elpv") else None)
    reconstructions = Reconstructions(load_autoencoder(autoencoder), sets[1]) if autoencoder else None
    options = {key: args[key] for key in keys}
    scores = evaluate(*sets, reconstructions=reconstructions, floor_images=floor, **options)
    print(scores)
    scores.save(args.output)
