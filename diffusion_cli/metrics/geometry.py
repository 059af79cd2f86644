"""Distances between the surfaces of samples and of real shapes."""

import math
from collections.abc import Sequence

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from diffusion_cli.data import PicturedImages, spread
from diffusion_cli.errors import UsageError
from diffusion_cli.formats import SurfacePoints
from diffusion_cli.metrics.base import FeatureView, Metric, MetricState, MetricValue, SampleBatch
from diffusion_cli.system.progress import ProgressBar
from diffusion_cli.system.seeding import mix

AT_ONCE = 2**24
"""Distances between points that are in memory at once."""


def chamfer_distances(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Return the Chamfer distance of each set of points [N, 3] to each of a second list, float64 [A, B].

    `mean_x min_y |x - y|^2 + mean_y min_x |x - y|^2`; infinite for a set without points.

    Source: Achlioptas et al. 2018, Sec. 2; Yang et al. 2019, Eq. 13, with means in place of sums.
    """
    distances = torch.full((len(first), len(second)), math.inf, dtype=torch.float64)
    sizes = sorted({len(points) for points in second} - {0})
    for size in sizes:  # sets of equal size together
        places = [place for place, points in enumerate(second) if len(points) == size]
        for row, points in enumerate(first):
            if not len(points):
                continue
            for part in torch.tensor(places).split(max(1, AT_ONCE // (size * len(points)))):
                others = torch.stack([second[place] for place in part.tolist()])
                exact = "donot_use_mm_for_euclid_dist"
                squares = torch.cdist(points.expand(len(others), -1, -1), others, compute_mode=exact).square()
                near = squares.amin(2).double().mean(1) + squares.amin(1).double().mean(1)
                distances[row, part] = near
    return distances


def neighbour_accuracy(first: Tensor, second: Tensor, across: Tensor) -> float:
    """Return the accuracy of the 1-nearest-neighbour classifier that tells two sets apart, leaving each element out.

    It is 0.5 for two sets of one distribution, and 1 for sets apart. Elements at infinite distances count as told
    apart.

    Args:
        first: distances within the first set, [A, A].
        second: distances within the second set, [B, B].
        across: distances between both, [A, B].

    Source: Lopez-Paz & Oquab 2017, Sec. 2; Yang et al. 2019, Eq. 16.
    """
    right = 0.0
    for own, other in ((first, across), (second, across.T)):
        others = own.clone().fill_diagonal_(math.inf).amin(1)
        right += float((others < other.amin(1)).sum() + (other.amin(1).isinf() & others.isinf()).sum())
        right += 0.5 * float(((others == other.amin(1)) & others.isfinite()).sum())
    return right / (len(first) + len(second))


def shape_values(samples: Sequence[Tensor], shapes: Sequence[Tensor]) -> dict[str, float | None]:
    """Return the values of `Geometry` that depend on distances, by name; None where no sample has points.

    Args:
        samples: points [N, 3] of each sample.
        shapes: points [N, 3] of each real shape, as many shapes as samples.
    """
    across = chamfer_distances(samples, shapes)
    near = across.amin(1)
    finite = near.isfinite()
    some = bool(finite.any())
    within = (chamfer_distances(samples, samples), chamfer_distances(shapes, shapes))
    return {
        "chamfer": float(near[finite].mean()) if some else None,
        "minimum_matching_distance": float(across.amin(0).mean()) if some else None,
        "shape_coverage": len(across[finite].argmin(1).unique()) / len(shapes),
        "nearest_neighbour_accuracy": neighbour_accuracy(*within, across),
    }


class Geometry(Metric):
    """Chamfer distances between surfaces of samples and real shapes, for point clouds and meshes.

    Points are random on each surface, in coordinates of the model, [-1, 1]. The values are

    - `chamfer`: mean distance of a sample to the nearest real shape;
    - `minimum_matching_distance`: mean distance of a real shape to the nearest sample;
    - `shape_coverage`: fraction of real shapes that are the nearest of some sample;
    - `nearest_neighbour_accuracy`: see `neighbour_accuracy`; best at 0.5;
    - `watertight` and `volume`, for meshes: fraction of closed surfaces, and mean volume, beside that of real shapes.

    Distances are those of equally many samples and real shapes, evenly spaced ones of each; they depend on this number.
    `watertight` and `volume` are those of all samples.

    Args:
        points: points per surface.
        shapes: largest number of samples and of real shapes for the distances.
        seed: seed of the points.

    Raises:
        UsageError: the samples or the real images are no point clouds or meshes, or there are fewer than 2.

    Source: Achlioptas et al. 2018; Yang et al. 2019, Sec. 5.1.
    """

    uses_features = False
    uses_stored = True

    def __init__(
        self, *, points: PositiveInt = 512, shapes: PositiveInt = 200, seed: NonNegativeInt = 0
    ) -> None:
        self.points, self.shapes, self.seed = points, shapes, seed

    def check(self, count: int, seen: FeatureView, force: bool) -> list[str]:
        if seen.samples.form is None or not seen.samples.form.has_surface:
            raise UsageError(
                "metric",
                "geometry",
                "applies to point clouds and meshes",
                "use dataset=points or dataset=meshes",
            )
        real = seen.real.images()
        if not isinstance(real, PicturedImages):
            raise UsageError("reference", seen.real.name(), "has no surfaces", "use reference=dataset")
        if min(count, len(real)) < 2:
            raise UsageError("metric", "geometry", "needs 2 samples and 2 real shapes", "use more")
        return []

    def init_state(self, seen: FeatureView) -> MetricState:
        return GeometryState(self, seen)


class GeometryState(MetricState):
    def __init__(self, metric: Geometry, seen: FeatureView) -> None:
        self.metric, self.seen = metric, seen
        self.found: list[SurfacePoints] = []

    def update(self, batch: SampleBatch) -> None:
        form = self.seen.samples.form
        assert form is not None
        assert batch.stored is not None
        for sample in batch.stored:
            seed = mix("sample points", self.metric.seed, len(self.found))
            self.found.append(form.surface_points(sample, self.metric.points, seed))

    def compute(self) -> list[MetricValue]:
        count = min(len(self.found), len(self._images()), self.metric.shapes)
        real, made = self._real(count), [self.found[row] for row in spread(len(self.found), count).tolist()]
        protocol = {
            "points": self.metric.points, "shapes": count, "points_seed": self.metric.seed,
            "reference": self.seen.real.protocol(),
        }  # fmt: skip
        empty = sum(not len(each.points) for each in made)
        notes = (
            (f"geometry: {empty} of {count} samples have no surface; chamfer leaves them out",)
            if empty
            else ()
        )
        values = shape_values([each.points for each in made], [each.points for each in real])
        results = [
            MetricValue(name, value, {}, protocol, notes, higher_is_better=name == "shape_coverage")
            for name, value in values.items()
        ]
        if made[0].watertight is None:
            return results
        both = (self.found, real)
        shares = [sum(bool(each.watertight) for each in found) / len(found) for found in both]
        volumes = [sum(each.volume or 0.0 for each in found) / len(found) for found in both]
        return [
            *results,
            MetricValue("watertight", shares[0], {"real": shares[1]}, protocol, higher_is_better=True),
            MetricValue("volume", volumes[0], {"real": volumes[1]}, protocol),
        ]

    def _images(self) -> PicturedImages:
        images = self.seen.real.images()
        assert isinstance(images, PicturedImages)
        return images

    def _real(self, count: int) -> list[SurfacePoints]:
        images, found = self._images(), []
        rows = spread(len(images), count)
        for number, row in enumerate(
            ProgressBar(rows.tolist(), desc="real surfaces", unit="shape", delay=1.0)
        ):
            stored = images.stored(torch.tensor([row], device=images.device))[0].cpu()
            seed = mix("real points", self.metric.seed, number)
            found.append(images.form.surface_points(stored, self.metric.points, seed))
        return found
