"""What a call takes from its process it gives back: precision, threads, Accelerate's state, the working directory."""

import os

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from conftest import CALLERS, hide_accelerators, metrics
from processes import ROOT, run

from latent_dmmd.data.particles import cache_latents
from latent_dmmd.data.sources import load_images
from latent_dmmd.training.config import Config, parse_config
from latent_dmmd.training.loop import train
from latent_dmmd.utils.errors import ConfigError
from latent_dmmd.utils.process import (
    AUTO_PRECISION,
    default_device,
    own_accelerator,
    precision_and_reason,
    resolved_precision,
)

STATES = (AcceleratorState, PartialState, GradientState)


def config(arguments, precision, folder):
    extra = ["--training.mixed_precision", precision, "--training.num_steps", "2", "--output_dir", str(folder)]
    return parse_config(Config, [*arguments, *extra])


def test_two_precisions_one_after_the_other(arguments, tmp_path):
    """As in a notebook; the first is then what it is in a process of its own."""
    folders = [train(config(arguments, p, tmp_path / str(i))) for i, p in enumerate(("no", "bf16", "no"))]
    first, rough, again = (metrics(folder) for folder in folders)
    assert first == again != rough
    assert not any(state._shared_state for state in STATES)


def test_a_caller_who_has_an_accelerator_keeps_it(arguments, tmp_path):
    accelerator = Accelerator(mixed_precision="no")
    train(config(arguments, "no", tmp_path / "same"))
    assert accelerator.mixed_precision == "no" and AcceleratorState().device == accelerator.device
    with pytest.raises(ConfigError, match="Accelerator of mixed precision no, and this call needs bf16") as error:
        train(config(arguments, "bf16", tmp_path / "other"))
    assert "\n" not in str(error.value) and not (tmp_path / "other").exists()
    assert accelerator.mixed_precision == "no"


def test_a_caller_who_has_a_partial_state_keeps_it(arguments, tmp_path):
    state = PartialState()
    train(config(arguments, "bf16", tmp_path / "run"))
    assert state.device == torch.device("cpu") and not AcceleratorState._shared_state


def test_a_call_that_fails_leaves_nothing_behind(arguments, tmp_path):
    with pytest.raises(ValueError, match="no autoencoder"):
        train(parse_config(Config, [*arguments, "--autoencoder.name_or_path", str(tmp_path)]))
    assert not any(state._shared_state for state in STATES)


@pytest.mark.parametrize("caller", CALLERS)
def test_a_run_does_not_depend_on_what_the_caller_has_set(caller, arguments, tmp_path):
    """In bf16, where another autocast around the steps would keep the casts of old weights."""
    expected = metrics(train(config(arguments, "bf16", tmp_path / "alone")))

    def modes():
        return torch.is_autocast_enabled("cpu"), torch.is_grad_enabled(), torch.get_default_dtype()

    with CALLERS[caller]():
        before = modes()
        folder = train(config(arguments, "bf16", tmp_path / "inside"))
        assert modes() == before
    assert metrics(folder) == expected


def test_caching_leaves_no_state_behind(tiny_vae, tiny_images, tmp_path):
    cache_latents(tiny_vae, load_images(str(tiny_images), 32), tmp_path / "cache", horizontal_flip=True, batch_size=8)
    assert not any(state._shared_state for state in STATES)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_is_the_callers(threads, arguments, tmp_path, monkeypatch):
    """Also where the launcher's one thread is undone for the length of the call."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    torch.set_num_threads(threads)
    with own_accelerator("no"):
        assert torch.get_num_threads() == len(os.sched_getaffinity(0))
    assert torch.get_num_threads() == threads


def test_the_environment_and_the_working_directory_stay(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    train(config(arguments, "auto", "relative/run"))
    assert dict(os.environ) == before and os.getcwd() == str(tmp_path)
    assert (tmp_path / "relative" / "run" / "pipeline").exists()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_auto_can_be_forced_either_way(precision, monkeypatch):
    monkeypatch.setenv(AUTO_PRECISION, precision)
    assert resolved_precision("auto") == precision
    assert resolved_precision("no") == "no" and resolved_precision("bf16") == "bf16"


def test_auto_refuses_what_is_no_precision(monkeypatch):
    monkeypatch.setenv(AUTO_PRECISION, "fp16")
    with pytest.raises(ConfigError, match="must be no or bf16; got 'fp16'"):
        resolved_precision("auto")


def test_gradients_that_a_launcher_would_accumulate_are_refused(arguments, tmp_path, monkeypatch):
    """Every step would be divided by their number in silence."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ConfigError, match="leave out the launcher's gradient_accumulation_steps"):
        train(config(arguments, "no", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_auto_follows_the_processor(monkeypatch):
    monkeypatch.delenv(AUTO_PRECISION, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for supported, expected in ((True, "bf16"), (False, "no")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda supported=supported: supported)
        assert resolved_precision("auto") == expected


@pytest.fixture
def hardware(monkeypatch):
    """A CPU that computes in bf16, or does not."""
    monkeypatch.delenv(AUTO_PRECISION, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return lambda supported: monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)


@pytest.mark.parametrize(
    "ours, launchers, supported, expected",
    [
        ("auto", None, True, ("bf16", "the hardware computes in it")),
        ("auto", None, False, ("no", "the hardware does not compute in bf16")),
        ("auto", "no", True, ("bf16", "the hardware computes in it; training.mixed_precision no turns it off")),
        ("auto", "bf16", False, ("bf16", "by the launcher")),
        ("no", "bf16", True, ("no", "by the configuration, not the launcher's bf16")),
        ("bf16", "fp16", True, ("bf16", "by the configuration, not the launcher's fp16")),
        ("bf16", "bf16", False, ("bf16", "by the configuration")),
        ("bf16", "no", False, ("bf16", "by the configuration")),
    ],
)
def test_the_launcher_and_the_configuration(ours, launchers, supported, expected, hardware, monkeypatch):
    hardware(supported)
    if launchers:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launchers)
    assert precision_and_reason(ours) == expected


@pytest.mark.parametrize("launchers", ["fp16", "fp8"])
def test_fp16_of_the_launcher_is_refused(launchers, hardware, monkeypatch, arguments, tmp_path):
    """By the line that refuses it in the configuration, unless something else was asked for."""
    hardware(True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launchers)
    expected = f"the launcher's mixed_precision={launchers} overflows in the second derivative.*use bf16 or no"
    with pytest.raises(ConfigError, match=expected):
        train(config(arguments, "auto", tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv(AUTO_PRECISION, "no")
    assert precision_and_reason("auto") == ("no", f"by {AUTO_PRECISION}")


def test_the_precision_is_said_at_the_start(arguments, tmp_path, capsys):
    train(config(arguments, "no", tmp_path / "run"))
    assert capsys.readouterr().out.startswith("mixed precision: no (by the configuration)\n")


def test_a_forced_precision_reaches_a_script(arguments, tmp_path):
    losses = {}
    for precision in ("no", "bf16"):
        how = ["--output_dir", tmp_path / precision, "--training.num_steps", "1"]
        result = run(ROOT / "scripts" / "train_latent.py", *arguments, *how, **{AUTO_PRECISION: precision})
        assert result.returncode == 0, result.stderr
        losses[precision] = metrics(tmp_path / precision)[0]["matching"]
    assert losses["no"] != losses["bf16"]
    assert losses["bf16"] == pytest.approx(losses["no"], rel=0.02)  # bf16 has 8 bits


@pytest.mark.parametrize(
    "markers, hidden", [("", True), ("not long and not gpu", True), ("long", True), ("gpu", False)]
)
def test_only_gpu_tests_see_a_gpu(markers, hidden):
    environment = {"CUDA_VISIBLE_DEVICES": "0"}
    hide_accelerators(markers, environment)
    assert environment["CUDA_VISIBLE_DEVICES"] == ("" if hidden else "0")
    assert ("ACCELERATE_USE_CPU" in environment) == hidden


def test_this_session_computes_on_the_cpu(request):
    if "gpu" not in request.config.option.markexpr.replace("not gpu", ""):
        assert not torch.cuda.is_available() and default_device() == PartialState().device == torch.device("cpu")


def test_figures_leave_the_backend_alone(trained, tmp_path, monkeypatch):
    import matplotlib

    from latent_dmmd.training.metrics_file import plot_losses

    monkeypatch.setitem(matplotlib.rcParams, "backend", "svg")
    plot_losses(trained / "metrics.jsonl", tmp_path / "losses.png")
    assert matplotlib.rcParams["backend"] == "svg" and (tmp_path / "losses.png").stat().st_size > 1000
