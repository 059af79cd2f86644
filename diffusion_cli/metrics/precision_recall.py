"""Precision, recall, density and coverage of samples by nearest neighbours in feature space."""

from pydantic import PositiveInt

from diffusion_cli.errors import UsageError
from diffusion_cli.metrics.base import FeatureView, Metric, MetricState, MetricValue
from diffusion_cli.metrics.neighbours import nearest, within


class Manifold(Metric):
    """Base class of metrics by balls that reach from each image to its k-th nearest neighbour in its set."""

    keeps_rows = True
    key: str

    def __init__(self, k: int) -> None:
        self.k = k

    def check(self, count: int, seen: FeatureView, force: bool) -> list[str]:
        for name, number in (("samples", count), (seen.real.name(), len(seen.real.images()))):
            if number <= self.k:
                raise UsageError(
                    f"metric.{self.key}.k",
                    self.k,
                    f"needs more than {self.k} images; {name} has {number}",
                    "use a smaller k or more images",
                )
        return []


class PrecisionRecall(Manifold):
    """Improved precision and recall.

    Precision is the fraction of samples in a ball around a real image; recall the fraction of real images in a ball
    around a sample. Balls reach to the k-th nearest neighbour in the same set, and include their boundary. Both
    depend on the numbers of images, which should be equal.

    Args:
        k: number of the neighbour.

    Raises:
        UsageError: there are at most k samples or real images.

    Source: Kynkäänniemi et al. 2019, Eq. 1 and 2.
    """

    key = "precision_recall"

    def __init__(self, *, k: PositiveInt = 3) -> None:
        super().__init__(k)

    def init_state(self, seen: FeatureView) -> MetricState:
        return PrecisionRecallState(seen, self.k)


class PrecisionRecallState(MetricState):
    def __init__(self, seen: FeatureView, k: int) -> None:
        self.seen, self.k = seen, k
        self.samples, self.real = seen.rows(), seen.real.rows()

    def compute(self) -> list[MetricValue]:
        network, k = self.seen.network, self.k
        device = network.device
        around_real = nearest(self.real, self.real, k + 1, device, "neighbours of real images")[0][:, -1]
        around_samples = nearest(self.samples, self.samples, k + 1, device, "neighbours of samples")[0][:, -1]
        in_real, _ = within(self.samples, self.real, around_real, False, device, "precision")
        in_samples, _ = within(self.real, self.samples, around_samples, False, device, "recall")
        protocol = {"k": k, "reference": self.seen.real.protocol()}
        shares = {"precision": in_real, "recall": in_samples}
        return [
            MetricValue(
                network.named(name), float((counts > 0).double().mean()), {}, protocol, higher_is_better=True
            )
            for name, counts in shares.items()
        ]


class DensityCoverage(Manifold):
    """Density and coverage.

    Density is the mean number of balls around real images that contain a sample, divided by k; about 1 for a perfect
    model. Coverage is the fraction of these balls that contain a sample. Balls reach to the k-th nearest real
    neighbour, and exclude their boundary.

    Args:
        k: number of the neighbour.

    Raises:
        UsageError: there are at most k samples or real images.

    Source: Naeem et al. 2020, Eq. 5 and 6.
    """

    key = "density_coverage"

    def __init__(self, *, k: PositiveInt = 5) -> None:
        super().__init__(k)

    def init_state(self, seen: FeatureView) -> MetricState:
        return DensityCoverageState(seen, self.k)


class DensityCoverageState(MetricState):
    def __init__(self, seen: FeatureView, k: int) -> None:
        self.seen, self.k = seen, k
        self.samples, self.real = seen.rows(), seen.real.rows()

    def compute(self) -> list[MetricValue]:
        network, k = self.seen.network, self.k
        radii = nearest(self.real, self.real, k + 1, network.device, "neighbours of real images")[0][:, -1]
        counts, held = within(self.samples, self.real, radii, True, network.device, "density")
        protocol = {"k": k, "reference": self.seen.real.protocol()}
        return [
            MetricValue(
                network.named("density"),
                float(counts.double().mean() / k),
                {},
                protocol,
                higher_is_better=True,
            ),
            MetricValue(
                network.named("coverage"), float(held.double().mean()), {}, protocol, higher_is_better=True
            ),
        ]
