"""From which checkpoint a run goes on, and what a refusal says."""

import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import metrics, weights

from latent_dmmd.training.checkpoints import check_run_folder, checkpoint_to_resume, steps_done
from latent_dmmd.training.config import Config, parse_config
from latent_dmmd.training.loop import train
from latent_dmmd.training.trainer import Trainer
from latent_dmmd.utils.errors import ConfigError

CONSTANT = ["--training.learning_rate_schedule", "constant", "--training.num_steps"]


def refusal(arguments):
    with pytest.raises(ConfigError) as caught:
        train(parse_config(Config, arguments))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("wanted", [None, "latest", "checkpoint-6", "folder"])
def test_more_steps_than_the_run_are_refused(trained, wanted):
    """However the checkpoint was named."""
    which = str(trained / "checkpoint-6") if wanted == "folder" else wanted
    assert checkpoint_to_resume(trained, which, 6) == trained / "checkpoint-6"
    with pytest.raises(
        ConfigError, match="checkpoint-6 has been trained longer, for 6 steps; raise training.num_steps=5"
    ):
        checkpoint_to_resume(trained, which, 5)


def test_a_refused_run_is_left_as_it_was(arguments):
    folder = train(parse_config(Config, [*arguments, *CONSTANT, "6"]))
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    resume = ["--resume_from_checkpoint", str(folder / "checkpoint-6")]
    assert "has been trained longer" in refusal([*arguments, *CONSTANT, "5", *resume])
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_finished_run_makes_its_outputs_again(arguments, trained):
    shutil.rmtree(trained / "pipeline")
    before = metrics(trained)
    train(parse_config(Config, [*arguments, "--resume_from_checkpoint", str(trained / "checkpoint-6")]))
    assert (trained / "pipeline").exists() and metrics(trained) == before


@pytest.mark.parametrize("name", ["best", "checkpoint-5"])
def test_a_checkpoint_of_another_name_goes_on_at_its_step(arguments, trained, tmp_path, name, capsys):
    """Copied elsewhere, and resumed in another folder: bitwise as the run it comes from, from step 3 on."""
    checkpoint = shutil.copytree(trained / "checkpoint-3", tmp_path / name)
    assert steps_done(checkpoint) == 3
    other = ["--output_dir", str(tmp_path / "other"), "--resume_from_checkpoint", str(checkpoint)]
    folder = train(parse_config(Config, [*arguments, *other]))
    assert f"resuming from {checkpoint}, at step 3" in capsys.readouterr().out
    assert metrics(folder) == metrics(trained)[3:]
    assert all((a == b).all() for a, b in zip(weights(folder).values(), weights(trained).values()))


def test_going_on_from_an_older_checkpoint_leaves_the_newer_way(arguments, trained, monkeypatch, capsys):
    """Its checkpoints are not resumed from again, and what is written anew is kept."""
    before, step = weights(trained), Trainer.step

    def stop_after_five(self, number, particles):
        if number == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number, particles)

    one = ["--training.checkpoints_total_limit", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stop_after_five)
        with pytest.raises(SystemExit):
            train(parse_config(Config, [*arguments, *one, "--resume_from_checkpoint", "checkpoint-3"]))
    output = capsys.readouterr().out
    assert "note: the next checkpoint takes the place of checkpoint-6" in output
    assert "stopped at step 5, saved; run it with --resume_from_checkpoint latest to go on" in output
    assert [p.name for p in trained.glob("checkpoint-*")] == ["checkpoint-5"]
    train(parse_config(Config, [*arguments, *one]))
    assert "at step 5" in capsys.readouterr().out
    assert all((a == b).all() for a, b in zip(weights(trained).values(), before.values()))


def test_what_killed_processes_left_is_no_foreign_file(arguments, tmp_path):
    """Nor is what another process is writing at the moment."""
    config = replace(parse_config(Config, arguments), output_dir=str(tmp_path / "begun"))
    (tmp_path / "begun").mkdir()
    for name in (".config.yaml.7.partial", ".probe.8.partial"):
        (tmp_path / "begun" / name).touch()
    assert check_run_folder(config) == tmp_path / "begun"
    (tmp_path / "begun" / "notes.txt").touch()
    with pytest.raises(ConfigError, match="not empty and holds no run"):
        check_run_folder(config)


def test_a_checkpoint_is_found_in_the_run_folder(trained):
    assert checkpoint_to_resume(trained, "checkpoint-3", 6) == trained / "checkpoint-3"


def test_latest_is_a_start_where_there_is_nothing(arguments, capsys, tmp_path):
    """A job script asks for the latest at its first start as well."""
    train(parse_config(Config, [*arguments, "--training.num_steps", "1", "--resume_from_checkpoint", "latest"]))
    said = capsys.readouterr().out
    assert f"no checkpoint in {tmp_path / 'run'} yet: starting at step 0\n" in said
    assert "note: training.num_warmup_steps=50 exceeds num_steps=1" in said


@pytest.mark.parametrize("which", ["run", "pipeline", "checkpoint-3"])
def test_a_folder_that_is_no_complete_checkpoint(arguments, trained, which):
    (trained / "checkpoint-3" / "complete.json").unlink()
    folder = trained if which == "run" else trained / which
    text = refusal([*arguments, "--resume_from_checkpoint", str(folder)])
    assert text == f"{folder} is no checkpoint, or not complete; pass a checkpoint folder or 'latest'"


def test_a_run_of_the_last_release_resumes(arguments, trained):
    """Its configuration lacks the keys that have come since."""
    saved = yaml.safe_load((trained / "config.yaml").read_text())
    for group, keys in {
        "objective": ("kernel", "label_dropout", "num_points"),
        "data": ("class_conditional", "streaming"),
        "feature_net": ("conv_in_kernel", "squared_norm"),
        "training": ("init_from", "learning_rate_schedule"),
    }.items():
        for key in keys:
            del saved[group][key]
    (trained / "config.yaml").write_text(yaml.safe_dump(saved))
    shutil.rmtree(trained / "checkpoint-6")
    before = metrics(trained)
    train(parse_config(Config, arguments))
    assert metrics(trained) == before


def test_a_refusal_names_values_and_a_way_on(arguments, trained, tmp_path):
    pipeline = trained / "pipeline"
    text = refusal([*arguments, "--training.seed", "5", "--objective.kernel", "gaussian"])
    assert "objective.kernel gaussian (was linear)" in text and "training.seed 5 (was 0)" in text
    assert text.endswith(
        f"choose another --output_dir, and --training.init_from {pipeline} to start from these weights"
    )
    # as it says
    way_on = ["--output_dir", str(tmp_path / "other"), "--training.init_from", str(pipeline)]
    train(parse_config(Config, [*arguments, "--training.seed", "5", *way_on]))


@pytest.mark.parametrize("why", ["no pipeline", "another network"])
def test_weights_are_offered_only_where_they_fit(arguments, trained, why):
    extra = ["--training.seed", "5"]
    if why == "no pipeline":
        shutil.rmtree(trained / "pipeline")
    else:
        extra += ["--feature_net.num_features", "4"]
    assert "init_from" not in refusal([*arguments, *extra])


def test_weights_are_not_offered_where_a_pipeline_holds_a_part_of_them(plain_arguments):
    arguments = [*plain_arguments, "--objective.name", "mmd-gan"]
    pipeline = train(parse_config(Config, arguments)) / "pipeline"
    assert refusal([*arguments, "--training.seed", "5"]).endswith("; choose another --output_dir")
    text = refusal([*arguments, "--training.init_from", str(pipeline)])
    assert text == "training.init_from: a pipeline of mmd-gan holds a part of what is trained; leave it out"


@pytest.mark.parametrize("where", ["file", "file/run", "file/run/again"])
def test_an_output_that_is_a_file_or_below_one(arguments, tmp_path, where):
    (tmp_path / "file").write_text("kept")
    with pytest.raises((ConfigError, OSError)) as caught:
        train(parse_config(Config, [*arguments, "--output_dir", str(tmp_path / where)]))
    text = str(caught.value)
    assert f"{tmp_path / 'file'} is a file" in text and "another" in text and "\n" not in text
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("below", ["", "run"])
def test_an_output_that_is_a_broken_link_or_below_one(arguments, tmp_path, below):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError) as caught:
        train(parse_config(Config, [*arguments, "--output_dir", str(tmp_path / "link" / below)]))
    assert str(caught.value).endswith(f"{tmp_path / 'link'} is a broken link; pass another output_dir")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder that takes no file")
def test_an_output_where_nobody_may_write(arguments):
    with pytest.raises(OSError) as caught:
        train(parse_config(Config, [*arguments, "--output_dir", "/proc/run"]))
    assert re.fullmatch("cannot write /proc/run: .*; pass another output_dir", str(caught.value))


def test_an_output_that_could_not_be_loaded(arguments, tmp_path):
    """safetensors reads no path that is not UTF-8."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    with pytest.raises(ConfigError, match=r"caf\\xe9 is not UTF-8; choose another --output_dir"):
        train(parse_config(Config, [*arguments, "--output_dir", str(folder)]))
    assert not folder.exists()


def test_an_output_without_permission(arguments, tmp_path, monkeypatch):
    config = parse_config(Config, arguments)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OSError) as caught:
        train(config)
    assert str(caught.value) == f"cannot write {tmp_path / 'run'}: no permission at {tmp_path}; pass another output_dir"
