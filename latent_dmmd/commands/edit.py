"""`latent-dmmd edit`: inpaints with a mask, enlarges without."""

from functools import partial

import torch
from jsonargparse.typing import PositiveInt

from latent_dmmd.commands import command_parser
from latent_dmmd.data.images import open_mask, open_rgb
from latent_dmmd.editing import editor_of
from latent_dmmd.pipeline import load_pipeline
from latent_dmmd.utils.images import save_pngs
from latent_dmmd.utils.output_folder import OutputFolder


def main(args: list[str] | None = None) -> None:
    parser = command_parser("edit")
    parser.add_argument("--pipeline", type=str, required=True, help="Folder of a saved pipeline: DMMD, flow matching.")
    parser.add_argument("--image", type=str, required=True, help="The image; without a mask it is enlarged.")
    parser.add_argument("--mask_image", type=str | None, help="White, or opaque, where the image is to be replaced.")
    parser.add_argument("--scale", type=PositiveInt, default=4, help="Without a mask: factor of enlarging.")
    parser.add_argument("--strength", type=float, default=1.0, help="Noise level that the flow begins at, in (0, 1].")
    parser.add_argument("--num_inference_steps", type=PositiveInt, default=25, help="Evaluations of the network.")
    parser.add_argument("--num_variations", type=PositiveInt, default=4, help="Images to make.")
    parser.add_argument("--eta", type=float, default=0.8, help="Share of fresh noise after a step, in [0, 1].")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the noise.")
    parser.add_argument("--output_dir", type=str, required=True, help="New folder for 00000.png, 00001.png, …")
    parser.add_argument("--overwrite", action="store_true", help="Replace what an earlier call wrote there.")
    args = parser.parse_args(args)
    output = OutputFolder(args.output_dir, args.overwrite)

    given = {"image": open_rgb(args.image)}
    if args.mask_image is not None:
        given["mask_image"] = open_mask(args.mask_image)
    else:
        given["scale"] = args.scale
    pipe = editor_of(load_pipeline(args.pipeline), "inpaint" if args.mask_image is not None else "upscale")
    settings = {key: args[key] for key in ("strength", "num_inference_steps", "num_variations", "eta")}
    images = pipe(**given, **settings, generator=torch.Generator().manual_seed(args.seed)).images
    output.fill(partial(save_pngs, images))
    print(f"{len(images)} images: {args.output_dir}")
