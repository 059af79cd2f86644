"""A denoiser that is told attributes and a text, and shows them in the grey value of its images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_cli.conditions import AttributeDescription, Condition, Conditions, TextDescription
from diffusion_cli.data import TextEncoder
from diffusion_cli.data.captions import CaptionTable
from diffusion_cli.data.sources import ColumnSource
from diffusion_cli.data.text import TokenTable
from diffusion_cli.diffusion.denoiser import Denoiser
from diffusion_cli.diffusion.latents import Pixels
from diffusion_cli.diffusion.parameterizations import X0
from diffusion_cli.diffusion.schedules import Schedule
from diffusion_cli.runs.load import LoadedDenoiser
from helpers import checkpoint_info
from helpers.metrics import Held, pixels

SPECIES = AttributeDescription(name="species", kind="category", values=("cat", "frog"))
GLASSES = AttributeDescription(name="glasses", kind="yes_no", values=("no", "yes"))
AGE = AttributeDescription(name="age", kind="number", low=0.0, high=80.0)
ATTRIBUTES = (SPECIES, GLASSES, AGE)
TEXT = TextDescription(length=4, vocabulary=256)


class GreyNetwork(nn.Module):
    """Predicts a constant image: the age in hundreds, more with frogs and glasses, and with the length of the text."""

    takes_conditions = True

    def __init__(self, conditions: Conditions) -> None:
        super().__init__()
        self.conditions, self.num_classes = conditions, conditions.num_classes
        self.zero = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, c_noise: Tensor, y: Condition | None = None) -> Tensor:
        """Return the predicted images [B, C, H, W]."""
        grey = torch.zeros(len(x), device=x.device) + self.zero
        for name, weight in {"age": 0.01, "species": 0.1, "glasses": 0.05}.items():
            value = None if y is None else y.get(name)
            if value is not None:
                grey = grey + weight * value.float().nan_to_num().clamp(min=0)
        text = None if y is None else y.get("text")
        if text is not None:
            grey = grey - 0.1 * (text >= 0).sum(1)
        return grey[:, None, None, None].expand_as(x)


def grey_model(
    schedule: Schedule,
    conditions: Conditions | None = None,
    label_dropout: float = 0.1,
    single_dropout: float = 0.1,
    missing: tuple[str, ...] = (),
) -> LoadedDenoiser:
    """A model of 8 x 8 images of constant grey value, with these conditions, any of which may be missing."""
    conditions = conditions or Conditions(attributes=ATTRIBUTES, text=TEXT)
    objective = {"label_dropout": label_dropout, "single_dropout": single_dropout}
    more: dict[str, Any] = {} if conditions.text is None else {"text": "a"}
    if conditions.image is not None:
        more["condition"] = {"_target_": "diffusion_cli.conditions.ImageCondition", "of": "noise"}
    info = checkpoint_info(
        conditions=conditions.model_dump(), objective=objective, missing_conditions=missing, **more
    )
    denoiser = Denoiser(GreyNetwork(conditions), schedule, X0()).eval()
    return LoadedDenoiser(info, 20, "0" * 64, denoiser, Pixels((1, 8, 8)))


def letters(texts: Sequence[str]) -> Tensor:
    """Encode texts by their first four letters, padded with -1; int64 [N, 4]."""
    return torch.tensor([[*text.encode()[:4], *[-1] * (4 - len(text.encode()[:4]))] for text in texts])


class LetterEncoder(TextEncoder):
    """The encoder of `letters`."""

    def __init__(self) -> None:
        super().__init__(TEXT, "letters")

    def lengths(self, texts: Sequence[str]) -> list[int]:
        return [len(text) for text in texts]

    def encode(self, texts: Sequence[str]) -> Tensor:
        return letters(texts)

    def stored(self, texts: Sequence[str], cache_dir: Path) -> TokenTable:
        return TokenTable(letters(texts))


class Captioned(Held):
    """Five validation images, with ages, captions and the classes 0 and 1; one has no caption and one no age."""

    attributes = (AGE,)
    ages = torch.tensor([10.0, 20.0, float("nan"), 40.0, 50.0])
    texts: tuple[tuple[str, ...], ...] = (("a", "frog"), ("dog",), (), ("it's",), ("me",))

    def __init__(self, *ages: float) -> None:
        super().__init__(pixels(5, 1), pixels(5, 0), classes=2)
        self.ages = torch.tensor(ages) if ages else self.ages

    def load(self, split):
        images = super().load(split).with_conditions({"age": ColumnSource(self.ages)})
        images.captions = CaptionTable.of(self.texts)
        return images
