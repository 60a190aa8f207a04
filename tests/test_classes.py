"""Features, mean embeddings and flows for classes of images, from the data to the pipeline."""

from functools import partial

import datasets
import pytest
import torch
from conftest import metrics, random_embeddings, refusal, solid, tiny_features, weights
from processes import ROOT
from processes import run as run_script

from latent_dmmd import LatentDMMDPipeline
from latent_dmmd.calibration import calibrate_on_particles, measure_all
from latent_dmmd.data.particles import LatentCache
from latent_dmmd.data.sources import load_images
from latent_dmmd.flow import ApproximateFlow, ExactFlow, GuidedFlow
from latent_dmmd.forward import LinearInterpolant
from latent_dmmd.latent_pipeline import FlowOptions
from latent_dmmd.objective import DMMD, Batch, WitnessMatching
from latent_dmmd.schedule import FlowStep
from latent_dmmd.training.config import Config, parse_config
from latent_dmmd.training.loop import train
from latent_dmmd.training.trainer import step_generators
from latent_dmmd.utils.errors import ConfigError, DataError


def net(num_classes=3, seed=0):
    """Random weights, the class embedding among them."""
    torch.manual_seed(seed)
    net = tiny_features(num_classes=num_classes)
    torch.nn.init.normal_(net.class_embedding.weight)
    for block in (m for m in net.modules() if hasattr(m, "conv2")):
        torch.nn.init.normal_(block.conv2.weight, std=0.1)  # zero at the start, which would hide the class
    return net


def sorted_images(folder, counts):
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            solid("RGB", (40 * i, 90, 20 * len(name)), (32, 32)).save(folder / name / f"{i}.png")
    return folder


# data


def test_folders_are_classes(tmp_path):
    source = load_images(str(sorted_images(tmp_path, {"b": 2, "a": 3})), 32)
    names, labels = source.labels()
    assert names == ["a", "b"] and labels.tolist() == [0, 0, 0, 1, 1]
    assert source.labels(skipped=(source.names[1], source.names[4]))[1].tolist() == [0, 0, 1]


def test_a_column_holds_classes(tmp_path):
    cells = [{"path": str(p)} for p in sorted(sorted_images(tmp_path / "p", {"x": 3}).rglob("*.png"))]
    table = datasets.Dataset.from_dict({"image": cells, "label": [7, 2, 7]})
    table.cast_column("image", datasets.Image()).to_parquet(tmp_path / "t.parquet")
    names, labels = load_images(str(tmp_path / "t.parquet"), 32).labels()
    assert names == ["2", "7"] and labels.tolist() == [1, 0, 1]


def labelled_table(folder, labels, feature=None):
    cells = [{"path": str(p)} for p in sorted(sorted_images(folder / "p", {"x": len(labels)}).rglob("*.png"))]
    table = datasets.Dataset.from_dict({"image": cells, "label": labels}).cast_column("image", datasets.Image())
    if feature is not None:
        table = table.cast_column("label", feature)
    table.to_parquet(folder / "t.parquet")
    return load_images(str(folder / "t.parquet"), 32)


def test_class_numbers_are_those_of_the_column(tmp_path):
    """With twelve classes, class 2 is "2" and not "10"."""
    names, labels = labelled_table(tmp_path, list(range(11, -1, -1))).labels()
    assert names == [str(c) for c in range(12)] and labels.tolist() == list(range(11, -1, -1))


def test_names_that_a_column_declares_are_kept_in_their_order(tmp_path):
    feature = datasets.ClassLabel(names=["zebra", "ant", "mole"])
    names, labels = labelled_table(tmp_path, [2, 0, 1, 0], feature).labels()
    assert names == ["zebra", "ant", "mole"] and labels.tolist() == [2, 0, 1, 0]


def test_elpv_has_four_classes():
    pytest.importorskip("elpv_dataset")
    names, labels = load_images("elpv").labels()
    assert names == ["mono defective", "mono intact", "poly defective", "poly intact"]
    counts = labels.bincount()
    assert counts.sum() == 2624 and counts.min() > 200
    assert int(counts[1] + counts[3]) == 1508 + 295  # probabilities 0 and 1/3, as Deitsch et al. (2019) count them


def test_images_without_classes_are_named(tiny_images, tmp_path):
    assert "no classes" in refusal(load_images(str(tiny_images), 32).labels)
    assert "one class, a" in refusal(load_images(str(sorted_images(tmp_path / "one", {"a": 2})), 32).labels)


# batches


def labelled_cache():
    """Latents that say which class they are of."""
    labels = torch.tensor([0, 1, 2, 2, 1, 0, 2, 2])
    latents = labels.float().reshape(-1, 1, 1, 1, 1).expand(-1, 1, 2, 4, 4).contiguous()
    return LatentCache(((latents, None),), torch.zeros(2), torch.ones(2), labels=labels)


@pytest.mark.parametrize("build", [DMMD, partial(WitnessMatching, mean_embeddings="batch")], ids=["dmmd", "matching"])
def test_pairs_are_of_the_class_of_their_level(build):
    cache, objective = labelled_cache(), build(net(), LinearInterpolant(), 4, label_dropout=0.25)
    drawn = []
    for step in range(300):
        batch, other_rank = (objective.draw(cache, 4, 6, step_generators(0, rank, step)) for rank in (0, 1))
        drawn.append(batch.label)
        for x_0, label in zip(batch.x_0, batch.label.tolist()):
            if label < 3:
                assert (x_0 == label).all()
        assert torch.equal(batch.label, other_rank.label)
    shares = torch.cat(drawn).bincount(minlength=4) / 1200
    torch.testing.assert_close(shares, torch.full((4,), 0.25), atol=0.04, rtol=0)


def test_without_classes_batches_have_no_labels():
    cache = labelled_cache()
    plain = LatentCache(cache.shards, cache.channel_mean, cache.channel_std)
    objective = DMMD(tiny_features(), LinearInterpolant(), 25, label_dropout=0.25)
    assert objective.draw(plain, 8, 6, step_generators(0, 0, 0)).label is None


# features and objectives


def test_the_last_class_is_any():
    phi, x, t = net(), torch.randn(3, 2, 4, 4), torch.tensor([0.2, 0.5, 0.9])
    assert torch.equal(phi(x, t), phi(x, t, 3))
    several = phi(x, t, torch.tensor([0, 1, 2]))
    for i in range(3):
        torch.testing.assert_close(several[i : i + 1], phi(x[i : i + 1], t[i : i + 1], i))
    assert not torch.allclose(phi(x, t, 0), phi(x, t, 1), atol=1e-3)


def make_batch(labels):
    generator = torch.Generator().manual_seed(0)
    shape = (len(labels), 4, 2, 4, 4)
    x_0, eps = (torch.randn(shape, generator=generator) for _ in range(2))
    u = torch.rand(shape[:2], generator=generator)
    return Batch(x_0, torch.arange(len(labels)), eps, u, torch.tensor(labels))


@pytest.mark.parametrize("build", [lambda phi: DMMD(phi, LinearInterpolant(), 4), None], ids=["dmmd", "matching"])
def test_an_objective_of_classes_is_that_of_each(build):
    """A loss over levels of two classes is the mean of the losses of features bound to each class."""
    build = build or (lambda phi: WitnessMatching(phi, LinearInterpolant(), 4, mean_embeddings="batch"))
    phi, batch = net(), make_batch([2, 0])
    alone = []
    for i, label in enumerate(batch.label.tolist()):
        bound = partial(phi, label=label)
        objective = build(phi)
        objective.net = torch.nn.Identity()
        objective.net.forward, objective.net.config = bound, phi.config
        alone.append(objective(Batch(*(a[i : i + 1] for a in batch[:4]))).total)
    torch.testing.assert_close(build(phi)(batch).total, torch.stack(alone).mean())


def test_running_embeddings_keep_classes_apart():
    phi = net()
    objective = WitnessMatching(phi, LinearInterpolant(), 4, net(seed=1), num_classes=3)
    objective(make_batch([2, 0]))
    assert objective.source.num_updates.nonzero().tolist() == [[0, 1], [2, 0]]
    assert objective.source.clean.shape == (4, 4, 6)


# sampling


def class_embeddings(**options):
    """Mean embeddings of three classes and any, whose gradient scales differ."""
    torch.manual_seed(3)
    stored = random_embeddings(num_classes=3, **options)
    stored.gradient_scale.uniform_()
    return stored


def pipeline():
    pipe = LatentDMMDPipeline(net(), class_embeddings(), class_names=["a", "b", "c"])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, batch_size, **options):
    z = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(0))[:batch_size]
    return pipe(batch_size, latents=z, num_inference_steps=8, output_type="latent", **options).images


@pytest.mark.parametrize("num_points", [0, 5])
def test_the_last_row_of_the_embeddings_is_for_any_class(num_points):
    stored = class_embeddings(num_points=num_points)
    for label, row in ((0, 0), (2, 2), (None, 3)):
        assert stored.row(label) == row
        for a, b in zip(stored.points(1, label), (stored.clean, stored.noisy)):
            assert torch.equal(a, b[row, 1].reshape(-1, 6))
        level = stored.at_level(1, label)
        assert level.t == 0.5 and level.scale == stored.gradient_scale[row, 1]
        assert torch.equal(level.clean, stored.clean[row, 1].reshape(-1, 6))
    for label in (3, -1):
        with pytest.raises(ValueError, match="classes 0 to 2"):
            stored.at_level(1, label)
    plain = random_embeddings()
    assert plain.clean.shape == (1, 4, 6) and plain.row(None) == 0
    with pytest.raises(ValueError, match="has no classes"):
        plain.at_level(1, 0)


@pytest.mark.parametrize("build", [ExactFlow, ApproximateFlow])
def test_the_flow_of_a_class_is_that_of_features_bound_to_it(build):
    phi, stored, z = net().double(), class_embeddings().double(), torch.randn(5, 2, 4, 4, dtype=torch.float64)
    for label in (0, 2, None):
        bound, alone = partial(phi, label=label), random_embeddings().double()
        for name in ("clean", "noisy", "gradient_scale", "lengthening"):
            getattr(alone, name).copy_(getattr(stored, name)[stored.row(label)])
        steps = [FlowStep(2, 0.75, 0.5), FlowStep(1, 0.5, 0.0)]
        expected = build(bound, alone).run(z, steps)
        torch.testing.assert_close(build(phi, stored, label).run(z, steps), expected)


def test_calibration_of_a_class_is_that_of_features_bound_to_it():
    phi, stored, z = net().double(), class_embeddings().double(), torch.randn(8, 2, 4, 4, dtype=torch.float64)
    alone, before = random_embeddings().double(), stored.lengthening.clone()
    for name in ("clean", "noisy", "gradient_scale", "lengthening"):
        getattr(alone, name).copy_(getattr(stored, name)[1])
    calibrate_on_particles(phi, stored, [0.2] * 4, z, label=1)
    calibrate_on_particles(partial(phi, label=1), alone, [0.2] * 4, z)
    torch.testing.assert_close(stored.lengthening[1], alone.lengthening[0])
    changed = (stored.lengthening != before).any(1)
    assert changed.tolist() == [False, True, False, False]


def test_every_class_is_measured_on_its_own_pairs():
    phi, stored, z = net(), class_embeddings(), torch.randn(8, 2, 4, 4)
    generator = torch.Generator().manual_seed(0)
    pairs = {(k, c): torch.randn(2, 6, 2, 4, 4, generator=generator) for k in range(4) for c in (0, 1, 2, None)}
    measure_all(phi, stored, lambda k, label: [tuple(pairs[k, label])], z)
    for (k, label), (x_0, x_t) in pairs.items():
        row, t = stored.row(label), stored.levels[k]
        torch.testing.assert_close(stored.clean[row, k], phi(x_0, t, label).mean(0).detach())
        torch.testing.assert_close(stored.noisy[row, k], phi(x_t, t, label).mean(0).detach())


@pytest.mark.parametrize("sampler", ["exact", "approximate"])
def test_classes_flow_side_by_side(sampler):
    """Images of several classes are those of each class alone, with exact witnesses of its own particles."""
    pipe = pipeline()
    mixed = run(pipe, 4, class_labels=["a", "c", "a", 1], sampler=sampler)
    z = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    for label, which in ((0, [0, 2]), (2, [1]), (1, [3])):
        how = dict(latents=z[which], num_inference_steps=8, output_type="latent", sampler=sampler)
        alone = pipe(len(which), class_labels=label, **how).images
        torch.testing.assert_close(mixed[which], alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(mixed[:1], run(pipe, 4, sampler=sampler)[:1], atol=1e-3)


def test_guidance_extrapolates_from_any_class_to_one():
    pipe = pipeline()
    phi, stored = pipe.feature_net, pipe.mean_embeddings
    z = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    displacement = {}
    for row, label in ((1, 1), (3, None)):
        x = z.clone().requires_grad_()
        delta = stored.noisy[row, 3] - stored.clean[row, 3]
        (g,) = torch.autograd.grad((phi(x, stored.levels[3], label) @ delta).sum(), x)
        displacement[label] = stored.gradient_scale[row, 3] * g
    expected = z - (3 * displacement[1] - 2 * displacement[None])
    how = dict(latents=z, class_labels=1, num_noise_levels=1, steps_per_level=1, output_type="latent")
    moved = pipe(2, guidance_scale=3.0, **how).images
    torch.testing.assert_close(moved, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 2.5])
def test_the_guided_flow_is_the_combination_of_two(guidance_scale):
    """s_∅ ∇f_∅ + γ (s_c ∇f_c − s_∅ ∇f_∅), in chunks and in whole, by a calibrated step and by a constant one."""
    phi, stored, z = net().double(), class_embeddings().double(), torch.randn(5, 2, 4, 4, dtype=torch.float64)
    step = FlowStep(2, 0.75, 0.5)
    stored.lengthening[stored.row(1), 2] = 1.5
    ours, theirs = (
        stored.gradient_scale[stored.row(label), 2] * ApproximateFlow(phi, stored, label).gradient(z, 2)
        for label in (1, None)
    )
    displacement = theirs + guidance_scale * (ours - theirs)
    for chunk_size in (None, 2):
        flow = GuidedFlow(phi, stored, 1, guidance_scale, chunk_size=chunk_size)
        torch.testing.assert_close(flow.gradient(z, 2), displacement)
        torch.testing.assert_close(flow.step(z, step), z - displacement / 3 * (1 + 0.5 * (2 / 3) ** 4))
    constant = GuidedFlow(phi, stored, 1, guidance_scale, step_size=0.1)
    torch.testing.assert_close(constant.step(z, step), z - 0.1 * displacement)


def test_guidance_needs_the_linear_kernel():
    stored = class_embeddings(num_points=5, discrepancy={"kernel": "gaussian", "bandwidth": 1.5})
    with pytest.raises(ValueError, match="needs the linear kernel"):
        GuidedFlow(net(), stored, 1, 2.0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"class_labels": 3}, "classes 0 to 2"),
        ({"class_labels": -1}, "classes 0 to 2"),
        ({"class_labels": "d"}, "no class 'd'; the pipeline has a, b, c"),
        ({"class_labels": [0, 1]}, "one class, or 4"),
        ({"guidance_scale": 2.0}, "needs class_labels"),
        ({"guidance_scale": 2.0, "class_labels": 0, "sampler": "exact"}, "needs sampler='approximate'"),
    ],
)
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        run(pipeline(), 4, **options)


def test_processes_share_particles_of_one_class():
    pipe = pipeline()
    pipe.flow_options = FlowOptions(across_ranks=True)
    with pytest.raises(ValueError, match="across_ranks needs the same class"):
        run(pipe, 4, class_labels=[0, 1, 1, 0])
    assert run(pipe, 4, class_labels=[1] * 4).isfinite().all()


# training


@pytest.fixture
def class_arguments(arguments, tmp_path):
    sorted_images(tmp_path / "classes", {"bright": 5, "dark": 7})
    extra = ["--data.name_or_path", str(tmp_path / "classes"), "--data.class_conditional", "true"]
    extra += ["--data.cache_dir", str(tmp_path / "labelled")]
    return [*arguments, *extra, "--training.levels_per_step", "4", "--training.num_steps", "8"]


def test_from_folders_to_a_pipeline_of_classes(class_arguments, tmp_path):
    folder = train(parse_config(Config, class_arguments))
    pipe = LatentDMMDPipeline.from_pretrained(folder / "pipeline")
    assert pipe.config.class_names == ["bright", "dark"] and pipe.feature_net.config.num_classes == 2
    assert pipe.mean_embeddings.clean.shape[:2] == (3, 4)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        4, class_labels=["bright", "dark"] * 2, num_inference_steps=4, guidance_scale=1.5, output_type="pt"
    ).images
    assert images.isfinite().all()
    how = ["--class_labels", "dark", "--sampler", "approximate", "--guidance_scale", "2", "--num_inference_steps", "2"]
    how += ["--num_images", "3", "--output_dir", tmp_path / "dark"]
    result = run_script(ROOT / "scripts" / "sample.py", "--pipeline", folder / "pipeline", *how)
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "dark" / "images").glob("*.png"))) == 3
    # resuming from the middle ends at the same weights and metrics
    again = [*class_arguments, "--output_dir", str(tmp_path / "again"), "--training.checkpointing_steps", "3"]
    train(parse_config(Config, [*again, "--training.learning_rate_schedule", "cosine"]))
    shorter = tmp_path / "again" / "checkpoint-6"
    resumed = train(parse_config(Config, [*again, "--resume_from_checkpoint", str(shorter)]))
    assert metrics(folder) == metrics(resumed)
    for (name, a), b in zip(weights(folder).items(), weights(resumed).values()):
        assert torch.equal(a, b), name


def test_training_begins_with_saved_weights(arguments, class_arguments, trained_once, tmp_path):
    first = trained_once
    begin = ["--training.init_from", str(first / "pipeline")]
    still = ["--training.learning_rate", "1e-12", "--training.num_steps", "1"]
    second = train(parse_config(Config, [*class_arguments, *begin, *still, "--output_dir", str(tmp_path / "second")]))
    before, after = weights(first), weights(second)
    assert set(after) - set(before) == {"class_embedding.weight"}
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, atol=1e-6, rtol=1e-5)
    other = [*class_arguments, *begin, "--feature_net.num_features", "9", "--output_dir", str(tmp_path / "third")]
    with pytest.raises(ConfigError, match="another than the one"):
        train(parse_config(Config, other))
    with pytest.raises(ConfigError, match="init_from: no pipeline"):
        train(parse_config(Config, [*other, "--training.init_from", str(tmp_path)]))


def test_classes_that_cannot_be(arguments, class_arguments, plain_arguments, tmp_path):
    with pytest.raises(DataError, match="no classes"):
        train(parse_config(Config, [*arguments, "--data.class_conditional", "true"]))
    sorted_images(tmp_path / "classes", {"grey": 1})
    for path in (tmp_path / "classes" / "dark").glob("*.png"):
        path.write_text("no image")
    with pytest.raises(DataError, match="no image of class dark"):
        train(parse_config(Config, [*class_arguments, "--data.on_bad_image", "skip"]))
    with pytest.raises(ConfigError, match="needs objective.name"):
        parse_config(Config, [*plain_arguments, "--data.class_conditional", "true", "--objective.name", "ddpm"])
    with pytest.raises(ConfigError, match="streaming=false"):
        parse_config(Config, [*class_arguments, "--data.streaming", "true"])
