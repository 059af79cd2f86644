"""Train digits with their class and stroke width as conditions, and measure whether samples have both.

    python scripts/compare_attributes.py --minutes 3 --picture attributes.png

Prints a table: one row per guidance scale. The error of the stroke width is judged by `metric=label_error`, the class
by the shipped classifier. The picture has the first scale, a row for each width and a column for each class.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

import diffusion_cli as diffuse
from diffusion_cli.captions import Captions
from diffusion_cli.cli import run
from diffusion_cli.data import Digits
from diffusion_cli.data.digits import STROKE_WIDTH
from diffusion_cli.images import save_rows
from diffusion_cli.metrics import Result
from diffusion_cli.model import Model

NAME = "digits_stroke_width"
SHARES = (0.02, 0.25, 0.5, 0.75, 0.98)
"""Quantiles of the widths in the picture."""
HEADS = (
    "guidance scale", "stroke width: error", "of real digits", "ratio", "mean difference", "class accuracy",
    "of real digits",
)  # fmt: skip


def trained(folder: str, minutes: float, words: list[str]) -> Model:
    """Return the model, trained for some minutes; a finished run is used again."""
    command = [
        "train", f"name={NAME}", f"output_dir={folder}", "dataset=digits", "dataset.label=[label,stroke_width]",
        f"max_time={round(60 * minutes)}s", "max_steps=1000000", "logger=csv", "trainer=cpu", *words,
    ]  # fmt: skip
    if code := run(command):
        raise SystemExit(code)
    return diffuse.load(Path(folder, NAME))


def measured(model: Model, scale: float, count: int) -> dict[str, Result]:
    """Return the results of samples with the attributes of real digits, guided with this scale."""
    guided = ["guidance=cfg", f"guidance.scale={scale}"] if scale != 1 else ["guidance=none"]
    return model.evaluate(
        ["label_error", "classifier"], num_samples=count, overrides=["features=classifier", *guided]
    )


def line(scale: float, results: dict[str, Result]) -> str:
    """Return a row of the table."""
    width, accuracy = results[f"label_error_{STROKE_WIDTH}"], results["class_accuracy"]
    numbers = [
        scale, width.value, *(width.details[name] for name in ("on_real_val", "ratio", "mean_difference")),
        accuracy.value, accuracy.details["on_real_val"],
    ]  # fmt: skip
    return f"| {' | '.join(f'{number:.4g}' for number in numbers)} |"


def widths() -> list[float]:
    """Return the widths of the rows of the picture, quantiles of the training digits."""
    images = Digits("", label=STROKE_WIDTH).load("train")
    found = images.condition(torch.arange(len(images)), images.pixels)
    assert found is not None
    quantiles = torch.tensor(SHARES)
    return [round(width, 3) for width in found.values[STROKE_WIDTH].quantile(quantiles).tolist()]


def rows(model: Model, scale: float, wanted: list[float]) -> list[Tensor]:
    """Return samples of all classes, [10, 1, 8, 8] per width; a class has the same seeds in all rows."""
    guided = {"guidance": "cfg", "guidance_scale": scale} if scale != 1 else {}
    return [
        model.sample(10, label=[{"label": str(digit), STROKE_WIDTH: width} for digit in range(10)], **guided)
        for width in wanted
    ]


def main() -> None:
    """Train, measure, print the table and draw the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=3.0, help="time of training")
    parser.add_argument(
        "--scales", type=float, nargs="+", default=[2.0, 1.0, 3.0, 4.0], help="guidance scales"
    )
    parser.add_argument("--samples", type=int, default=1000, help="samples per scale")
    parser.add_argument("--folder", default="outputs", help="folder of the run")
    parser.add_argument("--picture", type=Path, help="output PNG")
    parser.add_argument("words", nargs="*", help="further words of diffuse train, such as optimizer.lr=0.002")
    arguments = parser.parse_args()
    model = trained(arguments.folder, arguments.minutes, arguments.words)
    print(f"| {' | '.join(HEADS)} |\n{'|---' * len(HEADS)}|")
    for scale in arguments.scales:
        print(line(scale, measured(model, scale, arguments.samples)), flush=True)
    if arguments.picture:
        wanted = widths()
        captions = Captions([f"{width:.2f}" for width in wanted], [*"0123456789"], "class", "stroke width")
        save_rows(rows(model, arguments.scales[0], wanted), arguments.picture, captions)


if __name__ == "__main__":
    main()
