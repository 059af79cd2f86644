"""From the words of a command line to a checked configuration, without importing torch.

The YAML files under `conf` are the reference: one file a command, one folder a group, one file an option.
Each option names a class by `_target_` and gives every keyword argument of it. What a value may be is said
once, by the annotations of that class; they are read from its source, so that a mistake costs no import.
"""

import ast
import difflib
import hashlib
import importlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    create_model,
    model_validator,
)

PACKAGE = __package__ or "diffusion_cli"
HERE = Path(__file__).resolve().parent
CONF = HERE / "conf" if (HERE / "conf").is_dir() else HERE.parent / "conf"

STRICT = ConfigDict(strict=True, extra="forbid", frozen=True, regex_engine="python-re")
Node = dict[str, Any]
Duration = Annotated[str, Field(pattern=r"^(?=.)(\d+d)?(\d+h)?(\d+m)?(\d+s)?$")]
Precision = Literal["auto", "fp32", "bf16"]
Device = Literal["auto", "cpu", "cuda"]


class Mistakes(Exception):
    """Everything that is wrong with what the user asked for, one line each."""

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


class EMAConfig(BaseModel):
    """`ema.*`: the average of the weights that is validated, sampled and evaluated."""

    model_config = STRICT
    decay: Annotated[float, Field(ge=0, lt=1)]
    warm_up: bool


class TrainConfig(BaseModel):
    """The keys of `conf/train.yaml`."""

    model_config = STRICT
    seed: NonNegativeInt
    name: str | None
    batch_size: PositiveInt
    accumulate: PositiveInt
    precision: Precision
    compile: Literal["auto"] | bool
    max_steps: PositiveInt | None
    max_epochs: PositiveInt | None
    max_time: Duration | None
    checkpoint_every: PositiveInt
    keep_last: PositiveInt
    log_every: PositiveInt
    validate_every: PositiveInt
    preview_every: PositiveInt
    preview_steps: PositiveInt
    data_dir: str
    output_dir: str
    ema: EMAConfig
    dataset: Node
    schedule: Node
    parameterization: Node
    model: Node
    objective: Node
    sampler: Node
    optimizer: Node
    trainer: Node
    logger: dict[str, Node]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_steps is self.max_epochs is self.max_time is None:
            raise ValueError("max_steps: no budget; set max_steps, max_epochs or max_time")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate={self.accumulate}: does not divide batch_size={self.batch_size}; take a divisor"
            )
        return self


class _Generation(BaseModel):
    """What sampling and evaluation share."""

    model_config = STRICT
    run: str | None
    steps: PositiveInt
    num_samples: PositiveInt
    batch_size: PositiveInt
    seed: NonNegativeInt
    weights: Literal["ema", "raw"]
    clip_x0: bool
    precision: Precision
    device: Device
    output_dir: str
    sampler: Node


class SampleConfig(_Generation):
    """The keys of `conf/sample.yaml`."""

    output: str | None


class EvalConfig(_Generation):
    """The keys of `conf/eval.yaml`."""

    force: bool
    data_dir: str
    cache_dir: str | None
    metric: dict[str, Node]
    features: Node


Config = TrainConfig | SampleConfig | EvalConfig
COMMANDS: dict[str, type[TrainConfig] | type[SampleConfig] | type[EvalConfig]] = {
    "train": TrainConfig,
    "sample": SampleConfig,
    "eval": EvalConfig,
}

# Keys that say how far, how fast and where, but not what: a run may go on with other values of them.
NOT_IDENTITY = frozenset(
    [
        "name",
        "max_steps",
        "max_epochs",
        "max_time",
        "checkpoint_every",
        "keep_last",
        "log_every",
        "validate_every",
        "preview_every",
        "preview_steps",
        "compile",
        "data_dir",
        "output_dir",
        "sampler",
        "trainer",
        "logger",
    ]
)


# --- The catalogue: what groups, options and keys there are --------------------------------------------------


@cache
def defaults(command: str) -> dict[str, str | list[str] | None]:
    """The groups of a command and the option that each has unless told otherwise."""
    entries = yaml.safe_load((CONF / f"{command}.yaml").read_text())["defaults"]
    return {group: option for entry in entries if isinstance(entry, dict) for group, option in entry.items()}


def options(group: str, dirs: Sequence[Path] = ()) -> dict[str, Path]:
    """The options of a group by name, the user's own folders included."""
    files = (file for root in (CONF, *dirs) for file in sorted((root / group).glob("*.yaml")))
    return dict(sorted((file.stem, file) for file in files))


def documented(file: Path, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """The (key, value, comment) of every line `key: value  # comment` of a YAML file, keys in full."""
    text = file.read_text()
    parents: list[tuple[int, str]] = [] if "@package _global_" in text or not prefix else [(-1, prefix)]
    skipping = False
    for line in text.splitlines():
        match = re.match(r"(\s*)(\w+):\s*(.*?)\s*(?:#\s*(.*))?$", line)
        if not match:
            continue
        indent, key, value, comment = len(match[1]), match[2], match[3], match[4] or ""
        skipping = key == "defaults" if not indent else skipping
        if skipping or key == "_target_":
            continue
        while parents and parents[-1][0] >= indent:
            parents.pop()
        path = ".".join([name for _, name in parents] + [key])
        if value or comment:
            yield path, value, comment
        if not value:
            parents.append((indent, key))


def summary(file: Path) -> str:
    """The first comment of a YAML file, which says what it is."""
    comments = re.findall(r"(?:^|\s)# +([^@\s].*)", file.read_text())
    return comments[0] if comments else ""


def did_you_mean(word: str, words: Sequence[str]) -> str:
    """ "; did you mean X?" where a word is near, else the list of them."""
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else f"; there are: {', '.join(words)}"


# --- The check of a node against the class it names --------------------------------------------------

# What annotations of configurable arguments may be made of.
VOCABULARY = {
    "int": int, "float": float, "bool": bool, "str": str, "list": list, "dict": dict,
    "Literal": Literal, "Annotated": Annotated, "Field": Field,
    "PositiveInt": PositiveInt, "NonNegativeInt": NonNegativeInt,
    "PositiveFloat": PositiveFloat, "NonNegativeFloat": NonNegativeFloat,
}  # fmt: skip


@cache
def _definitions(module: str) -> dict[str, ast.AST]:
    """The top-level names of a module of this package, each with the node that makes it; not imported."""
    path = HERE.joinpath(*module.split(".")[1:])
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not file.is_file():
        return {}
    found: dict[str, ast.AST] = {}
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE}."):
            found |= {alias.asname or alias.name: node for alias in node.names}
    return found


def _find(module: str, name: str) -> tuple[str, ast.ClassDef | ast.FunctionDef] | None:
    """Where a name is defined, following imports within the package."""
    node = _definitions(module).get(name)
    if isinstance(node, ast.ImportFrom):
        return _find(node.module or "", name)
    return (module, node) if isinstance(node, ast.ClassDef | ast.FunctionDef) else None


def signature(target: str) -> dict[str, Any] | None:
    """The configurable (keyword-only) arguments of a class of this package by name, with their types.

    None if there is no such class. The source is read, nothing is imported.
    """
    found = _find(*target.rpartition(".")[::2]) if target.startswith(f"{PACKAGE}.") else None
    if found is None:
        return None
    module, node = found
    if isinstance(node, ast.ClassDef):
        inits = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
        if not inits:
            bases = (signature(f"{module}.{base.id}") for base in node.bases if isinstance(base, ast.Name))
            return next((arguments for arguments in bases if arguments is not None), {})
        node = inits[0]
    return {
        argument.arg: eval(compile(ast.Expression(argument.annotation), target, "eval"), {}, VOCABULARY)
        for argument in node.args.kwonlyargs
        if argument.annotation is not None
    }


def check_node(key: str, node: Mapping[str, Any]) -> list[str]:
    """What is wrong with a node `{_target_: class, argument: value, ...}`, one line each."""
    arguments = {str(name): value for name, value in node.items() if name != "_target_"}
    target = node.get("_target_")
    types = signature(target) if isinstance(target, str) else None
    if types is None:
        return [f"{key}._target_={target}: is not a class of {PACKAGE}; only its own classes are built"]
    fields: dict[str, Any] = {name: (kind, ...) for name, kind in types.items()}
    return _validate(create_model(key, __config__=STRICT, **fields), arguments, key)[1]


def _validate(model: type[BaseModel], values: Mapping[str, Any], prefix: str = "") -> tuple[Any, list[str]]:
    """The model made of values, or None and what is wrong with them, one line a key."""
    try:
        return model.model_validate(dict(values)), []
    except ValidationError as error:
        lines: dict[str, list[str]] = {}
        for detail in error.errors(include_url=False):
            path, value = _path(values, detail["loc"], prefix)
            lines.setdefault(f"{path}={_shown(value)}" if path else "", []).append(_remedy(detail, model))
        return None, [
            f"{where}: {' or '.join(dict.fromkeys(what))}".lstrip(": ") for where, what in lines.items()
        ]


def _path(values: Any, location: tuple[int | str, ...], prefix: str) -> tuple[str, Any]:
    """The dotted key that an error is about, and its value; a union's member names are left out."""
    keys = [prefix] if prefix else []
    for part in location:
        if isinstance(values, Mapping) and part not in values and len(keys) > bool(prefix):
            break
        if not isinstance(values, Mapping | list):
            break
        keys.append(str(part))
        values = (
            values.get(part)
            if isinstance(values, Mapping)
            else values[part]
            if isinstance(part, int)
            else None
        )
    return ".".join(keys), values


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _remedy(detail: Any, model: type[BaseModel]) -> str:
    kind, message, value = detail["type"], detail["msg"], detail["input"]
    if kind == "extra_forbidden":
        return f"unknown key{did_you_mean(str(detail['loc'][-1]), list(model.model_fields))}"
    if kind == "missing":
        return "missing; give it a value"
    if kind == "literal_error":
        expected = re.findall(r"'([^']*)'", detail["ctx"]["expected"])
        near = difflib.get_close_matches(str(value), expected, n=1)
        return f"should be {' or '.join(expected)}" + (f"; did you mean {near[0]}?" if near else "")
    if kind == "string_pattern_mismatch":
        return "should be a duration such as 90s, 45m, 2h30m or 1d"
    if kind == "value_error":
        return str(detail["ctx"]["error"])
    return message.replace("Input should be", "should be")


# --- Composition --------------------------------------------------


def load(command: str, overrides: Sequence[str], dirs: Sequence[Path] = ()) -> Config:
    """Compose and check the configuration of a command; raises Mistakes with all of them at once."""
    good, mistakes = _check_overrides(command, overrides, dirs)
    try:
        composed, choices = compose(command, good, dirs)
    except Exception as error:  # Hydra and OmegaConf have no common base class
        raise Mistakes(*mistakes, _first_line(error)) from error
    config, wrong = _check(command, composed)
    if mistakes or wrong or config is None:
        raise Mistakes(*dict.fromkeys([*mistakes, *wrong]))
    if isinstance(config, TrainConfig) and config.name is None:
        config = config.model_copy(update={"name": _run_name(config, choices, dirs)})
    return config


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of a sweep with each of its values tried once: enough to check every one of them."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides(list(overrides))
    choices = [
        [f"{item.get_key_element()}={value}" for value in item.sweep_string_iterator()]
        if item.is_sweep_override()
        else [item.input_line or ""]
        for item in parsed
    ]
    first = [values[0] for values in choices]
    variants = [
        [*first[:place], value, *first[place + 1 :]]
        for place, values in enumerate(choices)
        for value in values[1:]
    ]
    return [first, *variants]


def compose(command: str, overrides: Sequence[str], dirs: Sequence[Path] = ()) -> tuple[Node, Node]:
    """Hydra's composition of a command's configuration, and the option chosen for each group, as plain data."""
    import hydra
    from omegaconf import OmegaConf, flag_override

    searchpath = (
        [f"hydra.searchpath=[{','.join(f'file://{folder.resolve()}' for folder in dirs)}]"] if dirs else []
    )
    with hydra.initialize_config_dir(str(CONF), job_name="diffuse", version_base="1.3"):
        composed = hydra.compose(command, overrides=[*overrides, *searchpath], return_hydra_config=True)
    choices = OmegaConf.to_container(composed.hydra.runtime.choices)
    with flag_override(composed, ["struct", "readonly"], False):
        del composed["hydra"]
    plain = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(plain, dict)
    assert isinstance(choices, dict)
    return (
        {str(key): value for key, value in plain.items()},
        {str(group): option for group, option in choices.items() if group in defaults(command)},
    )


def _check_overrides(
    command: str, overrides: Sequence[str], dirs: Sequence[Path]
) -> tuple[list[str], list[str]]:
    """The overrides that name something that exists, and what is wrong with the others."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    groups = defaults(command)
    chosen: list[str] = []
    valued: list[tuple[str, str]] = []
    mistakes: list[str] = []
    for text in overrides:
        try:
            item = OverridesParser.create().parse_override(text)
        except Exception as error:  # antlr's and Hydra's own classes
            mistakes.append(f"{text}: is not of the form key=value ({_first_line(error)})")
            continue
        key = item.key_or_group
        if key in groups:
            value = item.value()
            names = value if isinstance(value, list) else [value]
            known = options(key, dirs)
            wrong = [str(name) for name in names if name is not None and str(name) not in known]
            mistakes += [f"{key}={name}: unknown option{did_you_mean(name, list(known))}" for name in wrong]
            chosen += [] if wrong else [text]
        elif key.startswith("hydra"):
            chosen.append(text)
        elif not (item.is_force_add() or item.is_add() or item.is_delete()):
            valued.append((key, text))
        else:
            mistakes.append(f"{text}: keys are neither added nor removed; write key=value")
    try:
        known_keys = list(flatten(compose(command, chosen, dirs)[0]))
    except Exception as error:
        return chosen, [*mistakes, _first_line(error)]
    for key, text in valued:
        if key in known_keys or any(other.startswith(f"{key}.") for other in known_keys):
            chosen.append(text)
        else:
            words = [*known_keys, *groups]
            near = difflib.get_close_matches(key, words, n=1, cutoff=0.6)
            near = near or [word for word in words if word.rpartition(".")[2] == key][:1]
            hint = f"did you mean {near[0]}?" if near else f"see diffuse {command} --help"
            mistakes.append(f"{text}: unknown key; {hint}")
    return chosen, mistakes


def _check(command: str, composed: Node) -> tuple[Config | None, list[str]]:
    config, mistakes = _validate(COMMANDS[command], composed)
    mistakes += [
        f"{key}: missing; give it a value" for key, value in flatten(composed).items() if value == "???"
    ]
    for key in defaults(command):
        node = composed.get(key)
        if isinstance(node, dict):
            nodes = (
                {key: node} if "_target_" in node else {f"{key}.{name}": item for name, item in node.items()}
            )
            for path, item in nodes.items():
                mistakes += check_node(path, item) if isinstance(item, dict) else []
    return config, mistakes


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


# --- Runs ------------------------------------------------------------


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a training configuration that says what is trained, as flat dotted keys."""
    return flatten({key: value for key, value in config.items() if key not in NOT_IDENTITY})


def flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        nested = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def fingerprint(node: Mapping[str, Any]) -> str:
    """Eight hex digits that follow from a configuration's keys and values."""
    return hashlib.sha256(json.dumps(node, sort_keys=True).encode()).hexdigest()[:8]


def seconds(duration: str | None) -> float | None:
    """The seconds of a duration such as 2h30m, or None."""
    if duration is None:
        return None
    units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    return float(sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([dhms])", duration)))


def _run_name(config: TrainConfig, choices: Mapping[str, Any], dirs: Sequence[Path]) -> str:
    """A folder name that follows from the configuration: its main choices, then all that they do not imply."""
    named = {group: option for group, option in choices.items() if group not in NOT_IDENTITY and option}
    _, usual = compose("train", [f"dataset={named['dataset']}"], dirs)
    plain, _ = compose("train", [f"{group}={option}" for group, option in named.items()], dirs)
    before, now = identity(plain), identity(config.model_dump())
    words = [named["dataset"], named["schedule"]]
    words += [option for group, option in named.items() if group != "schedule" and option != usual[group]]
    words += [f"{key}={_shown(value)}" for key, value in sorted(now.items()) if before.get(key, ...) != value]
    name = re.sub(r"[^\w.=+,-]+", "_", "-".join(words))
    if len(name) > 120:
        name = f"{name[:100]}-{hashlib.sha256(name.encode()).hexdigest()[:10]}"
    return name


def build(node: Mapping[str, Any], *supplied: Any) -> Any:
    """Make what a checked node names: `target(*supplied, **arguments)`."""
    module, _, name = node["_target_"].rpartition(".")
    assert module.split(".")[0] == PACKAGE, node
    target = getattr(importlib.import_module(module), name)
    return target(*supplied, **{str(key): value for key, value in node.items() if key != "_target_"})
