"""Guides of models with attributes, images and texts: their values must mean the same."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffusion_cli.commands import guides
from diffusion_cli.commands.guides import GuidanceRuns
from diffusion_cli.conditions import AttributeDescription, Conditions
from diffusion_cli.errors import UsageError
from helpers.conditions import AGE, SPECIES, TEXT, grey_model

GREY = {"_target_": "diffusion_cli.conditions.ImageCondition", "of": "gray"}
EDGES = {**GREY, "of": "edges"}
ALL = Conditions(attributes=(SPECIES, AGE), image=1, text=TEXT)


def changed(attribute: AttributeDescription, **values: object) -> Conditions:
    return Conditions(attributes=(attribute.model_copy(update=values),))


@pytest.fixture
def guided(schedules, monkeypatch):
    """Loads a guide with other conditions for a model with all of them."""

    def model(conditions, condition, text="a", objective="Simple"):
        found = grey_model(schedules["cosine"], conditions)
        node = {"_target_": f"diffusion_cli.diffusion.objectives.{objective}"}
        config = found.info.config.model_copy(update={"condition": condition, "objective": node})
        return replace(found, info=found.info.model_copy(update={"config": config, "text": text}))

    def loaded(conditions, condition=GREY, text="a", objectives=("Simple", "Simple")):
        weak, strong = objectives
        guide = replace(model(conditions, condition, text, weak), digest="1" * 64)
        monkeypatch.setattr(guides, "load_model", lambda *_: guide)
        monkeypatch.setattr(guides, "find_run", lambda *_: Path("guide"))
        runs = GuidanceRuns(
            model(ALL, GREY, objective=strong), Path("run"), output_dir="", weights="ema",
            device=torch.device("cpu"),
        )  # fmt: skip
        assert runs.denoiser("guide", None) is guide.denoiser

    return loaded


@pytest.mark.parametrize(("conditions", "condition", "names"), [
    (changed(SPECIES, values=("frog", "cat")), GREY, "species"),
    (changed(SPECIES, values=("cat", "frog", "toad")), GREY, "species"),
    (changed(SPECIES, kind="yes_no"), GREY, "species"),
    (changed(AGE, name="size"), GREY, "size"),
    (ALL.model_copy(update={"image": 2}), GREY, "image"),
    (ALL, EDGES, "image"),
    (Conditions(text=TEXT.model_copy(update={"vocabulary": 300})), GREY, "text"),
    (Conditions(attributes=(AGE.model_copy(update={"kind": "category", "values": ("1", "2")}),), image=1, text=TEXT),
     EDGES, "age and image"),
])  # fmt: skip
def test_a_guide_for_which_values_mean_something_else_is_refused(guided, conditions, condition, names):
    with pytest.raises(
        UsageError, match=rf"guidance\.run=guide: is conditioned on {names}, which the model lacks"
    ):
        guided(conditions, condition)


@pytest.mark.parametrize("conditions", [
    ALL,
    Conditions(),
    changed(AGE, low=-5.0, high=30.0),
    Conditions(attributes=(SPECIES,), text=TEXT.model_copy(update={"width": 16, "depth": 1})),
])  # fmt: skip
def test_a_guide_may_have_fewer_conditions_other_ranges_and_a_smaller_network(guided, conditions):
    guided(conditions)


def test_a_guide_with_another_tokenizer_is_refused(guided):
    with pytest.raises(
        UsageError, match=r"guidance\.run=guide: is conditioned on text, which the model lacks"
    ):
        guided(Conditions(text=TEXT), text="b")
    guided(Conditions(attributes=(AGE,)), text=None)


def test_a_guide_predicts_what_the_model_does(guided):
    """The mean of x_0, or the end of a path: their difference is no direction to better samples."""
    end, mean = "predicts the end of a path", "predicts the mean of x_0"
    for student in ("Consistency", "TrajectoryDistillation"):
        with pytest.raises(
            UsageError, match=rf"guidance\.run=guide: {end}, but the model {mean}; use a weaker run"
        ):
            guided(ALL, objectives=(student, "Simple"))
        with pytest.raises(UsageError, match=rf"guidance\.run=guide: {mean}, but the model {end}"):
            guided(ALL, objectives=("Simple", student))
    guided(ALL, objectives=("Likelihood", "Simple"))
