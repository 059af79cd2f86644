"""Training with random transforms of the images, which are an input of the network."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from diffusion_cli.cli import run
from diffusion_cli.commands import train_conditions
from diffusion_cli.commands.train_conditions import augmentation_size
from diffusion_cli.conditions import Condition, Conditions
from diffusion_cli.config import build
from diffusion_cli.data import Batch, EDMAugmentation
from diffusion_cli.diffusion.denoiser import Denoiser
from diffusion_cli.diffusion.latents import Pixels
from diffusion_cli.diffusion.objectives import Simple
from diffusion_cli.diffusion.parameterizations import Eps
from diffusion_cli.diffusion.schedules import Cosine
from diffusion_cli.diffusion.time_sampling import Uniform
from diffusion_cli.networks import DiT, UNet
from diffusion_cli.training.module import DenoisingModule
from helpers import assert_same, checkpoint_info
from helpers.networks import randomised
from helpers.recipes import train_config

COUNT, SHAPE = 16, (1, 8, 8)
CLASSES = Conditions.of(3)
UNETS = {"channels": 8, "norm_groups": 4, "head_channels": 8, "class_conditional": True}


def with_transforms(conditions: Conditions) -> Conditions:
    return conditions.model_copy(update={"augmentation": EDMAugmentation.size})


def unet(conditions: Conditions) -> UNet:
    torch.manual_seed(0)
    return UNet(SHAPE, conditions, **UNETS)


def dit(conditions: Conditions) -> DiT:
    torch.manual_seed(0)
    return DiT(SHAPE, conditions, hidden_size=16, depth=1, num_heads=2, class_conditional=True)


class Recorder(Simple):
    """An objective that keeps the images and conditions that it gets."""

    def __init__(self, label_dropout: float) -> None:
        super().__init__(label_dropout=label_dropout)
        self.seen: list[tuple[Tensor, Condition, Tensor]] = []

    def __call__(self, model, x0, y, t, eps):
        assert y is not None
        self.seen.append((x0, y, eps))
        return super().__call__(model, x0, y, t, eps)


def module(network: nn.Module, objective: Recorder, augmentation: EDMAugmentation | None, **place: int):
    made = DenoisingModule(
        Denoiser(network, Cosine(), Eps()), objective, Uniform(), Pixels(SHAPE), None,  # pyright: ignore
        seed=0, info=checkpoint_info(), augmentation=augmentation,
    )  # fmt: skip
    alone = {"accumulate_grad_batches": 1, "world_size": 1, "global_rank": 0, "global_step": 0}
    made.trainer = SimpleNamespace(**{**alone, **place})  # pyright: ignore[reportAttributeAccessIssue]
    return made


def batch(number: int = 0, rows: slice = slice(COUNT)) -> Batch:
    images = 2 * torch.rand(COUNT, *SHAPE, generator=torch.Generator().manual_seed(0)) - 1
    labels = Condition({"label": torch.arange(COUNT) % 3})
    return Batch(number, images, labels, torch.arange(COUNT)).part(torch.arange(COUNT)[rows])


@pytest.mark.parametrize("network", [unet, dit])
def test_the_network_is_the_same_without_a_transform(network):
    """At first for all parameters; later for those of an unchanged image, and for samples, which have none."""
    plain, augmented = network(CLASSES), network(with_transforms(CLASSES))
    weights = augmented.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in plain.state_dict().items())
    x, c_noise, y = (
        torch.randn(2, *SHAPE),
        torch.tensor([10.0, 500.0]),
        Condition({"label": torch.tensor([0, 2])}),
    )
    randomised(plain)
    augmented.load_state_dict(plain.state_dict(), strict=False)
    parameters = EDMAugmentation(probability=1.0).draw(2, torch.Generator().manual_seed(0))
    given = y.replaced({"augmentation": parameters})
    assert torch.equal(augmented(x, c_noise, given), plain(x, c_noise, y))
    nn.init.ones_(augmented.condition_embedding.augmentation.weight)
    assert torch.equal(augmented(x, c_noise, y), plain(x, c_noise, y))
    assert torch.equal(
        augmented(x, c_noise, y.replaced({"augmentation": 0 * parameters})), plain(x, c_noise, y)
    )
    assert not torch.allclose(augmented(x, c_noise, given), plain(x, c_noise, y), atol=1e-3)


def test_probability_0_is_training_without_augmentation_to_the_last_bit():
    plain, augmented = randomised(unet(CLASSES)), unet(with_transforms(CLASSES))
    augmented.load_state_dict(plain.state_dict(), strict=False)
    losses = [
        module(plain, Recorder(0.1), None).training_step(batch(), 0),
        module(augmented, Recorder(0.1), EDMAugmentation(probability=0.0)).training_step(batch(), 0),
    ]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    weights = dict(augmented.named_parameters())
    for name, weight in plain.named_parameters():
        assert_same(weights.pop(name).grad, weight.grad)
    assert [bool(weight.grad is not None and weight.grad.any()) for weight in weights.values()] == [False]


def test_the_network_gets_the_transform_of_each_image_even_without_its_label():
    objective = Recorder(0.9)
    module(unet(with_transforms(CLASSES)), objective, EDMAugmentation(probability=0.5)).training_step(
        batch(), 0
    )
    ((images, condition, eps),) = objective.seen
    assert (condition.values["label"] < 0).any()
    assert torch.equal(images, EDMAugmentation()(batch().images, condition.values["augmentation"]))
    assert 0 < (images != batch().images).flatten(1).any(1).sum() <= COUNT
    plain = Recorder(0.9)
    module(unet(CLASSES), plain, None).training_step(batch(), 0)
    assert torch.equal(eps, plain.seen[0][2])


@pytest.mark.parametrize("place", ["process", "part"])
def test_processes_and_parts_share_one_draw(place):
    whole, shares, augmentation = Recorder(0.0), Recorder(0.0), EDMAugmentation(probability=0.5)
    network, half = unet(with_transforms(CLASSES)), COUNT // 2
    module(network, whole, augmentation).training_step(batch(3), 0)
    for n in range(2):
        rows = slice(n * half, (n + 1) * half)
        if place == "process":
            module(network, shares, augmentation, world_size=2, global_rank=n).training_step(
                batch(3, rows), 0
            )
        else:
            module(network, shares, augmentation, accumulate_grad_batches=2).training_step(
                batch(6 + n, rows), 0
            )
    assert torch.equal(torch.cat([images for images, *_ in shares.seen]), whole.seen[0][0])
    parameters = [condition.values["augmentation"] for _, condition, _ in shares.seen]
    assert torch.equal(torch.cat(parameters), whole.seen[0][1].values["augmentation"])


@pytest.mark.parametrize(("words", "message"), [
    (["task=autoencoder"], "augmentation=edm: does not apply to task=autoencoder; set augmentation=none"),
    (["task=classifier"], "augmentation=edm: does not apply to task=classifier; set augmentation=none"),
    (["coupling=ot", "objective=target"], "augmentation=edm: coupling=ot would let the noise depend on the transforms"),
    (["condition=image", "condition.of=noise"], "augmentation=edm: condition=image would need the same transforms"),
    (["dataset=points"], "augmentation=edm: applies to images alone"),
    (["dataset.flip=true"], "dataset.flip=true: flips images that augmentation.x_flip=true flips too; set it to false"),
    (["augmentation.rotation=200"], "augmentation.rotation=200: must be at most 180"),
])  # fmt: skip
def test_what_cannot_be_augmented_is_refused_in_one_line(words, message, tmp_path, capsys):
    assert run(["train", f"output_dir={tmp_path}", "augmentation=edm", *words]) == 2
    assert message in capsys.readouterr().err


def test_probability_0_leaves_the_flips_to_the_dataset():
    config = train_config("augmentation=edm", "augmentation.probability=0", "dataset.flip=true")
    assert augmentation_size(config, build(config.dataset, config.data_dir), Denoiser) == EDMAugmentation.size


class Deaf(nn.Module):
    """A network of a plugin that takes conditions, but ignores the transforms."""

    takes_conditions = True


def test_a_network_that_ignores_the_transforms_is_refused_even_if_it_takes_conditions(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(train_conditions, "target", lambda _: Deaf)
    assert run(["train", f"output_dir={tmp_path}", "augmentation=edm", "max_steps=1"]) == 2
    line = "augmentation=edm: Deaf has no input for the transforms; set augmentation=none"
    assert line in capsys.readouterr().err
