"""`latent-dmmd toy2d`: toy2d.png, toy2d.json and a table."""

import time
from pathlib import Path

from jsonargparse.typing import PositiveInt

from latent_dmmd.commands import command_parser
from latent_dmmd.experiments.toy2d_report import bandwidth_report, plot_toy, toy_report
from latent_dmmd.utils.files import check_files, write_json


def main(args: list[str] | None = None) -> None:
    parser = command_parser("toy2d")
    parser.add_argument("--output_dir", type=str, required=True, help="Where toy2d.png and toy2d.json go.")
    parser.add_argument("--num_steps", type=PositiveInt, default=100, help="Steps of every flow.")
    parser.add_argument("--num_particles", type=PositiveInt, default=256, help="Particles of every flow.")
    parser.add_argument("--training_steps", type=PositiveInt, default=800, help="Training steps.")
    parser.add_argument("--num_seeds", type=PositiveInt, default=3, help="Seeds of particles and samples.")
    args = parser.parse_args(args)
    check_files(args.output_dir, "toy2d.json", "toy2d.png")

    start, output_dir = time.perf_counter(), Path(args.output_dir)
    seeds = tuple(range(args.num_seeds))
    report, particles, curves = toy_report(args.num_steps, args.num_particles, args.training_steps, seeds)
    bandwidth = bandwidth_report()
    output_dir.mkdir(parents=True, exist_ok=True)
    settings = {k: args[k] for k in ("num_steps", "num_particles", "training_steps", "num_seeds")}
    settings["seconds"] = round(time.perf_counter() - start, 1)
    result = {"settings": settings, "targets": report, "bandwidth": bandwidth}
    write_json(output_dir / "toy2d.json", result)
    plot_toy(particles, curves, bandwidth, str(output_dir / "toy2d.png"))
    print("| target | flow | energy distance | near a mode | modes |\n| --- | --- | --- | --- | --- |")
    for target, flows in report.items():
        for name, row in flows.items():
            error = "" if row["standard_error"] is None else f" ± {row['standard_error']:.4f}"
            cells = (f"{row['energy_distance']:.4f}{error}", f"{row['share_near_a_mode']:.2f}", str(row["modes"]))
            print(f"| {target} | {name} | {' | '.join(cells)} |")
