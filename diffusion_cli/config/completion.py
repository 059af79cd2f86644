"""Shell completion of `diffuse`."""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, pairwise
from pathlib import Path

from diffusion_cli.config import plugins
from diffusion_cli.config.catalogue import CONF, Choice, chosen, did_you_mean, documented, options
from diffusion_cli.config.introspection import CFG, INFO
from diffusion_cli.config.key_types import few_values, nodes, types_of
from diffusion_cli.config.launcher import launcher_keys, launchers, split_launcher
from diffusion_cli.config.option_keys import option_keys
from diffusion_cli.config.runs import run_folders
from diffusion_cli.config.schema import COMMANDS, FIRST_WORDS, UNSWEPT
from diffusion_cli.config.signature import is_foreign
from diffusion_cli.config.sweepers import sweeper_keys
from diffusion_cli.config.values import PATH_KEYS
from diffusion_cli.config.words import FLAGS, known_keys
from diffusion_cli.errors import NO_VALUE, UsageError, format_value

COMPLETION_HELP = """diffuse completion: Print a completion script for bash, zsh or fish

Usage: diffuse completion bash|zsh|fish

Line for the start-up file of the shell
  bash  ~/.bashrc                    eval "$(diffuse completion bash)"
  zsh   ~/.zshrc, after compinit     eval "$(diffuse completion zsh)"
  fish  ~/.config/fish/config.fish   diffuse completion fish | source"""

SCRIPTS = {
    # bash splits words at "=", so the script splits the line itself and removes the part up to "=" from completions.
    "bash": """_diffuse() {
  local line="${COMP_LINE:0:COMP_POINT}" words stem="" IFS=$' \\t\\n'
  read -ra words <<< "$line"
  [[ "$line" == *[[:space:]] ]] && words+=("")
  [[ "${words[-1]}" == *=* ]] && stem="${words[-1]%%=*}="
  IFS=$'\\n'
  COMPREPLY=($(diffuse __complete "${words[@]:1}" 2>/dev/null))
  COMPREPLY=("${COMPREPLY[@]#"$stem"}")
}
complete -o nospace -F _diffuse diffuse""",
    "zsh": """#compdef diffuse
_diffuse() { compadd -S '' -- ${(f)"$(diffuse __complete ${words[2,CURRENT]} 2>/dev/null)"} }
compdef _diffuse diffuse""",
    "fish": """complete -c diffuse -f -a \\
  '(diffuse __complete (commandline -opc)[2..] (commandline -ct) 2>/dev/null)'""",
}


SWEEP_WORDS = (
    "launcher=",
    "launcher.",
    "hydra/launcher=",
    "hydra.launcher.",
    "hydra/sweeper=",
    "hydra.sweeper.",
)
"""Groups and beginnings of keys that a sweep has."""
RUN_KEYS = ("run", "compare", "init.run", "latent.run", "guidance.run")
"""Keys with a value that names a run."""
MOST_PATHS = 1000
"""Most completions of a path."""


def completion_script(shell: str) -> str:
    """Return the completion script of a shell; raises UsageError for an unknown shell."""
    if shell not in SCRIPTS:
        problem = "unknown shell" if shell else "no shell given"
        remedy = did_you_mean(shell, list(SCRIPTS)) if shell else "write diffuse completion bash, zsh or fish"
        raise UsageError(f"completion {shell}".strip(), NO_VALUE, problem, remedy)
    return SCRIPTS[shell]


def complete(words: Sequence[str]) -> list[str]:
    """Return the completions of the last word: a command, a group, key, flag, or a value; none after an error."""
    words = [re.sub(r"^[\"']|[\"']$", "", word) for word in words]  # as in 'plugins=[x]'
    try:
        plugins.allow(plugins.named(words[:-1]))
        return _complete([word for word in words if not word.startswith(f"{plugins.KEY}=")])
    except UsageError:
        return []


def _complete(words: Sequence[str]) -> list[str]:
    last = words[-1] if words else ""
    if len(words) <= 1:
        candidates = [*COMMANDS, "completion", "--help", "--version"]
    elif words[0] == "completion":
        candidates = list(SCRIPTS)
    elif words[0] not in COMMANDS:
        return []
    elif last.startswith("++"):
        return [f"++{word}" for word in _complete([*words[:-1], last.removeprefix("++")])]
    elif (values := _of_flag(words)) is not None:
        candidates = values
    elif "=" in last:
        key, _, value = last.partition("=")
        candidates = [f"{key}={name}" for name in _after_equals(words, key, value)]
    elif last.startswith("-"):
        candidates = FLAGS
    else:
        dirs = _dirs(words)
        groups = chosen(words[0], words[1:-1], dirs)
        keys = [f"{key}=" for key, _, _ in documented(CONF / f"{words[0]}.yaml")]
        for group, file in _files(groups, dirs):
            keys += [f"{of.key}=" for of in option_keys(file, group)]
        keys += [] if words[0] in UNSWEPT else [*SWEEP_WORDS, *_keys_of_sweep(words, dirs)]
        candidates = [*_first_words(words), *(f"{group}=" for group in groups), *keys]
    return [word for word in dict.fromkeys(candidates) if word.startswith(last)]


def _of_flag(words: Sequence[str]) -> list[str] | None:
    """The completions of a value after a flag, or after its equals sign; None where no flag takes one."""
    last = words[-1]
    flag, equals, value = last.partition("=") if last.startswith("-") else (words[-2], "", last)
    if (last.startswith("-") and not equals) or "=" in value:
        return None
    if flag in ("--cfg", "-c"):
        values = list(CFG)
    elif flag in ("--info", "-i"):
        values = list(INFO)
    elif flag in ("--package", "-p"):
        values = known_keys(words[0], words[1:-1], _dirs(words))
    elif flag in ("--config-dir", "-cd"):
        values = [path for path in _paths(value) if path.endswith("/")]
    else:
        return None
    return [f"{flag}={name}" if equals else name for name in values]


def _keys_of_sweep(words: Sequence[str], dirs: Sequence[Path]) -> list[str]:
    """The keys of the chosen sweeper or launcher, if the last word begins with its name."""
    if words[-1].startswith("hydra.sweeper."):
        return [f"hydra.sweeper.{key}=" for key in sweeper_keys(words[1:-1], dirs)]
    prefix = re.match(r"(hydra\.)?launcher\.", words[-1])
    if prefix is None:
        return []
    given = (text.partition("=") for text in split_launcher(words[1:-1])[0])
    name = next((option for key, _, option in given if key == "launcher"), "local")
    return [f"{prefix[0]}{key}=" for key in (launcher_keys(name, dirs) if name in launchers(dirs) else ())]


def _after_equals(words: Sequence[str], key: str, value: str) -> list[str]:
    """The values of a key or a group; within brackets, or after commas, the rest of a list."""
    dirs, brackets = _dirs(words), value[:1] == "["
    before, comma, _ = value.rpartition(",")
    start = f"{before}," if comma else "[" * brackets
    given = before.removeprefix("[").split(",") if comma else []
    if key.removeprefix("hydra/") == "launcher":
        names = launchers(dirs)
    elif key.startswith("hydra/"):
        from diffusion_cli.config.hydra_jobs import installed

        names = sorted({*installed(key), *options(key, dirs)})
    else:
        names = [*options(key, dirs), *_values(words, key, dirs)]
    names = [f"{start}{name}" for name in names if name not in given]
    names += _runs(words) if key in RUN_KEYS else []
    paths = _paths(value) if key in RUN_KEYS or key.rpartition(".")[2] in PATH_KEYS else []
    return names + [path for path in paths if path.endswith("/") or key not in RUN_KEYS]


def _dirs(words: Sequence[str]) -> list[Path]:
    """The folders of options that a command line names."""
    given = [following for flag, following in pairwise(words) if flag in ("--config-dir", "-cd")]
    given += [word.partition("=")[2] for word in words if word.startswith(("--config-dir=", "-cd="))]
    return [path for text in given if (path := Path(text).expanduser()).is_dir()]


def _files(groups: Mapping[str, Choice], dirs: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """Yield the file of each chosen option, after its group."""
    for group, option in groups.items():
        for name in option if isinstance(option, list) else [option]:
            if file := options(group, dirs).get(str(name)):
                yield group, file


def _first_words(words: Sequence[str]) -> list[str]:
    """The options or values of the key that the last word, if it is bare, is for."""
    keys = FIRST_WORDS.get(words[0], ())[len(words) - 2 :]
    return [*options(keys[0]), *_values(words, keys[0], ())] if keys else []


def _values(words: Sequence[str], key: str, dirs: Sequence[Path]) -> list[str]:
    """The values of a key that takes one of a few; none for a class that would have to be imported."""
    groups, group = chosen(words[0], words[1:-1], dirs), key.partition(".")[0]
    of_key = _files({group: groups[group]} if group in groups else {}, dirs)
    if any(is_foreign(target) for of, file in of_key for target in nodes(file, of).values()):
        return []
    return [format_value(value) for value in few_values(types_of(words[0], key, lambda: groups, dirs))]


def _runs(words: Sequence[str]) -> list[str]:
    """The names of the runs in the `output_dir` of a command line."""
    given = [word.partition("=")[2] for word in words if word.startswith("output_dir=")]
    try:
        root = Path(given[-1] if given else "outputs").expanduser()
    except RuntimeError:  # `~` of an unknown user
        return []
    return [folder.name for folder in run_folders(root)]


def _paths(start: str) -> list[str]:
    """The files and folders whose path begins with a text; folders end in a slash, and hidden ones need their dot."""
    parent, slash, name = start.rpartition("/")
    try:
        found = [*islice(Path(f"{parent}{slash}" or ".").expanduser().iterdir(), MOST_PATHS)]
    except (OSError, RuntimeError):  # `~` of an unknown user
        return []
    shown = sorted(
        path
        for path in found
        if path.name.startswith(name or "") and (name[:1] == "." or path.name[0] != ".")
    )
    return [f"{parent}{slash}{path.name}{'/' if path.is_dir() else ''}" for path in shown]
