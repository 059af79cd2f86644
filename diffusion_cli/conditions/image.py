"""Condition images: of the dataset, or derived from the images."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from diffusion_cli.conditions.degradations import (
    Degradation,
    Edges,
    GaussianBlur,
    GaussianNoise,
    Gray,
    HiddenPart,
    Labels,
    ReducedSize,
    Shape,
    uniform,
    white_noise,
)
from diffusion_cli.errors import UsageError

OWN: dict[str, dict[str, Any]] = {
    "downsample": {"factor": 4},
    "mask": {"mask": "box", "ratio": 0.25},
    "blur": {"blur_sigma": 2.0},
    "noise": {"noise_sigma": 0.5},
}
"""Arguments of each way to derive condition images, with the values that null stands for."""
MAKERS: dict[str, Callable[..., Degradation]] = {
    "downsample": lambda factor: ReducedSize(factor),
    "gray": Gray,
    "mask": lambda mask, ratio: HiddenPart(mask, ratio),
    "edges": Edges,
    "segmentation": Labels,
    "blur": lambda blur_sigma: GaussianBlur(blur_sigma),
    "noise": lambda noise_sigma: GaussianNoise(noise_sigma),
}


class NoImage:
    """No condition image."""


class ImageCondition:
    """An image that the model is conditioned on: a second image of the dataset, or one derived from the image.

    With noise augmentation (Ho et al. 2022, "Cascaded diffusion models", section 4.2), training adds noise of a
    random standard deviation s, uniform in [0, S], to the condition image: of `downsample` to the reduced image, and of
    `mask` not to the channel that marks the known part. A further channel has the value 2 s / S - 1, so that the
    network is conditioned on s too. Sampling uses s = 0.

    Args:
        of: way to derive the condition image from the image; None: the second image of each pair of the dataset.
            `downsample`: means of blocks, for super-resolution; `gray`, for colorization; `mask`: the image with a
            hidden part, for inpainting; `edges`: length of the gradient; `segmentation`: the mask of `dataset.masks`;
            `blur`; `noise`.
        factor: downsampling factor; None: 4.
        mask: hidden part: a random `box`, random `pixels`, or `centre`, the middle half of each axis; None: box.
        ratio: largest share of the image in a hidden box, or share of hidden pixels, in (0, 1); None: 0.25.
        blur_sigma: standard deviation of blur in pixels; None: 2.
        noise_sigma: standard deviation of noise, where black and white differ by 2; None: 0.5.
        noise_augmentation: largest standard deviation S of the noise augmentation, where black and white differ by
            2; 0: none.

    Raises:
        UsageError: an argument applies only with another `of`, or with another `mask`.
    """

    def __init__(
        self,
        *,
        of: Literal["downsample", "gray", "mask", "edges", "segmentation", "blur", "noise"] | None = None,
        factor: Annotated[int, Field(ge=2)] | None = None,
        mask: Literal["box", "pixels", "centre"] | None = None,
        ratio: Annotated[float, Field(gt=0, lt=1)] | None = None,
        blur_sigma: PositiveFloat | None = None,
        noise_sigma: PositiveFloat | None = None,
        noise_augmentation: NonNegativeFloat = 0.0,
    ) -> None:
        given = {
            "factor": factor,
            "mask": mask,
            "ratio": ratio,
            "blur_sigma": blur_sigma,
            "noise_sigma": noise_sigma,
        }
        self.of, self.noise_augmentation = of, noise_augmentation
        arguments = {} if of is None else _arguments(of, given)
        self.derivation: dict[str, Any] = {"of": of, **arguments}
        """Degradation with its arguments, as plain data."""
        self.degradation = None if of is None else MAKERS[of](**arguments)
        """Degradation that derives the condition image; None for condition images of the dataset."""
        _check_unused(of, given)

    def channels(self, shape: Shape, source: int | None = None, has_masks: bool = False) -> int:
        """Return the channels of the network's condition image.

        Args:
            shape: shape of the images, [C, *sizes].
            source: channels of the condition images of the dataset; None: it has none.
            has_masks: whether the last channel of the images is a segmentation mask.

        Raises:
            UsageError: the images of the dataset do not allow this condition.
        """
        if self.degradation is None and source is None:
            remedy = "use dataset=pairs, or set condition.of"
            raise UsageError("condition", "image", "the dataset has no condition images", remedy)
        if self.degradation is not None and source is not None:
            problem = "conflicts with dataset=pairs, which has condition images"
            raise UsageError("condition.of", self.of, problem, "set condition.of=null")
        if self.degradation is not None:
            if self.degradation.needs_masks and not has_masks:
                problem = "needs images with a mask as their last channel"
                raise UsageError(
                    "condition.of", self.of, problem, "set dataset.masks, or has_masks in the .npz file"
                )
            self.degradation.check(shape)
            source = self.degradation.channels(shape)
        assert source is not None
        return source + (self.noise_augmentation > 0)

    def own_size(self, sizes: Shape) -> Shape:
        """Return the sizes of given condition images, for images of these sizes; smaller for downsample."""
        return sizes if self.degradation is None else self.degradation.sizes((1, *sizes))

    def given(self, condition: Tensor) -> Tensor:
        """Return the network's input for condition images of `own_size`: enlarged, and without noise."""
        enlarged = condition if self.degradation is None else self.degradation.enlarged(condition)
        return self.augmented(enlarged)

    def derived(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """Return the condition images of images [B, C, *sizes], of the same sizes, without augmentation.

        Args:
            images: float32 in [-1, 1].
            seeds: seed of the random choices for each image.
        """
        assert self.degradation is not None
        return self.degradation.enlarged(self.degradation(images, seeds))

    def augmented(self, condition: Tensor, seeds: Sequence[int] | None = None) -> Tensor:
        """Return condition images [B, C, *sizes] with noise augmentation; without it, unchanged.

        Args:
            condition: float32 in [-1, 1].
            seeds: seed of the standard deviation and the noise for each image; None: standard deviation 0.
        """
        if not self.noise_augmentation:
            return condition
        if seeds is None:
            return self.at_level(condition, condition.new_zeros(len(condition)), condition)
        level = self.noise_augmentation * uniform(seeds).to(condition)
        others = [seed ^ 1 for seed in seeds]  # the noise must not depend on the level
        noise = white_noise if self.degradation is None else self.degradation.noise
        return self.at_level(condition, level, noise(condition, others))

    def at_level(self, condition: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        """Return condition images with noise, and with a channel for its standard deviation.

        Args:
            condition: clean condition images, [B, C, *sizes].
            level: standard deviation of the noise of each image, [B], from 0 to `noise_augmentation`.
            noise: noise of unit deviation in the shape of `condition`.
        """
        s = level.view(-1, *[1] * (condition.dim() - 1))
        channel = (2 * s / self.noise_augmentation - 1).expand(-1, 1, *condition.shape[2:])
        noised = torch.where(s > 0, condition + s * noise, condition)
        return torch.cat([noised, channel], 1)


def _arguments(of: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a degradation; null becomes the usual value."""
    usual = OWN.get(of, {})
    return {name: value if given[name] is None else given[name] for name, value in usual.items()}


def _check_unused(of: str | None, given: dict[str, Any]) -> None:
    """Raise UsageError for an argument that does not apply."""
    for name, value in given.items():
        (owner,) = (each for each, arguments in OWN.items() if name in arguments)
        if value is not None and of != owner:
            problem = f"applies only with condition.of={owner}"
            raise UsageError(f"condition.{name}", value, problem, "leave it out")
    if given["mask"] == "centre" and given["ratio"] is not None:
        problem = "applies only with condition.mask=box or condition.mask=pixels"
        raise UsageError("condition.ratio", given["ratio"], problem, "leave it out")
