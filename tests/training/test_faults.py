"""Faults, injected: kills, full and read-only disks, ranks that die, pickles; docs/reliability.md is their table."""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import metrics, tiny_pipeline, weights
from processes import ROOT, Child, ranks, run, wait_until

from latent_dmmd.latent_pipeline import FlowOptions
from latent_dmmd.pipeline import load_pipeline
from latent_dmmd.training.checkpoints import checkpoints_in, is_complete
from latent_dmmd.training.config import Config, parse_config
from latent_dmmd.training.loop import train
from latent_dmmd.utils.errors import ConfigError

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
EVERY_STEP = ["--training.checkpointing_steps", "1", "--training.learning_rate_schedule", "constant"]
RUNS_ON = [*EVERY_STEP, "--training.num_steps", "1000000"]
TRAIN_LATENT = ROOT / "scripts" / "train_latent.py"
IMPORTS = """
import os, signal, sys
import torch
from latent_dmmd.training.config import Config, parse_config
from latent_dmmd.training.loop import train
from latent_dmmd.training.trainer import Trainer
"""


def train_apart(*args):
    """Train in a process of its own, one thread: state and number of threads are those of other such processes."""
    result = run(IMPORTS + "print(train(parse_config(Config, sys.argv[1:])))", *args, OMP_NUM_THREADS=1)
    assert result.returncode == 0, result.stderr
    return Path(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("count", [6, pytest.param(60, marks=pytest.mark.long)])
def test_killed_at_any_moment(arguments, tmp_path, count):
    """SIGKILL leaves a complete checkpoint behind, and what is trained in the end does not know of it."""
    folder, moments, states = tmp_path / "run", random.Random(0), []

    def steps():
        return [int(p.name.split("-")[1]) for p in checkpoints_in(folder)]

    run("pass")  # the server that forks children imports everything first
    # how long it takes from the start to the third checkpoint is this machine's measure of a moment
    start = time.monotonic()
    for kill in range(count):
        child = Child(TRAIN_LATENT, *arguments, *RUNS_ON, OMP_NUM_THREADS=1)
        if kill == 0:
            wait_until(lambda: max(steps(), default=0) >= 3)
            longest = 1.5 * (time.monotonic() - start)
        else:
            time.sleep(moments.uniform(0, longest))
        child.send_signal(signal.SIGKILL)
        assert child.wait().returncode == -signal.SIGKILL
        states.append((max(steps(), default=0), len(list(folder.glob(".checkpoint-*")))))
    latest = [step for step, _ in states]
    assert latest == sorted(latest)  # nothing that was saved is lost again
    if count > 50:
        assert any(aside for _, aside in states), "no kill inside a write"
    last = str(latest[-1] + 2)
    killed = train_apart(*arguments, *EVERY_STEP, "--training.num_steps", last)
    assert not list(killed.glob(".checkpoint-*"))
    whole = ["--training.num_steps", last, "--output_dir", str(tmp_path / "whole")]
    whole = train_apart(*arguments, *EVERY_STEP, "--training.checkpointing_steps", "1000", *whole)
    for (name, a), b in zip(weights(whole).items(), weights(killed).values()):
        assert torch.equal(a, b), name
    assert metrics(whole) == metrics(killed)


@pytest.mark.parametrize("damage", ["missing", "truncated", "no manifest", "never renamed"])
def test_an_incomplete_checkpoint_is_passed_over_and_named(arguments, trained, damage, capsys):
    folder = trained
    latest = folder / "checkpoint-6"
    if damage == "missing":
        (latest / "optimizer.bin").unlink()
    elif damage == "truncated":
        (latest / "model.safetensors").write_bytes((latest / "model.safetensors").read_bytes()[:100])
    elif damage == "no manifest":
        (latest / "complete.json").unlink()
    else:
        latest = latest.rename(folder / ".checkpoint-6")
    assert not is_complete(latest) or damage == "never renamed"
    shutil.rmtree(folder / "pipeline")
    train(parse_config(Config, arguments))
    output = capsys.readouterr().out
    assert f"passing over {latest.name}: not complete" in output and "resuming from" in output
    assert "checkpoint-3" in output and (folder / "pipeline").exists() and is_complete(folder / "checkpoint-6")
    if damage != "never renamed":
        (folder / "checkpoint-6" / "complete.json").unlink()
        with pytest.raises(ConfigError, match="not complete"):
            train(parse_config(Config, [*arguments, "--resume_from_checkpoint", str(folder / "checkpoint-6")]))


def test_damage_that_keeps_the_size_is_named(arguments, trained):
    folder = trained
    path = folder / "checkpoint-6" / "averages.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(ConfigError, match="cannot read .*checkpoint-6.*older"):
        train(parse_config(Config, arguments))


def test_pruning_keeps_the_latest(arguments):
    extra = ["--training.checkpointing_steps", "1", "--training.checkpoints_total_limit", "1"]
    folder = train(parse_config(Config, [*arguments, *extra]))
    assert [p.name for p in folder.iterdir() if "checkpoint" in p.name] == ["checkpoint-6"]


# disks

IN_A_NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")
TRAIN = """
import resource, signal, sys

limit, *arguments = sys.argv[1:]
if int(limit):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
sys.path.insert(0, "scripts")
from latent_dmmd.utils.cli import run
from train_latent import main
run(lambda: main(arguments))
"""


def in_a_namespace(command, *args):
    """A new interpreter in namespaces of its own, where `command` mounts something before "$@" trains."""
    train = [sys.executable, "-c", TRAIN, "0", *args]
    command = [*IN_A_NAMESPACE, command, "sh", *train]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT)


def mounts():
    """Whether this machine lets a user mount in a namespace of its own."""
    try:
        return subprocess.run([*IN_A_NAMESPACE, "mount -t tmpfs tmpfs /mnt"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def assert_one_line(result, *parts):
    """Exit code 2 and one line of error, without a traceback."""
    assert result.returncode == 2, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert "Traceback" not in result.stderr and all(part in last for part in parts), result.stderr
    return last


@pytest.mark.parametrize("room", [pytest.param("metrics", marks=pytest.mark.long), "checkpoint"])
def test_a_file_that_cannot_be_written(arguments, tmp_path, room):
    """A limit on the size of files stands for a disk that fills while a file is written."""
    folder = train(parse_config(Config, [*arguments, *EVERY_STEP, "--training.num_steps", "20"]))
    before = {p: p.read_bytes() for p in (folder / "checkpoint-20").iterdir()}
    more, limit = [*EVERY_STEP, "--training.num_steps", "23"], max(map(len, before.values())) - 1000
    if room == "metrics":
        more, limit = [*more, "--training.checkpointing_steps", "100"], (folder / "metrics.jsonl").stat().st_size + 10
    result = run(TRAIN, limit, *arguments, *more, folder=ROOT)
    what = {"checkpoint": "checkpoint-21", "metrics": "metrics.jsonl"}[room]
    assert_one_line(result, f"cannot write {folder / what}", "the last checkpoint, checkpoint-20, is intact")
    assert not list(folder.glob(".*")) and before == {p: p.read_bytes() for p in (folder / "checkpoint-20").iterdir()}
    resumed = train(parse_config(Config, [*arguments, *more]))
    assert [line["step"] for line in metrics(resumed)] == list(range(1, 24))


@pytest.mark.skipif(not mounts(), reason="no mounts in namespaces here")
def test_a_disk_that_fills(arguments, tmp_path):
    """A real one, of a few checkpoints' size."""
    whole = train(parse_config(Config, [*arguments, *EVERY_STEP, "--training.num_steps", "1"]))
    one = sum(p.stat().st_size for p in (whole / "checkpoint-1").iterdir())
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir(), kept.mkdir()
    command = f'mount -t tmpfs -o size={int(2.5 * one)} tmpfs {disk}; "$@"; code=$?; cp -a {disk}/. {kept}; exit $code'
    arguments = [*arguments, *EVERY_STEP, "--output_dir", str(disk / "run"), "--training.checkpoints_total_limit", "9"]
    result = in_a_namespace(command, *arguments)
    last = assert_one_line(result, "cannot write", "0 MB free", "is intact")
    checkpoints = checkpoints_in(kept / "run")
    assert checkpoints and f"the last checkpoint, {checkpoints[-1].name}," in last
    resumed = train(parse_config(Config, [*arguments, "--output_dir", str(kept / "run")]))
    assert (resumed / "pipeline").exists()


@pytest.mark.skipif(not mounts(), reason="no mounts in namespaces here")
@pytest.mark.parametrize("what", ["run folder", "cache"])
def test_a_disk_that_is_read_only(arguments, tmp_path, what):
    disk = tmp_path / "disk"
    disk.mkdir()
    key = ["--output_dir"] if what == "run folder" else ["--data.cache_dir"]
    command = f'mount -t tmpfs -o ro tmpfs {disk}; "$@"'
    result = in_a_namespace(command, *arguments, *key, str(disk / "new"))
    assert_one_line(result, "Read-only file system", str(disk / "new"))


# several processes

RANKS = (
    IMPORTS
    + """
trainers, original = [], Trainer.__init__
def remember(self, *args):
    original(self, *args)
    trainers.append(self)
Trainer.__init__ = remember
out, *arguments = sys.argv[1:]
train(parse_config(Config, arguments))
trainer = trainers[0]
state = {**trainer.network.state_dict(), **{str(i): a for i, a in enumerate(trainer.ema.shadow_params)}}
torch.save(state, f"{out}/{os.environ['RANK']}.pt")
"""
)
DIES = (
    IMPORTS
    + """
step = Trainer.step
def dies(self, number, particles):
    if number == 4 and self.accelerator.process_index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, number, particles)
Trainer.step = dies
train(parse_config(Config, sys.argv[1:]))
"""
)


def launch(path, *args, **options):
    """Two processes; `accelerate launch` starts several on CPUs through MPI alone."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(path), *args]
    env = {**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **options)


@pytest.mark.parametrize("objective", ["witness-matching", pytest.param("dmmd", marks=pytest.mark.long)])
def test_ranks_stay_identical_and_one_of_them_writes(arguments, tmp_path, objective):
    cache = ["--data.cache_dir", str(tmp_path / "cache"), "--objective.name", objective]
    results = [child.wait() for child in ranks(RANKS, tmp_path, *arguments, *cache)]
    assert [result.returncode for result in results] == [0, 0], results
    for said in ("mixed precision: ", "autoencoder: PSNR", "images: ", "next: "):
        assert [result.stdout.count(said) for result in results] == [1, 0], said
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    run = tmp_path / "run"
    assert [line["step"] for line in metrics(run)] == list(range(1, 7))
    assert len(list((tmp_path / "cache").glob("moments-*"))) == 1 and (run / "samples.png").exists()
    # what two processes began, one goes on with
    shutil.rmtree(run / "checkpoint-6")
    train(parse_config(Config, [*arguments, *cache]))
    assert [line["step"] for line in metrics(run)] == list(range(1, 7))


def test_a_rank_that_dies_ends_the_run(arguments, tmp_path):
    path = tmp_path / "dies.py"
    path.write_text(DIES)
    process = launch(path, *arguments, *RUNS_ON)
    _, errors = process.communicate(timeout=120)  # a hang is a failure
    assert process.returncode != 0 and "SIGKILL" in errors
    assert checkpoints_in(tmp_path / "run")[-1].name in ("checkpoint-3", "checkpoint-4")


SAMPLINGS = {
    "exact": (dict(sampler="exact"), {}),
    "chunks": (dict(sampler="exact"), dict(chunk_size=1)),
    "constant step": (dict(sampler="exact"), dict(step_size=0.01)),
    "approximate": (dict(sampler="approximate"), {}),
    "hybrid": (dict(sampler="hybrid"), {}),
}


def sampled(pipe, sampling, across_ranks=False):
    """The final particles of this process, by the options of the call and those of the flow."""
    how, options = sampling
    pipe.flow_options = FlowOptions(across_ranks=across_ranks, **options)
    how = dict(num_noise_levels=4, steps_per_level=2, output_type="latent", **how)
    return pipe(4, generator=torch.Generator().manual_seed(0), **how).images


SHARE = """
import sys
import torch
import torch.distributed as dist
from test_faults import SAMPLINGS, sampled
from latent_dmmd.pipeline import load_pipeline

folder = sys.argv[1]
dist.init_process_group("gloo")
pipe = load_pipeline(folder)
pipe.set_progress_bar_config(disable=True)
shares = {name: sampled(pipe, sampling, across_ranks=True) for name, sampling in SAMPLINGS.items()}
torch.save(shares, f"{folder}/{dist.get_rank()}.pt")
try:
    pipe(5, num_inference_steps=1)
except ValueError as error:
    assert "multiple of the 2 processes" in str(error)
else:
    raise AssertionError("5 particles for 2 processes")
dist.destroy_process_group()
"""


def test_ranks_that_share_particles_make_the_images_of_one(tiny_vae, tmp_path):
    pipe = tiny_pipeline(tiny_vae)
    pipe.save_pretrained(tmp_path)
    for child in ranks(SHARE, tmp_path):
        result = child.wait()
        assert result.returncode == 0, result.stderr
    shares = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, sampling in SAMPLINGS.items():
        assert all(len(share[name]) == 2 for share in shares)
        whole = sampled(pipe, sampling)
        torch.testing.assert_close(torch.cat([share[name] for share in shares]), whole, rtol=1e-4, atol=1e-5, msg=name)


def test_sample_script_on_two_processes(tiny_vae, tmp_path):
    tiny_pipeline(tiny_vae).save_pretrained(tmp_path / "pipeline")
    how = ["--pipeline", str(tmp_path / "pipeline"), "--num_images", "4", "--num_noise_levels", "4"]
    script = ROOT / "scripts" / "sample.py"
    one = Child(script, *how, "--output_dir", tmp_path / "one")
    for child in [one, *ranks(script, *how, "--output_dir", tmp_path / "two")]:
        result = child.wait()
        assert result.returncode == 0, result.stderr
    names = [f"{i:05d}.png" for i in range(4)]
    assert sorted(p.name for p in (tmp_path / "two" / "images").iterdir()) == names
    from latent_dmmd.data.sources import read_image

    for name in names:
        a, b = (read_image(tmp_path / folder / "images" / name, 32).int() for folder in ("one", "two"))
        assert (a - b).abs().max() <= 1


def test_sharded_weights_are_refused(arguments, monkeypatch):
    from accelerate.utils import DistributedType

    from latent_dmmd.utils.process import check_distributed

    for kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        with pytest.raises(ConfigError, match="differentiated twice.*configs/accelerate"):
            check_distributed(kind)
    for kind in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        check_distributed(kind)


# files from elsewhere


class Malice:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl"])
def test_a_checkpoint_from_elsewhere_runs_no_code(arguments, trained, tmp_path, name):
    folder = trained
    checkpoint, done = folder / "checkpoint-6", tmp_path / "malice"
    (checkpoint / name).write_bytes(pickle.dumps(Malice(done)))
    manifest = checkpoint / "complete.json"
    sizes = json.loads(manifest.read_text()) | {name: (checkpoint / name).stat().st_size}
    manifest.write_text(json.dumps(sizes))
    shutil.rmtree(folder / "pipeline")
    try:
        train(parse_config(Config, arguments))
    except ConfigError as error:
        assert "checkpoint-6" in str(error)
    assert not done.exists()
    pickle.loads((checkpoint / name).read_bytes())
    assert done.exists()  # it would have


# precision


def test_bf16_is_close_to_float32(tmp_path, arguments):
    """Loss of the first steps within 2 %, images of the trained networks within 0.05 of [0, 1] on average."""
    extra = ["--training.num_steps", "20", "--training.num_warmup_steps", "0", "--training.learning_rate", "1e-3"]
    runs = {}
    for precision in ("no", "bf16"):
        folder = tmp_path / precision
        where = ["--training.mixed_precision", precision, "--output_dir", str(folder)]
        runs[precision] = train_apart(*arguments, *extra, *where)
    exact, rough = (metrics(folder) for folder in runs.values())
    assert exact != rough  # bf16 was used
    for a, b in zip(exact[:5], rough[:5]):
        assert abs(a["matching"] - b["matching"]) < 0.02 * a["matching"], (a, b)
    images = []
    for folder in runs.values():
        pipe = load_pipeline(folder / "pipeline")
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images.append(pipe(8, num_noise_levels=4, steps_per_level=4, generator=generator, output_type="pt").images)
    assert (images[0] - images[1]).abs().mean() < 0.05


# trackers


def test_tensorboard_shows_terms_and_images(arguments, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train(parse_config(Config, [*arguments, "--training.log_with", "tensorboard"]))
    (path,) = {p.parent for p in folder.rglob("events.out.tfevents.*")}
    assert path == folder / "latent_dmmd"  # tensorboard --logdir of the run folder finds it
    events = EventAccumulator(str(path))
    events.Reload()
    assert {"matching", "grad_norm", "learning_rate"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("matching")] == list(range(1, 7))
    assert [event.step for event in events.Images("samples")] == [3, 6]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_named(arguments, tmp_path, monkeypatch, name):
    """Accelerate would go on without it."""
    monkeypatch.setattr(f"latent_dmmd.training.setup.is_{name}_available", lambda: False)
    with pytest.raises(ConfigError) as caught:
        train(parse_config(Config, [*arguments, "--training.log_with", name]))
    assert str(caught.value) == f"training.log_with={name} is not installed: pip install {name}"
    assert not (tmp_path / "run").exists()


def test_sigterm_reaches_every_rank(arguments, tmp_path):
    process = launch(TRAIN_LATENT, *arguments, *RUNS_ON)
    deadline = time.monotonic() + 120
    while not checkpoints_in(tmp_path / "run") and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=120)
    assert "run the same command again to go on" in output, errors
    latest = checkpoints_in(tmp_path / "run")[-1]
    assert f"stopped at step {latest.name.split('-')[1]}" in output
