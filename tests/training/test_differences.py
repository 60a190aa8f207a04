"""A run folder is resumed by the configuration it was started with, whatever keys have come since."""

from pathlib import Path

import pytest
import yaml

from latent_dmmd.training.config import Config, as_dict, parse_config, save_config
from latent_dmmd.training.differences import BEFORE, differing_keys, flatten
from latent_dmmd.utils.errors import ConfigError

OF_0_1 = Path(__file__).parent / "config-0.1.0.yaml"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "config.yaml"


def test_a_call_and_what_it_trains(path):
    save_config(Config(), path)
    assert differing_keys(Config(), path) == {}
    args = "--training.num_steps 9 --objective.name dmmd --output_dir elsewhere --resume_from_checkpoint latest".split()
    assert differing_keys(parse_config(Config, args), path) == {
        "objective.name": "dmmd (was witness-matching)",
        "training.num_steps": "9 (was 1850)",
    }


@pytest.mark.parametrize(
    "args, expected",
    [
        ("--objective.kernel gaussian", {"objective.kernel": "gaussian (was linear)"}),
        ("--data.class_conditional true", {"data.class_conditional": "true (was false)"}),
        ("--training.init_from elpv-dmmd", {"training.init_from": "elpv-dmmd (was null)"}),
        ("--feature_net.block_out_channels [8,16]", {"feature_net.block_out_channels": "[8, 16] (was [96, 128])"}),
    ],
)
def test_values_are_shown_as_the_command_line_takes_them(path, args, expected):
    save_config(Config(), path)
    assert differing_keys(parse_config(Config, args.split()), path) == expected


def test_a_key_that_came_later_has_the_value_from_before(path):
    """Every key of every group, one at a time: what was not written was not asked for."""
    whole = parse_config(Config, [f"--{name}={value}" for name, value in BEFORE.items()])
    for name in flatten(as_dict(whole)):
        if name in ("objective.name", "output_dir", "resume_from_checkpoint"):
            continue
        saved = as_dict(whole)
        group, _, key = name.rpartition(".")
        del (saved[group] if group else saved)[key]
        path.write_text(yaml.safe_dump(saved))
        assert differing_keys(whole, path) == {}, name


def test_the_way_of_before_segments_is_the_whole():
    kept = ["--config", "elpv256_unet", "--training.mixed_precision", "bf16", "--sampling.sampler", "exact"]
    assert differing_keys(parse_config(Config, kept), OF_0_1) == {"objective.segment": "level (was whole)"}
    assert differing_keys(parse_config(Config, kept[2:]), OF_0_1) == {
        "feature_net.architecture": "encoder (was unet)",
        "objective.segment": "level (was whole)",
        "objective.target": "restoring (was displacement)",
        "objective.weighting_scheme": "logit_normal (was none)",
        "training.num_steps": "1850 (was 1000)",
        "training.learning_rate": "0.002 (was 0.001)",
        "training.ema_decay": "0.99 (was 0.999)",
        "sampling.solver_order": "2 (was 1)",
    }
    assert differing_keys(parse_config(Config, [*kept, "--objective.segment", "whole"]), OF_0_1) == {}


def test_the_papers_objective_of_0_1(path):
    """It held the keys of all methods, and lacked many of today's."""
    saved = yaml.safe_load(OF_0_1.read_text())
    saved["objective"]["name"] = "dmmd"
    path.write_text(yaml.safe_dump(saved))
    kept = ["--training.mixed_precision", "bf16", "--sampling.sampler", "exact", "--objective.name", "dmmd"]
    kept += ["--feature_net.architecture", "unet", "--training.num_steps", "1000", "--training.ema_decay", "0.999"]
    kept += ["--training.learning_rate", "1e-3", "--sampling.solver_order", "1"]
    assert differing_keys(parse_config(Config, kept), path) == {}
    assert differing_keys(parse_config(Config, [*kept, "--objective.gradient_weight", "2.0"]), path) == {
        "objective.gradient_weight": "2.0 (was 1.0)"
    }


def test_a_key_of_another_version_is_named(path):
    path.write_text(yaml.safe_dump(as_dict(Config()) | {"training": {"num_epochs": 3}}))
    assert differing_keys(Config(), path) == {"training.num_epochs": "absent (was 3)"}


@pytest.mark.parametrize("text", ["", "- a\n", "training: [1,\n", "3\n"])
def test_a_damaged_file_is_named(path, text):
    path.write_text(text)
    with pytest.raises(ConfigError, match="config.yaml.*choose another --output_dir") as caught:
        differing_keys(Config(), path)
    assert "\n" not in str(caught.value)
