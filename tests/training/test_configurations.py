"""--config takes a file, lines of YAML, or the name of a configuration that comes with the package."""

import os

import pytest
import yaml
from processes import ROOT

from latent_dmmd.methods.base import METHODS
from latent_dmmd.training import configurations
from latent_dmmd.training.config import Config, parse_config
from latent_dmmd.training.configurations import bundled_configurations
from latent_dmmd.utils.errors import ConfigError

NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))


def refusal(*args):
    with pytest.raises(ConfigError) as caught:
        parse_config(Config, list(args))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_yaml_files_and_nothing_else():
    found = bundled_configurations()
    assert list(found) == NAMES and "elpv256_latent" in NAMES
    assert all(isinstance(yaml.safe_load(path.read_text()), dict) for path in found.values())


def test_in_a_wheel_they_lie_in_the_package(tmp_path, monkeypatch):
    package = tmp_path / "latent_dmmd"
    (package / "configs" / "accelerate").mkdir(parents=True)
    (package / "configs" / "accelerate" / "cpu.yaml").write_text("")
    (package / "configs" / "small.yaml").write_text("output_dir: runs/small")
    monkeypatch.setattr(configurations, "files", lambda name: package)
    assert bundled_configurations() == {"small": package / "configs" / "small.yaml"}
    assert parse_config(Config, ["--config", "small"]).output_dir == "runs/small"
    (package / "configs").rename(tmp_path / "configs")
    assert bundled_configurations() == {"small": tmp_path / "configs" / "small.yaml"}


@pytest.mark.parametrize("args", [["--config", "elpv256_one_step"], ["--config=elpv256_one_step.yaml"]], ids=" ".join)
def test_by_name_from_anywhere(args, tmp_path, monkeypatch):
    """Its method as well, which is looked for before the keys are known; and keys on top of it."""
    monkeypatch.chdir(tmp_path)
    config = parse_config(Config, [*args, "--training.num_steps", "7"])
    assert config.objective.name == "one-step" and config.training.num_steps == 7
    file = ["--config", str(ROOT / "configs" / "elpv256_one_step.yaml"), "--training.num_steps", "7"]
    assert config == parse_config(Config, file)


def test_a_local_file_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elpv256_classes").write_text("output_dir: mine")
    assert parse_config(Config, ["--config", "elpv256_classes"]).output_dir == "mine"


def test_a_pipe_is_read_once(tmp_path):
    read, write = os.pipe()
    os.write(write, b"output_dir: piped\n")
    os.close(write)
    assert parse_config(Config, ["--config", f"/dev/fd/{read}"]).output_dir == "piped"


@pytest.mark.parametrize("method", ["dmmd", "flow-matching", "mmd-gan"])
def test_a_pipe_chooses_the_method(method):
    read, write = os.pipe()
    os.write(write, f"objective:\n  name: {method}\n".encode())
    os.close(write)
    config = parse_config(Config, ["--config", f"/dev/fd/{read}"])
    assert isinstance(config.objective, METHODS[method].config_class) and config.objective.name == method


@pytest.mark.parametrize("name", ["elpv256_clases", "nowhere/elpv256_classes.yaml", "accelerate/cpu", ""])
def test_an_unknown_name_lists_the_known(name):
    text = refusal("--config", name)
    assert text.startswith(f"--config {name}: no such file") and text.endswith(", ".join(NAMES))


def test_what_is_no_yaml_file_is_named(tmp_path):
    assert refusal("--config", str(tmp_path)).startswith(f"--config {tmp_path} is a folder")
    for content in (b"\xff\xfe\x00\x80", os.urandom(1000) + b"\xff", b"training: [1,", b"a: b: c", b"\x00"):
        (tmp_path / "file").write_bytes(content)
        assert refusal("--config", str(tmp_path / "file")).startswith(f"--config {tmp_path / 'file'} cannot be read")


@pytest.mark.parametrize("args", [["--config"], ["--config", "--output_dir", "x"]], ids=" ".join)
def test_nothing_behind_it(args):
    assert refusal(*args) == "argument --config: expected one argument"
