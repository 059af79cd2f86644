"""From the words of a command line to a checked configuration."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from diffusion_cli.config import plugins
from diffusion_cli.config.at_hand import own_images
from diffusion_cli.config.catalogue import defaults
from diffusion_cli.config.compose import by_hydra, compose, keeping_options
from diffusion_cli.config.experiments import experiment_problems, named_by_file
from diffusion_cli.config.hydra_words import hydra_in_files
from diffusion_cli.config.mapping_words import LABEL, with_one_label
from diffusion_cli.config.option_keys import REQUIRED
from diffusion_cli.config.overrides import known_keys, sorted_overrides
from diffusion_cli.config.own_options import composition_problems, incomplete_files
from diffusion_cli.config.recipe import AUTO, resolution
from diffusion_cli.config.renamed import renamed_in_files
from diffusion_cli.config.runs import flatten
from diffusion_cli.config.schema import COMMANDS, Config
from diffusion_cli.config.secret_values import secrets_in
from diffusion_cli.config.training import continues, training
from diffusion_cli.config.typed import as_shown, as_typed
from diffusion_cli.config.validate import check_node, validate
from diffusion_cli.config.values import Node
from diffusion_cli.errors import NO_VALUE, Problem, UsageError


def load(command: str, overrides: Sequence[str], dirs: Sequence[Path] = ()) -> Config:
    """Compose and check the configuration of a command; raises UsageError with all of them at once."""
    try:
        with keeping_options():
            return _load(command, overrides, dirs)
    except UsageError as error:
        raise UsageError.several(named_by_file(command, overrides, dirs, error.problems)) from error


def _load(command: str, overrides: Sequence[str], dirs: Sequence[Path]) -> Config:
    """As `load`, with errors that do not name the file of an experiment."""
    for problems_in in (renamed_in_files, incomplete_files, experiment_problems, hydra_in_files):
        if wrong := problems_in(command, overrides, dirs):
            raise UsageError.several(wrong)
    words, mistakes = _with_one_label(command, as_typed(command, overrides, dirs))
    choosing, setting, wrong_words = sorted_overrides(command, words, dirs)
    mistakes += wrong_words
    try:
        composed, unknown = (
            training(choosing, setting, dirs)
            if command == "train"
            else _composed(command, choosing, setting, dirs)
        )
    except UsageError as error:
        raise UsageError.several(_one_per_plugin([*mistakes, *error.problems])) from error
    except Exception as error:  # Hydra and OmegaConf have no common base class
        if type(error).__module__.partition(".")[0] not in ("hydra", "omegaconf", "antlr4", "yaml"):
            raise
        raise UsageError.several(
            [*mistakes, *composition_problems(command, overrides, dirs, error)]
        ) from error
    config, wrong = _check(command, composed)
    if any(
        problem.key == "max_steps" for problem in wrong
    ):  # what is derived from it is wrong only because of it
        wrong = [problem for problem in wrong if problem.key not in composed["derived"]]
    unknown = _without_consequences(unknown, mistakes)
    mistakes += [*unknown, *secrets_in(composed), *_without_consequences(wrong, [*mistakes, *unknown])]
    if mistakes or config is None:
        raise UsageError.several(_one_per_plugin(mistakes))
    return config


def references(command: str, overrides: Sequence[str], dirs: Sequence[Path] = ()) -> dict[str, str]:
    """Return the values `${...}` of a command's configuration, by dotted key; none for a run that continues."""
    from omegaconf import OmegaConf

    words, _ = _with_one_label(command, as_typed(command, overrides, dirs))
    choosing, setting, _ = sorted_overrides(command, words, dirs)
    if command == "train" and continues(setting):
        return {}
    choosing = [text for text in choosing if command == "train" or not text.startswith("dataset=")]
    plain = OmegaConf.to_container(by_hydra(command, choosing, (*plugins.folders(), *dirs)))
    assert isinstance(plain, dict)
    written = flatten({str(key): value for key, value in plain.items() if key != "hydra"}) | {
        key: as_shown(text).partition("=")[2] for key, text in setting.items()
    }
    return {key: value for key, value in written.items() if isinstance(value, str) and "${" in value}


def choosing_words(command: str, overrides: Sequence[str], dirs: Sequence[Path] = ()) -> list[str]:
    """Return the overrides that choose options; UsageError for wrong ones."""
    choosing, _, mistakes = sorted_overrides(command, as_typed(command, overrides, dirs), dirs)
    if mistakes:
        raise UsageError.several(mistakes)
    return choosing


def _with_one_label(command: str, words: Sequence[str]) -> tuple[list[str], list[Problem]]:
    """Words with one `label=` for all `label.<name>=`, where a command has the key, and the conflicts."""
    return with_one_label(words) if LABEL in COMMANDS[command].model_fields else ([*words], [])


def _composed(
    command: str, choosing: list[str], setting: Mapping[str, str], dirs: Sequence[Path]
) -> tuple[Node, list[Problem]]:
    """The configuration of a command that does not train, and a line for each unknown key."""
    implied = compose(command, choosing, dirs)[0]
    known, unknown = known_keys(command, setting, implied)
    composed = compose(command, [*choosing, *known], dirs)[0] if known else implied
    dataset = composed.get("dataset")
    if isinstance(dataset, dict) and dataset.get("resolution") == AUTO:
        dataset["resolution"] = resolution(own_images(dataset), on_gpu=True)  # the same on every machine
    return composed, unknown


def _check(command: str, composed: Node) -> tuple[Config | None, list[Problem]]:
    config, mistakes = validate(COMMANDS[command], composed)
    of_nodes: list[Problem] = []
    for key in defaults(command):
        node = composed.get(key)
        if isinstance(node, dict):
            nodes = (
                {key: node} if "_target_" in node else {f"{key}.{name}": item for name, item in node.items()}
            )
            for path, item in nodes.items():
                of_nodes += check_node(path, item) if isinstance(item, dict) else []
    mistakes, of_nodes = (
        [problem for problem in found if problem.value != REQUIRED] for found in (mistakes, of_nodes)
    )
    explained = {problem.key for problem in of_nodes}
    missing = [
        Problem(key, NO_VALUE, "missing", f"add {key}=<value>")
        for key, value in flatten(composed).items()
        if value == REQUIRED and key not in explained
    ]
    return config, mistakes + missing + of_nodes


def _one_per_plugin(problems: Sequence[Problem]) -> list[Problem]:
    """The problems with only the first of those that end by allowing the same plugin."""
    first = {problem.remedy: problem for problem in reversed(problems)}
    return [
        problem
        for problem in problems
        if not problem.remedy.startswith(f"add {plugins.KEY}=") or first[problem.remedy] is problem
    ]


def _without_consequences(problems: Sequence[Problem], words: Sequence[Problem]) -> list[Problem]:
    """The problems of keys without those that follow from wrong words: a group that has no option, a misspelt key."""
    wrong = {_key_of(problem) for problem in words}
    meant = {problem.remedy for problem in words}
    return [
        problem
        for problem in problems
        if not {_key_of(problem), _key_of(problem).partition(".")[0]} & wrong
        and f"did you mean {problem.key}?" not in meant
    ]


def _key_of(problem: Problem) -> str:
    """The key of a problem with a word or a key."""
    return str(problem.key).partition("=")[0].lstrip("+")
