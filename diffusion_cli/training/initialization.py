"""First weights of a training from those of another network, and weights that training leaves unchanged."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import accumulate
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffusion_cli.conditions import AttributeDescription, Conditions
from diffusion_cli.conditions.condition import LABEL
from diffusion_cli.diffusion.denoiser import NoisyClassifier
from diffusion_cli.errors import UsageError
from diffusion_cli.networks.condition_embedding import ConditionEmbedding, NumberEmbedding
from diffusion_cli.networks.edm2 import EDM2UNet, MPConditionEmbedding, MPNumber
from diffusion_cli.networks.magnitude import normalize_weights, normalized_layers

GRAY, RGB = 1, 3
MOST_CLASSES = 5
"""Most names of classes in a line."""


@dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """The weights of a trained network, with the meaning of its channels and classes."""

    state: Mapping[str, Tensor]
    """Tensors by name."""
    channels: int
    """Channels of its data."""
    learns_variance: bool
    """Whether its outputs have as many channels again for the variance."""
    num_classes: int | None
    """Number of its classes, without the null class; None for an unconditional network."""
    class_names: Sequence[str] | None
    """Names of its classes; None if they have none."""
    conditions: Conditions = field(default_factory=Conditions)
    """Its conditions beside classes."""


class Fitted(NamedTuple):
    """The result of `fit`."""

    taken: int
    """Number of tensors that come from the source, in whole or in part."""
    total: int
    """Number of tensors of the network."""
    part: float
    """Share of the numbers of the network whose tensors come from the source, in whole or in part."""
    fresh: list[str]
    """Names of the tensors with random values; if a condition or rows of classes are the reason, with these."""
    adapted: list[str]
    """Names of the tensors that come from tensors of other channels or numbers of classes."""


@torch.no_grad()
def fit(
    network: nn.Module,
    source: InitialWeights,
    channels: int,
    class_names: Sequence[str] | None,
    changed: Mapping[str, str] = MappingProxyType({}),
) -> Fitted:
    """Copy weights into a network, each tensor to that of its name.

    * Tensors of the same shape are copied.
    * Input layer: weights of new channels are 0. From gray to RGB, weights are divided among the channels; from RGB to
      gray, they are added.
    * Output layer: weights of new channels and of a new variance are 0. From gray to RGB, weights are repeated; from
      RGB to gray, averaged.
    * Rows of classes: those of classes of the same name, and that of the null class. Without names all rows are
      copied, if the numbers of classes are equal. Rows of other categories likewise, by the names of their values.
    * Weights of a condition image in the input layer are 0 if the source has no such image, or another one; those of
      the coordinates of a network with windows are 0 if the source has no windows.
    * Normalized weights of the input and the output layer keep their random values if the channels differ, and the
      gain of the output is 0.
    * Other tensors keep their random values, and so do those that read a number or a text in `changed`.

    Args:
        network: network with random weights.
        source: weights of another network.
        channels: channels of the data of `network`.
        class_names: names of its classes; None without classes.
        changed: conditions with another meaning in the source, by name, with what they are there.
    """
    first, *_, last = getattr(network, "outer_layers", ()) or ("", "")
    outputs = tuple(f"{layer}." for layer in getattr(network, "output_layers", (last,)))
    changes = _Channels(
        source.channels,
        channels,
        source.learns_variance,
        bool(getattr(network, "learn_variance", False)),
        bool(getattr(network, "pixels_first", False)),
    )
    given = _image_channels(getattr(network, "conditions", Conditions()))
    theirs_given = _image_channels(source.conditions)
    windowed = getattr(network, "window", None) is not None
    rows = _class_tensors(network, len(class_names or ()))
    categories, readers = _categories(network), _changed_readers(network, changed)
    choices = _choices(network, class_names or (), source)
    # Weights of 0 would change the scale of the others.
    normalized = isinstance(network, EDM2UNet)
    state, taken, numbers, fresh, adapted = network.state_dict(), 0, 0, [], []
    for name, mine in state.items():
        theirs, partly, other = source.state.get(name), "", False
        if theirs is None:
            pass
        elif name in readers:
            theirs, partly = None, readers[name]
        elif name in rows and source.num_classes is not None:
            other = theirs.shape != mine.shape
            theirs, partly = _class_rows(
                mine, theirs, source.num_classes, source.class_names, class_names or (), null=rows[name]
            )
        # Equal shapes can have other meanings: C channels with a variance, and 2C without.
        elif name in categories:
            other = theirs.shape != mine.shape
            theirs, partly = _category_rows(mine, theirs, categories[name], source.conditions)
        elif name in choices:
            other = theirs.shape != mine.shape
            columns, partly = _class_rows(mine.T, theirs.T, *choices[name], null=False)
            theirs = None if columns is None else columns.T
        elif (
            name.startswith(f"{first}.")
            and theirs.ndim > 1
            and (changes.in_inputs or given or theirs_given or theirs.shape != mine.shape)
        ):
            other = changes.in_inputs or theirs.shape != mine.shape
            if normalized:
                fits = not changes.in_inputs and given == theirs_given and "image" not in changed
                theirs = theirs if fits else None
            else:
                theirs = _input_weights(
                    mine, theirs, changes, given, theirs_given,
                    keep="image" not in changed, windowed=windowed,
                )  # fmt: skip
            partly = changed.get("image", "") if theirs is not None else ""
        elif changes.in_outputs and f"{name}.".startswith(outputs):
            theirs, other = None if normalized else changes.of_output(theirs), True
        if partly:
            fresh.append(f"{name} ({partly})")
        if theirs is None or theirs.shape != mine.shape:
            fresh += [] if partly else [name]
            continue
        mine.copy_(theirs)
        taken, numbers = taken + 1, numbers + mine.numel()
        adapted += [name] if other else []
    normalize_weights(normalized_layers(network))
    part = numbers / sum(mine.numel() for mine in state.values())
    return Fitted(taken, len(state), part, fresh, adapted)


def _image_channels(conditions: Conditions) -> int:
    """Return the input channels beside those of the data, for a condition image and where it is given."""
    return 0 if conditions.image is None else conditions.image + 1


def _input_weights(
    mine: Tensor,
    theirs: Tensor,
    changes: "_Channels",
    given: int,
    theirs_given: int,
    *,
    keep: bool,
    windowed: bool,
) -> Tensor | None:
    """Return the weights of an input layer of data, coordinates and a condition image; None if nothing fits.

    Args:
        mine: weights [width, (C + axes + given) * pixels, ...] of a network, without axes if it has no windows.
        theirs: those of the source, with or without windows.
        changes: channels of the data.
        given: channels of the condition image.
        theirs_given: channels of the condition image of the source.
        keep: whether the weights of a condition image with as many channels are kept.
        windowed: whether the network has windows.
    """
    axes = mine.ndim - 2
    pixels = mine.shape[1] // (changes.now + axes * windowed + given)
    before, image = changes.before * pixels, theirs_given * pixels
    places = theirs.shape[1] - before - image
    if places not in (0, axes * pixels):
        return None  # patches of another size
    data, coordinates, rest = theirs.split([before, places, image], 1)
    data = changes.of_input(data) if changes.in_inputs else data
    if data is None or data.shape[0] != mine.shape[0] or data.shape[2:] != mine.shape[2:]:
        return None

    def zeros(channels: int) -> Tensor:
        return data.new_zeros(data.shape[0], channels * pixels, *data.shape[2:])

    coordinates = (coordinates if places else zeros(axes)) if windowed else zeros(0)
    rest = rest if keep and theirs_given == given else zeros(given)
    return torch.cat([data, coordinates, rest], 1)


def _categories(network: nn.Module) -> dict[str, AttributeDescription]:
    """Return the names of the tables of categories beside the class, and their descriptions."""
    embedding, conditions = (getattr(network, name, None) for name in ("condition_embedding", "conditions"))
    if not (isinstance(embedding, ConditionEmbedding) and isinstance(conditions, Conditions)):
        return {}
    described = {attribute.name: attribute for attribute in conditions.attributes}
    modules = zip(embedding.names, embedding.attributes, strict=True)
    return {
        f"condition_embedding.attributes.{module}.table.weight": described[name]
        for name, module in modules
        if described[name].kind == "category"
    }


def _choices(
    network: nn.Module, class_names: Sequence[str], source: InitialWeights
) -> dict[str, tuple[int, Sequence[str] | None, Sequence[str]]]:
    """Return the names of weights with a column for each class or category.

    Each has the number of choices of the source, their names there, and the names of those of the network.
    """
    embedding, conditions = (getattr(network, name, None) for name in ("condition_embedding", "conditions"))
    if not (isinstance(embedding, MPConditionEmbedding) and isinstance(conditions, Conditions)):
        return {}
    found: dict[str, tuple[int, Sequence[str] | None, Sequence[str]]] = {}
    for module, attribute in zip(embedding.attributes, conditions.attributes, strict=True):
        name = f"condition_embedding.attributes.{module}.linear.weight"
        if attribute.name == LABEL and conditions.num_classes is not None:
            if class_names:
                found[name] = (source.num_classes or 0, source.class_names, class_names)
        elif attribute.kind == "category":
            values = _values(attribute, source.conditions)
            found[name] = (len(values), values, attribute.values)
    return found


def _changed_readers(network: nn.Module, changed: Mapping[str, str]) -> dict[str, str]:
    """Return the names of the tensors that read numbers and texts in `changed`, with what these are in the source."""
    embedding = getattr(network, "condition_embedding", None)
    if not isinstance(embedding, ConditionEmbedding | MPConditionEmbedding):
        return {}
    modules = zip(embedding.names, embedding.attributes.items(), strict=True)
    prefixes = {
        f"attributes.{module}.{layer}.": changed[name]
        for name, (module, each) in modules
        for kind, layer in ((NumberEmbedding, "mlp"), (MPNumber, "linear"))
        if name in changed and isinstance(each, kind)
    }
    if "text" in changed:
        prefixes |= dict.fromkeys(("text.read.tokens.", "text.read.linear."), changed["text"])
    return {
        f"condition_embedding.{name}": reason
        for name in embedding.state_dict()
        for prefix, reason in prefixes.items()
        if name.startswith(prefix)
    }


def _category_rows(
    mine: Tensor, theirs: Tensor, attribute: AttributeDescription, source: Conditions
) -> tuple[Tensor | None, str]:
    """Return the table of a category with the rows of a source, as `_class_rows`."""
    values = _values(attribute, source)
    return _class_rows(mine, theirs, len(values), values, attribute.values, null=True)


def _values(attribute: AttributeDescription, source: Conditions) -> Sequence[str]:
    """Return the names of the values of an attribute in a source; empty if it has none."""
    return next((each.values for each in source.attributes if each.name == attribute.name), ())


class _Channels(NamedTuple):
    """Numbers of channels of the data of a source and of a network, and the layout of their outputs."""

    before: int
    now: int
    variance_before: bool
    variance_now: bool
    pixels_first: bool

    @property
    def in_inputs(self) -> bool:
        """Whether input layers differ."""
        return self.before != self.now

    @property
    def in_outputs(self) -> bool:
        """Whether output layers differ."""
        return (self.before, self.variance_before) != (self.now, self.variance_now)

    def of_input(self, weight: Tensor) -> Tensor | None:
        """Return the weights [width, C * pixels, ...] of an input layer for other channels; None if nothing fits."""
        if weight.shape[1] % self.before:
            return None
        parts = weight.unflatten(1, (self.before, -1)).movedim(1, 0)
        if (self.before, self.now) == (GRAY, RGB):
            parts = parts.expand(RGB, *parts.shape[1:]) / RGB
        elif (self.before, self.now) == (RGB, GRAY):
            parts = parts.sum(0, keepdim=True)
        else:
            parts = self._extended(parts)
        return None if parts is None else parts.movedim(0, 1).flatten(1, 2)

    def of_output(self, weight: Tensor) -> Tensor | None:
        """Return the weights or biases [outputs, ...] of an output layer for other channels; None if nothing fits."""
        kinds = 1 + self.variance_before
        if weight.shape[0] % (kinds * self.before):
            return None
        if self.pixels_first:
            parts = weight.unflatten(0, (-1, kinds, self.before)).movedim(0, 2)
        else:
            parts = weight.unflatten(0, (kinds, self.before, -1))
        parts = parts.movedim(1, 0)  # [C, kinds, pixels, ...]
        if (self.before, self.now) == (GRAY, RGB):
            parts = parts.expand(RGB, *parts.shape[1:])
        elif (self.before, self.now) == (RGB, GRAY):
            parts = parts.mean(0, keepdim=True)
        elif (parts := self._extended(parts)) is None:
            return None
        parts = parts.movedim(0, 1)  # [kinds, C, pixels, ...]
        if self.variance_now:
            parts = parts if self.variance_before else torch.cat([parts, torch.zeros_like(parts)])
        else:
            parts = parts[:1]
        return (parts.movedim(2, 0) if self.pixels_first else parts).flatten(0, 2)

    def _extended(self, parts: Tensor) -> Tensor | None:
        """Return parts [C, ...] with zeros for new channels; None for fewer channels."""
        if self.now < self.before:
            return None
        return torch.cat([parts, parts.new_zeros(self.now - self.before, *parts.shape[1:])])


def _class_tensors(network: nn.Module, classes: int) -> dict[str, bool]:
    """Return the names of the tensors with a row for each class, and whether a row of the null class follows."""
    if not classes:
        return {}
    embeddings = {
        f"{name}.weight": True
        for name, module in network.named_modules()
        if isinstance(module, nn.Embedding)
        and module.num_embeddings == classes + 1
        and not name.startswith("condition_embedding.")
    }
    if getattr(network, "task", None) != NoisyClassifier.task:
        return embeddings
    (*_, last) = getattr(network, "outer_layers", ("",))
    return embeddings | {name: False for name in network.state_dict() if name.startswith(f"{last}.")}


def _class_rows(
    mine: Tensor,
    theirs: Tensor,
    classes: int,
    source_names: Sequence[str] | None,
    names: Sequence[str],
    *,
    null: bool,
) -> tuple[Tensor | None, str]:
    """Return `mine` with the rows of a source, or None if no row fits; and which ones, if some classes have none."""
    # In a source without a row of the null class, the last row is that of a class.
    if theirs.shape[1:] != mine.shape[1:] or len(theirs) != classes + null:
        return None, ""
    if source_names is None:
        pairs = {row: row for row in range(len(names))} if classes == len(names) else {}
    else:
        of = {name: row for row, name in enumerate(source_names)}
        pairs = {row: of[name] for row, name in enumerate(names) if name in of}
    shared = [names[row] for row in pairs]
    if null:
        pairs[len(names)] = len(theirs) - 1
    if not pairs:
        return None, ""
    rows = mine.clone()
    rows[[*pairs]] = theirs[[*pairs.values()]].to(rows)
    if len(shared) == len(names):
        return rows, ""
    some = ", ".join(shared[:MOST_CLASSES]) + ", ..." * (len(shared) > MOST_CLASSES)
    return rows, f"{len(shared)} of {len(names)} classes taken by name" + f": {some}" * bool(shared)


def freeze(network: nn.Module, patterns: Sequence[str]) -> None:
    """Exclude parameters from training: those with a name, or a module around them, that matches a pattern.

    Args:
        network: network to train.
        patterns: names as in the state dict, where `*` stands for any text: `time_mlp`, `down.*`, `*.bias`.

    Raises:
        UsageError: a pattern matches nothing, or all parameters match.
    """
    names = [name for name, _ in network.named_parameters()]
    frozen = matching(names, patterns, "init.freeze", "parameter")
    if len(frozen) == len(names):
        raise UsageError("init.freeze", f"[{','.join(patterns)}]", "leaves nothing to train", "freeze less")
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name not in frozen)


def matching(names: Sequence[str], patterns: Sequence[str], key: str, kind: str) -> set[str]:
    """Return the dotted names that match a pattern, or lie in a module that does.

    Args:
        names: names of parameters or modules.
        patterns: names, where `*` stands for any text.
        key: option with the patterns, for errors.
        kind: word for what has a name, for errors.

    Raises:
        UsageError: a pattern matches nothing.
    """
    places_of = {name: [*accumulate(name.split("."), "{}.{}".format)] for name in names}
    places = list(dict.fromkeys(place for found in places_of.values() for place in found))
    for pattern in patterns:
        if not any(fnmatchcase(place, pattern) for place in places):
            near = difflib.get_close_matches(pattern, places, n=3)
            parts = dict.fromkeys(found[0] for found in places_of.values())
            remedy = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(parts)}"
            if any(fnmatchcase(place, f"*.{pattern}") for place in places):
                remedy = f"write *.{pattern}, because a pattern is for the whole name"
            raise UsageError(key, pattern, f"matches no {kind}", remedy)
    return {
        name for name, found in places_of.items() for place in found for pattern in patterns
        if fnmatchcase(place, pattern)
    }  # fmt: skip
