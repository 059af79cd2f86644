"""From seeds to images: the image of a seed does not depend on its batch."""

import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffusion_cli.commands.class_labels import labels_named
from diffusion_cli.diffusion.denoiser import Denoiser, Prediction
from diffusion_cli.diffusion.guidance import NoGuidance
from diffusion_cli.diffusion.latents import Pixels
from diffusion_cli.diffusion.parameterizations import Eps
from diffusion_cli.formats import to_bytes
from diffusion_cli.generate import (
    SamplingPipeline,
    SeededNoise,
    class_condition,
    generate,
    scale_for_display,
    states,
    trajectories,
)
from diffusion_cli.images import grid
from diffusion_cli.networks import UNet
from diffusion_cli.runs.load import LoadedDenoiser
from diffusion_cli.samplers import DDIM, DDPM, Sampler
from helpers import checkpoint_info

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(schedules):
    """An untrained network with random weights everywhere, so that inputs matter."""
    torch.manual_seed(0)
    network = UNet(
        (1, 8, 8), 3, channels=8, channel_mult=[1, 2], attention_resolutions=[4], num_heads=1, head_channels=None,
        norm_groups=4, dropout=0.5, class_conditional=True,
    )  # fmt: skip
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    denoiser = Denoiser(network, schedules["cosine"], Eps()).eval()
    info = checkpoint_info(class_names=("a", "b", "c"))
    return LoadedDenoiser(info, 0, "", denoiser, Pixels((1, 8, 8)))


def pipeline(model: LoadedDenoiser, sampler: Sampler, steps: int) -> SamplingPipeline:
    """Sampling of the three classes in turn, without guidance."""
    return SamplingPipeline(
        model=model, sampler=sampler, steps=steps, guidance=NoGuidance(None),
        condition=class_condition([0, 1, 2]), clip=True,
        precision="fp32",
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["ddim", "ddpm"])
def test_an_image_does_not_depend_on_its_batch(model, kind):
    schedule = model.denoiser.schedule
    sampler = (
        DDIM(schedule, eta=0.0, spacing="trailing")
        if kind == "ddim"
        else DDPM(schedule, variance="large", spacing="trailing")
    )

    def images(seeds, batch_size):
        batches = generate(pipeline(model, sampler, steps=6), seeds, batch_size)
        return {seed: image for part, out, _, _ in batches for seed, image in zip(part, out, strict=True)}

    together, alone, others = images(range(10), 10), images(range(10), 1), images([7, 3, 100], 2)
    for seed in range(10):
        assert (together[seed].int() - alone[seed].int()).abs().max() <= 1
    for seed in (3, 7):
        assert (together[seed].int() - others[seed].int()).abs().max() <= 1
    assert not torch.equal(together[0], together[3])


def test_labels_go_round_and_matter(model):
    sampler = DDIM(model.denoiser.schedule, eta=0.0, spacing="trailing")
    parts = list(generate(pipeline(model, sampler, steps=3), range(5), 2))
    given = [label for part in parts if part.condition for label in part.condition.values["label"].tolist()]
    assert given == [0, 1, 2, 0, 1]
    x, t = torch.randn(1, 1, 8, 8), torch.tensor(0.5, dtype=torch.float64)
    one, other = (model.denoiser(x, t, torch.tensor([label])).eps for label in (0, 1))
    assert not torch.allclose(one, other)


def test_noise_is_one_stream_a_seed():
    together, alone = SeededNoise([3, 4], (1, 4, 4), CPU), SeededNoise([4], (1, 4, 4), CPU)
    for _ in range(3):
        assert torch.equal(together.noise()[1], alone.noise()[0])


def test_generation_starts_from_the_noise_of_the_process(schedules):
    def denoise(x, t):
        return Prediction(x0=0 * x, eps=x, sigma=t)

    for tag, size in (("ve", 50), ("edm", 80), ("vp", 1)):
        sampler = DDIM(schedules[tag], eta=0.0, spacing="time")
        start = next(states(denoise, sampler, sampler.grid(3), [3, 4], (1, 4, 4), CPU))
        torch.testing.assert_close(start, size * SeededNoise([3, 4], (1, 4, 4), CPU).noise())


def test_noise_drawn_ahead_is_the_same_and_only_where_there_is_more_than_a_start(monkeypatch):
    gpu: Any = SimpleNamespace(type="cuda")  # a device that takes no tensor, and draws ahead
    empty, threads = torch.empty, set()

    def drawn(self, _next=SeededNoise._next):
        threads.add(threading.current_thread())
        return _next(self)

    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory: empty(*shape))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, non_blocking: self)
    monkeypatch.setattr(SeededNoise, "_next", drawn)
    ahead, now = SeededNoise([3, 4], (1, 4, 4), gpu), SeededNoise([3, 4], (1, 4, 4), CPU)
    assert torch.equal(ahead.noise(), now.noise())
    assert threads == {threading.current_thread()}
    for _ in range(5):
        assert torch.equal(ahead.noise(), now.noise())
    assert len(threads) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_noise_on_a_gpu_is_that_of_the_cpu():
    on_gpu, on_cpu = (SeededNoise([3, 4], (1, 64, 64), torch.device(name)) for name in ("cuda", "cpu"))
    for _ in range(20):
        assert torch.equal(on_gpu.noise().cpu(), on_cpu.noise())


def test_bytes_are_the_nearest_levels():
    levels = torch.arange(256.0)
    assert torch.equal(to_bytes(levels / 127.5 - 1), levels.byte())
    assert to_bytes(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
    assert to_bytes((levels[:-1] + 0.49) / 127.5 - 1).tolist() == list(range(255))


def test_grid_shows_each_image_in_its_place():
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 1, 40, 40) * 10
    picture = grid(images, columns=3)
    assert picture.shape == (1, 84, 126)
    assert picture[0, 21::42, 21::42].tolist() == [[0, 10, 20], [30, 40, 50]]


def test_the_words_of_label_stand_for_classes_of_that_name_first(model):
    def labels(label, *names):
        return labels_named(
            label,
            replace(model, info=checkpoint_info(class_names=names)),
            NoGuidance(None),
            [0, 2],
            null_label="all",
        )

    usual = "a", "b", "c"
    for label, expected in (
        (None, [0, 2]),
        ("null", [0, 2]),
        ("all", [0, 2]),
        ("none", None),
        ([], None),
    ):
        assert labels(label, *usual) == expected
    assert labels("none", "mild", "none", "severe") == [1]
    assert labels("all", "all", "null", "true") == [0]
    assert labels("null", "all", "null", "true") == [1]
    assert labels(None, "all", "null", "true") == [0, 2]
    assert labels([], "none", "null", "all") is None
    assert labels(["null", "all"], "all", "null", "true") == [1, 0]


# --- How images arise ------------------------------------------------------------


@pytest.mark.parametrize(("frames", "kept"), [(7, 7), (3, 3), (100, 7)])
def test_a_trajectory_goes_from_the_noise_to_the_image_itself(model, frames, kept):
    sampling = pipeline(model, DDPM(model.denoiser.schedule, variance="large", spacing="trailing"), steps=6)
    ways = trajectories(sampling, range(5), 2, frames=frames)
    assert ways.shape == (5, kept, 1, 8, 8)
    images = torch.cat([batch.images for batch in generate(sampling, range(5), 2)])
    assert torch.equal(ways[:, -1], images)
    noise = torch.cat([SeededNoise([seed], (1, 8, 8), CPU).noise() for seed in range(5)])
    assert torch.equal(ways[:, 0], to_bytes(noise))


@pytest.mark.parametrize("name", ["ve", "edm", "subvp", "rectified", "cosine"])
def test_states_are_shown_with_the_variance_of_the_data(schedules, name):
    schedule = schedules[name]
    image, noise = torch.full((1, 1, 4, 4), 0.3), torch.linspace(-0.9, 0.9, 16).reshape(1, 1, 4, 4)
    one, zero = torch.ones(1), torch.zeros(1)
    assert torch.equal(to_bytes(scale_for_display(image, zero, schedule)), to_bytes(image))
    _, sigma = schedule(one)
    state = (sigma * noise).float()
    difference = to_bytes(scale_for_display(state, one, schedule)).int() - to_bytes(noise).int()
    assert difference.abs().max() <= 1
    if name == "cosine":
        assert torch.equal(to_bytes(scale_for_display(state, one, schedule)), to_bytes(state))


def test_the_shares_of_all_batches_are_reported(model):
    shares: list[float] = []
    sampling = pipeline(model, DDIM(model.denoiser.schedule), 4)
    assert len(list(generate(sampling, range(5), 2, shares.append))) == 3
    # The last step of a batch is done when the batch is there.
    assert shares == pytest.approx([2 / 5 / 4] * 6 + [1 / 5 / 4] * 3)
    shares.clear()
    trajectories(sampling, range(5), 2, frames=3, advance=shares.append)
    assert sum(shares) == pytest.approx(3 / 4)
