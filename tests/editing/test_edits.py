"""Every edit with every sampler and process."""

from collections import deque
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import yaml

from diffusion_cli.config import CONF, build
from diffusion_cli.data import to_model_range
from diffusion_cli.editing import (
    DPS,
    Attribute,
    Colorize,
    Img2Img,
    Inpaint,
    Interpolate,
    Mask,
    Outpaint,
    Reconstruct,
    RePaint,
    Replacement,
    SuperResolution,
)
from diffusion_cli.editing.transform import slerp
from diffusion_cli.formats import to_bytes
from diffusion_cli.samplers import DDIM, integrate, invert, start_grid_at
from helpers.editing import GRAY, denoiser_of, noise, plain, process, shrinking

F64 = torch.float64
SAMPLERS = {file.stem: yaml.safe_load(file.read_text()) for file in sorted(CONF.glob("sampler/*.yaml"))}
METHODS = {
    "replacement": Replacement(),
    "repaint": RePaint(num_resamples=2, jump_length=3),
    "dps": DPS(scale=0.5),
}
RESTORATIONS = {
    "inpaint": (Inpaint(GRAY, mask=[2, 1, 6, 7]), GRAY),
    "outpaint": (Outpaint(GRAY, left=1, right=2, top=0, bottom=3, canvas="grow"), GRAY),
    "outpaint keep": (Outpaint(GRAY, left=3, right=0, top=0, bottom=0, canvas="keep"), (1, 8, 5)),
    "colorize": (Colorize((3, 8, 8)), (1, 8, 8)),
    "super_resolution": (SuperResolution(GRAY, factor=4), (1, 2, 2)),
}


@pytest.mark.parametrize("sampler_name", SAMPLERS)
@pytest.mark.parametrize("kind", RESTORATIONS)
def test_what_is_known_stays_with_every_sampler(schedules, kind, sampler_name):
    edit, shape = RESTORATIONS[kind]
    schedule = schedules["linear"]
    sampler = build(SAMPLERS[sampler_name], schedule)
    images = torch.randint(0, 256, (2, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    edited = edit(to_model_range(images).double(), process(
        schedule, sampler, shrinking(schedule), edit.results, METHODS["repaint"]
    ))  # fmt: skip
    assert edited.images.shape == (2, 1, *edit.results)
    assert edited.images.isfinite().all()
    assert edited.residual is not None
    known = 127.5 * edited.residual(to_model_range(to_bytes(edited.images[:, 0])).double())
    exact = kind in ("inpaint", "outpaint", "outpaint keep")
    assert known.abs().max() == 0 if exact else known.abs().max() < 0.51


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tag", ["cosine", "zero_snr", "vp", "subvp", "ve", "edm", "rectified"])
def test_what_is_known_stays_in_every_process_by_every_method(schedules, exact, tag, method):
    schedule = schedules[tag]
    edit = Inpaint((1, 2, 2), mask=[0, 0, 1, 2])
    sampler = DDIM(schedule, eta=1.0, spacing="log_snr")
    images = (
        to_model_range(torch.tensor([[10, 240], [60, 200]], dtype=torch.uint8).view(1, 1, 2, 2))
        .double()
        .repeat(2, 1, 1, 1)
    )
    edited = edit(images, process(schedule, sampler, exact(schedule), (1, 2, 2), METHODS[method], steps=20))
    assert to_bytes(edited.images)[:, 0, 0, :, 1].tolist() == [[240, 200], [240, 200]]
    assert edited.images.isfinite().all()
    assert edited.images[:, 0, 0, :, 0].abs().max() < 3


TRANSFORMS = {
    "img2img": Img2Img(GRAY, strength=0.6),
    "reconstruct": Reconstruct(GRAY, strength=0.7),
    "attribute": Attribute(GRAY, source=None, strength=0.5),
    "interpolate": Interpolate(GRAY, frames=3, seeds=None, strength=0.9),
}


@pytest.mark.parametrize("sampler_name", SAMPLERS)
@pytest.mark.parametrize("kind", TRANSFORMS)
def test_every_transformation_goes_with_every_sampler(schedules, kind, sampler_name):
    edit, schedule = TRANSFORMS[kind], schedules["vp"]
    sampler = build(SAMPLERS[sampler_name], schedule)
    images = noise(2 * edit.inputs_each, *GRAY).clamp(-1, 1)
    edited = edit(images, process(schedule, sampler, shrinking(schedule), GRAY))
    assert edited.images.shape == (2, 3 if kind == "interpolate" else 1, *GRAY)
    assert edited.images.isfinite().all()


@pytest.mark.parametrize(
    "spacing", ["leading", "trailing", "linspace", "quadratic", "karras", "log_snr", "time"]
)
@pytest.mark.parametrize("tag", ["linear", "cosine", "zero_snr", "vp", "ve", "edm", "rectified"])
def test_a_grid_cut_short_falls_strictly_from_the_time_asked_for(schedules, tag, spacing):
    times = schedules[tag].grid(10, spacing)
    for strength in (1.0, 0.97, 0.5, 0.001):
        cut = start_grid_at(times, strength)
        assert (cut.diff() < 0).all()
        assert cut[0] == min(strength, times[0])
        assert cut[-1] == 0


def test_a_solver_remembers_its_steps_between_replacements(schedules, wide):
    """Of second order it is not the first-order one; after a jump back it begins anew."""
    schedule = schedules["linear"]
    operator, start = Mask(torch.tensor([[True, False], [False, False]])[None, None]), noise(5, 1, 2, 2)

    def end(sampler_name, method):
        sampler = build(SAMPLERS[sampler_name] | {"spacing": "trailing"}, schedule)
        given = plain(sampler, denoiser_of(wide, schedule), 10, lambda: start)
        return deque(method.restore(given, operator, operator(start)), maxlen=1)[0]

    once = Replacement()
    assert not torch.allclose(end("ddim", once), end("dpmpp_2m", once), atol=1e-3)


@pytest.mark.parametrize("name", SAMPLERS)
def test_stochastic_samplers_are_those_that_add_noise(schedules, wide, name):
    """As their YAML sets them up, and with the other value of what scales their noise."""
    schedule = schedules["vp"]
    for changes in ({}, *({key: value} for key in ("eta", "s_churn") for value in (0.0, 1.0))):
        if changes.keys() <= SAMPLERS[name].keys():
            taken = []

            def draw(taken=taken):
                taken.append(noise(1, 1, 2, 2))
                return taken[-1]

            sampler = build(SAMPLERS[name] | changes, schedule)
            deque(
                integrate(sampler, denoiser_of(wide, schedule), noise(1, 1, 2, 2), sampler.grid(6), draw),
                maxlen=0,
            )
            assert sampler.stochastic == bool(taken), changes


def test_sampling_from_a_noised_image_starts_at_the_strength(schedules):
    schedule, shown = schedules["ve"], []

    def denoise(x, t):
        shown.append((x, t))
        return shrinking(schedule)(x, t)

    image, c = noise(2, *GRAY), noise(2, *GRAY, seed=1)
    given = plain(DDIM(schedule, eta=0.0, spacing="time"), denoise, 10, lambda: c)
    edited = Img2Img(GRAY, strength=0.55)(image, given)
    (start, time), times = shown[0], [t.item() for _, t in shown]
    assert times == [0.55, *(t for t in given.times.tolist() if 0 < t < 0.55)]
    torch.testing.assert_close(start, image + schedule(time)[1] * c)
    torch.testing.assert_close(edited.before[1], start)


def test_a_weak_edit_leaves_the_image_and_a_strong_one_does_not(schedules, exact, mixture, reference):
    schedule, images = schedules["linear"], reference("noise")["x0_data"]
    moved = []
    for strength in (0.01, 0.3, 0.6, 1.0):
        sampler = DDIM(schedule, eta=0.0, spacing="trailing")
        given = process(schedule, sampler, exact(schedule), (1, 2, 2), steps=100, count=len(images))
        edited = Img2Img((1, 2, 2), strength=strength)(images, given)
        moved.append((edited.images[:, 0] - images).square().mean().item())
    assert all(a < b for a, b in pairwise(moved)), moved
    assert moved[0] < 1e-2


@pytest.mark.parametrize("tag", ["linear", "cosine", "vp", "edm", "rectified"])
def test_reconstruction_is_of_first_order(schedules, exact, reference, tag):
    schedule, images = schedules[tag], reference("noise")["x0_data"]
    errors = []
    for steps in (50, 100, 200):
        sampler = DDIM(schedule, eta=0.0, spacing="karras" if tag == "edm" else "time")
        given = process(schedule, sampler, exact(schedule), (1, 2, 2), steps=steps, count=len(images))
        edited = Reconstruct((1, 2, 2), strength=0.9)(images, given)
        assert edited.residual is not None
        errors.append(edited.residual(edited.images[:, 0]).square().mean().sqrt().item())
    orders = [np.log2(a / b) for a, b in pairwise(errors)]
    assert all(order > 0.75 for order in orders), (errors, orders)
    assert errors[-1] < 0.02


def test_inversion_starts_at_the_data_or_at_the_least_noise(schedules, exact, reference):
    schedule, x = schedules["linear"], reference("noise")["x0_data"]
    times = schedule.grid(50, "trailing")
    from_data = list(invert(schedule, exact(schedule), x, times))
    assert len(from_data) == 50
    eps = exact(schedule)(x, times[-2]).eps
    alpha, sigma = schedule(times[-2])
    torch.testing.assert_close(from_data[0], alpha * x + sigma * eps)
    rest = list(invert(schedule, exact(schedule), from_data[0], times[:-1]))
    torch.testing.assert_close(rest[-1], from_data[-1])


@pytest.mark.parametrize("tag", ["cosine", "ve"])
def test_the_ends_of_an_interpolation_are_the_samples_of_its_seeds(schedules, exact, tag):
    schedule = schedules[tag]
    sampler = DDIM(schedule, eta=0.0, spacing="trailing")
    start = noise(2, 1, 2, 2)
    given = process(schedule, sampler, exact(schedule), (1, 2, 2), steps=20, count=1)
    frames = Interpolate((1, 2, 2), frames=5, seeds=[4, 9], strength=0.5)(start, given).images[0]
    size = 50 if tag == "ve" else 1
    *_, ends = integrate(sampler, exact(schedule), size * start, sampler.grid(20), lambda: start)
    torch.testing.assert_close(frames[[0, -1]], ends)


def test_the_great_circle_keeps_the_norm_and_meets_both_ends():
    a, b = noise(3, 1, 8, 8, seed=1), noise(3, 1, 8, 8, seed=2)
    b = b * (a.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    for u in (0.2, 0.5):
        torch.testing.assert_close(slerp(a, b, u).flatten(1).norm(dim=1), a.flatten(1).norm(dim=1))
    torch.testing.assert_close(slerp(a, a, 0.3), a)


@pytest.mark.parametrize("method", METHODS)
def test_a_restoration_reports_its_share_at_each_step(schedules, method):
    shares: list[float] = []
    schedule = schedules["linear"]
    task = process(schedule, DDIM(schedule), shrinking(schedule), GRAY, METHODS[method])
    RESTORATIONS["inpaint"][0](noise(2, *GRAY), replace(task, advance=shares.append))
    assert shares == pytest.approx([1 / 8] * 7)


@pytest.mark.parametrize(
    "edit",
    [
        Img2Img(GRAY, strength=0.5),
        Reconstruct(GRAY),
        Attribute(GRAY),
        Interpolate(GRAY),
        Interpolate(GRAY, seeds=[0, 1]),
    ],
)
def test_an_edit_reports_its_passes(schedules, edit):
    shares: list[float] = []
    schedule = schedules["linear"]
    task = process(schedule, DDIM(schedule), shrinking(schedule), GRAY, steps=50, count=1)
    edit(noise(edit.inputs_each, *GRAY), replace(task, advance=shares.append))
    assert min(shares) > 0
    assert edit.passes - 0.1 < sum(shares) <= edit.passes
