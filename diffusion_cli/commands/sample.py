"""`diffuse sample`: generate images with a trained model, one file per seed."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from diffusion_cli.batch_size import advise_batch_size
from diffusion_cli.captions import Captions
from diffusion_cli.commands.outputs import (
    claim,
    keep_calls,
    keep_labels,
    keep_seeds,
    named_folder,
    sampled_seeds,
)
from diffusion_cli.commands.sample_conditions import refuse_condition_images
from diffusion_cli.commands.sample_files import SampleFiles, class_folders
from diffusion_cli.commands.samples import read_films, read_pictures
from diffusion_cli.commands.trained import LoadedModel, open_run
from diffusion_cli.config import SampleConfig, fingerprint
from diffusion_cli.errors import counted
from diffusion_cli.generate import frame_places, generate, trajectories
from diffusion_cli.images import PLAIN, Writer, by_class, grid, save_gif, save_rows, save_stored
from diffusion_cli.system.distributed import Distributed, launch
from diffusion_cli.system.own_folder import own_folder
from diffusion_cli.system.progress import ProgressBar

GRID_IMAGES = 100
STRIP_IMAGES, MOST_STRIP_IMAGES = 8, 20
GIF_IMAGES = 64


def run(config: SampleConfig) -> int:
    """Generate the missing images; write them, a grid, the manifest, and on request a strip or an animation."""
    return launch(make, config, processes=config.processes, device=config.device)


def make(config: SampleConfig) -> None:
    """Generate samples as one of several processes; rank 0 draws the grid and prints."""
    with advise_batch_size(config.batch_size, config.device):
        _sample(config)


def _sample(config: SampleConfig) -> None:
    ranks, trained = Distributed(), open_run(config.sampling)
    refuse_condition_images(trained.model)
    trained.check()
    classes: tuple[str, ...] = ()
    if config.layout != "flat":
        classes = class_folders(trained)
        trained = replace(trained, record={**trained.record, "layout": config.layout})
    output = named_folder(config.output) if config.output else samples_folder(trained)
    ranks.main_first(lambda: claim(output, trained.record, trained.model))
    seeds = range(config.seed, config.seed + config.num_samples)
    form = trained.model.info.form
    files = SampleFiles(output, form.suffix, classes)
    todo = ranks.broadcast([seed for seed in seeds if not files.path(seed).is_file()])
    if 0 < len(todo) < len(seeds) and ranks.is_main:
        print(
            f"{output} has {len(seeds) - len(todo)} of {len(seeds)} images; generating the rest",
            file=sys.stderr,
        )
    rows = _strip_rows(trained) if config.strip else 0
    shown = seeds[: max(rows, GIF_IMAGES * config.gif)]
    size = trained.batch_size(max(len(todo), len(shown)))
    calls = max(ranks.all_gather(_make(trained, todo, files, ranks, size)))
    if not ranks.is_main:
        return
    keep_seeds(output, seeds)
    keep_labels(files, trained.model.info.class_names or ())
    overview = _overview(trained, files, seeds, config.captions)
    made = f", {counted(calls, 'network call')} each" if todo else " already there"
    print(
        f"{counted(len(seeds), 'image')} of step {trained.model.step}{made}, {trained.precision}, in {output}\n"
        f"{overview}"
    )
    if shown:
        bar = ProgressBar(total=len(shown), unit="image", desc="denoising steps", delay=1.0)
        with bar, bar.batch(len(shown)) as advance:
            ways = trajectories(trained, shown, size, frames=config.frames, advance=advance)
        _draw(ways, output, config, trained)


def _strip_rows(trained: LoadedModel) -> int:
    """Return the most rows of a strip: one for each class, within limits."""
    return min(max(STRIP_IMAGES, len(set(trained.row_names or ()))), MOST_STRIP_IMAGES)


def _make(trained: LoadedModel, todo: list[int], files: SampleFiles, ranks: Distributed, size: int) -> int:
    """Generate and write this process's share of the images; return the network calls per image."""
    most_calls, form = 0, trained.model.info.form
    with (
        ProgressBar(total=len(todo), unit="image", desc="sample", disable=not ranks.is_main) as bar,
        Writer(2 * size) as writer,
    ):
        for first, share in zip(
            range(0, len(todo), size * ranks.world), ranks.shard(len(todo), size), strict=True
        ):
            mine = [todo[place] for place in share]
            with bar.batch(min(size * ranks.world, len(todo) - first)) as advance:
                for batch, images, _, calls in generate(trained, mine, size, advance):
                    if calls > most_calls:
                        keep_calls(files.folder, calls)
                        most_calls = calls
                    for seed, image in zip(batch, images.cpu(), strict=True):
                        writer(save_stored, image, files.path(seed), form)
                ranks.all_gather(None)  # the batch of all processes is done
    return most_calls


def _overview(trained: LoadedModel, files: SampleFiles, seeds: range, named: bool) -> str:
    """Draw a grid, in rows of a class if each has two or `label=` is set; return a line that names it.

    The grid has the first images of the command if these fill it, else those of the folder.
    """
    path = files.folder / "grid.png"
    first = list(islice(sampled_seeds(files), GRID_IMAGES + 1))
    shown = "Grid"
    if len(first) > GRID_IMAGES:
        fills = len(seeds) >= GRID_IMAGES
        first = [*(seeds if fills else first)[:GRID_IMAGES]]
        shown += f" of the first {GRID_IMAGES} images of the {'command' if fills else 'folder'}"
    films = read_films(files, first, trained.model)
    if films.shape[1] > 1:
        save_gif(torch.stack([grid(images) for images in films.transpose(0, 1)]), files.folder / "grid.gif")
    rows, captions = by_class(
        read_pictures(files, first, trained.model), first, *_kinds(trained), always=trained.chosen
    )
    save_rows(rows, path, captions if named else PLAIN)
    return f"{shown}: {path}"


def _kinds(trained: LoadedModel) -> tuple[list[int] | None, Sequence[str] | None]:
    """Return the kind of consecutive images, repeated, and the names of the kinds: classes, or rows of values."""
    names = trained.row_names
    if trained.rows is None or names is None:
        return trained.labels, trained.model.info.class_names
    kinds = list(dict.fromkeys(names))
    places = {name: place for place, name in enumerate(kinds)}
    return [places[name] for name in names], kinds


def _draw(ways: Tensor, output: Path, config: SampleConfig, trained: LoadedModel) -> None:
    """Write denoising trajectories, uint8 [N, F, C, H, W], as a strip or an animation."""
    times = [f"{trained.times[place]:.2g}" for place in frame_places(len(trained.times), config.frames)]
    if config.strip:
        strip, names = output / "strip.png", trained.row_names
        rows = ways[: _strip_rows(trained)]
        words = [
            f"seed {seed}" if names is None else names[seed % len(names)]
            for seed in range(config.seed, config.seed + len(rows))
        ]
        sampler = trained.sampler
        title = f"{sampler.schedule.name} schedule, {type(sampler).__name__}, {trained.steps} steps"
        save_rows(list(rows), strip, Captions(words, times, "t", title) if config.captions else PLAIN)
        print(f"Strip: {strip}" + _part(len(rows), config.num_samples))
    if config.gif:
        animation = output / "denoising.gif"
        words = [f"t = {time}" for time in times] if config.captions else []
        save_gif(torch.stack([grid(images) for images in ways.transpose(0, 1)]), animation, names=words)
        print(f"Animation: {animation}" + _part(len(ways), config.num_samples))


def _part(shown: int, count: int) -> str:
    """Return which of the images a picture shows; empty for all."""
    return "" if shown == count else f" (first {shown} of {count} images)"


def samples_folder(trained: LoadedModel) -> Path:
    """Return the folder of samples in the run folder, named by the sampling settings."""
    sampler = type(trained.sampler).__name__.removesuffix("Sampler").lower()
    name = f"{sampler}-{trained.steps}-{fingerprint(trained.record)}"
    return own_folder(trained.folder, "samples", name)
