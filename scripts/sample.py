"""Sample from a saved pipeline: python scripts/sample.py --pipeline DIR --num_images 64 --output_dir samples."""

import sys
from argparse import ArgumentError
from pathlib import Path

import torch
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt

from latent_dmmd.flow import Sampler
from latent_dmmd.latents import to_uint8
from latent_dmmd.pictures import labelled_grid, save_pngs
from latent_dmmd.pipeline import load_pipeline


def main() -> None:
    parser = ArgumentParser(description=__doc__, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--pipeline", type=str, required=True, help="Folder of a saved pipeline.")
    parser.add_argument("--num_images", type=PositiveInt, default=64, help="Pictures, hence particles.")
    parser.add_argument("--output_dir", type=str, required=True, help="Where the PNG files and grid.png go.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the initial particles.")
    parser.add_argument("--sampler", type=Sampler, default="exact", help="Which witness.")
    parser.add_argument("--num_noise_levels", type=PositiveInt, default=25, help="Noise levels of the flow.")
    parser.add_argument("--steps_per_level", type=PositiveInt, default=2, help="Gradient steps at each level.")
    args = parser.parse_args()

    pipe = load_pipeline(args.pipeline)
    images = pipe(
        batch_size=args.num_images,
        num_noise_levels=args.num_noise_levels,
        steps_per_level=args.steps_per_level,
        sampler=args.sampler,
        generator=torch.Generator().manual_seed(args.seed),
        output_type="pt",
    ).images
    images_uint8 = to_uint8(images.cpu() * 2 - 1)
    output_dir = Path(args.output_dir)
    save_pngs(images_uint8, output_dir / "images")
    nfe = args.num_noise_levels * args.steps_per_level
    labelled_grid({f"{args.sampler}, {nfe} NFE, seed {args.seed}": images_uint8[:64]}).save(output_dir / "grid.png")
    print(f"{args.num_images} pictures: {output_dir / 'images'}   grid: {output_dir / 'grid.png'}")


if __name__ == "__main__":
    try:
        main()
    except (ArgumentError, OSError, ValueError) as error:
        print(f"sample.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
