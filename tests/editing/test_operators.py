"""Measurements and their inverses, and the exact conditional distribution of restored images."""

import math
from collections import deque
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_cli.editing import (
    DPS,
    BlockMean,
    Inpaint,
    Luma,
    Mask,
    Outpaint,
    RePaint,
    Replacement,
    SuperResolution,
)
from diffusion_cli.samplers import DDIM, DDPM
from helpers.editing import GRAY, denoiser_of, noise, plain, process, shrinking

F64 = torch.float64


# --- Operators ------------------------------------------------------------

HALF = torch.arange(64).view(1, 1, 8, 8) % 2 == 0
OPERATORS = {
    "mask": (Mask(HALF), (2, 3, 8, 8)),
    "luma": (Luma(), (2, 3, 8, 8)),
    "blocks": (BlockMean(4), (2, 1, 8, 8)),
    "mask of a volume": (Mask(HALF.view(1, 1, 4, 4, 4)), (2, 1, 4, 4, 4)),
    "luma of a volume": (Luma(), (2, 3, 2, 4, 4)),
    "blocks of a volume": (BlockMean(2), (2, 1, 4, 6, 2)),
}


def test_a_box_of_a_volume_lies_along_width_height_and_depth():
    shape = (1, 4, 6, 8)

    def painted(mask):
        known = Inpaint(shape, mask=mask).known
        assert known is not None
        return ~known[0, 0]

    box = torch.zeros(shape[1:], dtype=torch.bool)
    box[2:4, 1:5, 0:3] = True
    assert torch.equal(painted([0, 1, 2, 3, 5, 4]), box)
    assert torch.equal(
        painted("centre"), torch.nn.functional.pad(torch.ones(2, 4, 4), (2, 2, 1, 1, 1, 1)) > 0
    )
    for wrong in ([0, 1, 2, 3], [0, 1, 2, 3, 5, 5], [0, 1, 2, 3, 1, 4]):
        with pytest.raises(
            ValueError, match=r"\[left,top,front,right,bottom,back\] in voxels within 8 x 6 x 4"
        ):
            painted(wrong)
    with pytest.raises(ValueError, match=r"opposite to .* did you mean \[6, 1, 0, 8, 5, 3\]\?$"):
        painted([0, 1, 6, 3, 5, 8])


def test_each_input_has_its_region():
    painted = torch.rand(3, 1, 8, 8) > 0.5
    edit = Inpaint(GRAY, mask="masks").masked(painted)
    images = noise(2, *GRAY)
    _, y = edit.of([2, 0]).measure(images)
    assert torch.equal(y, images * ~painted[[2, 0]])
    one_for_all, known = Inpaint(GRAY).of([2, 0]).known, Inpaint(GRAY).known
    assert one_for_all is not None
    assert known is not None
    assert torch.equal(one_for_all, known)


def test_a_volume_is_continued_in_every_slice_and_enlarged_along_every_axis():
    sides = {"left": 1, "right": 2, "top": 3, "bottom": 0}
    assert Outpaint((1, 4, 6, 8), **sides, canvas="grow").results == (1, 4, 9, 11)
    assert Outpaint((1, 4, 6, 8), **sides, canvas="keep").accepts() == [(1, 4, 6, 8), (1, 4, 3, 5)]
    assert SuperResolution((1, 4, 6, 8), factor=2).accepts() == [(1, 4, 6, 8), (1, 2, 3, 4)]


@pytest.mark.parametrize("name", OPERATORS)
def test_a_measurement_and_its_inverse(name):
    """`A^+` is Moore-Penrose's: `A A^+ y = y`, and `A^+ A` is a projection that is its own adjoint."""
    operator, shape = OPERATORS[name]
    u, v = noise(*shape, seed=1), noise(*shape, seed=2)
    y = operator(u)
    torch.testing.assert_close(operator(operator.pseudo_inverse(y)), y)

    def projected(x):
        return operator.pseudo_inverse(operator(x))

    torch.testing.assert_close((projected(u) * v).sum(), (u * projected(v)).sum())
    moved = operator.project(v, y)
    torch.testing.assert_close(operator(moved), y)
    torch.testing.assert_close(moved - v, projected(moved - v))  # only what is measured has moved


@pytest.mark.parametrize("name", OPERATORS)
def test_the_nearest_image_agrees_and_is_in_range(name):
    operator, shape = OPERATORS[name]
    x, truth = 2 * noise(*shape, seed=1), noise(*shape, seed=2).clamp(-1, 1)
    image = operator.nearest_image(x, operator(truth))
    assert image.abs().max() <= 1
    torch.testing.assert_close(operator(image), operator(truth), rtol=0, atol=1e-6)
    assert ((image - x).square().sum() <= (truth - x).square().sum()).all()
    # From the nearest point the way to any other that agrees leads away (Kolmogorov's criterion).
    assert ((x - image) * (truth - image)).sum() <= 1e-6


def test_luma_is_pillows_gray():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    theirs = np.array(Image.fromarray(pixels).convert("L")).astype(float)
    mine = Luma()(torch.from_numpy(pixels).double().permute(2, 0, 1)[None])
    assert np.abs(mine[0, 0].numpy() - theirs).max() <= 1


# --- The right distribution ------------------------------------------------------------


def conditional_error(method, mixture, schedule, steps, seen=0.25, count=3000):
    """How far the mean of the unknown pixels is from that of the exact conditional distribution given the first."""
    weights = (
        mixture.weights.log() - 0.5 * ((seen - mixture.means[:, 0]) / mixture.stds) ** 2 - mixture.stds.log()
    ).softmax(0)
    exact = weights @ mixture.means[:, 1:]
    operator = Mask(torch.tensor([[True, False], [False, False]])[None, None])
    y = torch.zeros(count, 1, 2, 2, dtype=F64)
    y[:, :, 0, 0] = seen
    generator = torch.Generator().manual_seed(0)

    def draw():
        return torch.randn(count, 1, 2, 2, dtype=F64, generator=generator)

    sampler = DDPM(schedule, variance="small", spacing="trailing")
    denoise = denoiser_of(mixture, schedule)
    (x,) = deque(method.restore(plain(sampler, denoise, steps, draw), operator, y), maxlen=1)
    return (x.flatten(1)[:, 1:].mean(0) - exact).abs().max().item()


def test_resampling_approaches_the_exact_conditional_distribution(wide, schedules):
    errors = [
        conditional_error(method, wide, schedules["linear"], 50)
        for method in (
            Replacement(),
            RePaint(num_resamples=4, jump_length=1),
            RePaint(num_resamples=16, jump_length=1),
        )
    ]
    assert errors[0] > 0.15, errors
    assert errors[1] < 0.75 * errors[0], errors
    assert errors[2] < 0.5 * errors[0], errors


def test_replacement_is_repaint_without_resampling(wide, schedules):
    once = RePaint(num_resamples=1, jump_length=1)
    one, other = (
        conditional_error(m, wide, schedules["cosine"], 10, count=50) for m in (once, Replacement())
    )
    assert one == other


@pytest.mark.parametrize(
    ("resamples", "jump", "visits"),
    [
        (1, 2, [0, 1, 2, 3, 4]),
        (3, 1, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]),
        (2, 2, [0, 1, 0, 1, 2, 3, 2, 3, 4, 4]),
    ],
)
def test_resampling_visits_each_stretch_of_steps_as_often_as_asked(schedules, resamples, jump, visits):
    schedule, visited = schedules["vp"], []

    def denoise(x, t):
        visited.append(t)
        return shrinking(schedule)(x, t)

    sampler = DDIM(schedule, eta=0.0, spacing="time")
    given = process(schedule, sampler, denoise, GRAY, steps=5)
    y = noise(2, *GRAY)
    states = list(RePaint(num_resamples=resamples, jump_length=jump).restore(given, Mask(HALF), HALF * y))
    assert len(states) == -(-5 // jump)
    assert torch.equal(torch.stack(visited), given.times[visits])


@pytest.mark.parametrize("resamples", [1, 2])
def test_what_is_known_has_the_noise_of_each_time(schedules, resamples):
    """With one noise c for all draws: alpha y + sigma c, and where a jump leads back, that of the time below moved."""
    schedule, shown = schedules["subvp"], []

    def denoise(x, t):
        shown.append(x * HALF)
        return shrinking(schedule)(x, t)

    y, c = HALF * noise(2, *GRAY), noise(2, *GRAY, seed=1)
    sampler = DDIM(schedule, eta=0.0, spacing="time")
    given = plain(sampler, denoise, 4, lambda: c)
    list(RePaint(num_resamples=resamples, jump_length=1).restore(given, Mask(HALF), y))
    levels = [tuple(level.item() for level in schedule(t)) for t in given.times]
    expected = []
    for (alpha, sigma), (alpha_s, sigma_s) in pairwise(levels):
        a = alpha / alpha_s
        jumped = a * sigma_s + math.sqrt(sigma**2 - a**2 * sigma_s**2)
        expected += [HALF * (alpha * y + level * c) for level in (sigma, jumped)[:resamples]]
    torch.testing.assert_close(torch.stack(shown), torch.stack(expected))


def test_posterior_sampling_goes_towards_the_measurement(wide, schedules):
    """Without projection: the residual of the images falls with the scale of the gradient."""
    schedule, operator = schedules["linear"], BlockMean(2)
    y = torch.full((200, 1, 1, 1), 0.3, dtype=F64)
    misfits, start = [], noise(200, 1, 2, 2)
    for scale in (1e-9, 0.1, 0.5):
        sampler = DDIM(schedule, eta=0.0, spacing="trailing")
        given = plain(sampler, denoiser_of(wide, schedule), 50, lambda: start)
        (x,) = deque(DPS(scale=scale).restore(given, operator, y), maxlen=1)
        misfits.append((operator(x) - y).abs().mean().item())
    assert misfits[1] < 0.7 * misfits[0], misfits
    assert misfits[2] < 0.5 * misfits[1], misfits
