"""Translation of condition images to images, by a model that is trained with condition images."""

from collections import deque
from collections.abc import Sequence
from copy import copy
from typing import Self

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from diffusion_cli.conditions import Condition, ImageCondition
from diffusion_cli.conditions.condition import IMAGE
from diffusion_cli.conditions.operators import Mask
from diffusion_cli.editing.base import Edit, EditProcess, EditResult, LargerShapes, Shape
from diffusion_cli.editing.restore import box_of
from diffusion_cli.editing.tiles import tiled
from diffusion_cli.errors import UsageError
from diffusion_cli.networks.tiles import Tiles
from diffusion_cli.samplers import integrate, reporting


class Translate(Edit):
    """Sampling of images for condition images, such as sketches, masks or small images.

    Images that are larger than those of training are sampled in tiles of the model's size. All tiles share one noisy
    image. At every step, the predictions of overlapping tiles are averaged (Bar-Tal et al. 2023), so that neighbouring
    tiles agree and show no seams. Each tile has the condition image of its own place, and the noise of its own place.

    Args:
        shape: shape of the model's images.
        degrade: whether inputs are originals, from which condition images are derived first, as in training.
            Random parts and noise depend on the seed of the result.
        mask: hidden part of inputs, for a model trained with `condition.of=mask`: `centre`, a box [left, top, right,
            bottom] in pixels of the result, or the path of masks, which `masked` takes; None for other models.
        overlap: smallest overlap of neighbouring tiles in pixels of the result; None: a quarter of the model's size.
        tiles_per_call: largest number of tiles in a network call.
    """

    takes_condition_image = True
    starts_from_noise = True
    before_names = ("original", "condition")

    def __init__(
        self,
        shape: Shape,
        *,
        degrade: bool = False,
        mask: str | list[NonNegativeInt] | None = None,
        overlap: NonNegativeInt | None = None,
        tiles_per_call: PositiveInt = 16,
    ) -> None:
        super().__init__(shape)
        self.degrade, self.mask, self.overlap = degrade, mask, overlap
        self.most_at_once = self.tiles_per_call = tiles_per_call
        if isinstance(mask, str) and mask not in ("centre", "center"):
            self.mask_path = mask
        self.image, self.channels = ImageCondition(), shape[0]
        self.has_rows = False
        self._results = shape

    def conditioned(self, image: ImageCondition, channels: int) -> Self:
        edit = copy(self)
        edit.image, edit.channels = image, channels - (image.noise_augmentation > 0)
        if self.degrade and image.degradation is None:
            problem = (
                "the model is conditioned on images of its dataset, which are not derived from originals"
            )
            raise UsageError("edit.degrade", True, problem, "leave it out")
        edit.before_of_seed = int(self.degrade and image.degradation is not None and image.degradation.random)
        if self.mask is not None and (image.of != "mask" or self.degrade):
            raise UsageError(
                "edit.mask",
                self.mask,
                "applies only to a model trained with condition.of=mask, without edit.degrade",
                "leave it out",
            )
        return edit

    def of_rows(self) -> Self:
        if self.degrade or self.mask is not None:
            key = "edit.degrade" if self.degrade else "edit.mask"
            value = True if self.degrade else self.mask
            raise UsageError(
                key, value, "has no effect on images of the dataset, which have conditions", "leave it out"
            )
        edit = copy(self)
        edit.has_rows = True
        return edit

    def accepts(self) -> list[Shape]:
        derived = self.image.degradation
        if self.degrade or self.image.of == "mask":
            return LargerShapes([self.shape])
        sizes = self.shape[1:] if derived is None else derived.sizes(self.shape)
        return LargerShapes([(self.channels, *sizes)])

    def sized(self, shape: Shape) -> Self:
        if self.has_rows:
            return self
        if self.image.of == "mask" and not self.degrade and self.mask is None:
            remedy = "set it to centre, a box or a mask file, or set edit.degrade=true for random parts"
            raise UsageError("edit.mask", None, "needed, because the model fills a hidden part", remedy)
        edit = copy(self)
        edit._results = self._results_of(shape)
        tile, overlaps = self.shape[1:], self._overlaps()
        for whole, part, overlap in zip(edit.results[1:], tile, overlaps, strict=True):
            if whole > part and overlap >= part:
                problem = f"must be less than the {part} pixels of the model's images"
                raise UsageError("edit.overlap", self.overlap, problem, "use a smaller overlap")
        if self.mask is not None and self.mask_path is None:
            sizes = [*edit.results[1:]]
            edit.known = torch.ones(1, 1, *sizes, dtype=torch.bool)
            edit.known[(..., *box_of(self.mask, sizes))] = False
        return edit

    def _results_of(self, shape: Shape) -> Shape:
        """Return the shape of the results of inputs of a shape."""
        derived = self.image.degradation
        if self.degrade:
            assert derived is not None
            derived.check(shape)
            return shape
        small = self.shape[1:] if derived is None else derived.sizes(self.shape)
        scales = [whole // part for whole, part in zip(self.shape[1:], small, strict=True)]
        return self.shape[0], *(size * scale for size, scale in zip(shape[1:], scales, strict=True))

    def _overlaps(self) -> list[int]:
        return [size // 4 if self.overlap is None else self.overlap for size in self.shape[1:]]

    def masked(self, painted: Tensor) -> Self:
        edit = copy(self)
        edit.known = ~painted
        return edit

    def of(self, places: list[int]) -> Self:
        if self.known is None or len(self.known) == 1:
            return self
        edit = copy(self)
        edit.known = self.known[places]
        return edit

    def content(self) -> dict[str, Tensor]:
        return {} if self.known is None else {"mask": self.known}

    @property
    def results(self) -> Shape:
        return self._results

    def __call__(self, images: Tensor, process: EditProcess) -> EditResult:
        given, before = self._condition_images(images, process.seeds)
        tiles = Tiles(self.results[1:], self.shape[1:], self._overlaps())
        y = Condition.of(process.condition).repeat_interleave(len(tiles)).replaced({IMAGE: tiles.cut(given)})
        most = self.tiles_per_call
        parts = torch.arange(len(y.values[IMAGE])).split(most)
        denoise = tiled(tiles, [process.guided(y.rows(part)) for part in parts], most)
        denoise = reporting(denoise, process.times, process.advance)
        steps = integrate(process.sampler, denoise, process.start(), process.times, process.draw)
        (x,) = deque(steps, maxlen=1)
        made = process.space.decode(x)
        if self.image.of == "mask":
            made = torch.where(
                given[:, self.shape[0], None] > 0, given[:, : self.shape[0]], made.clamp(-1, 1)
            )
        return EditResult(made[:, None], [self._picture(image) for image in before])

    def _condition_images(self, images: Tensor, seeds: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Return the condition images [B, C', *sizes] of inputs for the network, and the images to show."""
        if self.has_rows:
            originals, given = images.split([self.shape[0], images.shape[1] - self.shape[0]], 1)
            return given, [originals, given]
        derived = self.image.degradation
        if self.degrade:
            given = self.image.derived(images, seeds)
            return self.image.augmented(given), [images, given]
        if self.known is not None:
            known = self.known.to(images.device).expand(len(images), *self.known.shape[1:])
            given = torch.cat([Mask(known)(images), 2 * known.to(images) - 1], 1)
        else:
            given = images if derived is None else derived.enlarged(images)
        return self.image.augmented(given), [given]

    def _picture(self, image: Tensor) -> Tensor:
        """Return a condition image with the channels of the model's images."""
        wanted = self.shape[0]
        if image.shape[1] >= wanted:
            return image[:, :wanted]
        return image[:, :1].expand(-1, wanted, *image.shape[2:])
