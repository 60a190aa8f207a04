"""`latent-dmmd sample`: numbered PNG files and a grid.

Under `accelerate launch` or torchrun several processes share the particles; the images are those of one process.
"""

import inspect
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from jsonargparse.typing import PositiveInt

from latent_dmmd.commands import command_parser
from latent_dmmd.latent_pipeline import FlowOptions
from latent_dmmd.pipeline import load_pipeline
from latent_dmmd.schedule import Sampler
from latent_dmmd.utils.images import labelled_grid, save_pngs, to_pil, to_uint8
from latent_dmmd.utils.output_folder import OutputFolder


def main(args: list[str] | None = None) -> None:
    parser = command_parser("sample")
    parser.add_argument("--pipeline", type=str, required=True, help="Folder of a saved pipeline.")
    parser.add_argument("--num_images", type=PositiveInt, default=64, help="Images, hence particles.")
    parser.add_argument(
        "--output_dir", type=str, required=True, help="New folder for images/00000.png, … and grid.png."
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace what an earlier call wrote there.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the initial particles.")
    parser.add_argument("--sampler", type=Sampler | None, help="DMMD: which witness.")
    parser.add_argument("--num_noise_levels", type=PositiveInt | None, help="DMMD: noise levels of the flow.")
    parser.add_argument("--steps_per_level", type=PositiveInt | None, help="DMMD: gradient steps at each level.")
    parser.add_argument("--num_inference_steps", type=PositiveInt | None, help="NFE, instead of these two.")
    parser.add_argument("--solver_order", type=Literal[1, 2] | None, help="Order of the steps of a flow.")
    parser.add_argument("--class_labels", type=str | None, help="Name of a class, of a pipeline that has classes.")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="How much more of it; approximate sampler.")
    args = parser.parse_args(args)
    output = OutputFolder(args.output_dir, args.overwrite)

    accelerator, pipe = Accelerator(), load_pipeline(args.pipeline)
    names = [name for name in inspect.signature(pipe.__call__).parameters if name in args]
    given = [
        name for name in ("sampler", "num_noise_levels", "steps_per_level", "class_labels") if args[name] is not None
    ]
    given += ["guidance_scale"] if args.guidance_scale != 1 else []
    ignored = [f"--{name}" for name in given if name not in names]
    if ignored:
        raise ValueError(f"{args.pipeline} is no DMMD pipeline: leave out {', '.join(ignored)}")
    # what is not given comes from the pipeline
    sampling = {name: args[name] for name in names if args[name] is not None}
    generator = torch.Generator().manual_seed(args.seed)
    pipe.flow_options = FlowOptions(across_ranks=True)
    pipe.set_progress_bar_config(disable=not accelerator.is_main_process)
    images = pipe(args.num_images, generator=generator, output_type="pt", **sampling).images
    images_uint8 = accelerator.gather(to_uint8(images * 2 - 1)).cpu()
    if accelerator.is_main_process:
        caption = ", ".join(f"{name} {value}" for name, value in (*sampling.items(), ("seed", args.seed)))

        def write(folder: Path) -> None:
            save_pngs(map(to_pil, images_uint8), folder / "images")
            labelled_grid({caption: images_uint8[:64]}).save(folder / "grid.png")

        output.fill(write)
        print(f"{args.num_images} images: {args.output_dir}/images   grid: {args.output_dir}/grid.png")
    accelerator.end_training()
