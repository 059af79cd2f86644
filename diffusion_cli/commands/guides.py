"""Load the networks for guidance: an earlier checkpoint, another denoiser, or a classifier."""

import math
from pathlib import Path

import torch

from diffusion_cli.conditions import TextDescription
from diffusion_cli.config.values import Weights
from diffusion_cli.data.encoder_identity import same_encoder
from diffusion_cli.diffusion.denoiser import Denoiser, NoisyClassifier
from diffusion_cli.errors import NO_VALUE, UsageError, format_value
from diffusion_cli.runs.find import find_run
from diffusion_cli.runs.load import LoadedClassifier, LoadedDenoiser, load_classifier, load_model
from diffusion_cli.runs.schema import LatentInfo

LATENT_SCALE_TOLERANCE = 1e-3  # largest difference between two measurements of the same latents


class GuidanceRuns:
    """Loads the networks for guidance; UsageError for a network that is incompatible with the model.

    Args:
        model: model to guide.
        folder: run folder of the model.
        output_dir: folder of all runs.
        weights: "ema" or "raw" weights of a guiding denoiser.
        device: device of the guiding network.
    """

    def __init__(
        self,
        model: LoadedDenoiser,
        folder: Path,
        *,
        output_dir: str,
        weights: Weights,
        device: torch.device,
    ) -> None:
        self.model, self.folder, self.device = model, folder, device
        self.output_dir = output_dir
        self.weights: Weights = weights
        self.trained_classes = model.info.trained_classes
        """Classes with training images of the model, or of the classifier that guides it."""
        self.digests: dict[str, str] = {}
        """SHA-256 of the weights of the guiding network."""

    def denoiser(self, run: str | None, step: int | None) -> Denoiser:
        """Return the denoiser of a checkpoint; `run=None` means the run of the model."""
        key = f"guidance.run={run}" if run else f"guidance.step={format_value(step)}"
        folder = self.folder if run is None else find_run(run, self.output_dir, "guidance.run")
        try:
            guide = load_model(folder, self.weights, self.device, step)
        except UsageError as error:
            raise error.renamed({"step": "guidance.step", folder: key}) from error
        if guide.digest == self.model.digest and run is step is None:
            raise UsageError(
                "guidance", "auto", "needs a weaker model", "set guidance.run= or guidance.step="
            )
        if guide.digest == self.model.digest:
            raise UsageError(
                key,
                NO_VALUE,
                "has the same weights as the model to guide",
                "use a weaker run (guidance.run=) or an earlier checkpoint (guidance.step=)",
            )
        self._compare(key, guide, "parameterization")
        if guide.info.is_consistency_model != self.model.info.is_consistency_model:
            kinds = ("predicts the end of a path", "predicts the mean of x_0")
            theirs, ours = kinds if guide.info.is_consistency_model else kinds[::-1]
            problem = f"{theirs}, but the model {ours}"
            raise UsageError(key, NO_VALUE, problem, "use a weaker run with the model's objective")
        if guide.num_classes is not None and (
            self.model.num_classes is None or guide.info.class_names != self.model.info.class_names
        ):
            known = (
                "no classes"
                if self.model.num_classes is None
                else f"the classes {self.model.info.class_names}"
            )
            raise UsageError(
                key,
                NO_VALUE,
                f"is conditioned on the classes {guide.info.class_names}, but the model on {known}",
                "use another guide",
            )
        self._compare_conditions(key, guide)
        self.digests = {"guide_sha256": guide.digest}
        return guide.denoiser

    def classifier(self, run: str) -> NoisyClassifier:
        """Return the classifier of a run."""
        key = f"guidance.run={run}"
        folder = find_run(run, self.output_dir, "guidance.run")
        try:
            guide = load_classifier(folder, self.device)
        except UsageError as error:
            raise error.renamed({folder: key}) from error
        self._compare(key, guide)
        if guide.info.class_names != self.model.info.class_names:
            raise UsageError(
                key,
                NO_VALUE,
                f"has the classes {guide.info.class_names}, but the model {self.model.info.class_names}",
                "use a classifier with the same classes",
            )
        self.digests = {"classifier_sha256": guide.digest}
        if self.model.num_classes is None:
            self.trained_classes = guide.info.trained_classes
        return guide.classifier

    def _compare_conditions(self, key: str, guide: LoadedDenoiser) -> None:
        """Raise UsageError if values of the model mean something else to a guide; the range of a number may differ."""
        theirs, ours = guide.denoiser.conditions, self.model.denoiser.conditions
        known = {attribute.name: (attribute.kind, attribute.values) for attribute in ours.attributes}
        others = [
            attribute.name
            for attribute in theirs.other_attributes
            if known.get(attribute.name) != (attribute.kind, attribute.values)
        ]
        images = [
            (model.info.config.condition, model.denoiser.conditions.image) for model in (guide, self.model)
        ]
        if theirs.image is not None and images[0] != images[1]:
            others.append("image")
        same_text = _form(theirs.text) == _form(ours.text) and same_encoder(
            guide.info.text or "", self.model.info.text or ""
        )
        if theirs.text is not None and not same_text:
            others.append("text")
        if others:
            problem = (
                f"is conditioned on {' and '.join(others)}, which the model lacks or has with other values"
            )
            raise UsageError(key, NO_VALUE, problem, "use another guide")

    def _compare(self, key: str, guide: LoadedDenoiser | LoadedClassifier, *parts: str) -> None:
        """Raise UsageError unless a guide has the model's image shape, latent space and noise schedule."""
        if guide.shape != self.model.shape:
            problem = f"has image shape {guide.shape}, but the model {self.model.shape}"
            raise UsageError(key, NO_VALUE, problem, "choose a guide for images of this shape")
        if not _same_latents(guide.info.latent, self.model.info.latent):
            theirs, ours = ("latents" if origin.info.latent else "pixels" for origin in (guide, self.model))
            if theirs == ours:
                raise UsageError(
                    key,
                    NO_VALUE,
                    "its latents differ from the model's",
                    "use one trained with the same latent.run",
                )
            raise other_space(key, theirs, f"use one trained on {ours}")
        for part in ("schedule", *parts):
            if getattr(guide.info.config, part) != getattr(self.model.info.config, part):
                raise UsageError(
                    key,
                    NO_VALUE,
                    f"its {part} differs from the model's",
                    f"use one trained with the same {part}",
                )


def other_space(name: str, space: str, remedy: str) -> UsageError:
    """Return the error for a part that works on `space`, "pixels" or "latents", with a model of the other."""
    ours = "latents" if space == "pixels" else "pixels"
    return UsageError(name, NO_VALUE, f"works on {space}, but the model works on {ours}", remedy)


def _form(text: TextDescription | None) -> tuple[int, int | None, int | None] | None:
    """Return what encoded texts have in common for all networks that take them."""
    return None if text is None else (text.length, text.vocabulary, text.features)


def _same_latents(one: LatentInfo | None, other: LatentInfo | None) -> bool:
    """Return whether two models use the same latents, up to rounding errors of their mean and std."""
    if one is None or other is None:
        return one is other
    scales = zip(one.mean + one.std, other.mean + other.std, strict=False)
    alike = all(
        math.isclose(a, b, rel_tol=LATENT_SCALE_TOLERANCE, abs_tol=LATENT_SCALE_TOLERANCE) for a, b in scales
    )
    return alike and one.shape == other.shape and one.sha256 == other.sha256
