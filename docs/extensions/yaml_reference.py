"""Reference pages of all commands and options, written at each build from the YAML files in `conf/`."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util.typing import ExtensionMetadata

from diffusion_cli.config import (
    COMMANDS,
    CONF,
    FIRST_WORDS,
    GROUPS,
    LAUNCHERS,
    UNSWEPT,
    defaults,
    documented,
    groups,
    options,
    summary,
)
from diffusion_cli.config.catalogue import content

GENERATED = ("reference/commands", "reference/options")
"""Folders of the generated pages, which are never committed."""


def folder(group: str) -> str:
    """The folder of a group in `conf/`."""
    return LAUNCHERS if group == "launcher" else group


def command_page(command: str) -> str:
    """The page of one command: its usage, its groups, and all its keys."""
    words = [f"[{key}]" for key in FIRST_WORDS.get(command, ())]
    chosen = defaults(command)
    words += ["[group=option ...]"] if chosen else []
    lines = [
        f"# diffuse {command}",
        "",
        prose(summary(CONF / f"{command}.yaml")),
        "",
        "```text",
        " ".join(["diffuse", command, *words, "[key=value ...]"]),
        "```",
        "",
    ]
    if chosen:
        lines += ["## Groups", "", "| group | default | options |", "|---|---|---|"]
        for group in groups(command):
            preset = chosen[group]
            names = [name for name in (preset if isinstance(preset, list) else [preset]) if name]
            usual = ", ".join(f"`{name}`" for name in names) or "none"
            lines.append(
                f"| [{group}](../options/{group}.md) | {usual} | {option_links(group, '../options/')} |"
            )
        lines.append("")
    lines += ["## Keys", "", *keys(CONF / f"{command}.yaml", "", f"diffuse {command}")]
    return "\n".join(lines)


def group_page(group: str) -> str:
    """The page of one group: every option with its class and its keys."""
    users = [
        command
        for command in COMMANDS
        if group in defaults(command) or (group == "launcher" and command not in UNSWEPT)
    ]
    links = ", ".join(f"[{command}](../commands/{command}.md)" for command in users)
    lines = [f"# {group}", "", f"Options of `{group}=`, for {links}.", ""]
    for name, file in options(folder(group)).items():
        target = content(file).get("_target_", "")
        lines += [f"## {name}", "", prose(summary(file)), ""]
        lines += [f"Class: {{py:class}}`{target}`", ""] if target.startswith("diffusion_cli.") else []
        lines += keys(file, group, f"{group}={name}")
    return "\n".join(lines)


def option_links(group: str, path: str = "") -> str:
    """Links to all options of a group, from a page that has the folder of the groups at `path`."""
    return ", ".join(f"[{name}]({path}{group}.md#{name})" for name in options(folder(group)))


def keys(file: Path, prefix: str, program: str) -> Iterator[str]:
    """The keys of a YAML file with defaults and meanings, as options of a program in the sense of Sphinx."""
    yield from (f"```{{program}} {program}", "```", "")
    for key, value, comment in documented(file, prefix):
        yield from (f":::{{option}} {key}={value}", prose(comment), ":::", "")


def prose(comment: str) -> str:
    """A comment as Markdown: settings become code, and other characters stand for themselves."""
    parts = re.split(r"((?<![\w.])[a-z][\w./]*=[^\s,;:)]*)", comment)
    return "".join(
        f"`{part}`" if place % 2 else re.sub(r"([\\`*_{}\[\]<>#|$~])", r"\\\1", part)
        for place, part in enumerate(parts)
    )


def index(title: str, introduction: str, pages: Mapping[str, str]) -> str:
    """A page that lists pages of its folder with a line on each."""
    rows = [f"| [{name}]({name}.md) | {line} |" for name, line in pages.items()]
    toctree = ["```{toctree}", ":hidden:", "", *pages, "```"]
    return "\n".join([f"# {title}", "", introduction, "", "| | |", "|---|---|", *rows, "", *toctree, ""])


def write(folder: Path, pages: Mapping[str, str]) -> None:
    """Make a folder hold exactly these pages; a page that has not changed is left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in {file.name for file in folder.iterdir()} - {f"{name}.md" for name in pages}:
        (folder / stale).unlink()
    for name, text in pages.items():
        file = folder / f"{name}.md"
        if not file.is_file() or file.read_text() != text:
            file.write_text(text)


def generate(app: Sphinx) -> None:
    """Write the pages of all commands and of all groups."""
    commands, choices = (Path(app.srcdir, name) for name in GENERATED)
    lines = {command: prose(summary(CONF / f"{command}.yaml")) for command in COMMANDS}
    introduction = (
        "Each command reads its keys and its groups from the command line: `diffuse COMMAND --help`."
    )
    pages = {command: command_page(command) for command in COMMANDS}
    write(commands, {"index": index("Commands", introduction, lines), **pages})
    lines = {group: option_links(group) for group in GROUPS}
    introduction = "`group=option` chooses one option of a group, and `group.key=value` sets a key of it."
    pages = {group: group_page(group) for group in GROUPS}
    write(choices, {"index": index("Options", introduction, lines), **pages})


def setup(app: Sphinx) -> ExtensionMetadata:
    app.connect("builder-inited", generate)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
