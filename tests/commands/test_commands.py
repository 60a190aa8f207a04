"""The command `latent-dmmd`: help without PyTorch, near misses, and one module for each command and script."""

import importlib
import subprocess
import sys
from argparse import ArgumentError

import pytest
from processes import ROOT

import latent_dmmd
from latent_dmmd.__main__ import main
from latent_dmmd.commands import COMMANDS, command_parser


def say(monkeypatch, capsys, *words):
    """What `latent-dmmd WORDS` prints and exits with."""
    monkeypatch.setattr(sys, "argv", ["latent-dmmd", *words])
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_command_with_an_example(monkeypatch, capsys, words):
    code, out, err = say(monkeypatch, capsys, *words)
    assert (code, err) == (0, "")
    for name, command in COMMANDS.items():
        assert f"\n  {name} " in out and command.summary in out
        assert f"latent-dmmd {command.example}\n" in out and command.example.startswith(f"{name} ")


def test_help_and_version_load_no_pytorch():
    check = "import sys; from latent_dmmd.__main__ import main; main(); assert 'torch' not in sys.modules"
    for option, expected in (("--help", "usage: latent-dmmd"), ("--version", f"latent-dmmd {latent_dmmd.__version__}")):
        command = [sys.executable, "-c", check, option]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(expected)


@pytest.mark.parametrize(
    "word, expected",
    [
        ("trian", "did you mean train?"),
        ("train_autoencoder", "did you mean train-autoencoder?"),
        ("samples", "did you mean sample?"),
        ("Evaluate", "did you mean evaluate?"),
        ("xyzzy", "latent-dmmd --help lists the commands"),
        ("--pipeline", "latent-dmmd --help lists the commands"),
        ("", "latent-dmmd --help lists the commands"),
    ],
)
def test_an_unknown_command_is_one_line_with_the_nearest(monkeypatch, capsys, word, expected):
    code, out, err = say(monkeypatch, capsys, word)
    assert (code, out) == (2, "")
    assert err == f"latent-dmmd: no command {word!r}; {expected}\n"


def test_an_unknown_option_is_one_line_with_the_nearest(monkeypatch, capsys):
    code, out, err = say(monkeypatch, capsys, "sample", "--pipelin", "elpv-dmmd", "--output_dir", "x")
    assert (code, out) == (2, "")
    assert err == "latent-dmmd sample: unrecognized arguments: --pipelin elpv-dmmd; did you mean --pipeline?\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_module_and_a_script(name):
    module = importlib.import_module(f"latent_dmmd.commands.{name.replace('-', '_')}")
    script = ROOT / "scripts" / f"{'train_latent' if name == 'train' else name.replace('-', '_')}.py"
    assert f"from {module.__name__} import main\n" in script.read_text()


def test_every_module_is_a_command():
    found = {path.stem.replace("_", "-") for path in (ROOT / "latent_dmmd" / "commands").glob("*.py")}
    assert found - {"--init--"} == set(COMMANDS)


@pytest.mark.parametrize("value", ["--output_dir=~/x", "--output_dir ~/x"])
def test_a_tilde_is_the_home_folder(monkeypatch, value):
    monkeypatch.setenv("HOME", "/somewhere")
    parser = command_parser("toy2d")
    parser.add_argument("--output_dir", type=str)
    parser.add_argument("--name", type=str, default="a~b")
    assert vars(parser.parse_args(value.split())) == {"output_dir": "/somewhere/x", "name": "a~b"}
    with pytest.raises(ArgumentError, match="did you mean --name"):
        parser.parse_args(["--nam", "x"])


def test_public_classes_are_imported_when_asked_for():
    assert {name: getattr(latent_dmmd, name).__name__ for name in latent_dmmd.__all__} == {
        name: name for name in latent_dmmd.__all__
    }
    assert set(latent_dmmd.__all__) <= set(dir(latent_dmmd))
    with pytest.raises(AttributeError, match="no attribute 'FeaturNet'"):
        latent_dmmd.FeaturNet  # noqa: B018
