"""Small models and calls of `diffuse sample`."""

from diffusion_cli.cli import run


def sample(sample_runs, *words):
    return run(["sample", f"output_dir={sample_runs}", "steps=4", "num_samples=6", "device=cpu", *words])


def pngs(output):
    return {file.name: file.read_bytes() for file in output.glob("0*.png")}
