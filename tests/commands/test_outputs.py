"""What a command is to write is checked before its work, and folders of images hold those of one call."""

import pytest
import torch
from conftest import tiny_pipeline, tiny_velocity
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from processes import ROOT

from latent_dmmd.commands import complexity, demo, diagnose, edit, evaluate_classes, evaluate_edits, film, sample, toy2d
from latent_dmmd.commands.compare import main as compare
from latent_dmmd.data.sources import load_images
from latent_dmmd.latent_pipeline import LatentPipeline
from latent_dmmd.pipeline import LatentSchedulerPipeline
from latent_dmmd.utils.output_folder import MANIFEST

COMMANDS = {
    complexity: [],
    diagnose: ["--pipeline", "nowhere", "--data", "nowhere"],
    edit: ["--pipeline", "nowhere", "--image", "nowhere.png"],
    evaluate_classes: ["--pipeline", "nowhere"],
    evaluate_edits: ["--pipelines", "{a: nowhere}", "--data", "nowhere"],
    film: ["--pipeline", "nowhere"],
    sample: ["--pipeline", "nowhere"],
    toy2d: [],
}


def refused(main, arguments):
    """The message of the OSError, which is one line."""
    with pytest.raises(OSError) as caught:
        main([str(a) for a in arguments])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.__name__.rpartition(".")[2])
def test_an_output_folder_that_cannot_be_made_is_refused_first(command, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "out"):
        message = refused(command.main, [*COMMANDS[command], "--output_dir", folder])
        assert message == f"cannot write into {folder}: {tmp_path / 'file'} is no folder"


@pytest.mark.parametrize(
    "command, name",
    [(complexity, "complexity.png"), (diagnose, "diagnosis.json"), (film, "strip.png"), (toy2d, "toy2d.png")],
)
def test_a_folder_in_the_place_of_a_file_is_refused_first(command, name, tmp_path):
    (tmp_path / name).mkdir()
    assert f"{name}: it is a folder" in refused(command.main, [*COMMANDS[command], "--output_dir", tmp_path])


def test_a_comparison_that_cannot_be_written_is_refused_first(tmp_path):
    (tmp_path / "file").write_text("")
    how = ["--config", ROOT / "configs" / "compare_elpv256.yaml", "--minutes", "1", "--output_dir", tmp_path / "file"]
    assert "file is no folder" in refused(compare, how)


@pytest.fixture
def scheduled(tmp_path):
    """The folder of a saved pipeline that has no witness."""
    LatentSchedulerPipeline(tiny_velocity(32, 3), FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


@pytest.mark.parametrize(
    "command, words, left_out",
    [
        (sample, ["--sampler", "exact", "--guidance_scale", "3"], "--sampler, --guidance_scale"),
        (sample, ["--num_noise_levels", "3", "--class_labels", "a"], "--num_noise_levels, --class_labels"),
        (film, ["--sampler", "exact"], "--sampler"),
    ],
)
def test_what_a_pipeline_cannot_use_is_refused(command, words, left_out, scheduled, tmp_path):
    with pytest.raises(ValueError, match=f"other is no DMMD pipeline: leave out {left_out}"):
        command.main(["--pipeline", scheduled, "--output_dir", str(tmp_path / "out"), *words])
    assert not (tmp_path / "out").exists()


def test_a_pipeline_without_a_witness_is_not_diagnosed(scheduled, tiny_images, tmp_path):
    words = ["--pipeline", scheduled, "--data", str(tiny_images), "--num_particles", "2"]
    with pytest.raises(ValueError, match="LatentSchedulerPipeline has no witness to diagnose"):
        diagnose.main([*words, "--output_dir", str(tmp_path / "out")])


@pytest.mark.parametrize("command", [evaluate_edits, demo])
def test_no_pipelines_are_refused(command, tmp_path):
    words = ["--data", "nowhere", "--output_dir", str(tmp_path / "out")] if command is evaluate_edits else []
    with pytest.raises(ValueError, match="--pipelines names none"):
        command.main(["--pipelines", "{}", *words])


def test_one_size_fits_no_exponent(tmp_path):
    with pytest.raises(ValueError, match="at least 2 different sizes"):
        complexity.main(["--batches", "[256, 256]", "--output_dir", str(tmp_path)])


@pytest.fixture
def numbered(tiny_vae, tiny_images, tmp_path):
    """The commands that write numbered images, as functions of their number, a folder and further words."""
    tiny_pipeline(tiny_vae).save_pretrained(tmp_path / "pipeline")
    image = next(iter(sorted(tiny_images.iterdir())))
    common = ["--pipeline", str(tmp_path / "pipeline"), "--num_inference_steps", "2", "--output_dir"]
    return {
        "sample": lambda n, out, *more: sample.main([*common, str(out), "--num_images", str(n), *more]),
        "edit": lambda n, out, *more: edit.main(
            [*common, str(out), "--num_variations", str(n), "--image", str(image), "--scale", "2", *more]
        ),
    }


@pytest.mark.parametrize("name", ["sample", "edit"])
def test_fewer_images_do_not_mix_with_those_of_an_earlier_call(name, numbered, tmp_path, monkeypatch):
    out, images = tmp_path / "out", "images/" if name == "sample" else ""
    others = [MANIFEST] + (["grid.png"] if name == "sample" else [])

    def names():
        return sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if not p.is_dir())

    def work(*args, **options):
        raise NotImplementedError("began to work")

    numbered[name](3, out)
    assert names() == sorted([*others, *(f"{images}{i:05d}.png" for i in range(3))])
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(LatentPipeline, "from_pretrained", work)
        with pytest.raises(OSError, match="out already holds .*; name another --output_dir, or pass --overwrite"):
            numbered[name](2, out)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    numbered[name](2, out, "--overwrite")
    assert names() == sorted([*others, *(f"{images}{i:05d}.png" for i in range(2))])
    (out / "mine.txt").write_text("mine")
    with pytest.raises(OSError, match="holds mine.txt, which no earlier call wrote"):
        numbered[name](2, out, "--overwrite")
    assert (out / "mine.txt").read_text() == "mine" and len(names()) == len(others) + 3


@pytest.mark.parametrize("name", ["sample", "edit"])
def test_an_interrupted_call_leaves_no_images(name, numbered, tmp_path, monkeypatch):
    original, count = Image.Image.save, 0

    def interrupted(image, file, *args, **options):
        nonlocal count
        count += 1
        original(image, file, *args, **options)
        if count == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        numbered[name](3, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*"))
    monkeypatch.undo()
    numbered[name](3, tmp_path / "out")
    assert len(list((tmp_path / "out").rglob("0*.png"))) == 3


def test_the_grid_of_samples_is_not_among_the_images(numbered, tmp_path):
    numbered["sample"](4, tmp_path / "out")
    images = load_images(str(tmp_path / "out" / "images"), 32)
    assert len(images) == 4 and torch.stack(list(images)).shape == (4, 3, 32, 32)
