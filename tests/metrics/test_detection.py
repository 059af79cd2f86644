"""Areas under curves and the best Dice coefficient, by hand and by other implementations, with equal scores."""

import pytest
import torch
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from diffusion_cli.metrics.detection import detection


def test_equal_scores_by_hand():
    """One of the four pairs is equal: 3.5 / 4. Detected: 1 of 1, then 2 of 3, then 2 of 4."""
    found = detection(torch.tensor([[2.0, 1.0], [3.0, 2.0]]), torch.tensor([[False, False], [True, True]]))
    assert found.auroc == 3.5 / 4
    assert found.average_precision == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert (found.best_dice, found.best_threshold) == (2 * 2 / (3 + 2), 2.0)
    assert found.anomalous == 0.5


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_any_scores_agree_with_all_pairs_and_another_implementation(levels):
    generator = torch.Generator().manual_seed(levels)
    for _ in range(20):
        scores = torch.randint(0, levels, (40,), generator=generator) / levels
        truth = torch.rand(40, generator=generator) < 0.3
        truth[:2] = torch.tensor([True, False])
        found = detection(100 * scores - 7, truth)
        apart = scores[truth][:, None] - scores[~truth]
        pairs = (apart > 0).double() + (apart == 0).double() / 2
        assert found.auroc == pytest.approx(float(pairs.mean()))
        assert found.auroc == pytest.approx(float(binary_auroc(scores, truth.int())), abs=1e-6)
        precision = float(binary_average_precision(scores, truth.int()))
        assert found.average_precision == pytest.approx(precision, abs=1e-6)
        dice = {
            float(k): float(2 * (truth & (scores >= k)).sum() / (truth.sum() + (scores >= k).sum()))
            for k in scores.unique()
        }
        assert found.best_dice == pytest.approx(max(dice.values()))
        best = max(k for k, value in dice.items() if value == max(dice.values()))
        assert found.best_threshold == pytest.approx(100 * best - 7, abs=1e-4)


def test_one_score_for_all_finds_nothing():
    found = detection(torch.ones(10), torch.arange(10) < 3)
    assert found.auroc == 0.5
    assert found.average_precision == pytest.approx(0.3)
    assert found.best_dice == pytest.approx(2 * 3 / 13)


@pytest.mark.parametrize("anomalous", [True, False])
def test_one_class_has_no_curve(anomalous):
    with pytest.raises(ValueError, match="some elements must be anomalous, and some must not"):
        detection(torch.arange(3.0), torch.full((3,), anomalous))
