"""One optimizer step, validation, samples on the way, and the average of the weights."""

import csv
import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from diffusion_cli.conditions import Condition
from diffusion_cli.data import Batch, ResolutionSchedule
from diffusion_cli.data.progressive import Stage
from diffusion_cli.diffusion.denoiser import Denoiser, NoisyClassifier
from diffusion_cli.diffusion.latents import Pixels
from diffusion_cli.diffusion.objectives import Objective, Target
from diffusion_cli.diffusion.parameterizations import X0
from diffusion_cli.diffusion.schedules import Rectified
from diffusion_cli.diffusion.time_sampling import TimeBatch, Times, Uniform
from diffusion_cli.formats import Uint8Image
from diffusion_cli.metrics import EvaluationCancelled
from diffusion_cli.samplers import DDIM
from diffusion_cli.training import evaluation
from diffusion_cli.training.callbacks import GracefulStop
from diffusion_cli.training.ema import EMA, ExponentialAverage
from diffusion_cli.training.module import DenoisingModule, LevelMeter
from diffusion_cli.training.optimizers import Optimization
from diffusion_cli.training.previews import Preview
from diffusion_cli.training.validation import ValidationAccuracy, ValidationLoss
from helpers import checkpoint_info, state, train

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


# --- One step ------------------------------------------------------------


class Constant(nn.Module):
    """A network with its one weight as output everywhere."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(value))

    def forward(self, x: Tensor, c_noise: Tensor, y: Tensor | None) -> Tensor:
        return self.weight.expand(x.shape)


class Recorded(Objective):
    """A loss of 1, 2, ... for the images of a batch; it keeps what each call draws."""

    def __init__(self) -> None:
        self.times: list[Tensor] = []
        self.noise: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.masks: list[Tensor] = []

    def __call__(self, model, x0, y, t, eps):
        self.times.append(t)
        self.noise.append(eps)
        self.labels.append(Condition.of(y).values.get("label", torch.empty(0)))
        self.masks.append(nn.functional.dropout(torch.ones(64), 0.5))
        return torch.arange(1.0, len(x0) + 1)

    def check(self, model, times):
        pass


class Weighing(Times):
    """Uniform times with the weights 1, 2, 3, ... and a bin an image; it keeps the losses that it is shown."""

    def forward(self, schedule, u):
        self.observed: list[tuple[Tensor, Tensor]] = []
        return TimeBatch(schedule.time(u), torch.arange(1.0, len(u) + 1), u, torch.arange(len(u)))

    def observe(self, bins, loss):
        self.observed.append((bins, loss))


def optimization(clip_norm: float | None = None) -> Optimization:
    node = {"_target_": "diffusion_cli.training.Adam", "lr": 1.0}
    return Optimization(node, {"_target_": "diffusion_cli.training.ConstantRate"}, clip_norm)


def step_of(objective: Objective, times: Times, seed: int = 0, **place: int) -> DenoisingModule:
    """A module in the place of a process, as Lightning would have it; its images are 1 x 2 x 2."""
    denoiser = Denoiser(Constant(0.0), Rectified(), X0())
    module = DenoisingModule(
        denoiser,
        objective,
        times,
        Pixels((1, 2, 2)),
        optimization(),
        seed=seed,
        info=checkpoint_info((1, 2, 2)),
    )
    alone = {"accumulate_grad_batches": 1, "world_size": 1, "global_rank": 0, "global_step": 0}
    module.trainer = SimpleNamespace(**{**alone, **place})  # pyright: ignore[reportAttributeAccessIssue]
    return module


def batch(number: int, count: int = 8) -> Batch:
    return Batch(number, torch.zeros(count, 1, 2, 2), None, torch.arange(count))


def test_noise_and_times_are_a_function_of_seed_and_step():
    """Equal for equal seeds and steps, whatever was drawn before; unlike for others."""
    objective = Recorded()
    for seed, number in ((0, 3), (0, 3), (0, 4), (1, 3)):
        torch.rand(seed + number)
        step_of(objective, Uniform(), seed).training_step(batch(number), 0)
    for first, again, *others in (objective.times, objective.noise, objective.masks):
        assert torch.equal(first, again)
        assert not any(torch.equal(first, other) for other in others)
    assert len(objective.times[0].unique()) == len(objective.noise[0].flatten(1).unique(dim=0)) == 8


@pytest.mark.parametrize("place", ["process", "part"])
def test_processes_and_parts_share_one_draw_and_have_their_own_dropout(place):
    whole, shares = Recorded(), Recorded()
    step_of(whole, Uniform()).training_step(batch(5), 0)
    for n in range(2):
        if place == "process":
            step_of(shares, Uniform(), world_size=2, global_rank=n).training_step(batch(5, 4), 0)
        else:
            step_of(shares, Uniform(), accumulate_grad_batches=2).training_step(batch(10 + n, 4), 0)
    assert torch.equal(torch.cat(shares.times), whole.times[0])
    assert torch.equal(torch.cat(shares.noise), whole.noise[0])
    assert not torch.equal(*shares.masks)


def test_processes_have_their_own_dropout_at_each_step():
    objective = Recorded()
    for rank in range(3):
        for number in (0, 1):
            step_of(objective, Uniform(), world_size=3, global_rank=rank).training_step(batch(number), 0)
    assert len(torch.stack(objective.masks).unique(dim=0)) == 6


def test_labels_are_withheld_at_the_share_of_the_objective():
    objective = Recorded()
    module = step_of(objective, Uniform())
    module.model.network.num_classes = 3  # pyright: ignore[reportArgumentType]
    given = torch.arange(2000) % 3
    for share in (0.0, 0.3):
        objective.label_dropout = share
        module.training_step(batch(0, 2000)._replace(condition=Condition.of(given)), 0)
    kept, withheld = objective.labels
    assert torch.equal(kept, given)
    assert abs((withheld == -1).float().mean().item() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 2000)
    assert torch.equal(withheld[withheld >= 0], given[withheld >= 0])


def test_the_loss_is_the_weighted_mean_and_times_learn_from_the_unweighted_losses():
    times = Weighing()
    module = step_of(Recorded(), times)
    loss = module.training_step(batch(0, 4), 0)
    assert loss.item() == (1 * 1 + 2 * 2 + 3 * 3 + 4 * 4) / 4
    assert module.meter.read()["loss"] == loss.item()
    ((bins, seen),) = times.observed
    assert (bins.tolist(), seen.tolist()) == ([0, 1, 2, 3], [1.0, 2.0, 3.0, 4.0])


def test_gradients_are_scaled_down_to_the_norm():
    module = step_of(Recorded(), Uniform())
    module.model.network.bias = nn.Parameter(torch.zeros(()))
    for clip_norm, expected in ((1.0, (0.6, 0.8)), (10.0, (3.0, 4.0)), (None, (3.0, 4.0))):
        module.optimization = optimization(clip_norm)
        for weight, gradient in zip(module.model.parameters(), (3.0, 4.0), strict=True):
            weight.grad = torch.tensor(gradient)
        module.configure_gradient_clipping(torch.optim.SGD(module.parameters(), 1.0))
        found = [weight.grad.item() for weight in module.model.parameters() if weight.grad is not None]
        assert found == pytest.approx(expected, rel=1e-5)


def test_a_run_clips_and_warms_up(tmp_path):
    """Adam undoes any scale of gradients but one that its eps drowns: then no weight moves by a millionth."""
    weights = {}
    for clip_norm in ("null", "1e-12"):
        folder = tmp_path / clip_norm
        assert train(folder, "max_steps=3", "log_every=1", f"clip_norm={clip_norm}") == 0
        weights[clip_norm] = state(folder)
    rates = [float(row["lr"]) for row in csv.DictReader((tmp_path / "null" / "tiny" / "metrics.csv").open())]
    assert rates == pytest.approx([0.001 * share for share in (2 / 3, 1, 1)])  # of the steps that come next
    moved = {}
    for clip_norm, found in weights.items():
        average = found["callbacks"]["EMA"]["network"]
        moved[clip_norm] = max(
            (weight - average[key.removeprefix("model.network.")]).abs().max().item()
            for key, weight in found["state_dict"].items()
        )
    assert moved["1e-12"] < 1e-6 < 1e-4 < moved["null"]


class Guess(nn.Module):
    """A classifier with its weights as scores, for any image."""

    task = "classifier"

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.tensor(scores))

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return self.scores.expand(len(x), -1)


class Log:
    """A logger and trainer in one."""

    is_global_zero = True
    precision_plugin = SimpleNamespace(forward_context=nullcontext)

    def __init__(self) -> None:
        self.loggers, self.values, self.callback_metrics = [self], {}, {}
        self.callbacks = []

    def log_metrics(self, values, step):
        self.values |= values


def averaged(module: DenoisingModule, network: nn.Module) -> EMA:
    """The average of a module's network, which has another network now."""
    ema = EMA(module.model.network, ExponentialAverage(0.9, warm_up=False))
    module.model.network = network
    return ema


def test_the_val_loss_and_previews_are_those_of_the_averaged_weights(tmp_path):
    module = step_of(Target(label_dropout=0.0), Uniform())
    log, stop, ema = Log(), GracefulStop(None, None), averaged(module, Constant(1.0))
    images = torch.rand(6, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    val = [Batch(0, images[:4], None, torch.arange(4)), Batch(1, images[4:], None, torch.arange(2))]
    ValidationLoss(1, lambda step: val, ema, stop).run(log, module, 1)  # pyright: ignore[reportArgumentType]
    assert log.values == {"val_loss": pytest.approx(images.square().mean().item(), rel=1e-5)}
    sampler = DDIM(module.model.schedule, eta=0.0, spacing="time")
    preview = Preview(
        1, ema, stop, run=tmp_path, sampler=sampler, steps=2, stages=ResolutionSchedule([Stage(0, (1, 2, 2), 1)]),
        space=Pixels((1, 2, 2)), form=Uint8Image(), batch_size=1,
    )  # fmt: skip
    preview.run(log, module, 1)  # pyright: ignore[reportArgumentType]
    with Image.open(tmp_path / "previews" / "step_00000001.png") as picture:
        assert picture.getpixel((1, 1)) == 128  # of the value 0; the network of now makes 255


def test_samples_on_the_way_are_those_of_the_averaged_weights(tmp_path, monkeypatch):
    seen: list[Tensor] = []

    def evaluate(metrics, networks, samples, *others, **options):
        seen.append(samples.batch([0, 1])[0])
        raise EvaluationCancelled

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    module, shape = step_of(Recorded(), Uniform()), (1, 2, 2)
    log, ema = Log(), averaged(module, Constant(1.0))
    sampler = DDIM(module.model.schedule, eta=0.0, spacing="time")
    data: Any = SimpleNamespace(dataset=SimpleNamespace(name="some", shape=shape), cache_dir=tmp_path)
    watcher = evaluation.EvaluationCallback(
        1,
        {},
        data,
        data,
        evaluation.TrainingSamples(
            2, sampler, 2, shape, Pixels(shape), form=Uint8Image(), names=None, condition=None
        ),
        ResolutionSchedule([Stage(0, shape, 1)]),
        run=tmp_path,
        ema=ema,
        stop=GracefulStop(None, None),
        batch_size=2,
        keep_best=None,
        identity="",
    )
    assert not watcher.run(log, module, 1)  # pyright: ignore[reportArgumentType]
    assert seen[0].unique().tolist() == [128]  # of the value 0; the network of now makes 255


def test_the_val_accuracy_is_that_of_the_averaged_weights():
    module = step_of(Recorded(), Uniform())
    classifier = NoisyClassifier(Guess([0.0, 1.0, 0.0]), module.model.schedule, X0())
    module.model = classifier  # pyright: ignore[reportAttributeAccessIssue]
    log, ema = Log(), averaged(module, Guess([1.0, 0.0, 0.0]))
    labels = torch.tensor([0, 1, 2, 1])
    val = [batch(0, 4)._replace(condition=Condition.of(labels), labels=labels)]
    watcher = ValidationAccuracy(1, lambda step: val, ema, GracefulStop(None, None))
    watcher.run(log, module, 1)  # pyright: ignore[reportArgumentType]
    assert log.values["val_accuracy"] == 0.5


def test_validation_images_meet_the_same_noise_at_spread_times_whenever_they_are_measured():
    objective = Recorded()
    for seed, number in ((0, 7), (0, 900), (1, 7)):
        module = step_of(objective, Uniform(), seed)
        list(module.val_losses(module.model, [batch(number), batch(number + 1)]))
    (first, second, again, _, other, _), noise = objective.times, objective.noise
    assert torch.equal(first, again)
    assert torch.equal(noise[0], noise[2])
    assert not torch.equal(first, second)
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(first, other)
    assert (first * 8).floor().tolist() == list(range(8))  # one in each of 8 equal intervals,
    assert (first * 8).frac().std() > 0.1  # anywhere in it


# --- Pieces ------------------------------------------------------------


def test_ema_decay_equals_score_sde(reference):
    arrays = reference("ema")
    average = ExponentialAverage(0.9999, warm_up=True)
    mine = torch.tensor([average.decay_at(int(n)) for n in arrays["steps"]], dtype=torch.float64)
    torch.testing.assert_close(mine, arrays["scoresde"], rtol=1e-12, atol=0)


def test_ema_is_the_weighted_sum_of_the_past():
    network = torch.nn.Linear(1, 1, bias=False)
    ema = EMA(network, ExponentialAverage(0.9, warm_up=False))
    start = network.weight.item()
    expected = start
    for value in (1.0, -2.0, 5.0):
        with torch.no_grad():
            network.weight.fill_(value)
            ema.update(network)
        expected = 0.9 * expected + 0.1 * value
    (weight,) = ema.network.parameters()
    assert weight.item() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert not weight.requires_grad


def test_ema_has_the_buffers_of_the_network():
    network = nn.BatchNorm1d(2)
    ema = EMA(network, ExponentialAverage(0.9, warm_up=False))
    network.running_mean = torch.tensor([3.0, 4.0])
    ema.update(network)
    for found in (ema.network, network):
        assert dict(found.named_buffers())["running_mean"].tolist() == [3.0, 4.0]


def test_ema_moves_once_an_optimizer_step():
    """However many parts a batch has: the EMA is called after each."""
    module = step_of(Recorded(), Uniform())
    ema, updates = EMA(module.model.network, ExponentialAverage(0.9, warm_up=False)), []
    for step in (0, 0, 1, 1, 1, 2):
        module.trainer.global_step = step  # pyright: ignore[reportAttributeAccessIssue]
        ema.on_train_batch_end(module.trainer, module, None, None, 0)
        updates.append(ema.updates)
    assert updates == [0, 0, 1, 1, 1, 2]


def test_meter_separates_noise_levels_and_finds_the_first_bad_step():
    meter = LevelMeter()
    quantile = torch.tensor([0.0, 0.24, 0.26, 0.74, 1.0], dtype=torch.float64)
    meter.add(torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0]), quantile, step=0)
    assert meter.read() == {"loss": 3.6, "loss_q1": 1.5, "loss_q2": 3.0, "loss_q3": 5.0, "loss_q4": 7.0}
    assert meter.first_bad_step() is None
    for step in (4, 5):
        meter.add(torch.tensor([float("nan")]), torch.tensor([0.5]), step=step)
    assert meter.first_bad_step() == 4
