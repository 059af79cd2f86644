"""Edits: known pixels stay, unknown ones have the right distribution, and the command is safe to use."""

import json
import math
from collections import deque
from itertools import pairwise

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from diffusion_cli.cli import run
from diffusion_cli.commands import edit as editing
from diffusion_cli.commands.inputs import read_mask
from diffusion_cli.commands.outputs import keep_results
from diffusion_cli.config import CONF, build
from diffusion_cli.data import GaussianMixture, to_model_range
from diffusion_cli.diffusion.denoiser import Prediction
from diffusion_cli.diffusion.latents import Pixels
from diffusion_cli.editing import (
    DPS,
    Attribute,
    BlockMean,
    Colorize,
    EditProcess,
    Img2Img,
    Inpaint,
    Interpolate,
    Luma,
    Mask,
    Outpaint,
    Reconstruct,
    RePaint,
    Replacement,
    SuperResolution,
)
from diffusion_cli.editing.transform import slerp
from diffusion_cli.formats import to_bytes
from diffusion_cli.samplers import DDIM, DDPM, integrate, invert, start_grid_at

F64 = torch.float64
GRAY = (1, 8, 8)
SAMPLERS = {file.stem: yaml.safe_load(file.read_text()) for file in sorted(CONF.glob("sampler/*.yaml"))}
METHODS = {
    "replacement": Replacement(),
    "repaint": RePaint(num_resamples=2, jump_length=3),
    "dps": DPS(scale=0.5),
}


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def no_file(path):
    raise AssertionError(path)


# --- Operators --------------------

HALF = torch.arange(64).view(1, 1, 8, 8) % 2 == 0
OPERATORS = {
    "mask": (Mask(HALF), (2, 3, 8, 8)),
    "luma": (Luma(), (2, 3, 8, 8)),
    "blocks": (BlockMean(4), (2, 1, 8, 8)),
    "mask of a volume": (Mask(HALF.view(1, 1, 4, 4, 4)), (2, 1, 4, 4, 4)),
    "luma of a volume": (Luma(), (2, 3, 2, 4, 4)),
    "blocks of a volume": (BlockMean(2), (2, 1, 4, 6, 2)),
}


def test_a_volume_is_painted_anew_in_a_box_and_where_a_mask_of_its_slices_is_white():
    shape = (1, 4, 6, 8)

    def painted(mask):
        return ~Inpaint(shape, lambda path: HALF[0, 0, :6] * 255, mask=mask).known[0, 0]

    box = torch.zeros(shape[1:], dtype=torch.bool)
    box[2:4, 1:5, 0:3] = True
    assert torch.equal(painted([0, 1, 2, 3, 5, 4]), box)
    assert torch.equal(
        painted("centre"), torch.nn.functional.pad(torch.ones(2, 4, 4), (2, 2, 1, 1, 1, 1)) > 0
    )
    assert torch.equal(painted("file.png"), HALF[0, :, :6].expand(4, -1, -1))
    for wrong in ([0, 1, 2, 3], [0, 1, 2, 3, 5, 5], [0, 1, 2, 3, 1, 4]):
        with pytest.raises(
            ValueError, match=r"\[left,top,front,right,bottom,back\] in pixels within 8 x 6 x 4"
        ):
            painted(wrong)


def test_a_volume_is_continued_in_every_slice_and_enlarged_along_every_axis():
    sides = {"left": 1, "right": 2, "top": 3, "bottom": 0}
    assert Outpaint((1, 4, 6, 8), no_file, **sides, canvas="grow").results == (1, 4, 9, 11)
    assert Outpaint((1, 4, 6, 8), no_file, **sides, canvas="keep").accepts() == [(1, 4, 6, 8), (1, 4, 3, 5)]
    assert SuperResolution((1, 4, 6, 8), no_file, factor=2).accepts() == [(1, 4, 6, 8), (1, 2, 3, 4)]


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


# --- The right distribution --------------------


@pytest.fixture(scope="module")
def wide() -> GaussianMixture:
    means = [[-0.6, -0.2, 0.3, 0.5], [0.5, 0.4, -0.4, 0.1], [0.1, -0.7, 0.6, -0.5]]
    return GaussianMixture(
        "", means=means, stds=[0.3] * 3, weights=[0.5, 0.3, 0.2], shape=[1, 2, 2], size=64, seed=0
    )


def plain(sampler, denoise, steps, draw, method=None):
    """Sampling without labels by one denoiser."""
    return EditProcess(
        sampler, sampler.grid(steps), None, lambda y: denoise, lambda label: denoise, method, draw, Pixels(())
    )


def denoiser_of(mixture, schedule):
    def denoise(x, t):
        alpha, sigma = schedule(t)
        x0 = mixture.denoise(x, alpha, sigma)
        return Prediction(x0, (x - alpha * x0) / sigma, sigma)

    return denoise


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


# --- Every edit with every sampler --------------------


def process(schedule, sampler, denoise, shape, method=None, steps=8, count=2):
    generator = torch.Generator().manual_seed(3)

    def draw():
        return torch.randn(count, *shape, dtype=F64, generator=generator)

    return plain(sampler, denoise, steps, draw, method)


def shrinking(schedule):
    """A denoiser of standard normal pixels."""

    def denoise(x, t):
        alpha, sigma = schedule(t)
        x0 = alpha * x / (alpha**2 + sigma**2)
        return Prediction(x0, (x - alpha * x0) / sigma, sigma)

    return denoise


RESTORATIONS = {
    "inpaint": (Inpaint(GRAY, no_file, mask=[2, 1, 6, 7]), GRAY),
    "outpaint": (Outpaint(GRAY, no_file, left=1, right=2, top=0, bottom=3, canvas="grow"), GRAY),
    "outpaint keep": (Outpaint(GRAY, no_file, left=3, right=0, top=0, bottom=0, canvas="keep"), (1, 8, 5)),
    "colorize": (Colorize((3, 8, 8), no_file), (1, 8, 8)),
    "super_resolution": (SuperResolution(GRAY, no_file, factor=4), (1, 2, 2)),
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
    edit = Inpaint((1, 2, 2), no_file, mask=[0, 0, 1, 2])
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
    "img2img": Img2Img(GRAY, no_file, strength=0.6),
    "reconstruct": Reconstruct(GRAY, no_file, strength=0.7),
    "attribute": Attribute(GRAY, no_file, source=None, strength=0.5),
    "interpolate": Interpolate(GRAY, no_file, frames=3, seeds=None, strength=0.9),
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
    edited = Img2Img(GRAY, no_file, strength=0.55)(image, given)
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
        edited = Img2Img((1, 2, 2), no_file, strength=strength)(images, given)
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
        edited = Reconstruct((1, 2, 2), no_file, strength=0.9)(images, given)
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
    frames = Interpolate((1, 2, 2), no_file, frames=5, seeds=[4, 9], strength=0.5)(start, given).images[0]
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


# --- The command --------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of a few steps: class-conditional, unconditional, a classifier; and images."""
    root = tmp_path_factory.mktemp("outputs")
    common = [
        "train", "model.channels=8", "model.norm_groups=4", "model.num_heads=1", "model.head_channels=null",
        "max_steps=20", "checkpoint_every=10", "logger=csv", "trainer=cpu", f"output_dir={root}",
    ]  # fmt: skip
    assert run([*common, "task=classifier", "name=judge", "validate_every=10"]) == 0
    assert run([*common, "name=plain"]) == 0
    assert run([*common, "name=told", "model.class_conditional=true"]) == 0
    generator = np.random.default_rng(0)
    (root / "images").mkdir()
    for name in "abc":
        Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)).save(
            root / "images" / f"{name}.png"
        )
    return root


def edit(folder, *words):
    return run(["edit", f"output_dir={folder}", "run=told", "steps=4", "device=cpu", *words])


def pixels(file):
    return np.array(Image.open(file)).astype(int)


def mask_file(folder, kind):
    """A 16 x 16 mask of one kind, and where it is to be painted."""
    pixels = np.zeros((16, 16, 4), np.uint8)
    inner = np.zeros((16, 16), bool)
    inner[4:8, 4:8] = True
    if kind.endswith("strokes"):
        pixels[inner] = {
            "white": 255,
            "gray": [200, 200, 200, 255],
            "red": [255, 0, 0, 255],
            "black": [0, 0, 0, 255],
        }[kind.split()[0]]
    elif kind == "strokes and gray pixels":
        pixels[inner] = 255
        pixels[8, 4:8] = [100, 100, 100, 255]
    elif kind == "black and white with a transparent border":
        pixels[2:12, 2:12] = [0, 0, 0, 255]
        pixels[inner] = 255
    elif kind == "page with a hole":
        inner = ~inner
        pixels[inner] = 255
    elif kind == "photograph":
        pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 4), np.uint8)
        pixels[:3, :, :3] = 250 + pixels[:3, :, :3] // 50  # a bright sky
        pixels[..., 3] = np.where(inner, 0, 255)
    elif kind == "digit":  # gray on black, with a part erased
        pixels[..., :3] = np.pad(np.arange(8 * 8).reshape(8, 8, 1) * 4, ((4, 4), (4, 4), (0, 0)))
        pixels[..., 3] = np.where(inner, 0, 255)
    else:  # opaque or transparent all over
        pixels[inner] = 255
        pixels[..., 3] = 255 * (kind == "opaque")
        inner &= kind != "transparent"
    Image.fromarray(pixels[..., 0] if kind == "without opacity" else pixels).save(folder / "mask.png")
    return folder / "mask.png", inner


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("white strokes", "the white part is painted"),
        ("black and white with a transparent border", "the white part is painted"),
        ("page with a hole", "the white part is painted"),
        ("photograph", "the transparent part is painted"),
        ("opaque", None), ("transparent", None), ("without opacity", None),
    ],
)  # fmt: skip
def test_a_mask_is_white_or_an_erased_part_of_a_photograph(tmp_path, capsys, kind, said):
    file, expected = mask_file(tmp_path, kind)
    assert ((read_mask(str(file)) >= 128).numpy() == expected).all()
    remark = capsys.readouterr().err
    assert remark.startswith(f"diffuse: edit.mask={file}: {said}") if said else not remark


@pytest.mark.parametrize(
    "kind", ["strokes and gray pixels", "gray strokes", "red strokes", "black strokes", "digit"]
)
def test_a_mask_whose_transparent_part_may_mean_either_is_refused(tmp_path, kind):
    file, _ = mask_file(tmp_path, kind)
    with pytest.raises(
        ValueError, match=r"mask.png: .*; save the mask as black and white without transparency$"
    ):
        read_mask(str(file))


@pytest.mark.slow
def test_edits_are_files_named_by_input_with_a_manifest(folder, tmp_path, capsys):
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[2:5, 3:8] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    words = [f"input={folder}/images", f"edit.mask={tmp_path}/mask.png", f"output={tmp_path}/out", "seed=5"]
    assert edit(folder, *words, "variations=2") == 0
    assert "at most 0 of 255" in capsys.readouterr().out
    names = sorted(file.name for file in (tmp_path / "out").glob("*.png"))
    assert names == ["a_0.png", "a_1.png", "b_0.png", "b_1.png", "c_0.png", "c_1.png", "grid.png"]
    for name in "abc":
        before = pixels(folder / "images" / f"{name}.png")
        for variation in "01":
            after = pixels(tmp_path / "out" / f"{name}_{variation}.png")
            assert (after == before)[mask == 0].all()
            assert (after != before)[mask > 0].any()
    assert (pixels(tmp_path / "out" / "a_0.png") != pixels(tmp_path / "out" / "a_1.png")).any()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["settings"]["seed"] == 5
    assert [name for name, _ in manifest["settings"]["inputs"]] == ["a", "b", "c"]
    assert manifest["results"]["a_0"].keys() == {"rmse", "largest", "rmse_sampled"}
    assert manifest["results"]["a_0"]["largest"] == 0
    assert manifest["results"]["a_0"]["rmse_sampled"] > 0
    # The same command with another drawing in the file does not take these results for its own.
    Image.fromarray(255 - mask).save(tmp_path / "mask.png")
    assert edit(folder, *words, "variations=2") == 2
    assert "read_sha256.mask=" in capsys.readouterr().err


def test_a_stopped_edit_is_completed_whatever_the_batch(folder, tmp_path, capsys):
    words = [f"input={folder}/images", "restoration.num_resamples=2"]
    edit(folder, *words, f"output={tmp_path}/whole")
    edit(folder, *words, f"output={tmp_path}/parts", "batch_size=1")
    (tmp_path / "parts" / "b.png").unlink()
    kept = (tmp_path / "parts" / "a.png").stat().st_mtime_ns
    edit(folder, *words, f"output={tmp_path}/parts", "batch_size=2")
    assert "has 2 of 3 results" in capsys.readouterr().err
    assert (tmp_path / "parts" / "a.png").stat().st_mtime_ns == kept
    for name in "abc":
        one, other = (pixels(tmp_path / place / f"{name}.png") for place in ("whole", "parts"))
        assert abs(one - other).max() <= 1
    assert edit(folder, *words, f"output={tmp_path}/whole", "seed=3") == 2
    assert "contains images made with other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["edit=outpaint", "edit.right=3"],
        ["edit=outpaint", "edit.top=2", "edit.canvas=keep"],
        ["edit=super_resolution", "restoration=dps", "restoration.scale=0.3"],
        ["edit=img2img", "label=3", "guidance=cfg"],
        ["edit=img2img", "label=[0,3]", "guidance=classifier", "guidance.run=judge"],
        ["edit=img2img", "guidance=auto", "guidance.step=10"],
        ["edit=reconstruct"],
        ["edit=attribute", "edit.source=4", "label=9", "guidance=cfg"],
        ["edit=interpolate", "edit.frames=4"],
        ["restoration=replacement", "sampler=unipc"],
    ],
)
def test_every_kind_of_edit_of_real_images(folder, tmp_path, words):
    assert edit(folder, *words, "input=val", "num_images=4", f"output={tmp_path}/out") == 0
    grid = pixels(tmp_path / "out" / "grid.png")
    assert grid.shape[0] % (2 if "edit=interpolate" in words else 4) == 0
    assert grid.std() > 0


def test_an_interpolation_is_a_strip_and_an_animation(folder, tmp_path):
    words = ["edit=interpolate", "edit.seeds=[2,7]", "edit.frames=4", f"output={tmp_path}/out"]
    assert edit(folder, *words) == 0
    (series,) = [path for path in (tmp_path / "out").glob("[!.]*") if path.is_dir()]
    assert [file.name for file in sorted(series.iterdir())] == [
        "000.png",
        "001.png",
        "002.png",
        "003.png",
        "strip.png",
    ]
    (animation,) = (tmp_path / "out").glob("*.gif")
    assert getattr(Image.open(animation), "n_frames", 1) == 6  # there and back
    run(
        [
            "sample",
            f"output_dir={folder}",
            "run=told",
            "steps=4",
            "label=none",
            "num_samples=8",
            f"output={tmp_path}/s",
        ]
    )
    for frame, seed in (("000", 2), ("003", 7)):
        assert abs(pixels(series / f"{frame}.png") - pixels(tmp_path / "s" / f"{seed:06d}.png")).max() <= 1


def test_labels_are_given_to_inputs_in_turn(folder, tmp_path):
    """Whatever the number of variations: input 1 gets the second label."""
    words = [f"input={folder}/images", "edit=img2img", "edit.strength=1.0", "variations=2"]
    words += ["guidance=cfg", "guidance.scale=200"]  # so that few steps of training distinguish labels
    for place, label in (("one", "[4,2,7]"), ("other", "[1,2,3]")):
        assert edit(folder, *words, f"label={label}", f"output={tmp_path}/{place}") == 0

    def same(name):
        return (pixels(tmp_path / "one" / name) == pixels(tmp_path / "other" / name)).all()

    assert same("b_0.png")
    assert same("b_1.png")
    assert not same("a_1.png")
    assert not same("c_0.png")


def test_results_of_a_command_are_input_of_the_next(folder, tmp_path):
    words = [f"output_dir={folder}", "run=told", "steps=2", "num_samples=3", "label=3"]
    assert run(["sample", *words, f"output={tmp_path}/threes"]) == 0
    assert edit(folder, "edit=reconstruct", f"input={tmp_path}/threes", f"output={tmp_path}/one") == 0
    assert edit(folder, "edit=reconstruct", f"input={tmp_path}/one", f"output={tmp_path}/two") == 0
    made = sorted(file.name for file in (tmp_path / "two").glob("*.png"))
    assert made == ["000000.png", "000001.png", "000002.png", "grid.png"]


def test_images_that_do_not_fit_are_refused_or_fitted(folder, tmp_path, capsys):
    colour = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(colour).save(tmp_path / "photo.png")
    (tmp_path / "broken.png").write_text("no image")
    assert edit(folder, f"input=[{tmp_path}/photo.png,{tmp_path}/broken.png,{tmp_path}/none.png]") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "photo.png: is 30 x 20 colour, but must be 8 x 8 gray; convert it, or set fit=true" in lines[0]
    assert "broken.png: is not an image in PNG" in lines[1]
    assert "none.png: is not a file" in lines[2]
    assert edit(folder, f"input={tmp_path}/photo.png", "fit=true", f"output={tmp_path}/out") == 0
    assert pixels(tmp_path / "out" / "photo.png").shape == (8, 8)


def test_files_of_one_name_do_not_overwrite_each_other(folder, tmp_path):
    for name in ("a.png", "a.tif", "x/a.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 7, dtype=np.uint8)).save(tmp_path / "in" / name)
    assert edit(folder, "edit=reconstruct", f"input={tmp_path}/in", f"output={tmp_path}/out") == 0
    assert len(list((tmp_path / "out").glob("*a*.png"))) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["input=null"], "input=null: required; give an image file, a folder, or val"),
        (["input=/nowhere"], "input=/nowhere: is not a file"),
        (["input=test"], "a list of images, or input=val for images of the run's dataset"),
        (["edit.mask=/nowhere.png"], "edit.mask=/nowhere.png: does not exist"),
        (["edit.mask=MASK"], "has 4 x 4 pixels, but the images have 8 x 8"),
        (
            ["edit.mask=[2,2,9,9]"],
            "edit.mask=[2, 2, 9, 9]: must be [left,top,right,bottom] in pixels within 8 x 8",
        ),
        (["label=12"], "label=12: out of range; use a class from 0 to 9"),
        (["label=frog"], "label=frog: unknown class; choose from 0, 1"),
        (["run=plain", "label=3"], "label=3: the model is not class-conditional"),
        (["run=plain", "guidance=cfg"], "guidance=cfg: the model is not class-conditional"),
        (["run=judge"], "was trained with task=classifier"),
        (["guidance=cfg"], "label: guidance=cfg needs a class"),
        (["guidance=auto"], "guidance=auto: needs a weaker model"),
        (["guidance=auto", "guidance.step=11"], "guidance.step=11: "),
        (
            ["guidance=auto", "guidance.run=plain", "guidance.interval=[3,1]"],
            "guidance.interval=[3, 1]: must be",
        ),
        (["guidance=classifier", "guidance.run=plain", "label=1"], "was trained with task=diffusion"),
        (["restoration=null"], "restoration=null: unknown option; choose from dps, repaint, replacement"),
        (["edit=img2img", "restoration=dps"], "restoration: not used by edit=img2img"),
        (["edit=attribute"], "label=null: edit=attribute needs a target class"),
        (
            ["edit=attribute", "label=1", "edit.source=12"],
            "edit.source=12: out of range; use a class from 0 to 9",
        ),
        (["edit=colorize"], "edit=colorize: the model generates gray images"),
        (["edit=super_resolution", "edit.factor=3"], "edit.factor=3: does not divide 8 x 8"),
        (["edit=outpaint"], "edit.left=0: there is no side to extend"),
        (["edit=interpolate", "num_images=3"], "3 images were given, but this edit needs a multiple of 2"),
        (["edit=interpolate", "edit.seeds=[1]"], "edit.seeds=[1]: must be pairs"),
        (["edit=attribute", "label=1", "variations=2"], "variations=2: edit=attribute is deterministic with"),
        (
            ["edit=interpolate", "edit.seeds=[0,1]"],
            "edit.seeds: cannot be combined with input, num_images or fit",
        ),
        (
            ["edit=reconstruct", "sampler=ddpm"],
            "sampler: edit=reconstruct requires a deterministic sampler",
        ),
        (
            ["edit=interpolate", "edit.seeds=[0,4294967296]"],
            "edit.seeds.1=4294967296: must be at most 4294967295",
        ),
        (["seed=4294967290"], "seed=4294967290: the seed of the last result exceeds"),
        (
            [
                "run=plain",
                "edit=attribute",
                "label=1",
                "guidance=classifier",
                "guidance.run=judge",
                "edit.source=2",
            ],
            "edit.source=2: the model is not class-conditional",
        ),
        (["edit=img2img", "edit.strength=1.5"], "edit.strength=1.5: must be at most 1"),
    ],
)
def test_wrong_input_gets_one_line(folder, tmp_path, capsys, words, expected):
    Image.fromarray(np.full((4, 4), 255, dtype=np.uint8)).save(tmp_path / "mask.png")
    words = [word.replace("MASK", str(tmp_path / "mask.png")) for word in words]
    given = [] if any(word.startswith("input=") for word in words) else ["input=val"]
    assert edit(folder, *given, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line


def test_what_is_not_finite_is_not_saved(folder, tmp_path, capsys):
    assert (
        edit(
            folder,
            "restoration=dps",
            "restoration.scale=1e38",
            "input=val",
            "num_images=1",
            f"output={tmp_path}/a",
        )
        == 2
    )
    assert "images: sampling produced values that are not finite; try a smaller" in capsys.readouterr().err
    words = [f"output_dir={folder}", "run=told", "steps=2", "num_samples=1", "label=1", "clip_x0=false"]
    assert run(["sample", *words, "guidance=cfg", "guidance.scale=1e39", f"output={tmp_path}/b"]) == 2
    assert not list((tmp_path / "b").glob("*.png"))


def test_the_order_of_the_input_is_part_of_an_edit(folder, tmp_path, capsys):
    files = [f"{folder}/images/{name}.png" for name in "ab"]
    words = ["edit=reconstruct", f"output={tmp_path}/out"]
    assert edit(folder, *words, f"input=[{','.join(files)}]") == 0
    assert edit(folder, *words, f"input=[{','.join(reversed(files))}]") == 2
    assert "inputs=" in capsys.readouterr().err


def test_names_that_would_clash_or_match_others(folder, tmp_path):
    (tmp_path / "in").mkdir()
    names = ["grid", "img[1]", "n" * 220]
    for name in names:
        Image.fromarray(np.full((8, 8), 7, dtype=np.uint8)).save(tmp_path / "in" / f"{name}.png")
    assert edit(folder, "edit=reconstruct", f"input={tmp_path}/in", f"output={tmp_path}/out") == 0
    assert pixels(tmp_path / "out" / "00000_grid.png").shape == (8, 8)
    assert pixels(tmp_path / "out" / "grid.png").shape == (3 * 34, 3 * 34)
    assert (tmp_path / "out" / "img[1].png").is_file()


def test_two_edits_at_work_in_one_folder_keep_the_numbers_of_both(folder, tmp_path, monkeypatch):
    words = [f"input={folder}/images", "edit=img2img", f"output={tmp_path}/out", "batch_size=3"]
    save = editing._save

    def beside(output, batch, images, shown, form):
        save(output, batch, images, shown, form)
        keep_results(
            output, {"of another": {"rmse": 1.0}}
        )  # as a process does that claimed the folder before

    monkeypatch.setattr(editing, "_save", beside)
    assert edit(folder, *words) == 0
    results = json.loads((tmp_path / "out" / "manifest.json").read_text())["results"]
    assert sorted(results) == ["a", "b", "c", "of another"]


def test_results_put_together_from_names_do_not_meet(folder, tmp_path):
    words = [
        "edit=interpolate",
        "edit.seeds=[0,1,0,1]",
        "label=[4,9]",
        "edit.frames=2",
        f"output={tmp_path}/a",
    ]
    assert edit(folder, *words) == 0
    assert len([path for path in (tmp_path / "a").glob("[!.]*") if path.is_dir()]) == 2
    (tmp_path / "in").mkdir()
    for name in ("a-b", "c", "a", "b-c"):
        Image.fromarray(np.full((8, 8), 7, dtype=np.uint8)).save(tmp_path / "in" / f"{name}.png")
    files = ",".join(f"{tmp_path}/in/{name}.png" for name in ("a-b", "c", "a", "b-c"))
    assert edit(folder, "edit=interpolate", "edit.frames=2", f"input=[{files}]", f"output={tmp_path}/b") == 0
    assert len(list((tmp_path / "b").glob("*.gif"))) == 2


def test_results_within_the_input_are_not_input(folder, tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(np.full((8, 8), 7, dtype=np.uint8)).save(tmp_path / "in" / "one.png")
    for _ in range(2):
        assert edit(folder, "edit=reconstruct", f"input={tmp_path}/in", f"output={tmp_path}/in/out") == 0
    assert len(list((tmp_path / "in" / "out").glob("*.png"))) == 2


def test_a_series_with_a_frame_missing_is_made_again(folder, tmp_path, capsys):
    words = ["edit=interpolate", "edit.seeds=[2,7]", "edit.frames=3", f"output={tmp_path}/out"]
    assert edit(folder, *words) == 0
    frame = tmp_path / "out" / "seed_2-seed_7" / "001.png"
    before = frame.read_bytes()
    frame.unlink()
    assert edit(folder, *words) == 0
    assert frame.read_bytes() == before


def test_a_null_class_that_was_never_trained_is_refused(folder, tmp_path, capsys):
    words = ["train", "max_steps=2", "logger=csv", "trainer=cpu", f"output_dir={tmp_path}", "name=sure"]
    assert run([*words, "model.class_conditional=true", "objective.label_dropout=0"]) == 0
    for command in (["sample", "label=none"], ["edit", "edit=reconstruct", "input=val"]):
        assert run([*command, f"output_dir={tmp_path}", "steps=2"]) == 2
        assert (
            "label=null: unconditional sampling needs a model trained with objective.label_dropout > 0"
            in capsys.readouterr().err
        )
    assert run(["edit", "edit=attribute", "label=3", "input=val", f"output_dir={tmp_path}", "steps=2"]) == 2
    assert "edit.source=null: unconditional sampling needs" in capsys.readouterr().err


def test_labels_are_chosen_by_name_number_list_and_all(folder, tmp_path):
    def sample(*words):
        return run(["sample", f"output_dir={folder}", "run=told", "steps=2", "num_samples=6", *words])

    def manifest(place):
        return json.loads((tmp_path / place / "manifest.json").read_text())["settings"]["labels"]

    for label, numbers in (
        ("7", [7]),
        ("[4,2]", [4, 2]),
        ("all", list(range(10))),
        ("null", list(range(10))),
    ):
        place = label.strip("[]").replace(",", "_")
        assert sample(f"label={label}", f"output={tmp_path}/{place}") == 0
        assert manifest(place) == numbers
    assert sample("label=none", f"output={tmp_path}/none") == 0
    assert manifest("none") is None
    two = pixels(tmp_path / "4_2" / "grid.png")
    assert two.shape == (2 * 34, 3 * 34)  # a row a class


def test_the_newest_run_is_that_of_a_denoiser(folder, capsys):
    (folder / "judge" / "checkpoints" / "last.ckpt").touch()
    assert run(["sample", f"output_dir={folder}", "steps=2", "num_samples=2"]) == 0
    assert "judge" not in capsys.readouterr().out


def test_a_classifier_run_shows_its_accuracy_by_noise_level(folder):
    header = (folder / "judge" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"val_accuracy", "val_accuracy_q1", "val_accuracy_q4", "val_loss"} <= set(header)
