"""Features, mean embeddings and flows for classes of pictures, from the data to the pipeline."""

from functools import partial

import datasets
import pytest
import torch
from conftest import metrics, refusal, solid, weights
from processes import ROOT
from processes import run as run_script

from latent_dmmd import FeatureNet, LatentDMMDPipeline, MeanEmbeddings
from latent_dmmd.cache import LatentCache
from latent_dmmd.config import Config, TrainingConfig, parse_config
from latent_dmmd.data import load_pictures
from latent_dmmd.forward import LinearInterpolant
from latent_dmmd.objective import DMMD, Batch, WitnessMatching
from latent_dmmd.training import draw_batch, train
from latent_dmmd.utils.errors import ConfigError, DataError

SIZES = dict(block_out_channels=(8,), attention_levels=(True,), layers_per_block=1, num_groups=2)


def net(num_classes=3, seed=0):
    """Random weights, the class embedding among them."""
    torch.manual_seed(seed)
    net = FeatureNet(4, 2, 6, num_classes=num_classes, **SIZES)
    torch.nn.init.normal_(net.class_embedding.weight)
    for block in (m for m in net.modules() if hasattr(m, "conv2")):
        torch.nn.init.normal_(block.conv2.weight, std=0.1)  # zero at the start, which would hide the class
    return net


def sorted_pictures(folder, counts):
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            solid("RGB", (40 * i, 90, 20 * len(name)), (32, 32)).save(folder / name / f"{i}.png")
    return folder


# data


def test_folders_are_classes(tmp_path):
    pictures = load_pictures(str(sorted_pictures(tmp_path, {"b": 2, "a": 3})), 32)
    names, labels = pictures.labels()
    assert names == ["a", "b"] and labels.tolist() == [0, 0, 0, 1, 1]
    assert pictures.labels(skipped=(pictures.names[1], pictures.names[4]))[1].tolist() == [0, 0, 1]


def test_a_column_holds_classes(tmp_path):
    cells = [{"path": str(p)} for p in sorted(sorted_pictures(tmp_path / "p", {"x": 3}).rglob("*.png"))]
    table = datasets.Dataset.from_dict({"image": cells, "label": [7, 2, 7]})
    table.cast_column("image", datasets.Image()).to_parquet(tmp_path / "t.parquet")
    names, labels = load_pictures(str(tmp_path / "t.parquet"), 32).labels()
    assert names == ["2", "7"] and labels.tolist() == [1, 0, 1]


def test_elpv_has_four_classes():
    pytest.importorskip("elpv_dataset")
    names, labels = load_pictures("elpv").labels()
    assert names == ["mono defective", "mono intact", "poly defective", "poly intact"]
    counts = labels.bincount()
    assert counts.sum() == 2624 and counts.min() > 200
    assert int(counts[1] + counts[3]) == 1508 + 295  # probabilities 0 and 1/3, as Deitsch et al. (2019) count them


def test_pictures_without_classes_are_named(tiny_pictures, tmp_path):
    assert "no classes" in refusal(load_pictures(str(tiny_pictures), 32).labels)
    assert "one class, a" in refusal(load_pictures(str(sorted_pictures(tmp_path / "one", {"a": 2})), 32).labels)


# batches


def labelled_cache():
    """Latents that say which class they are of."""
    labels = torch.tensor([0, 1, 2, 2, 1, 0, 2, 2])
    latents = labels.float().reshape(-1, 1, 1, 1, 1).expand(-1, 1, 2, 4, 4).contiguous()
    return LatentCache(((latents, None),), torch.zeros(2), torch.ones(2), labels=labels)


def test_pairs_are_of_the_class_of_their_level():
    cache, config = labelled_cache(), TrainingConfig(levels_per_step=4, pairs_per_level=6)
    drawn = []
    for step in range(300):
        batch = draw_batch(cache, config, 4, 0, step, label_dropout=0.25)
        drawn.append(batch.label)
        for x_0, label in zip(batch.x_0, batch.label.tolist()):
            if label < 3:
                assert (x_0 == label).all()
        assert torch.equal(batch.label, draw_batch(cache, config, 4, 1, step, label_dropout=0.25).label)
    shares = torch.cat(drawn).bincount(minlength=4) / 1200
    torch.testing.assert_close(shares, torch.full((4,), 0.25), atol=0.04, rtol=0)


def test_without_classes_batches_are_as_before():
    cache = labelled_cache()
    plain = LatentCache(cache.shards, cache.channel_mean, cache.channel_std)
    assert draw_batch(plain, TrainingConfig(), 25, 0, 0).label is None


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
        objective.feature_net = torch.nn.Identity()
        objective.feature_net.forward, objective.feature_net.config = bound, phi.config
        alone.append(objective(Batch(*(a[i : i + 1] for a in batch[:4]))).total)
    torch.testing.assert_close(build(phi)(batch).total, torch.stack(alone).mean())


def test_running_embeddings_keep_classes_apart():
    phi = net()
    objective = WitnessMatching(phi, LinearInterpolant(), 4, net(seed=1), num_classes=3)
    objective(make_batch([2, 0]))
    assert objective.source.num_updates.nonzero().flatten().tolist() == [0 * 4 + 1, 2 * 4 + 0]
    assert objective.source.clean.shape == (16, 6)


# sampling


def pipeline():
    stored = MeanEmbeddings(4, 6, num_classes=3)
    stored.levels.copy_(torch.arange(1, 5) / 4)
    stored.displacement.copy_(stored.levels)
    generator = torch.Generator().manual_seed(3)
    for tensor in (stored.clean, stored.noisy):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    stored.gradient_scale.copy_(torch.rand(4, 4, generator=generator))
    pipe = LatentDMMDPipeline(net(), stored, class_names=["a", "b", "c"])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, batch_size, **options):
    z = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(0))[:batch_size]
    return pipe(batch_size, latents=z, num_inference_steps=8, output_type="latent", **options).images


def test_views_of_classes_share_memory():
    stored = pipeline().mean_embeddings
    stored.of_class(1).gradient_scale[2] = 7
    assert stored.gradient_scale[1, 2] == 7
    assert torch.equal(stored.of_class(None).clean, stored.clean[3])
    plain = MeanEmbeddings(4, 6)
    assert plain.of_class(None) is plain


@pytest.mark.parametrize("sampler", ["exact", "approximate"])
def test_classes_flow_side_by_side(sampler):
    """Pictures of several classes are those of each class alone, with exact witnesses of its own particles."""
    pipe = pipeline()
    mixed = run(pipe, 4, class_labels=["a", "c", "a", 1], sampler=sampler)
    z = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    for label, which in ((0, [0, 2]), (2, [1]), (1, [3])):
        how = dict(latents=z[which], num_inference_steps=8, output_type="latent", sampler=sampler)
        alone = pipe(len(which), class_labels=label, **how).images
        torch.testing.assert_close(mixed[which], alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(mixed[:1], run(pipe, 4, sampler=sampler)[:1], atol=1e-3)


def test_guidance_extrapolates_from_any_class_to_one():
    pipe, phi = pipeline(), None
    phi, stored = pipe.feature_net, pipe.mean_embeddings
    z = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    moved = pipe(2, latents=z, class_labels=1, guidance_scale=3.0, num_noise_levels=1, steps_per_level=1)
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


@pytest.mark.parametrize(
    "options, message",
    [
        ({"class_labels": 3}, "classes 0 to 2"),
        ({"class_labels": -1}, "classes 0 to 2"),
        ({"class_labels": "d"}, "no class 'd'; the pipeline has a, b, c"),
        ({"class_labels": [0, 1]}, "one class, or 4"),
        ({"guidance_scale": 2.0}, "needs class_labels"),
        ({"guidance_scale": 2.0, "class_labels": 0, "sampler": "exact"}, "needs sampler='approximate'"),
        ({"class_labels": [0, 1, 1, 0], "noise_injection": 0.1}, "the same class"),
    ],
)
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        run(pipeline(), 4, **options)


# training


@pytest.fixture
def class_arguments(arguments, tmp_path):
    sorted_pictures(tmp_path / "classes", {"bright": 5, "dark": 7})
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


def test_classes_that_cannot_be(arguments, class_arguments, tmp_path):
    with pytest.raises(DataError, match="no classes"):
        train(parse_config(Config, [*arguments, "--data.class_conditional", "true"]))
    sorted_pictures(tmp_path / "classes", {"grey": 1})
    for path in (tmp_path / "classes" / "dark").glob("*.png"):
        path.write_text("no picture")
    with pytest.raises(DataError, match="no picture of class dark"):
        train(parse_config(Config, [*class_arguments, "--data.on_bad_image", "skip"]))
    with pytest.raises(ConfigError, match="needs objective.name"):
        parse_config(Config, [*class_arguments, "--objective.name", "ddpm"])
    with pytest.raises(ConfigError, match="streaming=false"):
        parse_config(Config, [*class_arguments, "--data.streaming", "true"])
