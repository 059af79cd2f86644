"""`diffuse sample`: images of a trained model, one PNG a seed."""

import sys
from pathlib import Path

from tqdm import tqdm

from diffusion_cli.commands.outputs import claim, keep_seeds, read_images
from diffusion_cli.commands.samples import image_path
from diffusion_cli.commands.trained import Trained, open_run
from diffusion_cli.config import EvalConfig, SampleConfig, fingerprint
from diffusion_cli.generate import generate
from diffusion_cli.report import save_grid, save_png, save_rows

GRID_IMAGES = 100


def run(config: SampleConfig) -> None:
    """Make the images that are not there yet, a grid of the first ones, and the manifest."""
    trained = open_run(config)
    trained.check(config.steps)
    model = trained.model
    output = Path(config.output) if config.output else samples_folder(trained, config)
    manifest = claim(output, trained.settings, model)
    seeds = range(config.seed, config.seed + config.num_samples)
    todo = [seed for seed in seeds if not image_path(output, seed).is_file()]
    if len(todo) < len(seeds):
        print(
            f"{output} has {len(seeds) - len(todo)} of {len(seeds)} images; making the others",
            file=sys.stderr,
        )

    most_calls = 0
    with tqdm(total=len(todo), unit="image", desc="sample", dynamic_ncols=True) as bar:
        for batch, images, _, calls in generate(
            model,
            trained.sampler,
            config.steps,
            todo,
            config.batch_size,
            guidance=trained.guidance,
            labels=trained.labels,
            clip=config.clip_x0,
            precision=config.precision,
        ):
            for seed, image in zip(batch, images, strict=True):
                save_png(image, image_path(output, seed))
            bar.update(len(batch))
            most_calls = max(most_calls, calls)
    keep_seeds(output, manifest, seeds)
    grid = output / "grid.png"
    first = list(seeds)[:GRID_IMAGES]
    if config.label is None or trained.labels is None:
        save_grid(read_images([image_path(output, seed) for seed in first]), grid)
    else:  # a row a class
        classes = [first[place :: len(trained.labels)] for place in range(len(trained.labels))]
        save_rows([read_images([image_path(output, seed) for seed in row]) for row in classes if row], grid)
    made = f", {most_calls} network calls each" if todo else ""
    print(f"{len(seeds)} images of step {model.step}{made}, in {output}\nGrid: {grid}")


def samples_folder(trained: Trained, config: SampleConfig | EvalConfig) -> Path:
    """Where the samples of a model and these settings lie, unless told otherwise."""
    sampler = config.sampler["_target_"].rpartition(".")[2].lower()
    return trained.folder / "samples" / f"{sampler}-{config.steps}-{fingerprint(trained.settings)}"
