"""`latent-dmmd sample`: numbered PNG files and a grid.

Under `accelerate launch` or torchrun several processes share the particles; the images are those of one process.
"""

import inspect
from pathlib import Path

import torch
from accelerate import Accelerator
from jsonargparse.typing import PositiveInt

from latent_dmmd.commands import command_parser
from latent_dmmd.flow import Sampler
from latent_dmmd.latent_pipeline import FlowOptions
from latent_dmmd.pipeline import load_pipeline
from latent_dmmd.utils.images import labelled_grid, save_pngs, to_uint8


def main(args: list[str] | None = None) -> None:
    parser = command_parser("sample")
    parser.add_argument("--pipeline", type=str, required=True, help="Folder of a saved pipeline.")
    parser.add_argument("--num_images", type=PositiveInt, default=64, help="Images, hence particles.")
    parser.add_argument("--output_dir", type=str, required=True, help="Where the PNG files and grid.png go.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the initial particles.")
    parser.add_argument("--sampler", type=Sampler | None, help="DMMD: which witness.")
    parser.add_argument("--num_noise_levels", type=PositiveInt | None, help="DMMD: noise levels of the flow.")
    parser.add_argument("--steps_per_level", type=PositiveInt | None, help="DMMD: gradient steps at each level.")
    parser.add_argument("--num_inference_steps", type=PositiveInt | None, help="NFE, instead of these two.")
    parser.add_argument("--class_labels", type=str | None, help="Name of a class, of a pipeline that has classes.")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="How much more of it; approximate sampler.")
    args = parser.parse_args(args)

    accelerator, pipe = Accelerator(), load_pipeline(args.pipeline)
    names = [name for name in inspect.signature(pipe.__call__).parameters if name in args]
    if args.class_labels is not None and "class_labels" not in names:
        raise ValueError(f"{args.pipeline} has no classes; leave out --class_labels")
    # what is not given comes from the pipeline
    sampling = {name: args[name] for name in names if args[name] is not None}
    generator = torch.Generator().manual_seed(args.seed)
    pipe.flow_options = FlowOptions(across_ranks=True)
    pipe.set_progress_bar_config(disable=not accelerator.is_main_process)
    images = pipe(args.num_images, generator=generator, output_type="pt", **sampling).images
    images_uint8 = accelerator.gather(to_uint8(images * 2 - 1)).cpu()
    if accelerator.is_main_process:
        output_dir, settings = Path(args.output_dir), {**sampling, "seed": args.seed}
        save_pngs(images_uint8, output_dir / "images")
        caption = ", ".join(f"{name} {value}" for name, value in settings.items())
        labelled_grid({caption: images_uint8[:64]}).save(output_dir / "grid.png")
        print(f"{args.num_images} images: {output_dir / 'images'}   grid: {output_dir / 'grid.png'}")
    accelerator.end_training()
