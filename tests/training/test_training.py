import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import metrics, weights
from PIL import Image
from processes import ROOT, Child, run, wait_until

from latent_dmmd import LatentDMMDPipeline
from latent_dmmd.data.particles import LatentCache
from latent_dmmd.data.sources import load_images
from latent_dmmd.latent_pipeline import FlowOptions
from latent_dmmd.objective import WitnessMatching
from latent_dmmd.pipeline import load_pipeline
from latent_dmmd.training.config import Config, parse_config
from latent_dmmd.training.loop import StopRequest, train
from latent_dmmd.training.trainer import Trainer, learning_rate_at, step_generators
from latent_dmmd.utils import cli
from latent_dmmd.utils.errors import ConfigError, DataError
from latent_dmmd.utils.process import own_accelerator


@pytest.mark.parametrize("objective", [["dmmd"], ["witness-matching"], ["witness-matching", "batch"]])
def test_run_folder(arguments, tmp_path, objective):
    extra = ["--objective.name", objective[0], "--training.learning_rate", "1e-4"]
    extra += ["--objective.mean_embeddings", objective[1]] if len(objective) > 1 else []
    folder = train(parse_config(Config, arguments + extra))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    terms = {"dmmd": {"mmd2", "gradient_penalty", "feature_penalty"}, "witness-matching": {"matching", "mmd"}}
    assert terms[objective[0]] <= set(lines[0])
    assert Image.open(folder / "samples.png").width == 8 * 32
    assert (folder / "losses.png").stat().st_size > 1000
    assert parse_config(Config, ["--config", str(folder / "config.yaml")]).training.num_steps == 6
    assert {p.name for p in folder.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}
    assert not list(folder.glob(".*"))
    assert "license" in (folder / "pipeline" / "README.md").read_text()
    pipe = LatentDMMDPipeline.from_pretrained(folder / "pipeline")
    assert pipe(num_noise_levels=4, steps_per_level=1, sampler="exact", output_type="pt").images.isfinite().all()


@pytest.mark.parametrize(
    "extra, term",
    [
        (["--config", str(ROOT / "configs" / "elpv256_kale.yaml")], "kale"),
        (["--objective.name", "dmmd", "--objective.kernel", "gaussian"], "mmd2"),
        (
            ["--objective.name", "dmmd", "--objective.kernel", "rational-quadratic", "--objective.bandwidth", "2"],
            "mmd2",
        ),
        (["--objective.kernel", "gaussian", "--objective.bandwidth", "[1.0, 4.0]"], "mmd"),
        (["--objective.discrepancy", "kale", "--objective.mean_embeddings", "ema"], "kale"),
        (["--objective.forward_process", "blur", "--objective.segment", "level"], "mmd"),
        (["--objective.forward_process", "vp-cosine"], "mmd"),
        (["--objective.forward_process", "vp-linear", "--objective.segment", "whole"], "mmd"),
    ],
    ids=lambda value: " ".join(value[1::2])[-40:] if isinstance(value, list) else value,
)
def test_every_discrepancy_and_process_trains_and_samples(arguments, tmp_path, extra, term):
    overrides = ["--training.num_steps", "3", "--objective.num_points", "6", "--training.learning_rate", "1e-4"]
    overrides += ["--output_dir", str(tmp_path / "run")]
    config = parse_config(Config, [*arguments, *extra, *overrides])
    folder = train(config)
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert term in line and all(math.isfinite(value) for value in line.values())
    pipe = LatentDMMDPipeline.from_pretrained(folder / "pipeline")
    stored = pipe.mean_embeddings
    assert stored.config.discrepancy == config.objective.discrepancy_options()
    assert stored.config.forward_process == config.objective.forward_process
    assert stored.clean.shape == ((1, 4, 8) if stored.discrepancy.needs_means_only else (1, 4, 6, 8))
    for sampler in ("exact", "approximate", "hybrid"):
        options = {"num_noise_levels": 4, "steps_per_level": 2, "batch_size": 3, "output_type": "latent"}
        pipe.flow_options = FlowOptions()
        z = pipe(sampler=sampler, generator=torch.Generator().manual_seed(0), **options).images
        pipe.flow_options = FlowOptions(step_size=1e-9)
        still = pipe(sampler=sampler, generator=torch.Generator().manual_seed(0), **options).images
        assert z.isfinite().all() and (z - still).abs().max() > 0.01


def test_samples_of_a_baseline(plain_arguments, tmp_path, monkeypatch):
    folder = train(parse_config(Config, [*plain_arguments, "--objective.name", "flow-matching"]))
    command = f"sample.py --pipeline {folder / 'pipeline'} --num_images 2 --num_inference_steps 3 --output_dir"
    monkeypatch.setattr(sys, "argv", [*command.split(), str(tmp_path / "samples")])
    runpy.run_path(str(ROOT / "scripts" / "sample.py"), run_name="__main__")
    assert len(list((tmp_path / "samples" / "images").iterdir())) == 2


def test_pixel_dmmd_with_the_squared_norm(arguments):
    extra = [
        "--autoencoder.name_or_path",
        "null",
        "--feature_net.patch_size",
        "16",
        "--feature_net.squared_norm",
        "true",
    ]
    folder = train(parse_config(Config, [*arguments, *extra]))
    pipe = load_pipeline(folder / "pipeline")
    assert pipe.feature_net.config.squared_norm and pipe.feature_net.norm_gate.weight.abs().sum() > 0
    assert pipe(batch_size=2, num_inference_steps=4, output_type="pt").images.shape == (2, 3, 32, 32)


def test_a_finished_run_goes_on_at_a_constant_learning_rate(arguments, tmp_path):
    """6 steps, then 3 more, are 9 steps: bitwise; not so with a cosine, which says so."""
    constant = [*arguments, "--training.learning_rate_schedule", "constant"]
    train(parse_config(Config, constant))
    longer = train(parse_config(Config, [*constant, "--training.num_steps", "9"]))
    whole = [*constant, "--training.num_steps", "9", "--output_dir", str(tmp_path / "whole")]
    for a, b in zip(weights(longer).values(), weights(train(parse_config(Config, whole))).values()):
        assert torch.equal(a, b)
    with pytest.raises(ConfigError, match="checkpoint-9 has been trained longer, for 9 steps"):
        train(parse_config(Config, constant))
    cosine = [*arguments, "--output_dir", str(tmp_path / "cosine")]
    train(parse_config(Config, cosine))
    with pytest.raises(ConfigError, match=r"another configuration: training.num_steps 9 \(was 6\)"):
        train(parse_config(Config, [*cosine, "--training.num_steps", "9"]))


def test_skipped_images_are_not_shown_either(arguments, tiny_images):
    """More bad images than good ones, so that some are among any eight."""
    for path in sorted(tiny_images.iterdir())[2:]:
        path.write_bytes(b"not an image")
    data = ["--data.name_or_path", str(tiny_images), "--data.cache_dir", str(tiny_images.parent / "cache")]
    folder = train(parse_config(Config, [*arguments, *data, "--data.on_bad_image", "skip"]))
    assert (folder / "samples.png").exists()
    source = load_images(str(tiny_images), 32)  # as a method sees them that does not read the data
    assert len(source.examples(8, 0, on_bad_image="skip")) == 2
    with pytest.raises(DataError, match="cannot read"):
        source.examples(8, 0)
    for path in tiny_images.iterdir():
        path.write_bytes(b"not an image")
    with pytest.raises(DataError, match="no image of .* can be read"):
        load_images(str(tiny_images), 32).examples(8, 0, on_bad_image="skip")


def test_resume_is_exact(arguments, trained, tmp_path):
    """6 steps = 3 steps, killed, 3 steps: bitwise, in weights and metrics."""
    whole = trained
    broken = tmp_path / "broken"
    shutil.copytree(whole, broken)
    for name in ("checkpoint-6", "pipeline"):
        shutil.rmtree(broken / name)
    resumed = train(parse_config(Config, [*arguments, "--output_dir", str(broken)]))
    for (name, a), b in zip(weights(whole).items(), weights(resumed).values()):
        assert torch.equal(a, b), name
    assert metrics(whole) == metrics(resumed)


def test_a_metrics_line_that_was_cut_off_is_left_out(arguments, trained):
    whole = trained
    lines = (whole / "metrics.jsonl").read_text().splitlines()
    (whole / "metrics.jsonl").write_text("\n".join(lines[:3]) + '\n{"step": 4, "matc')
    shutil.rmtree(whole / "checkpoint-6")
    train(parse_config(Config, arguments))
    assert [json.loads(line)["step"] for line in (whole / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_and_saves(arguments, tmp_path, number, code):
    extra = ["--training.learning_rate_schedule", "constant", "--training.checkpointing_steps", "100000"]
    extra += ["--training.num_steps"]
    metrics = tmp_path / "run" / "metrics.jsonl"
    child = Child(ROOT / "scripts" / "train_latent.py", *arguments, *extra, "100000")
    wait_until(lambda: not child.running() or (metrics.exists() and metrics.stat().st_size))
    child.send_signal(number)
    returncode, output, errors = child.wait()
    assert returncode == code and "run the same command again" in output, errors
    assert "Traceback" not in errors
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    assert f"stopped at step {step}, saved" in output
    assert json.loads(metrics.read_text().splitlines()[-1])["step"] == step
    resumed = train(parse_config(Config, [*arguments, *extra, str(step + 1)]))
    assert (resumed / "pipeline").exists()


def test_a_second_interrupt_is_obeyed():
    with StopRequest(None) as stop, pytest.raises(KeyboardInterrupt):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
    assert stop.exit_code == 130


def test_an_interrupt_elsewhere_is_one_line(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    assert stop.value.code == 130 and capsys.readouterr().err.endswith(": interrupted\n")


def test_refuses_another_configuration_in_the_same_folder(arguments, trained, tmp_path):
    folder = trained
    before = (folder / "config.yaml").read_text()
    with pytest.raises(ConfigError, match="training.learning_rate"):
        train(parse_config(Config, [*arguments, "--training.learning_rate", "0.5"]))
    assert (folder / "config.yaml").read_text() == before
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="not empty"):
        train(parse_config(Config, [*arguments, "--output_dir", str(tmp_path / "foreign")]))


def test_not_finite_stops_before_the_update(arguments, tmp_path, monkeypatch):
    original = WitnessMatching.forward
    calls = []

    def poisoned(self, batch):
        terms = original(self, batch)
        calls.append(1)
        if len(calls) < 5:
            return terms
        nan = torch.tensor(float("nan"))
        return terms._replace(total=terms.total * nan, named={**terms.named, "matching": nan})

    monkeypatch.setattr(WitnessMatching, "forward", poisoned)
    with pytest.raises(FloatingPointError, match="step 4: matching"):
        train(parse_config(Config, arguments))
    assert (tmp_path / "run" / "checkpoint-3").is_dir() and not (tmp_path / "run" / "pipeline").exists()


def test_a_short_average_has_forgotten_its_warm_up(arguments):
    """ema_decay below what the warm-up reaches is that decay from the first step on, but for what is forgotten."""
    config = parse_config(Config, [*arguments, "--training.ema_decay", "0.9"])
    with own_accelerator("no") as accelerator:
        trainer = Trainer(config, (4, 2, 2), accelerator)
        weight = trainer.network.conv_in.weight.data
        expected = weight.clone()
        for _ in range(300):
            weight += torch.randn_like(weight)
            trainer.ema.step(trainer.network.parameters())
            expected += 0.1 * (weight - expected)
        torch.testing.assert_close(trainer.averaged().conv_in.weight.data, expected, rtol=1e-4, atol=1e-4)


def test_batches_are_a_function_of_seed_rank_and_step(arguments):
    config = parse_config(Config, arguments)
    cache = LatentCache(((torch.randn(5, 2, 4, 2, 2), None),), torch.zeros(4), torch.ones(4))
    seed = config.training.seed
    with own_accelerator("no") as accelerator:
        trainer = Trainer(config, (4, 2, 2), accelerator)
        objective = trainer.objective
        a, again = trainer.draw(cache, 7), objective.draw(cache, 2, 4, step_generators(seed, rank=0, step=7))
        other_rank = objective.draw(cache, 2, 4, step_generators(seed, rank=1, step=7))
        levels = torch.stack([trainer.draw(cache, step).level for step in range(200)])
    assert a.label is None and all(torch.equal(x, y) for x, y in zip(a[:4], again[:4]))
    assert torch.equal(a.level, other_rank.level) and not torch.equal(a.eps, other_rank.eps)
    assert (levels[:, 0] < 2).all() and (levels[:, 1] >= 2).all() and levels.unique().tolist() == [0, 1, 2, 3]


def test_learning_rate():
    config = parse_config(Config, ["--training.num_steps", "100", "--training.num_warmup_steps", "10"]).training
    rates = [learning_rate_at(step, config) for step in range(101)]
    assert rates[0] == pytest.approx(2e-4) and max(rates) <= 2e-3 and rates[100] == pytest.approx(2e-4)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_scripts_end_to_end(arguments, tmp_path):
    """The documented command in a new interpreter, with all that the launcher does to it."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    command += [str(ROOT / "scripts" / "train_latent.py"), *arguments, "--training.num_steps", "2"]
    # as many threads as it has cores: one, beside the other worker
    one_core = {"preexec_fn": lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})}
    trained = subprocess.run(
        command, capture_output=True, text=True, **(one_core if hasattr(os, "sched_setaffinity") else {})
    )
    assert trained.returncode == 0, trained.stderr
    last = trained.stdout.strip().splitlines()[-2:]
    assert last[0].startswith("images: ") and "samples.png" in last[0] and "latent-dmmd sample" in last[1]
    out = tmp_path / "samples"
    how = ["--num_images", "3", "--num_noise_levels", "4", "--steps_per_level", "1", "--seed", "1"]
    pipeline = ["--pipeline", tmp_path / "run" / "pipeline", "--output_dir", out]
    sampled = run(ROOT / "scripts" / "sample.py", *pipeline, *how)
    assert sampled.returncode == 0, sampled.stderr
    assert sorted(p.name for p in (out / "images").iterdir()) == ["00000.png", "00001.png", "00002.png"]
    assert Image.open(out / "images" / "00000.png").size == (32, 32) and (out / "grid.png").exists()


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--training.num_step", "3"], "did you mean training.num_steps"),
        (["--training.num_steps", "many"], "training.num_steps"),
        (["--training.num_steps", "-1"], "must be positive"),
        (["--training.mixed_precision", "fp16"], "bf16"),
        (["--data.name_or_path", "/nowhere/at/all"], "no folder"),
        (["--autoencoder.name_or_path", "/nowhere/at/all"], "no autoencoder"),
        (["--resume_from_checkpoint", "/nowhere/at/all"], "no checkpoint"),
        (["--feature_net.patch_size", "7"], "multiple of"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(arguments, tmp_path, extra, message, capsys, monkeypatch):
    """The script's own main, in this process, since a launch takes seconds."""
    monkeypatch.setattr(sys, "argv", ["train_latent.py", *arguments, *extra])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "scripts" / "train_latent.py"), run_name="__main__")
    assert stop.value.code not in (0, None)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0], lines
    run = tmp_path / "run"
    assert not run.exists() or not any(run.iterdir())
