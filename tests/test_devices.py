"""GPU tests, ready for who has one: `pytest -m gpu`.

Each has a twin on the CPU, which runs by default: the same body on another device. What a twin proves is that the test
is right but for the device.
"""

import json
import math
import os
import shutil
import time
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from conftest import metrics, tiny_features, tiny_pipeline, tiny_velocity
from diffusers import DDPMScheduler
from PIL import Image
from torch.nn.parallel import DistributedDataParallel

from latent_dmmd import LatentDMMDPipeline
from latent_dmmd.apps.film import film, interpolation
from latent_dmmd.baselines import DDPM, MMDGAN, FlowMatching, GeneratorAndCritic
from latent_dmmd.data.autoencoder import load_autoencoder
from latent_dmmd.data.particles import LatentCache
from latent_dmmd.data.sources import load_images
from latent_dmmd.discrepancy import get_discrepancy
from latent_dmmd.distillation import OneStep
from latent_dmmd.editing import editor_of
from latent_dmmd.experiments.diagnosis import Diagnosis
from latent_dmmd.forward import LinearInterpolant
from latent_dmmd.latent_pipeline import FlowOptions
from latent_dmmd.metrics.autoencoders import psnr_of
from latent_dmmd.objective import DMMD, WitnessMatching
from latent_dmmd.pipeline import load_pipeline
from latent_dmmd.training.autoencoder import AutoencoderTrainingConfig, train_autoencoder
from latent_dmmd.training.autoencoder.config import CropDataConfig
from latent_dmmd.training.config import Config, parse_config
from latent_dmmd.training.loop import train
from latent_dmmd.training.trainer import Trainer, step_generators
from latent_dmmd.utils.process import default_device, own_accelerator

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")

# float32 on two devices sums in other orders; of the loss, and of each gradient beside the largest of them all
FLOAT32 = dict(rtol=1e-3, atol=1e-4)
# bf16 rounds to 0.4 %, and a loss is made of what has passed through many layers: of a term, and of a gradient's length
BF16_TERM, BF16_GRADIENT = 0.05, 0.15
# of images in [0, 1], after a flow of a few steps in float32
IMAGES = dict(rtol=0, atol=1e-3)
# a resumed run draws and computes the same; kernels of a GPU may sum in another order
RESUMED = {"cpu": dict(rtol=0, atol=0), "cuda": dict(rtol=0, atol=1e-6)}


def exact_kernels():
    """Context in which float32 is float32, not TF32, and sums are taken in the same order every time."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


@pytest.fixture(
    scope="module",
    params=[pytest.param("cpu", marks=pytest.mark.twin), pytest.param("cuda", marks=pytest.mark.gpu)],
)
def device(request):
    """Where a test runs, `train` and `load_pipeline` included."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU: torch.cuda.is_available() is false")
    with pytest.MonkeyPatch.context() as patch, exact_kernels():
        patch.setenv("ACCELERATE_USE_CPU", str(request.param == "cpu").lower())
        assert default_device().type == request.param
        yield torch.device(request.param)


# losses and gradients


def perturbed(net):
    """With weight in the layers that begin at zero."""
    for parameter in net.parameters():
        if parameter.ndim > 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return net


def features():
    return perturbed(tiny_features())


def velocity():
    return perturbed(tiny_velocity())


def matching(mean_embeddings, **options):
    def build(device):
        net, averaged = features(), features().to(device)
        how = dict(mean_embeddings=mean_embeddings, num_points=6, discrepancy=get_discrepancy(**options))
        return WitnessMatching(net, LinearInterpolant(), 4, averaged, **how)

    return build


def dmmd(**options):
    return lambda device: DMMD(features(), LinearInterpolant(), 4, discrepancy=get_discrepancy(**options))


OBJECTIVES = {
    "running means": matching("running"),
    "running features": matching("running", kernel="gaussian"),
    "averaged": matching("ema"),
    "batch": matching("batch"),
    "dmmd": dmmd(),
    "gaussian": dmmd(kernel="gaussian"),
    "rational-quadratic": dmmd(kernel="rational-quadratic", bandwidth=2.0),
    "kale": dmmd(name="kale"),
    "flow matching": lambda device: FlowMatching(velocity()),
    "ddpm": lambda device: DDPM(velocity()),
    "ddpm, velocity": lambda device: DDPM(velocity(), DDPMScheduler(prediction_type="v_prediction")),
    "mmd-gan": lambda device: MMDGAN(GeneratorAndCritic(velocity(), features())),
    "one step": lambda device: OneStep(velocity()),
}


def seeded():
    return torch.Generator().manual_seed(0)


def drawn(objective, pairs=4):
    """The batch of one step, on the CPU, always the same: two noise levels, or as many pairs."""
    latents = torch.randn(64, 1, 2, 4, 4, generator=seeded())
    particles = LatentCache(((latents, None),), torch.zeros(2), torch.ones(2))
    return objective.draw(particles, 2, pairs, step_generators(0, 0, 0))


def on(device, batch):
    return type(batch)(*(None if a is None else a.to(device) for a in batch))


def loss_and_gradient(name, device, bf16=False):
    """Terms, and the gradient of their total by name of the parameter, on the CPU."""
    torch.manual_seed(0)
    objective = OBJECTIVES[name](device).to(device)
    for _ in range(2):  # the second step finds running means where the first has left them
        objective.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            terms = objective(on(device, drawn(objective)))
        terms.total.backward()
    assert terms.total.device.type == device.type
    gradient = {name: p.grad.cpu() for name, p in objective.named_parameters() if p.grad is not None}
    return {name: value.cpu() for name, value in terms.named.items()} | {"total": terms.total.detach().cpu()}, gradient


def assert_gradients_close(found, expected):
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert found.keys() == expected.keys() and largest > 1e-3
    for name, gradient in found.items():
        close = dict(rtol=FLOAT32["rtol"], atol=FLOAT32["atol"] * largest)
        torch.testing.assert_close(gradient, expected[name].to(gradient.dtype), **close, msg=name)


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_loss_and_gradient_are_those_of_the_cpu(device, name):
    terms, gradient = loss_and_gradient(name, device)
    expected_terms, expected_gradient = loss_and_gradient(name, CPU)
    assert terms.keys() == expected_terms.keys()
    for term, value in terms.items():
        torch.testing.assert_close(value, expected_terms[term], **FLOAT32, msg=term)
    assert_gradients_close(gradient, expected_gradient)


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_bf16_is_close_to_float32(device, name):
    (exact, gradient), (rough, rough_gradient) = (loss_and_gradient(name, device, bf16) for bf16 in (False, True))
    assert exact["total"] != rough["total"]  # bf16 was used
    size = sum(value.abs() for term, value in exact.items() if term != "total")  # terms may cancel in the total
    for term, value in rough.items():
        allowed = BF16_TERM * (size if term == "total" else exact[term].abs()) + 0.01
        assert (value - exact[term]).abs() < allowed, term
    assert all(g.dtype == torch.float32 for g in rough_gradient.values())
    flat, rough_flat = (torch.cat([g.flatten() for g in each.values()]) for each in (gradient, rough_gradient))
    assert (rough_flat - flat).norm() < BF16_GRADIENT * flat.norm()


def penalty_gradient(device, dtype):
    """By the parameters of φ, of E ‖∇f‖² for f the sum of all features: attention is differentiated twice."""
    torch.manual_seed(0)
    net, x = features().to(device, dtype), torch.randn(3, 2, 4, 4).to(device, dtype).requires_grad_()
    (slope,) = torch.autograd.grad(net(x, torch.tensor([0.1, 0.5, 1.0]).to(x)).sum(), x, create_graph=True)
    slope.square().sum().backward()
    return {name: parameter.grad.cpu() for name, parameter in net.named_parameters()}


def test_second_derivatives_through_attention_against_float64(device):
    found, expected = penalty_gradient(device, torch.float32), penalty_gradient(CPU, torch.float64)
    assert_gradients_close(found, expected)
    attention = [gradient for name, gradient in expected.items() if "to_qkv.weight" in name]
    assert attention and all(gradient.abs().max() > 1e-3 for gradient in attention)


# several processes


def loss_of_a_share(rank, world_size, kind, rendezvous, folder):
    """Loss and gradient of the whole batch, of which each process has a share: what is saved is the first one's."""
    torch.set_num_threads(1)
    if kind == "cuda":
        torch.cuda.set_device(rank)
    backend = {"cpu": "gloo", "cuda": "nccl"}[kind]
    dist.init_process_group(backend, init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    device, share = torch.device(kind, rank) if kind == "cuda" else CPU, slice(3 * rank, 3 * rank + 3)
    torch.manual_seed(0)
    objective = OBJECTIVES["dmmd"](device).to(device)
    whole = drawn(objective, pairs=6)
    batch = whole._replace(x_0=whole.x_0[:, share], eps=whole.eps[:, share], u=whole.u[:, share])
    wrapped = DistributedDataParallel(objective, [rank] if kind == "cuda" else None)
    with exact_kernels():
        total = wrapped(on(device, batch)).total
        total.backward()
    loss = total.detach()
    dist.all_reduce(loss)
    if rank == 0:
        gradient = {name: parameter.grad.cpu() for name, parameter in objective.named_parameters()}
        torch.save({"loss": loss.cpu() / world_size, "gradient": gradient}, f"{folder}/share.pt")
    dist.destroy_process_group()


def test_two_devices_are_one_with_the_whole_batch(device, tmp_path):
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs; there is {torch.cuda.device_count()}")
    mp.spawn(loss_of_a_share, (2, device.type, str(tmp_path / "rendezvous"), str(tmp_path)), nprocs=2)
    found = torch.load(tmp_path / "share.pt", weights_only=True)
    torch.manual_seed(0)
    objective = OBJECTIVES["dmmd"](device).to(device)
    total = objective(on(device, drawn(objective, pairs=6))).total
    total.backward()
    torch.testing.assert_close(found["loss"], total.detach().cpu(), **FLOAT32)
    assert_gradients_close(found["gradient"], {name: p.grad.cpu() for name, p in objective.named_parameters()})


# from a configuration to images


@pytest.fixture(scope="module")
def run_of(device, workshop, tmp_path_factory):
    """From a method to the command line and the folder of a tiny run on the device, each trained once."""
    folder = tmp_path_factory.mktemp(device.type)

    @cache
    def run(method):
        options = {
            "config": workshop / ("tiny.yaml" if method == "witness-matching" else "plain.yaml"),
            "data.cache_dir": folder / "cache",
            "output_dir": folder / method,
            "objective.name": method,
            "training.num_steps": 4,
            "training.checkpointing_steps": 2,
            "training.mixed_precision": "no",
        }
        arguments = [f"--{name}={value}" for name, value in options.items()]
        return arguments, train(parse_config(Config, arguments))

    return run


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generated_by(pipe, chunk_size=64, step_size=None, **options):
    pipe.flow_options = FlowOptions(chunk_size, step_size=step_size)
    return pipe(4, num_inference_steps=8, generator=seeded(), output_type="pt", **options).images


METHODS = ("witness-matching", "flow-matching")
WAYS = {
    "exact": ("witness-matching", dict(sampler="exact")),
    "approximate": ("witness-matching", dict(sampler="approximate")),
    "hybrid": ("witness-matching", dict(sampler="hybrid")),
    "in chunks": ("witness-matching", dict(sampler="exact", chunk_size=3)),
    "second order in chunks": ("witness-matching", dict(sampler="approximate", solver_order=2, chunk_size=3)),
    "first order": ("witness-matching", dict(solver_order=1)),
    "constant step": ("witness-matching", dict(sampler="exact", step_size=0.1)),
    "flow matching": ("flow-matching", dict(solver_order=2)),
    "Euler": ("flow-matching", dict(solver_order=1)),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_the_run(device, run_of, method, tmp_path):
    arguments, whole = run_of(method)
    resumed = Path(shutil.copytree(whole, tmp_path / "resumed"))
    for name in ("checkpoint-4", "pipeline"):
        shutil.rmtree(resumed / name)
    train(parse_config(Config, [*arguments, "--output_dir", str(resumed)]))
    a, b = (load_pipeline(folder / "pipeline").net for folder in (whole, resumed))
    assert next(a.parameters()).device.type == device.type
    for (name, expected), found in zip(a.state_dict().items(), b.state_dict().values()):
        torch.testing.assert_close(found, expected, **RESUMED[device.type], msg=name)
    for before, after in zip(metrics(whole), metrics(resumed)):
        assert after == pytest.approx(before, rel=RESUMED[device.type]["atol"])


@pytest.mark.parametrize("way", list(WAYS))
def test_a_pipeline_saved_there_makes_the_same_images_on_the_cpu(device, run_of, way):
    method, options = WAYS[way]
    folder = run_of(method)[1] / "pipeline"
    there = quiet(load_pipeline(folder))
    here = quiet(type(there).from_pretrained(folder))
    assert there.device.type == device.type and here.device == CPU
    images, expected = generated_by(there, **options), generated_by(here, **options)
    assert images.device.type == device.type and images.std() > 0.01
    torch.testing.assert_close(images.cpu(), expected, **IMAGES)


def test_a_pipeline_saved_on_the_cpu_makes_the_same_images_there(device, tiny_vae, tmp_path):
    here = tiny_pipeline(tiny_vae)
    here.save_pretrained(tmp_path / "here")
    there = quiet(load_pipeline(tmp_path / "here"))
    assert there.device.type == device.type
    images, expected = generated_by(there), generated_by(here)
    torch.testing.assert_close(images.cpu(), expected, **IMAGES)
    there.save_pretrained(tmp_path / "there")
    back = LatentDMMDPipeline.from_pretrained(tmp_path / "there")
    for name in ("feature_net", "mean_embeddings", "vae"):
        for a, b in zip(getattr(here, name).state_dict().values(), getattr(back, name).state_dict().values()):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("task", ["inpaint", "upscale"])
@pytest.mark.parametrize("method", METHODS)
def test_edits_are_those_of_the_cpu(device, run_of, method, task):
    folder, image = run_of(method)[1] / "pipeline", torch.rand(2, 3, 32, 32, generator=seeded())
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 5:20, 9:27] = 1
    given = dict(image=image, mask_image=mask) if task == "inpaint" else dict(image=image[..., ::4, ::4])
    there = load_pipeline(folder)
    pipes = [quiet(editor_of(pipe, task)) for pipe in (there, type(there).from_pretrained(folder))]
    images, expected = (
        pipe(**given, num_inference_steps=2, num_variations=2, generator=seeded(), output_type="pt").images
        for pipe in pipes
    )
    assert images.shape == (4, 3, 32, 32) and images.device.type == device.type
    torch.testing.assert_close(images.cpu(), expected, **IMAGES)
    if task == "inpaint":
        kept = (1 - mask) * image.repeat_interleave(2, 0)
        torch.testing.assert_close(images.cpu() * (1 - mask), kept, atol=1e-6, rtol=0)


def test_films_and_diagnoses_are_those_of_the_cpu(device, run_of, workshop):
    folder = run_of("witness-matching")[1] / "pipeline"
    pipes = [quiet(load_pipeline(folder)), quiet(LatentDMMDPipeline.from_pretrained(folder))]
    there, here = (film(pipe, 2, 4, seeded()) for pipe in pipes)
    assert (there.int() - here.int()).abs().max() <= 1
    images_uint8 = load_images(str(workshop / "images"), 32).examples(8, 0)
    there, here = (pipe.decode(pipe.move(pipe.encode(images_uint8), 2, 0.5), "pt").cpu() for pipe in pipes)
    torch.testing.assert_close(there, here, **IMAGES)
    ends = images_uint8[:2]
    there, here = (interpolation(pipe, ends, 3, 0.5, 2, generator=seeded()) for pipe in pipes)
    assert (there.int() - here.int()).abs().max() <= 1
    there, here = (Diagnosis(pipe, pipe.encode(images_uint8)).run("exact", 4, 1) for pipe in pipes)
    for found, expected in zip(there, here, strict=True):
        assert vars(found) == pytest.approx(vars(expected), rel=0.01, abs=0.01)


# scores


def on_both(monkeypatch, score):
    """What is scored on the device of the test, and on the CPU."""
    there = score()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return there, score()


def test_scores_are_those_of_the_cpu(device, monkeypatch):
    pytest.importorskip("efficientnet_lite_pytorch")
    from latent_dmmd.metrics.edits import EditComparison
    from latent_dmmd.metrics.evaluation import evaluate

    real = torch.randint(256, (8, 3, 32, 32), generator=seeded()).to(torch.uint8)
    generated = real.flip(-1) // 2 + 50
    there, here = on_both(monkeypatch, lambda: evaluate(generated, real, reconstructions=real // 2 * 2))
    there, here = ({**vars(evaluation), "seconds": 0.0} for evaluation in (there, here))
    numbers = {name: value for name, value in here.items() if isinstance(value, float)}
    assert len(numbers) >= 10 and numbers == pytest.approx({name: there[name] for name in numbers}, rel=0.01, abs=0.01)

    def edits():
        comparison = EditComparison(real[:2], "inpaint")
        return vars(comparison.score(comparison.plain(None)["smooth fill"]))

    monkeypatch.setenv("ACCELERATE_USE_CPU", str(device == CPU).lower())
    there, here = on_both(monkeypatch, edits)
    assert here["consistency"] is here["diversity"] is None  # given pixels stay, and there is one variation
    for score in ("psnr", "perceptual"):
        assert there[score] == pytest.approx(here[score], rel=0.01) and here[score] > 0


def test_a_comparison_end_to_end(device, workshop, tmp_path, monkeypatch, toy):
    from latent_dmmd.experiments import stages
    from latent_dmmd.experiments.compare import CompareConfig, Comparison

    monkeypatch.setattr(stages, "in_a_process", lambda function, *args: function(*args))
    heldout = tmp_path / "heldout"
    heldout.mkdir()
    for path in sorted((workshop / "images").iterdir())[:4]:
        Image.open(path).transpose(Image.Transpose.ROTATE_90).save(heldout / path.name)
    common = yaml.safe_load((workshop / "plain.yaml").read_text())
    common["data"]["cache_dir"] = str(tmp_path / "cache")
    common["feature_net"]["patch_size"] = 2
    settings = CompareConfig(
        output_dir=str(tmp_path / "comparison"),
        extractor=toy,
        common=common,
        entries={
            "latent-dmmd": {"objective": {"num_noise_levels": 4}},
            "latent-flow-matching": {"objective": {"name": "flow-matching"}},
        },
        nfe=[2],
        seeds=[0],
        num_images=4,
        num_steps=2,
        reference=str(heldout),
    )
    result = stages.run_comparison(Comparison(settings))
    assert (result["machine"]["gpu"] is None) == (device.type == "cpu")
    labels = {row["label"] for row in result["rows"]}
    assert labels == {"latent-dmmd exact", "latent-dmmd approximate", "latent-flow-matching", "gaussian"}
    assert all(math.isfinite(value) for row in result["rows"] for value in row["frechet_distance"])


# autoencoders


def autoencoder_run(workshop, folder, **options):
    data = CropDataConfig(str(workshop / "images"), resolution=32, cache_dir=str(folder / "cache"))
    how = dict(num_steps=4, checkpointing_steps=2, batch_size=4, crop_size=32, learning_rate=1e-2, width=8)
    how |= dict(perceptual_weight=0.0, pooled_weight=0.0, adversarial_weight=0.1, adversarial_start=1)
    return AutoencoderTrainingConfig(str(folder / "run"), data, mixed_precision="no", **how | options)


def test_an_autoencoder_trained_there_is_that_of_the_cpu(device, workshop, tmp_path, monkeypatch):
    saved = train_autoencoder(autoencoder_run(workshop, tmp_path))
    run = saved.parent
    lines = metrics(run)
    resumed = tmp_path / "resumed"
    shutil.copytree(run, resumed / "run")
    for name in ("checkpoint-4", "autoencoder"):
        shutil.rmtree(resumed / "run" / name)
    train_autoencoder(autoencoder_run(workshop, resumed))
    for before, after in zip(lines, metrics(resumed / "run"), strict=True):
        assert after == pytest.approx(before, rel=RESUMED[device.type]["atol"])
    there, here = (load_autoencoder(str(saved), where) for where in (device, CPU))
    images_uint8 = torch.stack([load_images(str(workshop / "images"), 32)[i] for i in range(5)])
    assert there.device.type == device.type
    assert psnr_of(there, images_uint8) == pytest.approx(psnr_of(here, images_uint8), abs=0.01)
    (tmp_path / "cpu").mkdir()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    train_autoencoder(autoencoder_run(workshop, tmp_path / "cpu"))
    assert metrics(tmp_path / "cpu" / "run")[0] == pytest.approx(lines[0], rel=0.01)


# for the record


def test_a_step_of_the_main_job(device, capsys, record_property):
    """Time and memory of a training step as configs/celebahq256_latent.yaml has it; the twin's network is small."""
    small = ["--feature_net.block_out_channels", "[8,8,8]", "--feature_net.layers_per_block", "1"]
    small += ["--training.levels_per_step", "1", "--training.pairs_per_level", "2", "--training.mixed_precision", "no"]
    path = str(ROOT / "configs" / "celebahq256_latent.yaml")
    config = parse_config(Config, ["--config", path, *(small if device.type == "cpu" else [])])
    with own_accelerator(config.training.mixed_precision) as accelerator:
        assert accelerator.device.type == device.type
        trainer = Trainer(config, (4, 32, 32), accelerator)
        latents = LatentCache(((torch.randn(64, 1, 4, 32, 32), None),), torch.zeros(4), torch.ones(4))
        trainer.step(0, latents)  # warms up
        wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        wait()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        losses = [trainer.step(step, latents)[0].total.item() for step in (1, 2)]
        wait()
        figures = {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
            "precision": accelerator.mixed_precision,
            "pairs": config.training.levels_per_step * config.training.pairs_per_level,
            "parameters": sum(p.numel() for p in trainer.network.parameters()),
            "milliseconds_per_step": round(500 * (time.perf_counter() - start), 1),
        }
        if device.type == "cuda":
            figures["peak_mb"] = round(torch.cuda.max_memory_allocated() / 2**20)
    assert all(math.isfinite(loss) for loss in losses)
    for name, value in figures.items():
        record_property(name, value)
    with capsys.disabled() if device.type == "cuda" else nullcontext():
        print(f"\na training step of {os.path.basename(path)}: {json.dumps(figures)}")
