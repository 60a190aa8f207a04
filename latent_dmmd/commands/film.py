"""`latent-dmmd film`: strip.png and film.webp."""

import inspect

import torch
from jsonargparse.typing import PositiveInt

from latent_dmmd.apps.film import film, interpolation, save_film
from latent_dmmd.commands import command_parser
from latent_dmmd.data.images import read_image
from latent_dmmd.pipeline import load_pipeline
from latent_dmmd.schedule import Sampler
from latent_dmmd.utils.files import check_files


def main(args: list[str] | None = None) -> None:
    parser = command_parser("film")
    parser.add_argument("--pipeline", type=str, required=True, help="Folder of a saved pipeline.")
    parser.add_argument("--output_dir", type=str, required=True, help="Where strip.png and film.webp go.")
    parser.add_argument("--num_images", type=PositiveInt, default=4, help="Particles that are filmed.")
    parser.add_argument("--num_inference_steps", type=PositiveInt | None, help="Evaluations of the network; 25, or 1.")
    parser.add_argument("--sampler", type=Sampler | None, help="DMMD: which witness.")
    parser.add_argument("--from_image", type=str | None, help="Interpolate from this image")
    parser.add_argument("--to_image", type=str | None, help="to this one.")
    parser.add_argument("--strength", type=float, default=0.5, help="Noise level that interpolated latents flow from.")
    parser.add_argument("--num_frames", type=PositiveInt, default=9, help="Images in the strip, and interpolated.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the noise.")
    args = parser.parse_args(args)
    if (args.from_image is None) != (args.to_image is None):
        raise ValueError("give both --from_image and --to_image, or neither")
    check_files(args.output_dir, "strip.png", "film.webp")

    pipe, generator = load_pipeline(args.pipeline), torch.Generator().manual_seed(args.seed)
    own = 1 if pipe.one_step else 25
    sampling = {"num_inference_steps": args.num_inference_steps or own, "generator": generator}
    if args.sampler is not None:
        if "sampler" not in inspect.signature(pipe.__call__).parameters:
            raise ValueError(f"{args.pipeline} is no DMMD pipeline: leave out --sampler")
        sampling["sampler"] = args.sampler
    if args.from_image is not None:
        ends = torch.stack([read_image(path, pipe.resolution) for path in (args.from_image, args.to_image)])
        frames = interpolation(pipe, ends, args.num_frames, args.strength, **sampling)[:, None]
    else:
        frames = film(pipe, args.num_images, **sampling)
    save_film(frames, args.output_dir, args.num_frames)
    print(f"strip: {args.output_dir}/strip.png   film: {args.output_dir}/film.webp")
