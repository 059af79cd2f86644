"""Augmentation of training images, with the transforms as an input of the network, so that samples have none."""

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

ALONG_AXES = 0.5
"""Probability that an anisotropic scaling is along the axes of the image."""


class NoAugmentation:
    """No augmentation."""


class EDMAugmentation:
    """Random flips and affine transforms of images, with parameters that are an input of the network.

    The parameters a of a transform, in the order in which they act on an image, are 0 for an unchanged one:

    * a_0, a_1: 1 for a flip left to right, and for one top to bottom.
    * a_2: scaling by `2^(scale a_2)`.
    * a_3, a_4: `cos(theta) - 1` and `sin(theta)` of a rotation by theta, clockwise.
    * a_5, a_6: `w cos(2 r)` and `w sin(2 r)` of a scaling by `2^(anisotropy w)` along the axis at the angle r, and by
      the inverse across it.
    * a_7, a_8: shift to the right by `translation a_7` widths, and down by `translation a_8` heights.

    a_2, w, a_7 and a_8 are normal with unit variance, theta is uniform. The published parameters have r in place of
    2 r, so that some stand for two transforms.

    Args:
        probability: probability of each transform, but 1/2 for flips left to right; 0: no transforms.
        x_flip: whether to flip images left to right.
        y_flip: whether to flip images top to bottom, with probability `probability / 2`.
        scale: standard deviation of log2 of the scaling; 0: none.
        rotation: largest angle in degrees, in [0, 180]; 0: none.
        anisotropy: standard deviation of log2 of the anisotropic scaling; 0: none.
        translation: standard deviation of the shifts, relative to the width and the height; 0: none.

    Source: Karras et al. 2020 ("Training generative adversarial networks with limited data"), Appendix B, for the
    transforms; Karras et al. 2022, Appendix F.2, for their strengths and the input of the network.
    """

    size = 9
    """Number of parameters of a transform."""

    def __init__(
        self,
        *,
        probability: Annotated[float, Field(ge=0, le=1)] = 0.12,
        x_flip: bool = True,
        y_flip: bool = True,
        scale: Annotated[float, Field(ge=0, le=1)] = 0.2,
        rotation: Annotated[float, Field(ge=0, le=180)] = 180.0,
        anisotropy: Annotated[float, Field(ge=0, le=1)] = 0.2,
        translation: Annotated[float, Field(ge=0, le=1)] = 0.125,
    ) -> None:
        self.probability = probability
        self.x_flip, self.y_flip = x_flip, y_flip
        self.scale, self.rotation = scale, rotation
        self.anisotropy, self.translation = anisotropy, translation

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Return the parameters of random transforms, float32 [count, 9]; the generator is on the CPU."""
        # All are drawn, so that a transform that is left out changes no other.
        applies = torch.rand(count, 5, generator=generator) < self.probability
        flips = torch.randint(2, (count, 2), generator=generator)
        normal = torch.randn(count, 4, generator=generator)
        angle, axis = (math.pi * (2 * torch.rand(count, 2, generator=generator) - 1)).unbind(1)
        turned = torch.rand(count, generator=generator) >= ALONG_AXES
        flips_y, scales, rotates, stretches, shifts = applies.unbind(1)
        theta = angle * self.rotation / 180 * rotates
        log_scale = normal[:, 0] * scales * (self.scale > 0)
        stretch = normal[:, 1] * stretches * (self.anisotropy > 0)
        shift = normal[:, 2:] * shifts[:, None] * (self.translation > 0)
        return torch.stack([
            flips[:, 0] * (self.x_flip and self.probability > 0), flips[:, 1] * flips_y * self.y_flip,
            log_scale, theta.cos() - 1, theta.sin(),
            stretch * (2 * axis * turned).cos(), stretch * (2 * axis * turned).sin(), *shift.unbind(1),
        ], 1)  # fmt: skip

    def __call__(self, images: Tensor, parameters: Tensor) -> Tensor:
        """Return transformed images; those with parameters 0 are unchanged.

        Pixels are interpolated by cubic functions within the range of each channel, and reflected at the border.

        Args:
            images: floating-point images [B, C, H, W].
            parameters: float32 [B, 9], on the CPU.
        """
        flips = parameters[:, :2].bool().to(images.device)[:, :, None, None, None]
        images = torch.where(flips[:, 0], images.flip(3), images)
        images = torch.where(flips[:, 1], images.flip(2), images)
        rows = parameters[:, 2:].any(1).nonzero().flatten()
        if not len(rows):
            return images
        moved = images[rows.to(images.device)]
        near = moved if images.device.type != "mps" else moved.cpu()  # MPS has no cubic interpolation
        affine = self.source_positions(parameters[rows], near.shape[2:])
        # Not in the number format of training: bfloat16 would move pixels by up to 1 / 512 of half of the width.
        with torch.autocast(near.device.type, enabled=False):
            grid = affine_grid(affine.to(near), [*near.shape], align_corners=False)
            sampled = grid_sample(near, grid, "bicubic", "reflection", align_corners=False).to(moved)
        sampled = torch.clamp(sampled, moved.amin((2, 3), keepdim=True), moved.amax((2, 3), keepdim=True))
        return images.index_copy(0, rows.to(images.device), sampled)

    def source_positions(self, parameters: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """Return the maps from positions in transformed images to those in flipped ones, float64 [B, 2, 3].

        Positions (x, y) are relative to the centre, where 1 is half of the width or of the height.

        Args:
            parameters: [B, 9].
            sizes: height and width of the images.
        """
        a = parameters.double()
        cos, sin = 1 + a[:, 3], a[:, 4]
        # The scaling by e^k along an axis at the angle r is cosh(k) + sinh(k) [[cos(2 r), sin(2 r)], [sin(2 r),
        # -cos(2 r)]]; its inverse has -k.
        length = a[:, 5:7].norm(dim=1)
        k = math.log(2) * self.anisotropy * length
        u, v = (-k.sinh()[:, None] * a[:, 5:7] / length.clamp(min=1e-12)[:, None]).unbind(1)
        unstretch = torch.stack([k.cosh() + u, v, v, k.cosh() - u], 1).view(-1, 2, 2)
        unrotate = torch.stack([cos, sin, -sin, cos], 1).view(-1, 2, 2)
        unscale = torch.exp2(-self.scale * a[:, 2])[:, None, None]
        inverse = unscale * unrotate @ unstretch
        half = a.new_tensor([*reversed(sizes)]) / 2
        inverse = inverse * half / half[:, None]
        shift = 2 * self.translation * a[:, 7:9, None]
        return torch.cat([inverse, -inverse @ shift], 2)
