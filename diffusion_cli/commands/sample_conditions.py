"""The conditions of samples: those that `label=` and `prompt=` name, or those of a dataset's images."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from diffusion_cli.commands.class_labels import is_null, labels_named, warn_of_untrained
from diffusion_cli.commands.condition_values import (
    about,
    is_class,
    never_left_out,
    outside_of_training,
    read_prompts,
    rows_of_label,
    rows_of_word,
    with_prompts,
)
from diffusion_cli.commands.inputs import show_remarks
from diffusion_cli.conditions import Condition, Conditions, ImageCondition, TextDescription
from diffusion_cli.conditions.condition import IMAGE, TEXT, is_missing
from diffusion_cli.conditions.rows import ConditionRows, Encode, Row, encoded_rows
from diffusion_cli.config import SamplingSettings, build
from diffusion_cli.diffusion.guidance import ClassifierFree, Guidance
from diffusion_cli.errors import NO_VALUE, UsageError, counted
from diffusion_cli.generate import class_condition
from diffusion_cli.runs.load import Loaded, LoadedDenoiser
from diffusion_cli.runs.texts import load_text_encoder

AT_HAND = 2**26
"""Most bytes of encoded texts that stay in memory; more are encoded for each batch."""


@dataclass(frozen=True)
class ChosenConditions:
    """The conditions of consecutive samples, and their plain data."""

    condition: ConditionRows | None
    """None: unconditional."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """Settings of manifests and protocols that name the conditions."""
    rows: list[Row] | None = None
    """Values of each row by name; None for class labels alone, and without conditions."""
    chosen: bool = False
    """Whether the command names the conditions."""

    @property
    def given(self) -> list[str]:
        """Names with a value in some row."""
        if isinstance(self.condition, Condition):
            return [name for name, value in self.condition.values.items() if not is_missing(value).all()]
        return [*dict.fromkeys(name for row in self.rows or [] for name in row)]


class NamedRows:
    """Conditions that have values by name; many texts are encoded when their rows are asked for.

    Args:
        values: values of each row.
        conditions: description of the values.
        encode: encoder of texts; None without.
    """

    def __init__(self, values: Sequence[Row], conditions: Conditions, encode: Encode | None) -> None:
        self.values, self.conditions, self.encode = values, conditions, encode
        self.attributes = encoded_rows(values, conditions)

    def __len__(self) -> int:
        return len(self.values)

    def get(self, name: str) -> Tensor | None:
        """Return the values of an attribute in all rows, or None for other names."""
        return self.attributes.get(name)

    def rows(self, index: Tensor) -> Condition:
        """Return the condition of rows, int64 [B]."""
        return encoded_rows([self.values[row] for row in index.tolist()], self.conditions, self.encode)


def conditions_of(
    settings: SamplingSettings, model: LoadedDenoiser, guidance: Guidance, trained_classes: list[int]
) -> ChosenConditions:
    """Return the conditions that a command names; UsageError for those that the model lacks."""
    if model.info.conditions is None:
        return _of_classes(settings, model, guidance, trained_classes)
    return _of_rows(settings, model, model.info.conditions)


def condition_of(model: LoadedDenoiser, values: Mapping[str, Any], count: int) -> Condition:
    """Return the condition of some images, on the device of the model.

    Args:
        model: the model.
        values: values by name, one for each image, None for a missing one, or None for all; an image is a tensor
            [C, *sizes] in [-1, 1] of the size of the images, without noise augmentation.
        count: number of images.

    Raises:
        UsageError: an unknown name or value, another number of values, or an image of another shape.
    """
    values = {name: column for name, column in values.items() if column is not None}
    names, info = model.denoiser.conditions.names, model.info
    conditions = info.conditions or Conditions.of_classes(info.class_names or ())
    if unknown := [name for name in values if name not in names]:
        problem = "the model has no such condition"
        raise UsageError(f"y.{unknown[0]}", NO_VALUE, problem, f"choose from {', '.join(names) or 'none'}")
    for name, column in values.items():
        found = _length(column)
        if found != count:
            problem = "is no list of values" if found is None else f"has {counted(found, 'value')}"
            raise UsageError(f"y.{name}", NO_VALUE, problem, f"give {count}, one for each image")
    plain = {
        name: column.tolist() if isinstance(column, Tensor) else column
        for name, column in values.items()
        if name != IMAGE
    }
    rows = [{name: plain[name][at] for name in plain if plain[name][at] is not None} for at in range(count)]
    if wrong := [row[TEXT] for row in rows if not isinstance(row.get(TEXT, ""), str)]:
        raise UsageError(f"y.{TEXT}", wrong[0], "must be text", "give texts, or None for a missing one")
    try:
        named = [
            rows_of_label({name: row[name] for name in row if name != TEXT}, conditions.attributes)[0]
            | {name: row[name] for name in row if name == TEXT}
            for row in rows
        ]
    except UsageError as error:
        raise about("y", error) from error
    texts = [row[TEXT] for row in named if TEXT in row]
    encoder = _encoder(model, texts, False) if conditions.text is not None else None
    condition = encoded_rows(named, conditions, encoder)
    images = {IMAGE: _condition_images(model, values[IMAGE])} if IMAGE in values else {}
    return condition.replaced(images).to(next(model.denoiser.parameters()).device)


def _length(column: Any) -> int | None:
    """Return the number of values of a column; None for what is no list, such as a number or a text."""
    if isinstance(column, str) or not hasattr(column, "__len__"):
        return None
    return None if isinstance(column, Tensor) and not column.ndim else len(column)


def _condition_images(model: LoadedDenoiser, images: Sequence[Any]) -> Tensor:
    """Return condition images of the network, float32 [B, C', *sizes], NaN for a missing one; see `condition_of`."""
    image, channels = condition_image(model), model.denoiser.conditions.image
    assert channels is not None
    wanted = (channels - (image.noise_augmentation > 0), *model.shape[1:])
    found = torch.full((len(images), *wanted), float("nan"))
    for row, given in enumerate(images):
        if given is None:
            continue
        try:
            pixels = torch.as_tensor(given).cpu()
        except (TypeError, ValueError, RuntimeError):
            pixels = None
        if pixels is not None and not pixels.is_floating_point():
            problem = f"has an image of {str(pixels.dtype).removeprefix('torch.')}"
            raise UsageError(f"y.{IMAGE}", NO_VALUE, problem, "give floating-point numbers in [-1, 1]")
        if pixels is None or pixels.shape != wanted:
            problem = "is no image" if pixels is None else f"has an image of shape {(*pixels.shape,)}"
            raise UsageError(f"y.{IMAGE}", NO_VALUE, problem, f"give images of shape {wanted}, or None")
        found[row] = pixels
    missing = found.isnan().flatten(1).all(1)
    return Condition({IMAGE: image.augmented(found)}).dropped(where=missing).values[IMAGE]


def condition_image(model: Loaded) -> ImageCondition:
    """Return the condition image of a model that has one."""
    image = build(model.info.config.condition or {})
    assert isinstance(image, ImageCondition)
    return image


def refuse_condition_images(model: LoadedDenoiser) -> None:
    """Raise UsageError for a model that needs an image for each sample."""
    conditions = model.info.conditions
    if conditions is not None and conditions.image is not None:
        remedy = "use diffuse edit edit=translate input=<images>"
        raise UsageError("run", NO_VALUE, "the model turns an input image into an image", remedy)


def _of_classes(
    settings: SamplingSettings, model: LoadedDenoiser, guidance: Guidance, trained_classes: list[int]
) -> ChosenConditions:
    """Return the class labels of a model of classes, or of one that a classifier guides."""
    _refuse_texts(settings)
    labels = labels_named(settings.label, model, guidance, trained_classes, settings.null_label)
    warn_of_untrained("label", labels or [], trained_classes, model)
    chosen = settings.label is not None and not is_null(settings.label, model.info.class_names)
    return ChosenConditions(class_condition(labels), {"labels": labels}, chosen=chosen)


def _of_rows(settings: SamplingSettings, model: LoadedDenoiser, conditions: Conditions) -> ChosenConditions:
    """Return the conditions of a model with attributes, an image or a text."""
    if conditions.text is None:
        _refuse_texts(settings)
    prompts = _prompts(settings)
    encode = _encoder(model, prompts)
    attributes = conditions.attributes
    is_default = settings.label in (None, "null") and not is_class(settings.label, attributes)
    if not attributes and not is_default and settings.label not in ("all", "none", []):
        remedy = "leave it out" if conditions.text is None else "describe the images with prompt="
        raise UsageError("label", NO_VALUE, "the model has no attributes", remedy)
    rows: list[Row] = []
    if attributes and is_default:
        rows = rows_of_word(_default(settings.null_label, prompts), attributes)
    elif attributes:
        rows = rows_of_label(settings.label, attributes)
    rows = with_prompts(rows, prompts)
    show_remarks(outside_of_training(rows, attributes))
    chosen = bool(prompts) or not is_default
    if chosen or not (settings.of_images or settings.finds_conditions):
        show_remarks(never_left_out(rows, model.info))
    record: dict[str, Any] = {"conditions": rows or None}
    if settings.negative_prompt is not None:
        record["negative_prompt"] = settings.negative_prompt
    if not rows:
        return ChosenConditions(None, record, chosen=chosen)
    return ChosenConditions(_condition(rows, conditions, encode), record, rows, chosen=chosen)


def _condition(rows: Sequence[Row], conditions: Conditions, encode: Encode | None) -> ConditionRows:
    """Return the condition of rows: encoded if it fits in memory, else by batch; few texts are encoded once."""
    if conditions.text is None or encode is None:
        return encoded_rows(rows, conditions)
    size = _bytes(conditions.text)
    if len(rows) * size <= AT_HAND:
        return encoded_rows(rows, conditions, encode)
    texts = [*dict.fromkeys(row.get(TEXT, "") for row in rows)]
    at_hand = _encoded_once(texts, encode) if len(texts) * size <= AT_HAND else encode
    return NamedRows(rows, conditions, at_hand)


def _bytes(text: TextDescription) -> int:
    """Return the bytes of one encoded text: int64 for each token, or float32 for each of its features."""
    return text.length * (8 if text.features is None else 4 * text.features)


def _encoded_once(texts: Sequence[str], encode: Encode) -> Encode:
    """Return an encoder of some texts, and of the empty one, that keeps their encodings."""
    known = [*dict.fromkeys([*texts, ""])]
    places = {text: place for place, text in enumerate(known)}
    encoded = encode(known)
    return lambda wanted: encoded[torch.tensor([places[text] for text in wanted])]


def lead_away(
    guidance: Guidance, negative_prompt: str | None, model: LoadedDenoiser, given: Collection[str]
) -> None:
    """Set the text that classifier-free guidance leads away from.

    Args:
        guidance: the guidance.
        negative_prompt: the text; None: none.
        model: the model.
        given: names with a value in some image.

    Raises:
        UsageError: for other guidance, or if its scales leave the text without effect.
    """
    if negative_prompt is None:
        return
    names = [name for name in model.denoiser.conditions.names if name in {*given, TEXT}]
    if not isinstance(guidance, ClassifierFree) or guidance.ignores_negative(TEXT, names):
        problem = "applies only to classifier-free guidance with a scale other than 1"
        own = isinstance(guidance, ClassifierFree) and TEXT in guidance.scales
        remedy = "set guidance.scales.text=4" if own else "add guidance=cfg guidance.scale=4"
        raise UsageError("negative_prompt", NO_VALUE, problem, remedy)
    encode = _encoder(model, [negative_prompt])
    assert encode is not None
    guidance.negative = Condition({TEXT: encode([negative_prompt])})


def _default(null_label: Literal["all", "none"], prompts: Sequence[str]) -> Literal["all", "none"]:
    """Return the label of a command without one: attributes are missing beside texts."""
    return "none" if prompts else null_label


def _prompts(settings: SamplingSettings) -> list[str]:
    """Return the texts of a command."""
    if settings.prompts is not None:
        return read_prompts(settings.prompts)
    return [settings.prompt] if isinstance(settings.prompt, str) else settings.prompt or []


def _refuse_texts(settings: SamplingSettings) -> None:
    """Raise UsageError for texts, which describe images for models that are trained with them."""
    for key in ("prompt", "prompts", "negative_prompt"):
        value = getattr(settings, key)
        if value is not None:
            shown = value if key == "prompts" else NO_VALUE
            raise UsageError(key, shown, "the model has no text condition", "train one with text=learned")


def _encoder(model: LoadedDenoiser, texts: Sequence[str], remark: bool = True) -> Encode | None:
    """Return the encoder of the model's texts, or None; print a remark if it cuts some of these texts."""
    # Without texts, a frozen encoder reads no file, so nobody needs to trust the path in the checkpoint.
    run = model.run if texts else None
    encoder = load_text_encoder(model.info, next(model.denoiser.parameters()).device, run)
    if encoder is None:
        return None
    if remark and (cut := encoder.cut(texts)):
        longest = encoder.description.length
        show_remarks([f"prompt: the ends of {counted(cut, 'text')} are cut to {longest} tokens"])
    return encoder.encode
