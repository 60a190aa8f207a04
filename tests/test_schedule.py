"""The order of a flow's steps. `flow_schedule` itself is tested with the flows, in test_flow.py."""

from functools import partial

import pytest
import torch
from conftest import moved, random_embeddings, tiny_features, tiny_velocity
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from latent_dmmd.flow import get_flow
from latent_dmmd.latent_pipeline import FlowOptions
from latent_dmmd.pipeline import LatentDMMDPipeline, LatentSchedulerPipeline, load_pipeline
from latent_dmmd.schedule import Multistep, flow_schedule


def error(order, num_steps):
    """Of steps for dz/dt = z, from t = 1 to 0, against e^−1."""
    z, multistep = torch.ones((), dtype=torch.float64), Multistep(order)
    for n in range(num_steps, 0, -1):
        start, end = n / num_steps, (n - 1) / num_steps
        z = z - (start - end) * multistep(z, start, end)
    return abs(z.item() - torch.exp(torch.tensor(-1.0, dtype=torch.float64)).item())


def test_the_error_falls_with_the_order():
    """Half the step: half the error in the first order. The end of first order costs the second order a little."""
    assert 1.9 < error(1, 64) / error(1, 128) < 2.1
    assert 3.5 < error(2, 64) / error(2, 128) < 4.5
    assert error(2, 16) < error(1, 100)


def test_steps_of_unequal_length():
    """Exact where the velocity is linear in time, but for the first step and the last: dz/dt = 2 t."""
    z, multistep, times = torch.zeros((), dtype=torch.float64), Multistep(2), [1.0, 0.7, 0.6, 0.2, 0.0]
    for start, end in zip(times, times[1:]):
        z = z - (start - end) * multistep(torch.tensor(2 * start, dtype=torch.float64), start, end)
    first, last = (2 * 1.0 * 0.3 - (1 - 0.49)), 2 * 0.2 * 0.2 - 0.04
    assert z.item() == pytest.approx(-(1 + first + last))


def test_an_order_that_is_neither():
    with pytest.raises(ValueError, match="solver_order must be 1 or 2; got 3"):
        Multistep(3)


def by_hand(velocity, z, times):
    """Adams and Bashforth, written out."""
    previous = None
    for start, end in zip(times, times[1:]):
        v, h = velocity(z, start), start - end
        w = v if previous is None or end == 0 else v + h / (2 * previous[1]) * (v - previous[0])
        z, previous = z - h * w, (v, h)
    return z


@pytest.mark.parametrize("sampler", ["approximate", "exact", "hybrid"])
@pytest.mark.parametrize("target", ["restoring", "displacement"])
def test_a_flow_of_second_order(sampler, target):
    net, stored = moved(tiny_features()), random_embeddings(5, target=target)
    z, steps = torch.randn(6, 2, 4, 4), flow_schedule(stored, 3, 2)
    euler = get_flow(sampler, net, stored)

    def velocity(z, start):
        step = next(step for step in steps if step.start == start)
        return euler.coefficients(step)[1] * euler.gradient(z, step.level) / (step.start - step.end)

    times = [steps[0].start, *(step.end for step in steps)]
    found = get_flow(sampler, net, stored, solver_order=2).run(z, steps)
    torch.testing.assert_close(found, by_hand(velocity, z, times))
    assert not torch.allclose(found, euler.run(z, steps), atol=1e-3)


def test_flow_matching_of_second_order():
    net, z = moved(tiny_velocity()), torch.randn(3, 2, 4, 4)
    pipe = LatentSchedulerPipeline(net, FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    how = dict(num_inference_steps=5, latents=z, output_type="latent")
    with torch.no_grad():
        expected = by_hand(lambda z, t: net(z, torch.tensor(t)), z, [1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    found = pipe(3, solver_order=2, **how).images
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, pipe(3, **how).images, atol=1e-3)
    assert torch.equal(pipe(3, **how).images, pipe(3, solver_order=1, **how).images)


def test_a_saved_pipeline_has_the_order_it_was_trained_with(tmp_path):
    """And the first where it was saved before there was another."""
    z, how = torch.randn(2, 2, 4, 4), dict(output_type="latent", num_inference_steps=4)
    stored = random_embeddings(4)
    for make in (  # networks of their own: one remembers the options of its pipeline
        lambda order: LatentDMMDPipeline(moved(tiny_features()), stored, sampling=order),
        lambda order: LatentSchedulerPipeline(moved(tiny_velocity()), FlowMatchEulerDiscreteScheduler(), **order),
    ):
        images = {}
        for name, order in (("second", {"solver_order": 2}), ("before", {})):
            make(order).save_pretrained(tmp_path / name)
            pipe = load_pipeline(tmp_path / name)
            pipe.set_progress_bar_config(disable=True)
            images[name] = pipe(2, latents=z, **how).images
            for explicit, same in ((1, name == "before"), (2, name == "second")):
                assert torch.equal(pipe(2, latents=z, solver_order=explicit, **how).images, images[name]) == same


@pytest.mark.parametrize("sampler", ["approximate", "exact", "hybrid"])
def test_a_flow_can_run_again(sampler):
    """Its first step is of first order, also for other particles, and after a run that was interrupted."""
    net, stored = moved(tiny_features()), random_embeddings(4)
    z, steps = torch.randn(3, 2, 4, 4), flow_schedule(stored, 4, 2)
    fresh = partial(get_flow, sampler, net, stored, solver_order=2)
    flow = fresh()
    flow.run(z, steps[:3])
    for particles in (z, z, z[:2]):
        assert torch.equal(flow.run(particles, steps), fresh().run(particles, steps))
    assert not torch.equal(flow.run(z, steps), get_flow(sampler, net, stored).run(z, steps))


def test_where_the_second_order_cannot_be_had():
    z, how = torch.randn(2, 2, 4, 4), dict(output_type="latent", num_inference_steps=4)
    pipe = LatentDMMDPipeline(tiny_features(), random_embeddings(4), sampling={"solver_order": 2})
    pipe.set_progress_bar_config(disable=True)
    pipe.flow_options = FlowOptions(step_size=0.1)
    assert pipe(2, latents=z, **how).images.isfinite().all()  # the pipeline's own order is a default
    with pytest.raises(ValueError, match="solver_order=2 needs calibrated steps of the linear forward process"):
        pipe(2, latents=z, solver_order=2, **how)
    ddpm = LatentSchedulerPipeline(tiny_velocity(), DDIMScheduler(clip_sample=False))
    ddpm.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="solver_order=2 needs flow matching"):
        ddpm(2, latents=z, solver_order=2, **how)
    other = LatentSchedulerPipeline(ddpm.network, DDIMScheduler(clip_sample=False), solver_order=2)
    other.set_progress_bar_config(disable=True)
    assert torch.equal(other(2, latents=z, **how).images, ddpm(2, latents=z, **how).images)
