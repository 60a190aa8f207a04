"""Every pipeline class has the habits of diffusers: precision, offloading, generators, copies, components."""

import copy
import pickle

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from conftest import CALLERS, frozen, random_embeddings, tiny_features, tiny_velocity
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines import pipeline_utils
from torch import nn

from latent_dmmd import LatentDMMDInpaintPipeline, LatentDMMDPipeline, LatentDMMDUpscalePipeline, MeanEmbeddings
from latent_dmmd.editing import Editing, Inpainting, LatentSchedulerInpaintPipeline, LatentSchedulerUpscalePipeline
from latent_dmmd.latent_pipeline import FlowOptions
from latent_dmmd.pipeline import LatentSchedulerPipeline, load_pipeline
from latent_dmmd.utils.hashing import module_hash

BASES = [LatentDMMDPipeline, LatentSchedulerPipeline]
CLASSES = [*BASES, LatentDMMDInpaintPipeline, LatentDMMDUpscalePipeline]
EDITORS = [LatentSchedulerInpaintPipeline, LatentSchedulerUpscalePipeline]
# of images in [0, 1], against float32; bfloat16 has 8 bits, float16 has 11
HALF = {torch.bfloat16: dict(rtol=0, atol=0.05), torch.float16: dict(rtol=0, atol=0.01)}
EXACT = dict(rtol=0, atol=1e-5)


def build(cls, vae=None):
    """A pipeline of random weights, with statistics and options of its own, and steps of second order."""
    torch.manual_seed(0)
    statistics = dict(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 0.5, 1.5])
    options = dict(vae=vae or frozen("AutoencoderKL"), **statistics)
    if issubclass(cls, LatentDMMDPipeline):
        net = tiny_features(16, 4, num_classes=2)
        options |= dict(
            class_names=["sound", "broken"],
            sampling=dict(sampler="exact", num_noise_levels=4, steps_per_level=1, solver_order=2),
        )
        pipe = cls(net, random_embeddings(num_classes=2), **options)
    else:
        net = tiny_velocity(16, 4)
        pipe = cls(net, FlowMatchEulerDiscreteScheduler(), num_inference_steps=3, solver_order=2, **options)
    for parameter in net.parameters():  # some begin at zero
        parameter.data += 0.05 * torch.randn_like(parameter)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, num_images=2, seed=0, **options):
    """Images of a pipeline, or edits of as many given ones."""
    pipe.set_progress_bar_config(disable=True)
    options = dict(generator=torch.Generator().manual_seed(seed), output_type="pt") | options
    if not isinstance(pipe, Editing):
        return pipe(num_images, **options).images
    image = torch.rand(num_images, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    options = dict(num_inference_steps=4) | options
    if isinstance(pipe, Inpainting):
        return pipe(image, (image[:1, :1] > 0.5).float(), **options).images
    return pipe(image[..., ::4, ::4], **options).images


@pytest.fixture(params=CLASSES, ids=lambda cls: cls.__name__)
def cls(request):
    return request.param


@pytest.fixture
def pipe(cls):
    return build(cls)


@pytest.fixture
def folder(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


# precision

DTYPE_NAMES = ["torch_dtype", *(["dtype"] if hasattr(pipeline_utils, "_resolve_dtype") else [])]
CASTS = {
    **{n: lambda cls, folder, dtype, n=n: cls.from_pretrained(folder, **{n: dtype}) for n in DTYPE_NAMES},
    "to(dtype)": lambda cls, folder, dtype: cls.from_pretrained(folder).to(dtype),
    "to(device, dtype)": lambda cls, folder, dtype: cls.from_pretrained(folder).to("cpu", dtype),
}


@pytest.mark.parametrize(
    "how, dtype", [*((how, torch.bfloat16) for how in CASTS), ("to(dtype)", torch.float16)], ids=str
)
def test_half_precision_gives_the_images_of_float32(pipe, folder, dtype, how):
    half = CASTS[how](type(pipe), folder, dtype)
    assert half.net.dtype == half.vae.dtype == half.dtype == dtype
    seen = []
    watch = dict(callback_on_step_end=lambda pipe, i, t, tensors: seen.append(tensors["latents"].dtype))
    images, expected = generate(half, **watch), generate(pipe)
    assert images.dtype == torch.float32 and images.isfinite().all() and set(seen) == {torch.float32}
    torch.testing.assert_close(images, expected, **HALF[dtype])
    assert not torch.equal(images, expected)  # it was used


@pytest.mark.parametrize("how", list(CASTS))
def test_what_is_stored_is_not_rounded(how, tmp_path):
    pipe = build(LatentDMMDPipeline)
    pipe.save_pretrained(tmp_path)
    half = CASTS[how](LatentDMMDPipeline, tmp_path, torch.bfloat16)
    for name, stored in pipe.mean_embeddings.named_buffers():
        assert torch.equal(getattr(half.mean_embeddings, name), stored)
    assert torch.equal(half.net.time_embedding.frequencies, pipe.net.time_embedding.frequencies)
    assert half.to(torch.float64).mean_embeddings.clean.dtype == torch.float64


@pytest.mark.parametrize("sampler", ["exact", "approximate", "hybrid"])
def test_every_sampler_runs_in_half_precision(sampler):
    pipe = build(LatentDMMDPipeline)
    how = dict(num_images=3, sampler=sampler, class_labels=["sound", "broken", "sound"])
    expected = generate(pipe, **how)
    torch.testing.assert_close(generate(pipe.to(torch.bfloat16), **how), expected, **HALF[torch.bfloat16])
    how = dict(sampler="approximate", class_labels="broken", guidance_scale=2.0)
    guided = generate(pipe, **how)
    torch.testing.assert_close(guided, generate(pipe.to(torch.float32), **how), **HALF[torch.bfloat16])


@torch.no_grad()
def test_an_autoencoder_that_overflows_in_float16_gives_no_black_images(pipe):
    pipe.vae.decoder.conv_in.weight.mul_(1e5)
    assert generate(pipe).isfinite().all()
    with pytest.raises(FloatingPointError, match="overflows in float16: use bfloat16"):
        generate(pipe.to(torch.float16))
    pipe.vae.float()
    assert generate(pipe).isfinite().all()


@pytest.mark.parametrize("dtype", list(HALF), ids=str)
def test_a_bundled_pipeline_in_half_precision(dtype):
    images, expected = (
        generate(LatentDMMDPipeline.from_pretrained("elpv-dmmd", torch_dtype=kind), 1, num_inference_steps=5)
        for kind in (dtype, torch.float32)
    )
    torch.testing.assert_close(images, expected, **HALF[dtype])


# modes of autograd


INFERENCE = [(torch.inference_mode, made) for made in ("outside", "built inside", "loaded inside", "cast inside")]


@pytest.mark.parametrize("mode, made", [*INFERENCE, (torch.no_grad, "outside"), (torch.enable_grad, "outside")])
def test_images_are_the_same_in_every_mode_of_autograd(pipe, folder, mode, made):
    expected = generate(pipe)
    with mode():
        if made == "built inside":
            pipe = build(type(pipe))
        if made == "loaded inside":
            pipe = type(pipe).from_pretrained(folder)
        if made == "cast inside":
            pipe = pipe.to(torch.float64).to(torch.float32)
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        images = generate(pipe)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    torch.testing.assert_close(images, expected, **EXACT)
    torch.testing.assert_close(generate(pipe), expected, **EXACT)
    torch.testing.assert_close(generate(pipe.to(torch.bfloat16)), expected, **HALF[torch.bfloat16])


@pytest.mark.parametrize("caller", CALLERS)
def test_images_are_of_float32_whatever_the_caller_has_set(pipe, caller):
    """Under autocast the networks run in half precision, as those of any pipeline, and nothing else does."""
    expected, seen = generate(pipe), []
    watch = dict(callback_on_step_end=lambda pipe, i, t, tensors: seen.append(tensors["latents"].dtype))
    with CALLERS[caller]():
        images = generate(pipe, **watch)
    assert images.dtype == torch.float32 and set(seen) == {torch.float32}
    torch.testing.assert_close(images, expected, **(HALF[torch.bfloat16] if caller == "autocast" else EXACT))
    assert (caller == "autocast") == (not torch.allclose(images, expected, **EXACT))


# steps


@pytest.mark.parametrize("cls", BASES, ids=lambda cls: cls.__name__)
def test_the_order_of_steps_is_the_pipelines_unless_it_is_given(pipe, folder):
    first, second = (generate(pipe, solver_order=order) for order in (1, 2))
    assert not torch.allclose(first, second, atol=1e-4)
    made = type(pipe)(**pipe.components)
    for other in (pipe, made, type(pipe).from_pipe(pipe), type(pipe).from_pretrained(folder), copy.deepcopy(pipe)):
        assert torch.equal(generate(other), second) and torch.equal(generate(other, solver_order=1), first)
    for order in (0, 3, "2"):
        with pytest.raises(ValueError, match=f"solver_order must be 1 or 2; got {order!r}"):
            generate(pipe, solver_order=order)


@pytest.mark.parametrize("options", [dict(sampler="approximate"), dict(sampler="approximate", guidance_scale=2.0)])
def test_several_classes_at_once_are_those_of_one_by_one(options):
    pipe, z = build(LatentDMMDPipeline), torch.randn(4, 4, 16, 16)
    pipe.flow_options, labels = FlowOptions(chunk_size=2), ["sound", "broken", 0, "sound"]
    together = generate(pipe, 4, latents=z, class_labels=labels, **options)
    alone = [generate(pipe, 1, latents=z[i : i + 1], class_labels=c, **options) for i, c in enumerate(labels)]
    torch.testing.assert_close(together, torch.cat(alone), **EXACT)


@pytest.mark.parametrize("cls", EDITORS + CLASSES[2:], ids=lambda cls: cls.__name__)
def test_edits_are_of_first_order(pipe, monkeypatch):
    def refuse(self, *_):
        assert self.order == 1
        return _[0]

    monkeypatch.setattr("latent_dmmd.schedule.Multistep.__call__", refuse)
    assert generate(pipe).isfinite().all()


def test_components_of_inference_mode_are_taken():
    pipe = build(LatentDMMDPipeline)
    expected = generate(pipe)
    with torch.inference_mode():
        pipe.feature_net, pipe.mean_embeddings = copy.deepcopy((pipe.feature_net, pipe.mean_embeddings))
        assert all(a.is_inference() for a in (*pipe.net.parameters(), *pipe.mean_embeddings.buffers()))
        torch.testing.assert_close(generate(pipe), expected, **EXACT)
    torch.testing.assert_close(generate(pipe), expected, **EXACT)


def test_tensors_of_inference_mode_are_taken_and_given_back(pipe):
    """Images, latents, and what a callback returns."""
    expected = generate(pipe, seed=3)
    with torch.inference_mode():
        replace = dict(callback_on_step_end=lambda pipe, i, t, tensors: {"latents": tensors["latents"].clone()})
        images = generate(pipe, seed=3, **replace)
        given = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    generate(pipe, callback_on_step_end=lambda pipe, i, t, tensors: {"latents": given})
    torch.testing.assert_close(images, expected, **EXACT)
    if not isinstance(pipe, Editing):
        torch.testing.assert_close(generate(pipe, latents=given), expected, **EXACT)


def test_weights_are_left_as_they_are(pipe):
    expected = generate(pipe)
    for requires_grad in (False, True):
        pipe.net.requires_grad_(requires_grad)
        assert torch.equal(generate(pipe), expected)
        assert all(p.requires_grad == requires_grad and p.grad is None for p in pipe.net.parameters())


# devices


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.twin), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU: torch.cuda.is_available() is false")
    return request.param


def skip_before_torch_2_7(why):
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7):
        pytest.skip(why)


def enable_group_offload(pipe, device):
    if device == "cpu":
        skip_before_torch_2_7("diffusers asks PyTorch for an accelerator, and 2.6 raises where there is none")
    pipe.enable_group_offload(torch.device(device), offload_type="leaf_level")


def enable_sequential_offload(pipe, device):
    if device != "cpu":
        return pipe.enable_sequential_cpu_offload(device=device)
    for component in pipe.components.values():  # as diffusers does, but for "cpu:0", which accelerate cannot offload to
        if isinstance(component, nn.Module):
            cpu_offload(component, torch.device(device), offload_buffers=len(component._parameters) > 0)


OFFLOADS = {
    "model": lambda pipe, device: pipe.enable_model_cpu_offload(device=device),
    "sequential": enable_sequential_offload,
    "group": enable_group_offload,
}


@pytest.mark.parametrize("way", list(OFFLOADS))
def test_offloading_gives_the_same_images(pipe, way, device):
    expected = generate(pipe)
    OFFLOADS[way](pipe, device)
    for _ in range(2):  # the hooks are put back after a call
        torch.testing.assert_close(generate(pipe).cpu(), expected, rtol=0, atol=1e-3)
    assert pipe._execution_device.type == device


def test_mean_embeddings_go_where_particles_are(monkeypatch):
    """No hook moves them: their forward is never called."""
    pipe, moves = build(LatentDMMDPipeline), []
    apply, at_level = MeanEmbeddings._apply, MeanEmbeddings.at_level

    def note(original, what):
        return lambda self, *a: (moves.append(what(*a)), original(self, *a))[1]

    enable_group_offload(pipe, "cpu")
    monkeypatch.setattr(MeanEmbeddings, "_apply", note(apply, lambda fn, *_: fn(torch.zeros(())).device.type))
    monkeypatch.setattr(MeanEmbeddings, "at_level", note(at_level, lambda *_: "used"))
    generate(pipe)
    assert moves == ["cpu"] + ["used"] * 4


# arguments of a call


def generators(n):
    return [torch.Generator().manual_seed(i) for i in range(n)]


@pytest.mark.parametrize(
    "generator, message",
    [
        (generators(1), "a list of 1, but there are 2 images"),
        (generators(3), "a list of 3, but there are 2 images"),
        ([], "a list of 0, but there are 2 images"),
        (7, r"generator must be .* got 7: pass torch.Generator\(\).manual_seed\(seed\)"),
        ([7, 8], "generator must be .* got 7"),
        ([*generators(1), None], "generator must be .* got None"),
        (tuple(generators(2)), "generator must be .* got \\("),
        (np.random.default_rng(0), "generator must be"),
    ],
)
def test_wrong_generators_are_refused_before_any_work(pipe, generator, message):
    pipe.net.forward = pipe.vae.encode = None  # would fail
    with pytest.raises(ValueError, match=message) as caught:
        generate(pipe, generator=generator)
    assert "\n" not in str(caught.value)


def test_a_list_of_generators_gives_every_image_its_own(pipe):
    if isinstance(pipe, LatentDMMDPipeline):  # without interaction
        pipe.register_to_config(sampling={"num_noise_levels": 4, "solver_order": 2})
    together = generate(pipe, 2, generator=generators(2))
    if not isinstance(pipe, Editing):
        alone = torch.cat([generate(pipe, 1, generator=g) for g in generators(2)])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    assert torch.equal(together, generate(pipe, 2, generator=generators(2)))
    assert not torch.equal(together, generate(pipe, 2, generator=generators(3)[1:]))


def test_any_number_of_images(pipe):
    pipe.flow_options = FlowOptions(chunk_size=4)
    for num_images in (1, 5, 17):
        assert generate(pipe, num_images).shape == (num_images, 3, 32, 32)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"latents": np.zeros((2, 4, 16, 16), np.float32)}, "latents must be a tensor .* got ndarray"),
        ({"latents": [[0.0]]}, "latents must be a tensor .* got list"),
        ({"latents": torch.zeros(2, 4, 16, 16, dtype=torch.int64)}, "floating-point numbers; got torch.int64"),
        ({"latents": torch.zeros(3, 4, 16, 16)}, r"latents must have shape \(2, 4, 16, 16\); got \(3, 4, 16, 16\)"),
        ({"latents": torch.zeros(4, 16, 16)}, "latents must have shape"),
        ({"num_images": 2.0}, "batch_size must be a whole number"),
        ({"num_images": "2"}, "batch_size must be a whole number"),
        ({"num_images": -1}, "batch_size must be a whole number"),
    ],
)
@pytest.mark.parametrize("cls", BASES, ids=lambda cls: cls.__name__)
def test_wrong_latents_and_batch_sizes_are_refused(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        generate(pipe, **options)


@pytest.mark.parametrize("cls", BASES, ids=lambda cls: cls.__name__)
def test_latents_of_any_precision_are_particles(pipe):
    z = torch.randn(2, 4, 16, 16).to(torch.bfloat16)
    expected = generate(pipe, latents=z.float())
    for dtype in (torch.bfloat16, torch.float64):
        assert torch.equal(generate(pipe, latents=z.to(dtype)), expected)


@pytest.mark.parametrize("output_type", ["PIL", "jpeg", None, "tensor"])
def test_unknown_output_types_are_refused_before_any_work(pipe, output_type):
    pipe.net.forward = pipe.vae.encode = pipe.vae.decode = None
    with pytest.raises(ValueError, match="output_type must be one of pil, np, pt"):
        generate(pipe, output_type=output_type)


def test_every_output_type(pipe):
    pt, array, pil = (generate(pipe, output_type=kind) for kind in ("pt", "np", "pil"))
    np.testing.assert_allclose(array, pt.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    np.testing.assert_allclose(np.asarray(pil[1]), 255 * array[1], atol=0.51)
    if isinstance(pipe, Editing):
        with pytest.raises(ValueError, match="output_type must be one of pil, np, pt; got 'latent'"):
            generate(pipe, output_type="latent")
    else:
        assert torch.equal(pipe.decode(generate(pipe, output_type="latent"), "pt"), pt)


@pytest.mark.parametrize("cls", [LatentDMMDPipeline, LatentDMMDInpaintPipeline], ids=lambda cls: cls.__name__)
def test_memory_savers_of_diffusers_change_no_image(cls, each_vae):
    pipe = build(cls, each_vae)
    expected = generate(pipe)
    pipe.enable_attention_slicing()
    pipe.vae.enable_slicing()
    torch.testing.assert_close(generate(pipe), expected, **EXACT)
    if not isinstance(each_vae, AutoencoderTiny):  # whose tiles are for decoders that enlarge eight times
        pipe.vae.enable_tiling()  # these images fit one tile
        torch.testing.assert_close(generate(pipe), expected, **EXACT)


# saving


@pytest.mark.parametrize("variant, dtype", [("fp16", torch.float16), ("bf16", torch.bfloat16)], ids=str)
def test_variants_are_saved_and_loaded(pipe, tmp_path, variant, dtype):
    pipe.to(dtype)
    expected = generate(pipe)
    pipe.save_pretrained(tmp_path, safe_serialization=True, variant=variant)
    saved = list(tmp_path.rglob("*.safetensors"))
    assert saved and all(f".{variant}." in path.name for path in saved)
    again = type(pipe).from_pretrained(tmp_path, variant=variant, torch_dtype=dtype)
    torch.testing.assert_close(generate(again), expected, **EXACT)
    with pytest.raises(ValueError, match="no such modeling files"):
        type(pipe).from_pretrained(tmp_path, variant="ema")


# components


@pytest.mark.parametrize(
    "cls, other",
    [
        (LatentDMMDPipeline, LatentDMMDInpaintPipeline),
        (LatentDMMDPipeline, LatentDMMDUpscalePipeline),
        (LatentDMMDUpscalePipeline, LatentDMMDPipeline),
        (LatentDMMDInpaintPipeline, LatentDMMDUpscalePipeline),
        *((LatentSchedulerPipeline, editor) for editor in EDITORS),
    ],
    ids=lambda cls: cls.__name__,
)
def test_another_pipeline_of_the_same_components_has_the_same_options(pipe, folder, other):
    """Statistics, names of classes and defaults of sampling, also where the network alone was loaded."""
    loaded = type(pipe).from_pretrained(folder)
    name = "feature_net" if isinstance(pipe, LatentDMMDPipeline) else "network"
    network = type(pipe.net).from_pretrained(folder, subfolder=name)
    expected = generate(other.from_pipe(pipe))
    for components in (pipe.components, loaded.components, {**pipe.components, name: network}):
        made = other(**components)
        for option in ("latents_mean", "latents_std", "sampling", "class_names", "num_inference_steps", "solver_order"):
            assert made.config.get(option) == pipe.config.get(option)
        torch.testing.assert_close(generate(made), expected, **EXACT)
    given = other(**pipe.components, latents_mean=[0.0] * 4)
    assert given.config.latents_mean == [0.0] * 4 and given.config.latents_std == pipe.config.latents_std


def test_statistics_that_nobody_knows_are_those_of_standard_latents():
    pipe = LatentSchedulerPipeline(tiny_velocity(16, 4), FlowMatchEulerDiscreteScheduler(), frozen("AutoencoderKL"))
    assert pipe.config.latents_mean == [0.0] * 4 and pipe.config.latents_std == [1.0] * 4
    seen = []
    pipe.set_progress_bar_config(disable=True)
    pipe(callback_on_step_end=lambda pipe, i, *_: seen.append(i), output_type="latent")
    assert len(seen) == 50


# copies


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda pipe: pickle.loads(pickle.dumps(pipe))}


@pytest.mark.parametrize("how, dtype", [("deepcopy", torch.float32), ("pickle", torch.bfloat16)], ids=str)
def test_copies_give_the_same_images(pipe, how, dtype):
    pipe.flow_options = FlowOptions(chunk_size=1)
    pipe.to(dtype)
    expected = generate(pipe)
    made = COPIES[how](pipe)
    assert made.flow_options == pipe.flow_options and made.config == pipe.config
    torch.testing.assert_close(generate(made), expected, **EXACT)
    with torch.no_grad():
        for parameter in made.net.parameters():
            parameter.zero_()
    assert torch.equal(generate(pipe), expected)  # nothing is shared


def test_a_printed_pipeline_is_readable():
    net, vae = tiny_features(16, 256), frozen("AutoencoderKL")
    pipe = build(LatentDMMDPipeline, vae)
    assert '"latents_std"' in str(pipe) and "1.5" in str(pipe)  # short lists are whole
    wide = LatentDMMDPipeline(net, random_embeddings(), latents_mean=[0.25] * 256, latents_std=[1.0] * 256)
    assert len(str(wide).splitlines()) < 50 and "… 256 numbers" in str(wide)
    assert wide.config.latents_mean == [0.25] * 256


# compiled decoders


def compile_vae(pipe, **options):
    pipe.vae = torch.compile(pipe.vae, **options)


def compile_decoder(pipe, **options):
    pipe.vae.decoder = torch.compile(pipe.vae.decoder, **options)


def compile_decode(pipe, **options):
    skip_before_torch_2_7("PyTorch 2.6 cannot trace the method, which diffusers wraps")
    pipe.vae.decode = torch.compile(pipe.vae.decode, **options)


def compile_net(pipe, **options):
    name = "feature_net" if isinstance(pipe, LatentDMMDPipeline) else "network"
    setattr(pipe, name, torch.compile(pipe.net, **options))


def test_a_compiled_autoencoder_of_any_class_gives_the_same_images(each_vae):
    pipe = build(LatentDMMDInpaintPipeline, each_vae)
    expected, digest = generate(pipe), module_hash(pipe.vae)
    compile_vae(pipe, backend="eager")
    torch.testing.assert_close(generate(pipe), expected, **EXACT)
    assert module_hash(pipe.vae) == digest


@pytest.mark.parametrize(
    "cls, part",
    [
        *((LatentDMMDPipeline, part) for part in (compile_decoder, compile_decode, compile_net)),
        (LatentSchedulerPipeline, compile_vae),
        (LatentDMMDInpaintPipeline, compile_vae),
        (LatentDMMDUpscalePipeline, compile_vae),
    ],
    ids=lambda value: value.__name__,
)
def test_compiled_parts_give_the_same_images(pipe, part, tmp_path):
    cls, expected = type(pipe), generate(pipe)
    part(pipe, backend="eager")
    torch.testing.assert_close(generate(pipe), expected, **EXACT)
    torch.testing.assert_close(generate(cls(**pipe.components)), expected, **EXACT)
    torch.testing.assert_close(generate(cls.from_pipe(pipe)), expected, **EXACT)
    if part is compile_decoder:  # its weights have other names, as in any autoencoder of diffusers
        return
    pipe.save_pretrained(tmp_path)
    torch.testing.assert_close(generate(cls.from_pretrained(tmp_path)), expected, **EXACT)


@pytest.mark.long
@pytest.mark.parametrize("part", [compile_decoder, compile_net], ids=lambda part: part.__name__)
def test_inductor_gives_the_same_images(part):
    pipe = load_pipeline("elpv-dmmd")
    how = dict(num_images=1, num_inference_steps=2)
    expected = generate(pipe, **how)
    part(pipe, backend="inductor")
    torch.testing.assert_close(generate(pipe, **how), expected, rtol=0, atol=1e-3)
