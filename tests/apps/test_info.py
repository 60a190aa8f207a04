import json
import pickle
import shlex
import shutil

import pytest
from conftest import tiny_pipeline
from processes import ROOT
from safetensors.torch import save_file

from latent_dmmd.apps.info import describe_folder
from latent_dmmd.data.particles import cache_latents
from latent_dmmd.data.pixels import cache_images
from latent_dmmd.data.sources import load_images
from latent_dmmd.training.autoencoder.config import AutoencoderTrainingConfig
from latent_dmmd.training.checkpoints import AVERAGES, MANIFEST
from latent_dmmd.training.config import AutoencoderConfig, Config, parse_config, save_config
from latent_dmmd.training.loop import train


def facts(path):
    """The first line without the path, and the others by name."""
    first, *lines = describe_folder(path).splitlines()
    assert first.startswith(f"{path}: ")
    return first.removeprefix(f"{path}: "), {
        k: v.strip() for k, _, v in (line.strip().partition(":") for line in lines)
    }


def test_a_finished_run(trained, workshop):
    title, lines = facts(trained)
    assert title == "a run, Deep MMD gradient flow (witness-matching)"
    assert lines["data"] == f"{workshop / 'images'}, 32 pixels" and lines["autoencoder"] == str(workshop / "vae")
    assert lines["steps"] == "6 of 6" and lines["checkpoints"] == "checkpoint-3, checkpoint-6"
    assert lines["next"].startswith(f"latent-dmmd sample --pipeline {trained / 'pipeline'} ")
    assert "incomplete" not in lines


def test_a_run_that_was_stopped(trained):
    """The command that it names resumes it."""
    (trained / "checkpoint-6" / "optimizer.bin").unlink()
    shutil.rmtree(trained / "pipeline")
    _, lines = facts(trained)
    assert (lines["steps"], lines["checkpoints"], lines["incomplete"]) == ("3 of 6", "checkpoint-3", "checkpoint-6")
    assert lines["pipeline"].startswith("not yet")
    command = lines["next"].removesuffix("(resumes)").split()
    assert command[:2] == ["latent-dmmd", "train"]
    train(parse_config(Config, command[2:]))
    assert facts(trained)[1]["steps"] == "6 of 6"


def test_a_run_without_checkpoints(trained):
    for name in ("checkpoint-3", "checkpoint-6"):
        shutil.rmtree(trained / name)
    assert facts(trained)[1]["steps"] == "0 of 6" and facts(trained)[1]["checkpoints"] == "none that is complete"


def test_checkpoints(trained, tmp_path):
    title, lines = facts(trained / "checkpoint-3")
    assert title == "a checkpoint, complete" and (lines["step"], lines["run"]) == ("3", str(trained))
    assert lines["next"].endswith(f"--resume_from_checkpoint {trained / 'checkpoint-3'}")
    copy = shutil.copytree(trained / "checkpoint-3", tmp_path / "best")
    assert facts(copy)[1]["step"] == "3" and "run" not in facts(copy)[1]
    (copy / "random_states_0.pkl").unlink()
    assert facts(copy)[0].startswith("a checkpoint, not complete")


def test_pipelines(trained, tiny_vae, tmp_path):
    title, lines = facts(trained / "pipeline")
    assert title == "a pipeline, LatentDMMDPipeline"
    assert lines["particles"].startswith("4 × 16 × 16, latents of AutoencoderKL") and lines["noise levels"] == "4"
    assert lines["samples by"] == "approximate, 4 levels × 1 steps"
    pipe = tiny_pipeline(tiny_vae)
    pipe.save_pretrained(tmp_path / "pipe line")
    _, lines = facts(tmp_path / "pipe line")
    assert lines["network"] == f"FeatureNet, {sum(p.numel() for p in pipe.feature_net.parameters()):,} parameters"
    assert f"'{tmp_path / 'pipe line'}'" in lines["next"]


def test_bundled_names():
    title, lines = facts("elpv-dmmd")
    assert title == "a pipeline, LatentDMMDPipeline" and lines["samples by"] == "approximate, 25 levels × 2 steps"
    assert "--pipeline elpv-dmmd " in lines["next"] and lines["noise levels"] == "25"
    title, lines = facts("elpv-flow-matching")
    assert lines["samples by"] == "FlowMatchEulerDiscreteScheduler, 50 steps" and "noise levels" not in lines
    title, lines = facts("elpv-vae")
    assert title == "an autoencoder, AutoencoderDC" and lines["channels"] == "8"
    assert facts("elpv-vae-f16c16")[1]["channels"] == "16"


def test_a_pipeline_of_another_library(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    (tmp_path / "vae").mkdir()
    title, lines = facts(tmp_path)
    assert title == "a pipeline of another library, StableDiffusionPipeline"
    assert lines["autoencoder"] == str(tmp_path / "vae") and "next" not in lines


def test_the_run_of_an_autoencoder(tiny_images, tmp_path):
    """Its commands go on with it: the one resumes it, the other trains with what it wrote."""
    folder = tmp_path / "run of mine"
    options = ["--data.name_or_path", str(tiny_images), "--data.resolution", "32", "--crop_size", "32"]
    config = parse_config(AutoencoderTrainingConfig, [*options, "--output_dir", str(folder), "--num_steps", "7"])
    folder.mkdir()
    save_config(config, folder / "config.yaml")
    title, lines = facts(folder)
    assert title == "a run, the training of an autoencoder" and "PSNR" not in lines
    assert (lines["steps"], lines["data"]) == ("0 of 7", f"{tiny_images}, 32 pixels")
    words = shlex.split(lines["next"].removesuffix("(resumes)"))
    assert words[:2] == ["latent-dmmd", "train-autoencoder"]
    assert parse_config(AutoencoderTrainingConfig, words[2:]) == config

    (folder / "checkpoint-7").mkdir()
    (folder / "checkpoint-7" / MANIFEST).write_text("{}")
    save_file({}, folder / "checkpoint-7" / AVERAGES, metadata={"num_updates": "7"})
    (folder / "metrics.jsonl").write_text('{"step": 5, "psnr": 20.0}\n{"step": 7, "psnr": 21.5}\n{"step": 8, "psn')
    (folder / "autoencoder").mkdir()
    (folder / "autoencoder" / "config.json").write_text("{}")
    assert facts(folder / "checkpoint-7")[1]["next"] == lines["next"].removesuffix("   (resumes)")
    _, lines = facts(folder)
    assert lines["PSNR"] == "21.50 dB on validation images, at step 7"
    words = shlex.split(lines["next"])
    trained_with = parse_config(Config, words[2:])
    assert trained_with.autoencoder.name_or_path == str(folder / "autoencoder")
    assert (trained_with.data.name_or_path, trained_with.data.resolution) == (str(tiny_images), 32)


def test_a_cache_of_images(tiny_images, tmp_path):
    cache_images(load_images(str(tiny_images), 32), tmp_path / "cache")
    title, lines = facts(tmp_path / "cache")
    assert title == "a cache of images, complete" and lines["images"] == "12 decoded, 32 pixels"
    assert "autoencoder" not in lines


def test_a_cache(tiny_vae, tiny_images, tmp_path):
    (tiny_images / "03.png").write_bytes(b"not an image")
    folder, source = tmp_path / "cache", load_images(str(tiny_images), 32)
    options = dict(horizontal_flip=True, batch_size=4, on_bad_image="skip", shard_size=6)
    cache_latents(tiny_vae, source, folder, **options)
    title, lines = facts(folder)
    assert title == "a latent cache, complete" and lines["images"] == "11 encoded, 32 pixels, mirrored as well"
    assert lines["skipped"] == f"1: {tiny_images / '03.png'}"
    (folder / "moments-00000006.safetensors").unlink()
    assert facts(folder)[0].startswith("a latent cache, not complete") and facts(folder)[1]["images"].startswith("5 ")


def test_models_and_images(workshop):
    assert facts(workshop / "vae")[0] == "an autoencoder, AutoencoderKL"
    title, lines = facts(workshop / "images")
    assert (title, lines["images"]) == ("a folder of images", "12")
    net = ROOT / "latent_dmmd" / "assets" / "elpv-dmmd" / "feature_net"
    assert facts(net)[0] == "a model, EncoderFeatureNet, part of a pipeline or of another library"


def test_samples_and_runs(tiny_images, trained, tmp_path):
    folder = tmp_path / "samples"
    folder.mkdir()
    shutil.copytree(tiny_images, folder / "images")
    shutil.copy(tiny_images / "00.png", folder / "grid.png")
    assert facts(folder) == ("generated images", {"images": "12", "grid": str(folder / "grid.png")})
    (tmp_path / "runs").mkdir()
    trained.rename(tmp_path / "runs" / "a")
    assert facts(tmp_path / "runs") == ("a folder of 1 runs", {"runs": "a"})


def test_what_is_not_known(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    text = describe_folder(tmp_path)
    assert "\n" not in text and "looked for" in text and "model_index.json" in text
    for path in (tmp_path / "thesis.tex", tmp_path / "nowhere", "elpv-dmdm"):
        with pytest.raises(ValueError, match="bundled name: elpv-dmmd, .*openmoji-dmmd, .*elpv-vae, elpv-vae-f16c16, "):
            describe_folder(path)


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"[1]", b"{}", b"3", b"objective: 3\ntraining: [1]\n"])
@pytest.mark.parametrize(
    "name", ["config.yaml", "config.json", "manifest.json", "model_index.json", "averages.safetensors"]
)
def test_damaged_files_are_no_traceback(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert describe_folder(tmp_path).startswith(f"{tmp_path}: ")


def test_no_pickle_is_read(trained, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("a pickle was read")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr("torch.load", refuse)
    for folder in (trained, trained / "checkpoint-6", trained / "pipeline"):
        describe_folder(folder)


def test_a_configuration_of_something_else(tmp_path):
    save_config(AutoencoderConfig(), tmp_path / "config.yaml")
    assert facts(tmp_path)[0] == "a folder, with a config.yaml that is no run's"
