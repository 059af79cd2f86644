"""Side-by-side timings as a Markdown table: `python scripts/benchmark.py [startup loading loop sampling ...]`.

Each pair runs A B A B ... in one process; the table gives the median of each and the ratio of the medians, since
absolute times mean little on a shared machine. `step` also needs diffusers.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice, pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from PIL import Image
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from diffusion_cli import config
from diffusion_cli.checkpoint import LAST, Model, digest, read
from diffusion_cli.commands import sample as sample_command
from diffusion_cli.commands import train as train_command
from diffusion_cli.config import build
from diffusion_cli.data import Batches, Digits, Given, Images, NoDataset
from diffusion_cli.data.memory import MemoryImages
from diffusion_cli.denoiser import Denoiser
from diffusion_cli.generate import generate
from diffusion_cli.guidance import Unguided
from diffusion_cli.metrics import (
    FeatureBatch,
    Features,
    FrechetDistance,
    GivenReference,
    GivenSamples,
    InceptionFeatures,
    InceptionScore,
    KernelDistance,
    Networks,
    evaluate,
)
from diffusion_cli.objective import Simple
from diffusion_cli.parameterizations import Eps
from diffusion_cli.precision import autocast, device_of, resolve
from diffusion_cli.ranks import Ranks, work_together
from diffusion_cli.report import save_png
from diffusion_cli.samplers import DDIM, Sampler
from diffusion_cli.schedules import Linear
from diffusion_cli.seeding import mix
from diffusion_cli.training.callbacks import Stop
from diffusion_cli.training.ema import EMA
from diffusion_cli.training.module import TrainingModule

Row = tuple[str, float, float, str]
Cells = tuple[str, ...]


def alternate(ours: Callable[[], float], theirs: Callable[[], float], rounds: int) -> tuple[float, float]:
    """Medians over A B A B ..., after one round that does not count."""
    ours()
    theirs()
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    return median(a for a, _ in pairs), median(b for _, b in pairs)


def timed(function: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """A function that returns how many seconds another takes."""

    def run() -> float:
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return run


def startup(rounds: int, device: torch.device) -> Iterator[Row]:
    """`diffuse --help`, and a misspelt option, in a process of their own."""
    code = "import sys; from diffusion_cli.cli import run; code = run(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    for words, limit in (["--help"], 0.4), (["train", "schedule=cosin"], 1.0):

        def once(words: list[str] = words) -> None:
            subprocess.run([sys.executable, "-c", code, *words], capture_output=True, check=True)

        seconds = median(timed(once, device)() for _ in range(rounds))
        yield f"`diffuse {' '.join(words)}`, s (limit, torch not imported)", seconds, limit, "at most 1"


def loading(rounds: int, device: torch.device) -> Iterator[Row]:
    """Images per second of in-memory batches, and of ImageFolder with a DataLoader of two workers."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    count, size = 10_000, 128
    pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
    ours = iter(Batches(MemoryImages(pixels, None), size, seed=0, flip=True, device=device))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "class").mkdir()
        for i, image in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
            Image.fromarray(np.ascontiguousarray(image)).save(f"{folder}/class/{i}.jpg", quality=95)
        steps = [
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
        files = ImageFolder(folder, transforms.Compose(steps))
        loader = torch.utils.data.DataLoader(files, size, shuffle=True, num_workers=2, drop_last=True)
        batches = count // size
        a, b = alternate(
            timed(lambda: [None for _ in islice(ours, 10 * batches)], device),
            timed(lambda: [None for _ in loader], device),
            rounds,
        )
    yield "loading 32x32, images/s", 10 * batches * size / a, batches * size / b, "at least 50"


class Clock:
    """When each training step of `diffuse train` starts."""

    def __init__(self) -> None:
        self.starts: list[float] = []
        original = TrainingModule.training_step

        def stamped(module: TrainingModule, batch: object, index: int) -> Tensor:
            self.starts.append(time.perf_counter())
            return original(module, batch, index)  # pyright: ignore[reportArgumentType]

        TrainingModule.training_step = stamped  # pyright: ignore[reportAttributeAccessIssue]

    def period(self) -> float:
        """The median time from one start to the next, and a new start."""
        periods = [after - before for before, after in pairwise(self.starts[5:])]
        self.starts.clear()
        return median(periods)


def loop(rounds: int, device: torch.device) -> Iterator[Row]:
    """A step of `diffuse train` on the digits at batch 128, and the same step in a bare loop."""
    clock, steps = Clock(), 40

    def ours() -> float:
        with tempfile.TemporaryDirectory() as folder:
            words = [f"output_dir={folder}", f"max_steps={steps}", "batch_size=128", "precision=fp32"]
            train_command.run(config.load("train", words))  # pyright: ignore[reportArgumentType]
        return clock.period()

    checked = config.load("train", ["batch_size=128"])
    assert isinstance(checked, config.TrainConfig)
    images = build(checked.dataset, "").load("train")
    optimizer_config = build(checked.optimizer)

    def bare() -> float:
        network = build(checked.model, 1, 8, None).to(device)
        denoiser, objective = (
            Denoiser(network, build(checked.schedule), Eps()),
            Simple(huber_delta=None, label_dropout=0.0),
        )
        ema = EMA(network, 0.999, warm_up=True)
        optimizer = optimizer_config.optimizer(network.parameters(), fused=True)
        scheduler = optimizer_config.scheduler(optimizer)
        starts = []
        for batch in islice(Batches(images, 128, 0, flip=False, device=device), steps):
            starts.append(time.perf_counter())
            torch.manual_seed(mix(0, "step", batch.number))
            u, eps = torch.rand(128, device=device), torch.randn_like(batch.images)
            loss = objective(denoiser, batch.images, None, denoiser.schedule.time(u), eps).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            ema.update(network)
        return median(after - before for before, after in pairwise(starts[5:]))

    a, b = alternate(ours, bare, rounds)
    yield "training step, Lightning / bare loop, s", a, b, "at most 1.05"


def sampling(rounds: int, device: torch.device) -> Iterator[Row]:
    """`diffuse sample` of 16 images in 50 steps, PNGs and all, and its network calls alone."""
    network = build(_option("model", "unet_cifar10"), 3, 32, None).to(device).eval().requires_grad_(False)
    schedule = Linear(num_timesteps=1000, beta_start=1e-4, beta_end=0.02, zero_terminal_snr=False)
    model = Model((3, 32, 32), None, {}, 0, "", Denoiser(network, schedule, Eps()))
    sampler, x, t = (
        DDIM(schedule, eta=0.0, spacing="trailing"),
        torch.randn(16, 3, 32, 32),
        torch.full((16,), 500.0),
    )
    x, t = x.to(device), t.to(device)

    def ours() -> None:
        _write_samples(model, sampler, 50)

    @torch.inference_mode()
    def calls() -> None:
        for _ in range(50):
            network(x, t)

    a, b = alternate(timed(ours, device), timed(calls, device), rounds)
    yield "sampling 16 images, DDIM-50 / its network calls, s", a, b, "at most 1.03"


def _write_samples(model: Model, sampler: Sampler, steps: int) -> None:
    """What `diffuse sample` does for 16 images: sample them and write their PNGs."""
    with tempfile.TemporaryDirectory() as folder:
        for seeds, images, _, _ in generate(
            model,
            sampler,
            steps,
            range(16),
            16,
            guidance=Unguided(),
            labels=None,
            clip=True,
            precision="fp32",
        ):
            for seed, image in zip(seeds, images, strict=True):
                save_png(image, sample_command.image_path(Path(folder), seed))


def samplers(rounds: int, device: torch.device) -> Iterator[Row]:
    """Sampling 16 images in 5 steps with each sampler, PNGs and all, and the time within its network calls."""
    network = build(_option("model", "unet_cifar10"), 3, 32, None).to(device).eval().requires_grad_(False)
    schedule = Linear(num_timesteps=1000, beta_start=1e-4, beta_end=0.02, zero_terminal_snr=False)
    clock = _NetworkClock(network, device)
    model = Model((3, 32, 32), None, {}, 0, "", Denoiser(clock, schedule, Eps()))
    for name in config.options("sampler"):
        node = _option("sampler", name) | ({"rtol": 0.1, "atol": 0.1} if name == "ode" else {})
        sampler = build(node, schedule)

        def run(sampler: Sampler = sampler) -> None:
            clock.seconds = 0.0
            _write_samples(model, sampler, 5)

        pairs = [(timed(run, device)(), clock.seconds) for _ in range(rounds)]
        whole, within = median(a for a, _ in pairs), median(b for _, b in pairs)
        yield (
            f"sampling 16 images by `{name}` in 5 steps / within its network calls, s",
            whole,
            within,
            "at most 1.03",
        )


class _NetworkClock(nn.Module):
    """A network that adds up the time it takes."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.network, self.device, self.seconds = network, device, 0.0

    def forward(self, x: Tensor, c_noise: Tensor, y: Tensor | None) -> Tensor:
        out: list[Tensor] = []
        self.seconds += timed(lambda: out.append(self.network(x, c_noise, y)), self.device)()
        return out[0]


def step(rounds: int, device: torch.device) -> Iterator[Row]:
    """A training step of the DDPM network at batch 8, and diffusers' as its script runs it."""
    try:
        diffusers = importlib.import_module("diffusers")
        ema_model = importlib.import_module("diffusers.training_utils").EMAModel
    except ImportError:
        sys.exit("step: compares with diffusers; install it with: pip install diffusers")

    x0 = torch.randn(8, 3, 32, 32, device=device)
    network = build(_option("model", "unet_cifar10"), 3, 32, None).to(device)
    denoiser = Denoiser(
        network, Linear(num_timesteps=1000, beta_start=1e-4, beta_end=0.02, zero_terminal_snr=False), Eps()
    )
    ema = EMA(network, 0.9999, warm_up=True)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4, fused=True)

    def ours(precision: str) -> Callable[[], None]:
        def run() -> None:
            with autocast(device, precision):
                u, eps = torch.rand(8, device=device), torch.randn_like(x0)
                loss = Simple(huber_delta=None, label_dropout=0.0)(
                    denoiser, x0, None, denoiser.schedule.time(u), eps
                ).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            ema.update(network)

        return run

    down, attention = "DownBlock2D", "AttnDownBlock2D"
    their_network = diffusers.UNet2DModel(
        sample_size=32, in_channels=3, out_channels=3, layers_per_block=2, block_out_channels=(128, 256, 256, 256),
        dropout=0.1, down_block_types=(down, attention, down, down), norm_eps=1e-6, downsample_padding=0,
        flip_sin_to_cos=False, freq_shift=1, attention_head_dim=None,
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    ).to(device)  # fmt: skip
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000)
    their_ema = ema_model(their_network.parameters(), decay=0.9999, use_ema_warmup=True)
    their_optimizer = torch.optim.AdamW(their_network.parameters(), 1e-4)

    def theirs() -> None:
        eps, t = torch.randn_like(x0), torch.randint(1000, (8,), device=device)
        noised = scheduler.add_noise(x0, eps, t)
        loss = nn.functional.mse_loss(their_network(noised, t).sample, eps)
        loss.backward()
        nn.utils.clip_grad_norm_(their_network.parameters(), 1.0)
        their_optimizer.step()
        their_optimizer.zero_grad()
        their_ema.step(their_network.parameters())

    sizes = [sum(p.numel() for p in net.parameters()) for net in (network, their_network)]
    assert sizes[0] == sizes[1], sizes
    for precision in dict.fromkeys([resolve("auto", device), "fp32"]):
        a, b = alternate(timed(ours(precision), device), timed(theirs, device), rounds)
        yield (
            f"step of the DDPM network, diffusers fp32 / ours {precision}, s",
            b,
            a,
            "at least 1.5 with bf16",
        )


def inception(rounds: int, device: torch.device) -> Iterator[Row]:
    """Images per second of 64 images of 32x32 through our Inception, and through torch-fidelity's as it is."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        """The network as it is initialised, for the published weights may not be at hand."""

        def load_state_dict(self, *args: object, **kwargs: object) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            pass

    images = torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8)
    digits = Digits("", held_out=0.2, flip=False)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pth"
        torch.save({}, weights)
        theirs = Untrained("untrained", ["2048", "logits_unbiased"], str(weights)).to(device)
        torch.save(theirs.state_dict(), weights)
        ours = {
            precision: InceptionFeatures(
                digits, Path(folder), device, weights=str(weights), resize="tensorflow", precision=precision
            )
            for precision in ("fp32", "bf16")
        }

    @torch.inference_mode()
    def reference() -> None:
        theirs(images.to(device))

    for precision, features in ours.items():
        a, b = alternate(
            timed(lambda features=features: features(images), device), timed(reference, device), rounds
        )
        yield f"Inception {precision}, ours / torch-fidelity's, images/s", 64 / a, 64 / b, "at least 1.4"


class Noise(Images):
    """Images of 32x32 that are made when they are asked for, and take no memory."""

    shape, labels = (3, 32, 32), None

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def gather(self, index: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(int(index[0]))
        return torch.randint(256, (len(index), *self.shape), dtype=torch.uint8, generator=generator)


class Projection(Features):
    """What stands for Inception: as many features and class scores, made in no time."""

    name, resize, note, digest = "projection", "none", "", "0" * 64
    dim, classes, chunk = 2048, 1008, 250

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.matrix = torch.randn(3072, self.dim + self.classes, device=device) / 3072

    def extract(self, images: torch.Tensor) -> FeatureBatch:
        values = images.flatten(1).float() @ self.matrix
        return FeatureBatch(values[:, : self.dim], values[:, self.dim :])


def memory(rounds: int, device: torch.device) -> Iterator[Row]:
    """Peak memory, in GB, of fid, kid and is of 50,000 images against 50,000, beyond programs and network."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = NoDataset("noise", Noise.shape)
        networks = Networks({}, dataset, Path(folder), device)
        networks.chosen = Projection(device)
        reference = GivenReference(dataset, path="noise")
        reference.images = Noise(50000)
        before, start = _resident(), time.perf_counter()
        evaluate(
            {
                "fid": FrechetDistance(floor=False, infinity=0, bootstrap=0),
                "kid": KernelDistance(subsets=100, subset_size=1000, seed=2020),
                "is": InceptionScore(splits=10),
            },
            networks,
            GivenSamples(Given(Noise(50000), None), None, {}, "samples"),
            reference,
            batch_size=250,
        )
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    yield (
        "memory of fid+kid+is at N = 50,000 beyond the network, GB / limit",
        (peak - before) / 1e9,
        3,
        "at most 1",
    )
    yield "its time apart from the network, images/s / 1", 100000 / seconds, 1, ""


def _resident() -> int:
    """Bytes of memory in use now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _option(group: str, name: str) -> dict[str, object]:
    import yaml

    return yaml.safe_load(config.options(group)[name].read_text())


class Probe:
    """When each optimizer step of `diffuse train` ends in this process, and what it has taken of memory by then.

    On a GPU the peak is of what torch has allotted; on the CPU it is the most that was ever resident, which Linux keeps
    as VmHWM, beyond what the program held before the model was made.
    """

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.cpu_ends: list[float] = []
        self.peak = self.optimizer_state = 0
        before, original = _resident(), Stop.act

        def watched(stop: Stop, trainer: Trainer, module: TrainingModule, step: int) -> None:
            original(stop, trainer, module, step)
            if module.device.type == "cuda":
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())
            self.cpu_ends.append(time.process_time())
            on_gpu = module.device.type == "cuda"
            self.peak = torch.cuda.max_memory_allocated() if on_gpu else _most_resident() - before
            self.optimizer_state = sum(
                _local_bytes(value)
                for values in trainer.optimizers[0].state.values()
                for value in values.values()
            )

        Stop.act = watched  # pyright: ignore[reportAttributeAccessIssue]

    def taken(self) -> dict[str, float]:
        """Median seconds, of the clock and of the CPU, from the end of a step to that of the next; memory in bytes."""
        seconds, cpu_seconds = (
            median(after - before for before, after in pairwise(ends)) for ends in (self.ends, self.cpu_ends)
        )
        return {
            "seconds": seconds, "cpu_seconds": cpu_seconds, "peak": self.peak, "optimizer_state": self.optimizer_state,
        }  # fmt: skip


def _local_bytes(value: object) -> int:
    """What this process holds of a tensor."""
    local = value.to_local() if isinstance(value, DTensor) else value
    return local.nbytes if isinstance(local, Tensor) else 0


def _most_resident() -> int:
    """The most bytes of memory that were ever in use."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def observed(words: list[str]) -> dict[str, Any]:
    """What a short `diffuse train` on random images of 32x32 took, and the SHA-256 of the weights it came to.

    Where processes work together it is the most that one of them took.
    """
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images.npy"
        np.save(images, np.random.default_rng(0).integers(256, size=(256, 32, 32, 3), dtype=np.uint8))
        fixed = [
            f"output_dir={folder}", "name=run", "dataset=array", f"dataset.path={images}", "dataset.held_out=0",
            "compile=false", "logger=csv", "preview_every=100000", "log_every=100000",
        ]  # fmt: skip
        checked = config.load("train", [*fixed, *words])
        assert isinstance(checked, config.TrainConfig)
        found = Path(folder) / "found.json"
        work_together(_observe, checked, found, processes=checked.trainer["devices"])
        weights = digest(read(Path(folder) / "run" / LAST)["state_dict"])
        return {**json.loads(found.read_text()), "weights": weights}


def _observe(checked: config.TrainConfig, found: Path) -> None:
    """Train as one of the processes, and note down what all of them took."""
    probe = Probe()
    train_command.train(checked)
    taken = Ranks().gather(probe.taken())
    if Ranks().first:
        found.write_text(json.dumps({key: max(each[key] for each in taken) for key in taken[0]}))


def afresh(function: Callable[..., Any], *arguments: object) -> Any:
    """What a function returns in a new process, of which nothing is heard."""
    with ProcessPoolExecutor(1, get_context("spawn"), _be_silent) as pool:
        return pool.submit(function, *arguments).result()


def _be_silent() -> None:
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)


def processes(rounds: int, device: torch.device) -> Iterator[Cells]:
    """Training by one process and by several, of 8 images and one thread each: images/s, and over N times one's."""
    several = max(2, torch.cuda.device_count()) if device.type == "cpu" else torch.cuda.device_count()
    runs = {"1 process": (1, "ddp")}
    if several > 1:
        runs |= {f"{several} processes, {strategy}": (several, strategy) for strategy in ("ddp", "fsdp")}
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, (count, strategy) in runs.items():
            words = [
                "model=unet_small", f"batch_size={8 * count}", "max_steps=8", f"trainer={device.type}",
                "trainer.threads=1", f"trainer.devices={count}", f"trainer.strategy={strategy}",
            ]  # fmt: skip
            taken[name].append(afresh(observed, words))
    yield (
        "`unet_small`, 8 images of 32x32 a process",
        "median",
        "over N times one's",
        "CPU time over one's",
        "rounds",
    )
    work = {name: median(each["cpu_seconds"] for each in all_of_it) for name, all_of_it in taken.items()}
    rates = {
        name: [8 * runs[name][0] / each["seconds"] for each in all_of_it] for name, all_of_it in taken.items()
    }
    one = median(rates["1 process"])
    for name, (count, _) in runs.items():
        rate, ratio = median(rates[name]), work[name] / work["1 process"]
        yield (
            f"{name}, images/s",
            f"{rate:.3g}",
            f"{rate / (count * one):.3g}",
            f"{ratio:.3g}",
            _in_a_row(rates[name]),
        )
    if several > 1:
        times = [afresh(agreement, several) for _ in range(rounds)]
        yield (
            f"what {several} agree on at each step, ms", f"{1000 * median(times):.3g}",
            f"{median(times) * one / 8:.2g} of a step", "", _in_a_row([1000 * each for each in times]),
        )  # fmt: skip


def _in_a_row(numbers: list[float]) -> str:
    return " ".join(f"{number:.3g}" for number in numbers)


def agreement(count: int) -> float:
    """The seconds that so many processes take to agree whether to stop, or to save, where none waits for another."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        work_together(_agree, found, processes=count)
        return json.loads(found.read_text())


def _agree(found: Path) -> None:
    ranks, seconds = Ranks(), []
    for _ in range(1000):
        start = time.perf_counter()
        ranks.highest(0, False, False)
        seconds.append(time.perf_counter() - start)
    if ranks.first:
        found.write_text(json.dumps(median(seconds[100:])))


MEMORY_OPTIONS = {
    "plain": ([], ""),
    "precision=bf16": (["precision=bf16"], "rounding"),
    "model.gradient_checkpointing=true": (["model.gradient_checkpointing=true"], ""),
    "accumulate=4": (["accumulate=4"], "noise"),
    "bf16, checkpointing and accumulate=4": (
        ["precision=bf16", "model.gradient_checkpointing=true", "accumulate=4"], "rounding, noise",
    ),
    "trainer.offload_ema=true": (["trainer.offload_ema=true"], ""),
    "2 processes, ddp": (["trainer.devices=2"], "dropout, order of sums"),
    "2 processes, fsdp": (["trainer.devices=2", "trainer.strategy=fsdp"], "dropout, order of sums"),
    "precision=fp16": (["precision=fp16"], "rounding"),
}  # fmt: skip
"""The words of each option, and why the weights are then not those of the plain one."""


def training_memory(rounds: int, device: torch.device) -> Iterator[Cells]:
    """Peak memory and time of the second training step of the DDPM network by option, in fresh processes."""
    yield (
        "option",
        "peak, MB",
        "over plain",
        "optimizer state, MB",
        "step time over plain",
        "its CPU time",
        "weights",
    )
    fixed = [
        "model=unet_cifar10", f"batch_size={64 if device.type == 'cuda' else 8}", "max_steps=2", "precision=fp32",
        f"trainer={device.type}", "trainer.threads=1",
    ]  # fmt: skip
    of_option: dict[str, dict[str, Any]] = {}
    for name, (words, why) in MEMORY_OPTIONS.items():
        if device.type == "cuda" and "trainer.devices=2" in words and torch.cuda.device_count() < 2:
            continue
        taken = of_option[name] = afresh(observed, [*fixed, *words])
        plain = of_option["plain"]
        peak, seconds, cpu = (taken[key] / plain[key] for key in ("peak", "seconds", "cpu_seconds"))
        yield (
            name, f"{taken['peak'] / 1e6:.0f}", f"{peak:.3g}", f"{taken['optimizer_state'] / 1e6:.0f}",
            f"{seconds:.3g}", f"{cpu:.3g}",
            "the same bits" if taken["weights"] == plain["weights"] else f"others: {why}",
        )  # fmt: skip


BENCHMARKS = {
    item.__name__: item for item in (startup, loading, loop, sampling, samplers, step, inception, memory)
}
TABLES = {item.__name__: item for item in (processes, training_memory)}
"""Those that have columns of their own: of what they yield, the first is the head."""


def main() -> None:
    """Run the named benchmarks, or all, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        choices=[*BENCHMARKS, *TABLES, []],
        metavar="name",
        help=", ".join([*BENCHMARKS, *TABLES]),
    )
    parser.add_argument("--rounds", type=int, default=5, help="A B pairs that count (default 5)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    arguments = parser.parse_args()
    device = device_of(arguments.device)
    where = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    )
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "lightning"))
    print(
        f"{where}, {platform.system()} {platform.machine()}, Python {platform.python_version()}, {versions}"
    )
    names = arguments.names or [*BENCHMARKS, *TABLES]
    pairs = [name for name in names if name in BENCHMARKS]
    if pairs:
        print("\n| what | A | B | A / B | target |\n|---|---|---|---|---|")
    for name in pairs:
        for what, a, b, target in BENCHMARKS[name](arguments.rounds, device):
            print(f"| {what} | {a:.4g} | {b:.4g} | {a / b:.3g} | {target} |", flush=True)
    for name in names:
        if name in TABLES:
            _print_table(TABLES[name](arguments.rounds, device))


def _print_table(rows: Iterator[Cells]) -> None:
    head = next(rows)
    print(f"\n| {' | '.join(head)} |\n{'|---' * len(head)}|", flush=True)
    for cells in rows:
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
