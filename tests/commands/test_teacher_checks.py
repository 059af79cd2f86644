"""Sources of first weights that cannot be teachers."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from diffusion_cli.commands.first_weights import WeightSource, check_copy, check_teacher
from diffusion_cli.conditions import Conditions
from diffusion_cli.errors import UsageError
from diffusion_cli.runs.schema import InitInfo
from diffusion_cli.training.initialization import InitialWeights

MODEL = {"_target_": "diffusion_cli.networks.UNet", "num_heads": 1, "dropout": 0.1, "class_conditional": True}
SOURCE = WeightSource(
    key="init.run", named="start", origin={}, model=MODEL, shape=(1, 8, 8),
    weights=InitialWeights(
        state={}, channels=1, learns_variance=False, num_classes=3, class_names=None, conditions=Conditions()
    ),
    process={}, label_dropout=0.0,
)  # fmt: skip
INIT = InitInfo(
    source="start", kind="run", step=1, weights="ema", sha256="0" * 64, taken=9, total=9, fresh=[]
)


def config(scale: float | None = None, progressive: Any = None, **model: Any) -> Any:
    objective = {"_target_": "diffusion_cli.diffusion.objectives.Consistency", "guidance_scale": scale}
    return SimpleNamespace(
        objective=objective, progressive=progressive, schedule={}, parameterization={},
        model=MODEL | model, derived=[],
    )  # fmt: skip


def test_guidance_needs_a_teacher_that_was_trained_without_conditions():
    with pytest.raises(
        UsageError, match=r"guidance_scale=2.0: init.run=start was trained with objective.label_d"
    ):
        check_teacher(SOURCE, config(2.0))
    check_teacher(replace(SOURCE, label_dropout=0.1), config(2.0))
    check_teacher(SOURCE, config(1.0))
    check_copy(SOURCE, config(2.0), INIT, Conditions.of(3))
    with pytest.raises(UsageError, match=r"objective.guidance_scale=2.0: the network has no conditions"):
        check_copy(SOURCE, config(2.0), INIT, Conditions())


def test_the_teacher_is_the_source_as_a_whole():
    check_copy(SOURCE, config(1.0, dropout=0.0), INIT, Conditions.of(3))
    for changed in ({"fresh": ["stem.weight"], "taken": 8}, {"adapted": ["stem.weight"]}):
        with pytest.raises(
            UsageError, match=r"init.run=start: is the teacher, but 1 of 9 .*stem.weight differs"
        ):
            check_copy(SOURCE, config(1.0), INIT.model_copy(update=changed), Conditions.of(3))


def test_the_teacher_keeps_conditions_and_options_that_have_no_tensors_in_the_network():
    """All tensors of the network are those of the source, but its outputs are not."""
    with pytest.raises(UsageError, match=r"start: is the teacher, but the network lacks its label; keep its"):
        check_copy(SOURCE, config(1.0, class_conditional=False), INIT, Conditions())
    unconditional = replace(SOURCE, model=MODEL | {"class_conditional": False})
    check_copy(unconditional, config(1.0, class_conditional=False), INIT, Conditions())
    with pytest.raises(
        UsageError, match=r"is the teacher, but model.num_heads=2, the source has 1; keep its"
    ):
        check_copy(SOURCE, config(1.0, num_heads=2), INIT, Conditions.of(3))


@pytest.mark.parametrize("objective", ["Consistency", "TrajectoryDistillation", "ProgressiveDistillation"])
def test_a_few_step_model_is_no_teacher_of_others(objective):
    """Its x_0 is the end of a step, not a mean; only progressive distillation continues from such steps."""
    source = replace(SOURCE, objective={"_target_": f"diffusion_cli.diffusion.objectives.{objective}"})
    with pytest.raises(UsageError, match=r"init.run=start: is a few-step model, which predicts ends of"):
        check_teacher(source, config(1.0))
    again = config(1.0)
    again.objective = {"_target_": "diffusion_cli.diffusion.objectives.ProgressiveDistillation"}
    if objective == "ProgressiveDistillation":
        check_teacher(source, again)
    else:
        with pytest.raises(UsageError, match="is a few-step model"):
            check_teacher(source, again)


def test_a_teacher_has_no_progressive_resolution():
    with pytest.raises(UsageError, match=r"progressive=.*: the teacher knows images of its own size alone"):
        check_teacher(SOURCE, config(progressive=[4, 8]))
