"""`latent-dmmd evaluate-edits`: edits.json, inpaint.webp and upscale.webp."""

import json
from pathlib import Path

import torch
from jsonargparse.typing import PositiveInt

from latent_dmmd.commands import command_parser
from latent_dmmd.data.sources import load_images
from latent_dmmd.editing import editor_of
from latent_dmmd.metrics.edits import EditComparison
from latent_dmmd.pipeline import load_pipeline
from latent_dmmd.utils.files import check_files, write_json
from latent_dmmd.utils.images import labelled_grid, save_image


def main(args: list[str] | None = None) -> None:
    parser = command_parser("evaluate-edits")
    parser.add_argument("--pipelines", type=dict[str, str], required=True, help="Names and folders of pipelines.")
    parser.add_argument("--data", type=str, required=True, help="Images: a folder, elpv:heldout.")
    parser.add_argument("--output_dir", type=str, required=True, help="Where the files go.")
    parser.add_argument("--num_images", type=PositiveInt, default=32, help="Images, drawn at random.")
    parser.add_argument("--num_variations", type=PositiveInt, default=2, help="Edits of each image.")
    parser.add_argument("--num_inference_steps", type=PositiveInt, default=25, help="Evaluations of the network.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of images, boxes and noise.")
    args = parser.parse_args(args)
    if not args.pipelines:
        raise ValueError('--pipelines names none; give "{NAME: FOLDER}"')
    check_files(args.output_dir, "edits.json", "inpaint.webp", "upscale.webp")

    pipes = {name: load_pipeline(folder) for name, folder in args.pipelines.items()}
    first, output_dir = next(iter(pipes.values())), Path(args.output_dir)
    originals = load_images(args.data, first.resolution).examples(args.num_images, args.seed)
    settings = {key: args[key] for key in ("num_inference_steps", "num_variations")}
    facts = {"data": args.data, "num_images": len(originals), "seed": args.seed}
    results = {"settings": facts | settings}
    grids = {}
    for task in ("inpaint", "upscale"):
        comparison = EditComparison(originals, task, seed=args.seed)
        sets = comparison.plain(first.vae)
        for name, pipe in pipes.items():
            generator = torch.Generator().manual_seed(args.seed)
            sets[name] = comparison.edited(editor_of(pipe, task), generator=generator, **settings)
        results[task] = {name: vars(comparison.score(images)) for name, images in sets.items()}
        rows = {"original": originals, "given": comparison.given} | sets
        firsts = {name: images[:: len(images) // len(originals)][:8] for name, images in rows.items()}
        grids[task] = labelled_grid(firsts, side=192)
    write_json(output_dir / "edits.json", results)
    for task, grid in grids.items():
        save_image(grid, output_dir / f"{task}.webp", quality=85)
        print(f"{task}: {json.dumps(results[task], indent=2)}")
