"""`latent-dmmd diagnose`: diagnosis.json and diagnosis.png."""

from pathlib import Path

from jsonargparse.typing import PositiveInt

from latent_dmmd.commands import command_parser
from latent_dmmd.data.sources import load_images
from latent_dmmd.experiments.diagnosis import Diagnosis, save_diagnosis
from latent_dmmd.pipeline import load_pipeline
from latent_dmmd.schedule import Sampler
from latent_dmmd.utils.files import check_files


def main(args: list[str] | None = None) -> None:
    parser = command_parser("diagnose")
    parser.add_argument("--pipeline", type=str, required=True, help="Folder of a saved pipeline.")
    parser.add_argument("--data", type=str, required=True, help="Images it was trained on: a folder, elpv:train.")
    parser.add_argument("--output_dir", type=str, required=True, help="Where the JSON file and the plot go.")
    parser.add_argument("--num_particles", type=PositiveInt, default=64, help="Particles; twice as many images.")
    parser.add_argument("--samplers", type=list[Sampler], default=["exact", "approximate"], help="Flows to compare.")
    parser.add_argument("--num_noise_levels", type=PositiveInt, default=25, help="Noise levels of the flow.")
    parser.add_argument("--steps_per_level", type=PositiveInt, default=2, help="Gradient steps at each level.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of images, particles and noise.")
    args = parser.parse_args(args)
    check_files(args.output_dir, "diagnosis.json", "diagnosis.png")

    pipe = load_pipeline(args.pipeline)
    pipe.set_progress_bar_config(desc="flow")
    source = load_images(args.data, resolution=pipe.resolution)
    x_0 = pipe.encode(source.examples(2 * args.num_particles, args.seed))
    diagnosis, steps = Diagnosis(pipe, x_0, args.seed), (args.num_noise_levels, args.steps_per_level)
    flows = {sampler: diagnosis.run(sampler, *steps) for sampler in args.samplers}
    settings = {key: args[key] for key in ("data", "num_noise_levels", "steps_per_level", "seed")}
    save_diagnosis(flows, settings | {"num_particles": len(diagnosis.z)}, args.output_dir)
    for sampler, stops in flows.items():
        print(f"{sampler}: standard deviation at the end {stops[-1].std:.3f}, of the data {stops[-1].forward_std:.3f}")
    print(f"figure: {Path(args.output_dir) / 'diagnosis.png'}")
