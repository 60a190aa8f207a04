import re
import sys
from dataclasses import fields, is_dataclass

import pytest
import yaml

from latent_dmmd.methods import METHODS
from latent_dmmd.training.config import Config, as_dict, parse_config, save_config
from latent_dmmd.utils.errors import ConfigError


@pytest.fixture
def write(tmp_path):
    """From YAML to the arguments that read it."""

    def write(text, name="a.yaml"):
        (tmp_path / name).write_text(text)
        return ["--config", str(tmp_path / name)]

    return write


def message(args):
    with pytest.raises(ConfigError) as caught:
        parse_config(Config, args)
    text = str(caught.value)
    assert text and "\n" not in text and "functools" not in text
    return text


def test_defaults():
    assert parse_config(Config, []) == Config()


def test_command_line_and_file_override(write):
    args = write("training:\n  num_steps: 7\n  seed: 3\nobjective: {name: dmmd}\n")
    config = parse_config(Config, [*args, "--training.num_steps", "9", "--feature_net.block_out_channels", "[8, 16]"])
    assert (config.training.num_steps, config.training.seed, config.objective.name) == (9, 3, "dmmd")
    assert config.feature_net.block_out_channels == [8, 16]
    assert config.training.ema_decay == Config().training.ema_decay


def test_later_files_win(write):
    first = write("training:\n  num_steps: 7\n  learning_rate: 3e-4\n", "first.yaml")
    second = write("training:\n  num_steps: 9\n", "second.yaml")
    config = parse_config(Config, first + second)
    assert (config.training.num_steps, config.training.learning_rate) == (9, 3e-4)
    assert parse_config(Config, second + first).training.num_steps == 7


def test_exponent_without_a_point_is_a_number(write):
    for args in (["--training.learning_rate", "3e-4"], write("training:\n  learning_rate: 3e-4\n")):
        rate = parse_config(Config, args).training.learning_rate
        assert isinstance(rate, float) and rate == 3e-4


def test_null(write):
    args = write("data:\n  cache_dir: null\n")
    assert parse_config(Config, ["--data.cache_dir", "x", *args]).data.cache_dir is None
    assert parse_config(Config, ["--resume_from_checkpoint", "null"]).resume_from_checkpoint is None


def test_elpv_trains_on_its_train_split():
    assert parse_config(Config, ["--data.name_or_path", "elpv"]).data.name_or_path == "elpv:train"


@pytest.mark.parametrize(
    "given, nearest",
    [
        ("training.num_step", "training.num_steps"),
        ("num_steps", "training.num_steps"),
        ("trainin.num_steps", "training.num_steps"),
        ("training.num-steps", "training.num_steps"),
        ("output_dirr", "output_dir"),
        ("data.resolutoin", "data.resolution"),
    ],
)
def test_unknown_key_names_the_nearest(write, given, nearest):
    expected = f"no such key: {given}; did you mean {nearest}?"
    assert message([f"--{given}", "3"]) == expected
    assert message([f"--{given}=3"]) == expected
    nested = 3
    for part in reversed(given.split(".")):
        nested = {part: nested}
    found = message(write(yaml.safe_dump(nested)))
    assert found == expected


def test_unknown_key_far_from_any():
    assert message(["--zzzzzz", "3"]) == "no such key: zzzzzz"


@pytest.mark.parametrize(
    "key, value",
    [
        ("training.num_steps", "many"),
        ("training.num_steps", "1.5"),
        ("training.num_steps", "true"),
        ("training.learning_rate", "fast"),
        ("training.log_with", "mlflow"),
        ("training.mixed_precision", "int8"),
        ("data.horizontal_flip", "maybe"),
        ("data.on_bad_image", "ignore"),
        ("objective.name", "gan"),
        ("objective.mean_embeddings", "none"),
        ("sampling.sampler", "euler"),
        ("feature_net.block_out_channels", "[wide]"),
    ],
)
def test_wrong_type(write, key, value):
    group, name = key.split(".")
    for args in ([f"--{key}", value], write(f"{group}:\n  {name}: {value}\n")):
        assert key in message(args)


@pytest.mark.parametrize(
    "key, value",
    [
        ("training.num_steps", "0"),
        ("training.levels_per_step", "0"),
        ("training.pairs_per_level", "1"),
        ("training.learning_rate", "0.0"),
        ("training.learning_rate", ".nan"),
        ("training.num_warmup_steps", "-1"),
        ("training.max_grad_norm", "0.0"),
        ("training.ema_decay", "1.0"),
        ("training.checkpointing_steps", "0"),
        ("training.checkpoints_total_limit", "0"),
        ("training.log_every", "0"),
        ("training.seed", "-1"),
        ("training.seed", "4294967296"),
        ("training.learning_rate", ".inf"),
        ("data.resolution", "0"),
        ("data.num_workers", "-1"),
        ("autoencoder.batch_size", "0"),
        ("feature_net.num_features", "0"),
        ("feature_net.patch_size", "0"),
        ("feature_net.layers_per_block", "0"),
        ("feature_net.block_out_channels", "[8, -8]"),
        ("feature_net.attention_levels", "[true]"),
        ("objective.forward_process", "cubic"),
        ("objective.num_noise_levels", "0"),
        ("objective.momentum", "1.0"),
        ("objective.momentum", ".nan"),
        ("objective.refresh_every", "0"),
        ("objective.gradient_center", "0.5"),
        ("objective.gradient_weight", "-1.0"),
        ("objective.feature_weight", "-1.0"),
        ("sampling.num_images", "0"),
        ("sampling.seed", "-1"),
        ("sampling.seed", "1180591620717411303424"),
        ("sampling.steps_per_level", "0"),
        ("sampling.num_noise_levels", "0"),
        ("sampling.num_noise_levels", "26"),
    ],
)
def test_out_of_range(write, key, value):
    group, name = key.split(".")
    method = ["--objective.name", "dmmd"] if name.startswith(("gradient_", "feature_weight")) else []
    for args in ([f"--{key}", value], write(f"{group}:\n  {name}: {value}\n")):
        text = message([*args, *method])
        assert key in text
        assert value.lstrip(".") in text or key == "feature_net.attention_levels"


def test_no_channels():
    assert "block_out_channels" in message(
        ["--feature_net.block_out_channels", "[]", "--feature_net.attention_levels", "[]"]
    )


def test_fp16_is_refused_with_a_reason():
    text = message(["--training.mixed_precision", "fp16"])
    assert "training.mixed_precision=fp16" in text and "overflows" in text and "bf16" in text


@pytest.mark.parametrize(
    "text",
    ["", "# nothing\n", "- a\n- b\n", "3\n", "training: [1,\n", "training: 3\n", "training:\n", "training: x\n"],
)
def test_file_that_holds_no_settings(write, text):
    message(write(text))


def test_missing_file(tmp_path):
    assert "nope.yaml" in message(["--config", str(tmp_path / "nope.yaml")])
    message(["--config", str(tmp_path)])


def test_stray_arguments():
    assert "stray" in message(["stray"])
    assert "training.num_steps" in message(["--training.num_steps"])


def test_saved_configuration_parses_back(tmp_path):
    args = "--training.learning_rate 3e-7 --training.mixed_precision no --data.name_or_path hub/name:train[:5]".split()
    config = parse_config(Config, [*args, "--output_dir", "rüns/ä b: c #1"])
    save_config(config, tmp_path / "config.yaml")
    again = parse_config(Config, ["--config", str(tmp_path / "config.yaml")])
    assert again == config != Config()
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == as_dict(config)
    save_config(Config(), tmp_path / "default.yaml")
    assert parse_config(Config, ["--config", str(tmp_path / "default.yaml")]) == Config()


@pytest.mark.parametrize("method", METHODS)
def test_a_method_takes_its_own_keys_and_no_others(write, method):
    """By name, from the command line and from files, with the methods whose key it is."""
    own = {f.name for f in fields(METHODS[method].config_class)}
    foreign = {f.name for m in METHODS.values() for f in fields(m.config_class)} - own
    assert foreign or method == "witness-matching"
    teacher = ["--objective.teacher", "elpv-dmmd"] if method == "one-step" else []
    given = ["--objective.name", method, *teacher]
    assert {f.name for f in fields(parse_config(Config, given).objective)} == own
    assert type(parse_config(Config, given).method) is METHODS[method]
    for name in sorted(foreign):
        for args in ([*given, f"--objective.{name}", "1"], [*given, *write(f"objective:\n  {name}: 1\n")]):
            text = message(args)
            assert f"objective.{name} is a key of" in text and f"not of {method}" in text, text


def test_the_last_name_chooses_the_method(write):
    flow = write("objective: {name: flow-matching}\n", "flow.yaml")
    paper = write("objective: {name: dmmd, gradient_weight: 2.0}\n", "paper.yaml")
    assert parse_config(Config, paper).objective.gradient_weight == 2
    assert parse_config(Config, [*flow, *paper]).objective.name == "dmmd"
    assert parse_config(Config, [*flow, "--objective.name=ddpm"]).objective.name == "ddpm"
    assert parse_config(Config, ["--objective", "{name: dmmd, feature_weight: 0.5}"]).objective.feature_weight == 0.5


def test_the_home_folder_is_expanded(write, tmp_path, monkeypatch):
    """A shell leaves it alone behind "=" and in YAML."""
    monkeypatch.setenv("HOME", str(tmp_path))
    args = [
        "--output_dir=~/runs",
        "--training.init_from=~/pipeline",
        *write("data: {cache_dir: ~/cache, resolution: 8}"),
    ]
    config = parse_config(Config, args)
    assert config.output_dir == f"{tmp_path}/runs" and config.data.cache_dir == f"{tmp_path}/cache"
    assert config.training.init_from == f"{tmp_path}/pipeline" and config.data.name_or_path == "elpv:train"


def test_unknown_methods_are_named():
    text = message(["--objective.name", "flow-machting"])
    assert "did you mean flow-matching?" in text and all(name in text for name in METHODS)


@pytest.mark.parametrize("where", ["", "runs/new", "../images/x"])
def test_a_run_does_not_lie_among_its_data(tmp_path, where):
    """Its samples would be read as images by the next one."""
    (tmp_path / "images").mkdir()
    data = ["--data.name_or_path", str(tmp_path / "images")]
    assert "would become data" in message([*data, "--output_dir", str(tmp_path / "images" / where)])
    parse_config(Config, [*data, "--output_dir", str(tmp_path / "images-runs")])
    parse_config(Config, [*data, "--output_dir", str(tmp_path)])


def test_notes_on_what_is_legal_and_unusual():
    assert Config().training.notes() == []
    few = parse_config(Config, ["--training.num_steps", "5", "--training.learning_rate", "3e-4"]).training
    assert few.notes() == [
        "training.num_warmup_steps=50 exceeds num_steps=5: the learning rate never reaches 0.0003",
        "training.log_every=10 exceeds num_steps=5: metrics.jsonl gets one line",
    ]


def test_help_begins_with_one_line_of_usage_and_groups_keys(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_latent.py"])
    with pytest.raises(SystemExit) as stop:
        parse_config(Config, ["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert text.splitlines()[:3] == [
        "usage: train_latent.py [--config FILE] [--KEY VALUE …]",
        "",
        "Train latent DMMD and write a run folder.",
    ]
    assert text.index("\nThe images:") < text.index("--data.resolution") < text.index("\nThe loop:")


def test_a_switch_needs_no_value():
    """`--dry_run` alone, as of any command; with a value as in files."""
    config = parse_config(Config, ["--dry_run", "--data.horizontal_flip", "--output_dir", "x"])
    assert config.dry_run and config.data.horizontal_flip and config.output_dir == "x"
    assert parse_config(Config, ["--dry_run", "false"]).dry_run is False
    assert parse_config(Config, ["--config", "dry_run: true"]).dry_run is True
    assert "dry_run" in message(["--dry_run", "maybe"])


def test_every_key_is_documented():
    groups = [type(group) for group in vars(Config()).values() if is_dataclass(group)]
    for config_class in [Config, *groups, *(method.config_class for method in METHODS.values())]:
        documented = [
            name
            for base in config_class.__mro__
            for name in re.findall(r"^ {8}(\w+): ", (base.__doc__ or "").partition("Args:")[2], re.M)
        ]
        assert set(documented) == {f.name for f in fields(config_class)}, config_class
