"""`diffuse new`: write a plugin with one option, from the files of `skeletons`. It does not import torch."""

import keyword
import re
import shlex
from pathlib import Path

from diffusion_cli.config import HERE, NewConfig, options
from diffusion_cli.config.plugins import exists
from diffusion_cli.config.runs import run_folders
from diffusion_cli.errors import NO_VALUE, UsageError

SKELETONS = HERE / "skeletons"
"""A folder for each group: `example.py`, `example.yaml` and `test_example.py`, of the package `example_package`."""
NAME = re.compile(r"[a-z][a-z0-9_]*", re.ASCII)
PLACEHOLDERS = re.compile(r"\b(example_package\b|example\b|Example(?=State\b|\b))")
NEXT = {
    "dataset": "train {plugins} dataset={name}",
    "model": "train {plugins} model={name}",
    "schedule": "train {plugins} schedule={name}",
    "parameterization": "train {plugins} parameterization={name}",
    "objective": "train {plugins} objective={name}",
    "time_sampling": "train {plugins} time_sampling={name}",
    "optimizer": "train {plugins} optimizer={name}",
    "lr_schedule": "train {plugins} lr_schedule={name}",
    "logger": "train {plugins} 'logger=[csv,{name}]'",
    "callback": "train {plugins} 'callback=[{name}]'",
    "sampler": "sample {run}{plugins} sampler={name}",
    "guidance": "sample {run}{plugins} guidance={name}",
    "edit": "edit {run}{plugins} edit={name} input=val num_images=4",
    "restoration": "edit {run}{plugins} edit=inpaint restoration={name} input=val num_images=4",
    "measurement": "edit {run}{plugins} edit=restore measurement={name} input=val num_images=4",
    "metric": "eval {run}{plugins} metric={name}",
    "features": "eval {run}{plugins} features={name}",
    "reference": "eval {run}{plugins} reference={name}",
    "figure": "plot {plugins} figure={name}",
}
"""The command that uses a new option; `{plugins}` stands for the word that allows the package, `{run}` for a run that
is trained first; where there are runs, the command uses the newest model."""
DEMO = "demo"


def run(config: NewConfig) -> None:
    """Write the files of a new option, replacing no file, and print the next commands."""
    output, name = Path(config.output).expanduser(), config.name
    _check_name(config, output)
    package = config.plugin or name
    files = {
        output / package / "__init__.py": f'"""Classes and options for diffuse: {package}."""\n',
        output / package / f"{name}.py": _filled(config, "example.py"),
        output / package / "conf" / config.group / f"{name}.yaml": _filled(config, "example.yaml"),
        output / f"test_{name}.py": _filled(config, "test_example.py"),
    }
    if config.plugin is not None:
        files.pop(output / package / "__init__.py")
    for path in files:
        if path.exists():
            raise UsageError(path, NO_VALUE, "exists already", "choose another name or output")
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
        print(path)
    print("Next:")
    if output.resolve() != Path.cwd():
        print(f"  cd {shlex.quote(str(output))}")
    if exists("pytest"):
        print(f"  pytest test_{name}.py")
    command, trained = NEXT[config.group], ""
    if "{run}" in command and not run_folders(output / "outputs"):
        print(f"  diffuse train name={DEMO}")
        trained = f"run={DEMO} "
    words = command.format(run=trained, plugins=f"'plugins=[{package}]'", name=name)
    print(f"  diffuse {words}")


def _check_name(config: NewConfig, output: Path) -> None:
    """Raise UsageError unless the name suits an option, a module and a class, and is not in use."""
    name = config.name
    if not NAME.fullmatch(name) or keyword.iskeyword(name):
        known = re.sub(r"\W+", "_", name.lower(), flags=re.ASCII).strip("_0123456789")
        usable = NAME.fullmatch(known) and not keyword.iskeyword(known)
        remedy = f"write name={known}" if usable and known != name else "choose another name"
        raise UsageError(
            "name", name, "must be lower-case letters, digits and _, and no word of Python", remedy
        )
    if name in options(config.group):
        raise UsageError("name", name, f"{config.group}={name} exists already", "choose another name")
    if re.search(rf"\b{_class_name(name)}\b", _template(config.group, "example.py")):
        raise UsageError(
            "name", name, f"{_class_name(name)} is a class of diffuse or a library", "choose another name"
        )
    folder = output / (config.plugin or name)
    if config.plugin is not None and not (config.plugin.isidentifier() and folder.is_dir()):
        raise UsageError(
            "plugin", config.plugin, f"no such package in {output}", "leave it out for a new package"
        )
    if config.plugin is None and folder.exists():
        remedy = f"choose another name, or add plugin={name} to extend this package"
        raise UsageError(folder, NO_VALUE, "exists already", remedy)
    if config.plugin is None and exists(name):
        raise UsageError("name", name, "is the name of an installed module", "choose another name")


def _filled(config: NewConfig, file: str) -> str:
    """Return a file of a skeleton with the names of the new option."""
    names = {
        "example_package": config.plugin or config.name,
        "example": config.name,
        "Example": _class_name(config.name),
    }
    return PLACEHOLDERS.sub(lambda found: names[found[0]], _template(config.group, file))


def _template(group: str, file: str) -> str:
    return (SKELETONS / group / file).read_text(encoding="utf-8")


def _class_name(name: str) -> str:
    return "".join(word[:1].upper() + word[1:] for word in name.split("_"))
