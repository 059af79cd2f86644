"""First weights of `diffuse train`: those of a run, or of a model of another program."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from diffusion_cli.commands.inputs import show_remarks
from diffusion_cli.conditions import Conditions, ImageCondition
from diffusion_cli.config import TrainConfig, build
from diffusion_cli.config.initial import ATTENTION
from diffusion_cli.convert import read_source
from diffusion_cli.data import Dataset
from diffusion_cli.data.encoder_identity import same_encoder
from diffusion_cli.diffusion.objectives import ProgressiveDistillation
from diffusion_cli.errors import NO_VALUE, UsageError, class_name, format_value, option_name
from diffusion_cli.formats import Shape
from diffusion_cli.networks.encoder import attention_at_levels
from diffusion_cli.networks.layers import used_conditions
from diffusion_cli.runs.find import find_run
from diffusion_cli.runs.imported import weights_of
from diffusion_cli.runs.load import load_weights
from diffusion_cli.runs.schema import InitInfo, trains_consistency
from diffusion_cli.system.tensors import digest
from diffusion_cli.training.initialization import InitialWeights, fit

FEW = 0.5
"""Smallest part of the weights that comes from a source without a warning."""
MOST_KEYS = 3
"""Most keys in this warning."""
FREE = ("class_conditional", "dropout", "gradient_checkpointing")
"""Options of a network that a student can change: the first is one of the conditions, the others end with training."""
TAUGHT = ("schedule", "parameterization")
"""Groups that give the outputs of a network their meaning."""


@dataclass(frozen=True, kw_only=True)
class WeightSource:
    """The source that `init.run` or `init.pretrained` names, with its weights."""

    key: str
    named: str
    """The source, as the user named it."""
    origin: Mapping[str, Any]
    """Entries of `InitInfo`."""
    model: Mapping[str, Any]
    """Class and options of its network."""
    shape: Shape
    """Shape of the inputs of its network."""
    weights: InitialWeights
    process: Mapping[str, Any]
    """The nodes of its schedule and parameterization; empty if it has none."""
    image: str | None = None
    """What its condition image is; None without one."""
    text: str | None = None
    """State of its text encoder; None without texts."""
    label_dropout: float | None = None
    """Probability in its training of dropping all conditions; None if unknown."""
    objective: Mapping[str, Any] = field(default_factory=dict)
    """Node of the objective of its training; empty if unknown."""

    def with_its_levels(self, config: TrainConfig, shape: Shape) -> TrainConfig:
        """Return a configuration with attention at the levels of the source, unless the user chose the sizes.

        Args:
            config: configuration of the training.
            shape: shape of the inputs of its network.
        """
        if ATTENTION not in config.derived:
            return config
        *_, name = ATTENTION.split(".")
        levels = attention_at_levels(
            self.model[name], _levels(self.model, self.shape), _levels(config.model, shape)
        )
        return config.model_copy(update={"model": config.model | {name: levels}})

    def fill(
        self, config: TrainConfig, network: nn.Module, train_data: Dataset, text: str | None
    ) -> InitInfo:
        """Replace the random weights of a network by those of the source, where they fit.

        Args:
            config: configuration of the training.
            network: network with random weights.
            train_data: dataset of its inputs.
            text: state of its text encoder; None without texts.

        Raises:
            UsageError: none of the weights fits.
        """
        changed = self._changed_conditions(config, network, text)
        fitted = fit(network, self.weights, train_data.shape[0], train_data.class_names, changed)
        if not fitted.taken:
            problem, remedy = (
                "none of its weights fits this network",
                "leave out model= to use the network of the source",
            )
            raise UsageError(self.key, self.named, problem, remedy)
        if fitted.part < FEW:
            problem = f"only {100 * fitted.part:.2g}% of the weights come from it"
            show_remarks(["; ".join([f"{self.key}={self.named}: {problem}", *self.differences(config)])])
        return InitInfo(
            source=self.named,
            **self.origin,
            taken=fitted.taken,
            total=fitted.total,
            fresh=fitted.fresh,
            adapted=fitted.adapted,
        )

    def _changed_conditions(
        self, config: TrainConfig, network: nn.Module, text: str | None
    ) -> dict[str, str]:
        """Return the conditions of a network that have another meaning in the source, with their meaning there."""
        conditions: Conditions = getattr(network, "conditions", None) or Conditions()
        theirs = {attribute.name: attribute for attribute in self.weights.conditions.attributes}
        changed = {}
        for mine in conditions.attributes:
            of = theirs.get(mine.name)
            if of is not None and of.kind == "number" and (of.low, of.high) != (mine.low, mine.high):
                changed[mine.name] = f"{of.low:.6g} to {of.high:.6g} in the source"
        image = _image_of(config.condition)
        if None not in (image, self.image) and image != self.image:
            changed["image"] = f"{self.image} in the source"
        if text is not None and self.text is not None and not same_encoder(text, self.text):
            changed["text"] = "other tokens or features in the source"
        return changed

    @property
    def conditions(self) -> Conditions:
        """Conditions of its network; its data may have classes that it does not use."""
        described = self.weights.conditions if self.weights.conditions.names else self.weights.num_classes
        return used_conditions(described, bool(self.model.get("class_conditional")))

    def differences(self, config: TrainConfig, free: Collection[str] = ()) -> Iterator[str]:
        """Yield the options of the network that differ from those of the source; its class if that differs.

        Args:
            config: configuration of the training.
            free: options that may differ.
        """
        ours, theirs = config.model, self.model
        if ours["_target_"] != theirs["_target_"]:
            classes = (class_name(node) for node in (ours, theirs))
            yield "the class of the network is {}, that of the source {}".format(*classes)
            return
        differing = [
            key for key in ours
            if key in theirs and ours[key] != theirs[key] and f"model.{key}" not in config.derived and key not in free
        ]  # fmt: skip
        for key in differing[:MOST_KEYS]:
            value, other = format_value(ours[key]), format_value(theirs[key])
            yield f"model.{key}={value}, the source has {other}"


def check_teacher(source: WeightSource | None, config: TrainConfig) -> None:
    """Raise UsageError unless the source can be the teacher of an objective that distils.

    Args:
        source: source of the first weights; None for random ones.
        config: configuration of the training.
    """
    if source is None:
        problem, remedy = "distils a trained model", "set init.run"
        name = option_name(class_name(config.objective))
        raise UsageError("objective", name, problem, remedy)
    if config.progressive is not None:
        problem = "the teacher knows images of its own size alone"
        raise UsageError("progressive", config.progressive, problem, "leave it out")
    mine, theirs = (class_name(objective) for objective in (config.objective, source.objective))
    halved = ProgressiveDistillation.__name__
    if trains_consistency(source.objective) or (theirs == halved and mine != halved):
        problem = "is a few-step model, which predicts ends of steps; a teacher predicts the mean of x_0"
        raise UsageError(source.key, source.named, problem, "distil the model that it was trained from")
    scale = _guidance_scale(config)
    if scale != 1 and source.label_dropout == 0:
        problem = f"{source.key}={source.named} was trained with objective.label_dropout=0, so never without a label"
        remedy = "distil a run that was trained with 0.1, or use objective.guidance_scale=1"
        raise UsageError("objective.guidance_scale", scale, problem, remedy)
    for group in TAUGHT:
        mine, theirs = getattr(config, group), source.process.get(group)
        if theirs is not None and mine != theirs:
            names = [class_name(node) for node in (mine, theirs)]
            problem = f"{names[0]} is not that of the teacher, {source.key}={source.named} with {names[1]}"
            remedy = "leave it out, and distil a run that was trained with v, edm or flow"
            raise UsageError(group, NO_VALUE, problem, remedy)


def check_copy(source: WeightSource, config: TrainConfig, init: InitInfo, conditions: Conditions) -> None:
    """Raise UsageError unless a network is a copy of its teacher, which guidance can steer.

    Args:
        source: source of the first weights.
        config: configuration of the training.
        init: which weights come from the source.
        conditions: conditions of the network.
    """
    scale = _guidance_scale(config)
    if scale != 1 and not conditions.names:
        problem, remedy = "the network has no conditions to guide by", "use objective.guidance_scale=1"
        raise UsageError("objective.guidance_scale", scale, problem, remedy)
    if init.new:
        problem = f"is the teacher, but {len(init.new)} of {init.total} tensors of the network differ from it"
        remedy = f"keep its network, channels, classes and conditions; {min(init.new)} differs"
        raise UsageError(source.key, source.named, problem, remedy)
    left_out = [name for name in source.conditions.names if name not in conditions.names]
    differences = [*source.differences(config, FREE), *(f"the network lacks its {name}" for name in left_out)]
    if differences:
        problem = f"is the teacher, but {'; '.join(differences)}"
        raise UsageError(source.key, source.named, problem, "keep its network and its conditions")


def _guidance_scale(config: TrainConfig) -> float:
    """Return the guidance scale of a teacher; 1 without guidance."""
    return config.objective.get("guidance_scale") or 1.0


def read_weights(config: TrainConfig, task: str) -> WeightSource | None:
    """Return the source of the first weights; None without one.

    Raises UsageError if it cannot be read, or was trained for another task.
    """
    if (named := config.init.run) is not None:
        return _run(named, config, task)
    if (named := config.init.pretrained) is not None:
        return _other_program(named)
    return None


def _image_of(node: Mapping[str, Any] | None) -> str | None:
    """Return what a condition image is, in the words of its options; None without one."""
    image = None if node is None else build(node)
    if not isinstance(image, ImageCondition):
        return None
    augmented = " with condition.noise_augmentation" if image.noise_augmentation else ""
    return f"condition.of={format_value(image.of)}{augmented}"


def _levels(model: Mapping[str, Any], shape: Shape) -> tuple[int, int]:
    """Return the first size of the data of a U-Net in patches, and its number of levels."""
    return -(-shape[1] // model.get("patch_size", 1)), len(model["channel_mult"])


def _run(named: str, config: TrainConfig, task: str) -> WeightSource:
    """Return the weights of a run."""
    init, key = config.init, "init.run"
    run = find_run(named, config.output_dir, key)
    try:
        source = load_weights(run, init.weights, init.step, task)
    except UsageError as error:
        raise error.renamed({run: f"{key}={named}", "step": "init.step"}) from error
    model, shape = source.info.config.model, source.info.network_shape
    weights = InitialWeights(
        state=source.state,
        channels=shape[0],
        learns_variance=bool(model.get("learn_variance")),
        num_classes=source.info.num_classes,
        class_names=source.info.stated_class_names,
        conditions=source.info.conditions or Conditions(),
    )
    return WeightSource(
        key=key,
        named=named,
        origin={"kind": "run", "step": source.step, "weights": init.weights, "sha256": source.digest},
        model=model,
        shape=shape,
        weights=weights,
        process={group: getattr(source.info.config, group) for group in TAUGHT},
        image=_image_of(source.info.config.condition),
        text=source.info.text,
        label_dropout=source.info.label_dropout,
        objective=source.info.config.objective,
    )


def _other_program(named: str) -> WeightSource:
    """Return the weights of a model of another program."""
    key = "init.pretrained"
    source = read_source(named, key)
    remarks = source.remarks
    if source.process is not None:
        remarks += (*source.process.assumptions, *source.process.remarks)
    show_remarks(f"{key}={named}: {remark}" for remark in remarks)
    model, shape = source.network.node, source.network.shape
    weights = InitialWeights(
        state=weights_of(source, named, key),
        channels=shape[0],
        learns_variance=bool(model.get("learn_variance")),
        num_classes=source.network.num_classes,
        class_names=source.class_names,
    )
    origin = {
        "kind": source.kind, "step": None, "weights": None, "sha256": digest(weights.state), "commit": source.commit,
    }  # fmt: skip
    process, objective = {}, {}
    if source.process is not None:
        process = {group: getattr(source.process, group) for group in TAUGHT}
        objective = source.process.objective
    return WeightSource(
        key=key, named=named, origin=origin, model=model, shape=shape, weights=weights, process=process,
        objective=objective,
    )  # fmt: skip
