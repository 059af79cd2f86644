"""Train digits with their class and stroke width as conditions, and measure whether samples have both.

    python scripts/compare_attributes.py --minutes 3 --picture attributes.png

Samples have the class and the width of held-out digits, in turn. Prints a table: one row per guidance scale. The
width of a sample is measured exactly, by the function that measured the digits; of a sample without ink it is 0. The
class is judged by the shipped classifier, and the width also by the network of `metric=label_error`.

The exact error of a held-out digit at its own width is 0, so two rows have other real digits in place of samples:
the training digit of the same class with the closest width, as if the model remembered its training digits; and all
other held-out digits of the class, as if it ignored the width. The last row has the held-out digits, with the judge's
own error. The picture has the first scale, a row for each width and a column for each class.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import diffusion_cli as diffuse
from diffusion_cli.captions import Captions
from diffusion_cli.cli import run
from diffusion_cli.conditions.condition import LABEL
from diffusion_cli.data import Digits
from diffusion_cli.data.base import Split
from diffusion_cli.data.digits import STROKE_WIDTH, stroke_widths
from diffusion_cli.images import save_rows
from diffusion_cli.metrics import FeatureExtractors, cache_folder
from diffusion_cli.metrics.features.judge import AttributeJudge
from diffusion_cli.metrics.label_error import LabelError
from diffusion_cli.model import Model

NAME = "digits_stroke_width"
SHARES = (0.02, 0.25, 0.5, 0.75, 0.98)
"""Quantiles of the widths in the picture."""
HEADS = ("samples", "width: mean error", "mean difference", "mean error as judged", "class accuracy")


class LabelledDigits(NamedTuple):
    """Digits of a split with their attributes."""

    pixels: Tensor
    """Images, uint8 [N, 1, 8, 8]."""
    classes: Tensor
    """Digits, int64 [N]."""
    widths: Tensor
    """Stroke widths in pixels, float32 [N]."""

    @classmethod
    def of(cls, split: Split) -> "LabelledDigits":
        """Return the digits of a split."""
        images = Digits("").load(split)
        assert images.labels is not None
        return cls(images.pixels, images.labels, stroke_widths(images.pixels))

    def rows(self) -> list[dict[str, str | float]]:
        """Return the conditions of samples with the attributes of the digits."""
        pairs = zip(self.classes.tolist(), self.widths.tolist(), strict=True)
        return [{LABEL: str(digit), STROKE_WIDTH: width} for digit, width in pairs]

    def in_turn(self, count: int) -> "LabelledDigits":
        """Return `count` digits, from the first one again after the last one."""
        turn = torch.arange(count) % len(self.pixels)
        return LabelledDigits(*(values[turn] for values in self))


def trained(folder: str, minutes: float, words: list[str]) -> Model:
    """Return the model, trained for some minutes; a finished run is used again."""
    command = [
        "train", f"name={NAME}", f"output_dir={folder}", "dataset=digits", "dataset.label=[label,stroke_width]",
        f"max_time={round(60 * minutes)}s", "max_steps=1000000", "logger=csv", "trainer=cpu", *words,
    ]  # fmt: skip
    if code := run(command):
        raise SystemExit(code)
    return diffuse.load(Path(folder, NAME))


def differences(images: Tensor, wanted: Tensor) -> Tensor:
    """Return the stroke widths of images minus the wanted ones, in pixels [N]; an image without ink has width 0."""
    return stroke_widths(images).nan_to_num(0.0) - wanted


def closest(held_out: LabelledDigits, train: LabelledDigits) -> Tensor:
    """Return the width of the closest training digit of the same class minus that of each held-out digit, [N]."""
    gaps = train.widths - held_out.widths[:, None]
    gaps = gaps.masked_fill(train.classes != held_out.classes[:, None], torch.inf)
    return gaps.gather(1, gaps.abs().argmin(1, keepdim=True))[:, 0]


def others(held_out: LabelledDigits) -> Tensor:
    """Return the widths of all other held-out digits of the same class minus that of each held-out digit, [pairs]."""
    pairs = held_out.classes == held_out.classes[:, None]
    return (held_out.widths - held_out.widths[:, None])[pairs.fill_diagonal_(False)]


class Judges:
    """The networks that judge widths and classes."""

    def __init__(self) -> None:
        dataset = Digits("", label=[LABEL, STROKE_WIDTH])
        networks = FeatureExtractors({}, dataset, cache_folder(None), torch.device("cpu"))
        self.widths = networks.judge(LabelError().recipe).prepare()
        self.classes = networks.option("classifier").prepare()

    def row(self, title: str, images: Tensor, wanted: LabelledDigits) -> str:
        """Return the row of the table of images with the wanted attributes."""
        assert isinstance(self.widths, AttributeJudge)
        outputs, scores = self.widths(images).logits, self.classes(images).logits
        assert outputs is not None
        assert scores is not None
        judged = self.widths.heads.predicted(outputs)[STROKE_WIDTH].cpu() - wanted.widths
        accuracy = (scores.argmax(1).cpu() == wanted.classes).float().mean()
        return line(title, differences(images, wanted.widths), judged.abs().mean().item(), accuracy.item())


def line(title: str, errors: Tensor, judged: float | None = None, accuracy: float | None = None) -> str:
    """Return a row of the table, with the mean absolute error and the mean of errors of the width."""
    numbers = [errors.abs().mean().item(), errors.mean().item(), judged, accuracy]
    return f"| {' | '.join([title, *('' if number is None else f'{number:.4f}' for number in numbers)])} |"


def sampled(model: Model, scale: float, rows: list[dict[str, str | float]], count: int) -> Tensor:
    """Return samples with conditions in turn, uint8 [N, 1, 8, 8]."""
    guided = {"guidance": "cfg", "guidance_scale": scale} if scale != 1 else {}
    return model.sample(count, label=rows, batch_size=250, **guided)


def pictures(model: Model, scale: float, wanted: list[float]) -> list[Tensor]:
    """Return samples of all classes, [10, 1, 8, 8] per width; a class has the same seeds in all rows."""
    return [
        sampled(model, scale, [{LABEL: str(digit), STROKE_WIDTH: width} for digit in range(10)], 10)
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
    judges, held_out, train = Judges(), LabelledDigits.of("val"), LabelledDigits.of("train")
    wanted = held_out.in_turn(arguments.samples)
    for scale in arguments.scales:
        images = sampled(model, scale, held_out.rows(), arguments.samples)
        print(judges.row(f"guidance scale {scale:g}", images, wanted), flush=True)
    print(line("closest training digit of the class", closest(held_out, train)))
    print(line("other held-out digits of the class", others(held_out)))
    print(judges.row("held-out digits", held_out.pixels, held_out))
    if arguments.picture:
        widths = [round(width, 3) for width in train.widths.quantile(torch.tensor(SHARES)).tolist()]
        captions = Captions([f"{width:.2f}" for width in widths], [*"0123456789"], "class", "stroke width")
        save_rows(pictures(model, arguments.scales[0], widths), arguments.picture, captions)


if __name__ == "__main__":
    main()
