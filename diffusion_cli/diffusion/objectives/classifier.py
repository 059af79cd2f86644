"""The objective of classifiers of noised images."""

from typing import Annotated

from pydantic import Field
from torch import Tensor
from torch.nn.functional import nll_loss

from diffusion_cli.conditions import Condition
from diffusion_cli.conditions.condition import LABEL
from diffusion_cli.diffusion.denoiser import NoisyClassifier, noised
from diffusion_cli.diffusion.objectives.base import Objective
from diffusion_cli.diffusion.time_sampling import Times


class CrossEntropy(Objective[NoisyClassifier]):
    """Cross-entropy `-log p(y | x_t)` in nats, for classifiers of noisy images (Dhariwal and Nichol 2021, Sec. 4).

    Args:
        label_smoothing: fraction of the target distribution shared equally among all K classes, in [0, 1).
    """

    trains = NoisyClassifier

    def __init__(self, *, label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def check(self, model: NoisyClassifier, times: Times) -> None:
        pass  # any classifier and any times

    def __call__(
        self, model: NoisyClassifier, x0: Tensor, y: Condition | None, t: Tensor, eps: Tensor
    ) -> Tensor:
        labels = Condition.of(y).get(LABEL)
        assert labels is not None
        log_p = model(noised(model.schedule, x0, t, eps), t)
        loss = nll_loss(log_p, labels, reduction="none")
        return (1 - self.label_smoothing) * loss - self.label_smoothing * log_p.mean(dim=1)
