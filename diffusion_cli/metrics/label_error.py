"""Errors of the attributes of samples, judged by a network of the dataset."""

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from diffusion_cli.conditions import AttributeDescription, Conditions
from diffusion_cli.errors import UsageError
from diffusion_cli.metrics.base import FeatureView, Metric, MetricState, MetricValue, SampleBatch
from diffusion_cli.metrics.features.base import Features
from diffusion_cli.metrics.features.classifier_training import Recipe
from diffusion_cli.metrics.features.heads import AttributeErrors
from diffusion_cli.metrics.features.judge import AttributeJudge
from diffusion_cli.metrics.features.registry import FeatureExtractors
from diffusion_cli.metrics.samples import Samples


class LabelError(Metric):
    """Errors of the attributes that samples were made with, judged by a small network trained on the dataset.

    Values, one for each attribute:

    - `label_error_NAME` of a number: mean absolute difference, in its unit, of the judged and the wanted value.
    - `label_accuracy_NAME` of a category or yes/no: share of samples, 0 to 1, that are judged to have the wanted value.

    The detail `on_real_val` is the value for real validation images, which a perfect model reaches; `ratio` divides by
    it. `mean_difference` is the mean of the judged minus the wanted number.

    Args:
        dim: number of features of the judge.
        width: channels of its first convolution.
        steps: its training steps.
        batch_size: its training batch size.
        learning_rate: its peak learning rate of AdamW.
        shift: largest random shift of its training images, in pixels.
        seed: seed of its weights, batches and shifts.

    Raises:
        UsageError: the dataset or the samples have neither attributes nor classes.
    """

    def __init__(
        self,
        *,
        dim: PositiveInt = 64,
        width: PositiveInt = 32,
        steps: PositiveInt = 500,
        batch_size: PositiveInt = 128,
        learning_rate: PositiveFloat = 0.002,
        shift: NonNegativeInt = 1,
        seed: NonNegativeInt = 0,
    ) -> None:
        self.recipe = Recipe(
            dim=dim, width=width, classes=0, steps=steps, batch_size=batch_size, learning_rate=learning_rate,
            shift=shift, seed=seed, flip=False,
        )  # fmt: skip

    def network(self, networks: FeatureExtractors) -> Features:
        return networks.judge(self.recipe)

    def check(self, count: int, seen: FeatureView, force: bool) -> list[str]:
        judge = seen.network
        assert isinstance(judge, AttributeJudge)
        if not _comparable(judge, seen.samples):
            raise UsageError(
                "metric",
                "label_error",
                f"the samples have no labels of {seen.dataset.name}",
                "use a model with conditions, or labelled images",
            )
        return []

    def init_state(self, seen: FeatureView) -> MetricState:
        assert isinstance(seen.network, AttributeJudge)
        return LabelErrorState(seen.network, _comparable(seen.network, seen.samples))


class LabelErrorState(MetricState):
    def __init__(self, judge: AttributeJudge, judged: list[AttributeDescription]) -> None:
        self.judge, self.judged = judge, judged
        self.errors = AttributeErrors(judge.heads)

    def update(self, batch: SampleBatch) -> None:
        if batch.condition is not None:
            assert batch.seen.logits is not None
            names = [attribute.name for attribute in self.judged]
            wanted = {name: value for name, value in batch.condition.values.items() if name in names}
            self.errors.update(batch.seen.logits, wanted)

    def compute(self) -> list[MetricValue]:
        return [self._value(attribute) for attribute in self.judged]

    def _value(self, attribute: AttributeDescription) -> MetricValue:
        name, number = attribute.name, attribute.kind == "number"
        error, real = self.errors.mean(name), self.judge.real.mean(name)
        title = f"label_error_{name}" if number else f"label_accuracy_{name}"
        if error is None:
            return MetricValue(title, None, notes=(f"no {title}: no sample has a value of {name}",))
        details: dict[str, float] = {"images": self.errors.counts[name]}
        if not number:
            details |= {} if real is None else {"on_real_val": 1 - real}
            return MetricValue(title, 1 - error, details, higher_is_better=True)
        if real is not None:
            details |= {"on_real_val": real} | ({"ratio": error / real} if real else {})
        bias = self.errors.bias(name)
        assert bias is not None
        return MetricValue(title, error, details | {"mean_difference": bias})


def _comparable(judge: AttributeJudge, samples: Samples) -> list[AttributeDescription]:
    """Return the attributes of the judge that samples have with the same meaning."""
    described = samples.attributes
    if not described and samples.labelled and samples.class_names is not None:
        described = Conditions.of_classes(samples.class_names).attributes
    meanings = {(attribute.name, attribute.kind, attribute.values) for attribute in described}
    return [
        attribute
        for attribute in judge.heads.attributes
        if (attribute.name, attribute.kind, attribute.values) in meanings
    ]
