"""Conditions of the inputs and the results of an edit that changes attributes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from diffusion_cli.commands.class_labels import warn_of_untrained
from diffusion_cli.commands.condition_values import about, outside_of_training, rows_of_label
from diffusion_cli.commands.inputs import Input, is_archive, show_remarks
from diffusion_cli.commands.trained import LoadedModel, refuse_untrained_null
from diffusion_cli.conditions import AttributeDescription, Condition, Conditions
from diffusion_cli.conditions.condition import IMAGE, is_missing
from diffusion_cli.conditions.rows import Row, encoded_rows, row_name
from diffusion_cli.data import file_names
from diffusion_cli.data.attributes import MISSING
from diffusion_cli.data.label_tables import TABLES, read_labels
from diffusion_cli.data.labels import composed, find_table
from diffusion_cli.editing import Attribute, Edit, Reconstruct
from diffusion_cli.editing.transform import AttributeValue
from diffusion_cli.errors import NO_VALUE, UsageError
from diffusion_cli.runs.load import LoadedDenoiser
from diffusion_cli.system.tensors import digest


def check_attributes(edit: Edit, trained: LoadedModel) -> None:
    """Raise UsageError if an edit of attributes names unknown values, or has no target."""
    if not isinstance(edit, Attribute):
        return
    if edit.to is None and trained.condition is None:
        raise UsageError(
            "label", None, "edit=attribute needs a target class", "name one, or attributes with edit.to"
        )
    attributes = described(trained.model)
    for key, value in (("edit.source", edit.source), ("edit.to", edit.to)):
        if isinstance(value, Mapping) or (value is not None and edit.to is not None):
            _row(key, value, attributes, warn=True)
    if edit.to is None and not isinstance(edit.source, Mapping):
        number = trained.number(edit.source, "edit.source")
        known = trained.model.info.trained_classes
        warn_of_untrained("edit.source", [] if number is None else [number], known, trained.model)


def conditioned(
    edit: Edit, trained: LoadedModel, inputs: Sequence[Input], source: str | list[str] | None
) -> tuple[Edit, LoadedModel]:
    """Return an edit of attributes with the conditions of its inputs, and the model with those of the results.

    A reconstruction has the conditions of its inputs, unless the command names some or the model has classes alone. So
    has a translation of images of the dataset.

    Args:
        edit: the edit; other edits are unchanged.
        trained: the model, with the conditions of the command.
        inputs: the inputs.
        source: `input=` of the command; a folder or ZIP may have a table of their attributes.
    """
    attributes = described(trained.model)
    if isinstance(edit, Reconstruct) and has_own_conditions(edit, trained):
        given = _own(inputs, source, attributes)
        _check_guidance(trained, given)
        return edit, _reconstructed(trained, given)
    if edit.takes_condition_image:
        known = [item.condition for item in inputs if item.condition is not None]
        given = Condition.cat(known) if known else Condition()
        if source in ("val", "train") and not trained.chosen:
            _check_guidance(trained, given, IMAGE)
        return edit, _with_conditions(trained, given) if known else trained
    if not isinstance(edit, Attribute):
        return edit, trained
    if edit.to is None:
        return edit.of_inputs(_given(edit, trained, attributes)), trained
    given = _own(inputs, source, attributes)
    if edit.source is not None:
        given = _changed(given, _row("edit.source", edit.source, attributes))
    results = _changed(given, _row("edit.to", edit.to, attributes))
    _check_guidance(trained, results)
    return edit.of_inputs(given), replace(trained, condition=results)


def has_own_conditions(edit: Edit, trained: LoadedModel) -> bool:
    """Return whether an edit is by the conditions of its inputs, as far as they are known."""
    if isinstance(edit, Reconstruct) or edit.takes_condition_image:
        return trained.model.info.conditions is not None and not trained.chosen
    return isinstance(edit, Attribute) and edit.to is not None


def wanted_name(to: dict[str, AttributeValue], model: LoadedDenoiser) -> str:
    """Return the name of the attributes that an edit changes, such as "age 40, no glasses"."""
    attributes = described(model)
    (row,) = rows_of_label({**to}, attributes)
    return row_name(row, attributes)


def described(model: LoadedDenoiser) -> tuple[AttributeDescription, ...]:
    """Return the attributes of a model, or its classes as one; nothing for an unconditional model."""
    info = model.info
    if info.conditions is not None:
        return info.conditions.attributes
    if model.num_classes is None or info.class_names is None:
        return ()
    return Conditions.of_classes(info.class_names).attributes


def condition_names(model: LoadedDenoiser) -> tuple[str, ...]:
    """Return the names of the conditions of a model, with that of its classes."""
    conditions = model.info.conditions
    return conditions.names if conditions is not None else tuple(each.name for each in described(model))


def _reconstructed(trained: LoadedModel, given: Condition) -> LoadedModel:
    """Return the model with the conditions of the inputs; unconditional if none is known."""
    if all(is_missing(value).all() for value in given.values.values()):
        refuse_untrained_null(trained.model, "label")
        return trained
    return _with_conditions(trained, given)


def _with_conditions(trained: LoadedModel, given: Condition) -> LoadedModel:
    """Return the model with the conditions of the inputs, which its record names by their digest."""
    record = {**trained.record, "conditions": {"sha256": digest(given.values)}}
    return replace(trained, condition=given, record=record)


def _check_guidance(trained: LoadedModel, given: Condition, *brought: str) -> None:
    """Raise UsageError if guidance has no value to act on, of the conditions of the inputs or of those brought."""
    names = [name for name, value in given.values.items() if not is_missing(value).all()]
    trained.guidance.check(trained.model.denoiser, trained.model.info.dropouts, [*names, *brought])


def _given(
    edit: Attribute, trained: LoadedModel, attributes: Sequence[AttributeDescription]
) -> Condition | None:
    """Return the condition of all inputs by `edit.source` alone."""
    if isinstance(edit.source, Mapping):
        return Condition(_row("edit.source", edit.source, attributes))
    number = trained.number(edit.source, "edit.source")
    return None if number is None else Condition.of(torch.tensor([number]))


def _row(
    key: str, value: Any, attributes: Sequence[AttributeDescription], *, warn: bool = False
) -> dict[str, Tensor]:
    """Return the values that a key names, [1] by name; UsageError about this key for unknown ones."""
    if not attributes:
        raise UsageError(key, NO_VALUE, "the model has neither attributes nor classes", "leave it out")
    try:
        rows = rows_of_label(value, attributes)
    except UsageError as error:
        raise about(key, error) from error
    if len(rows) != 1:
        raise UsageError(key, NO_VALUE, "must have one value for each attribute", "name one")
    if warn:
        lines = outside_of_training(rows, attributes)
        show_remarks(key + line.removeprefix("label") for line in lines)
    encoded = encoded_rows(rows, Conditions(attributes=tuple(attributes)))
    return {name: encoded.values[name] for name in (value if isinstance(value, Mapping) else rows[0])}


def _changed(rows: Condition, values: Mapping[str, Tensor]) -> Condition:
    """Return rows with one value in place of those of each name."""
    return rows.replaced({name: value.expand(len(rows)).clone() for name, value in values.items()})


def _own(
    inputs: Sequence[Input], source: str | list[str] | None, attributes: Sequence[AttributeDescription]
) -> Condition:
    """Return the conditions of the inputs that are known: of their split, or attributes in the table of their folder.

    Attributes that are not known are missing.
    """
    conditions = Conditions(attributes=tuple(attributes))
    nothing = encoded_rows([{}] * len(inputs), conditions)
    known = [item.condition for item in inputs if item.condition is not None]
    if len(known) == len(inputs):
        return nothing.replaced({name: value.cpu() for name, value in Condition.cat(known).values.items()})
    rows = _table_rows(inputs, source, attributes)
    return nothing if rows is None else encoded_rows(rows, conditions)


def _table_rows(
    inputs: Sequence[Input], source: str | list[str] | None, attributes: Sequence[AttributeDescription]
) -> list[Row] | None:
    """Return the attributes of files in the table of their folder or archive; None without a table.

    Files without a row, and columns that are no attributes, are left out.
    """
    path = Path(source).expanduser() if isinstance(source, str) else None
    if path is None or not attributes or not (path.is_dir() or is_archive(path)):
        return None
    files = [item.file or "" for item in inputs]
    names = file_names(path, "input")
    table = find_table(names, files, TABLES)
    if table is None:
        return None
    folder = table.removesuffix(PurePosixPath(table).name)
    try:
        found = read_labels(path, table, None, [attribute.name for attribute in attributes])
        places = {composed(folder + file): row for row, file in enumerate(found.files())}
    except ValueError as error:
        raise UsageError("input", path, f"{table} {error}") from error
    columns = {each.name: found.columns[each.name] for each in attributes if each.name in found.columns}
    known = [attribute for attribute in attributes if attribute.name in columns]
    rows = [places.get(composed(file)) for file in files]
    return [
        {} if row is None else _cells({name: cells[row] for name, cells in columns.items()}, known, file)
        for row, file in zip(rows, files, strict=True)
    ]


def _cells(cells: Mapping[str, Any], attributes: Sequence[AttributeDescription], file: str) -> Row:
    """Return the attributes in the cells of a file; UsageError that names the file for wrong ones."""
    given = {name: None if str(cell).lower() in MISSING else cell for name, cell in cells.items()}
    if not given:
        return {}
    try:
        (row,) = rows_of_label(given, attributes)
    except UsageError as error:
        raise UsageError(
            "input", file, f"its table has {_shown(error)}", "correct the table, or set edit.source"
        ) from error
    return row


def _shown(error: UsageError) -> str:
    problem = error.problems[0]
    return problem._replace(key=str(problem.key).removeprefix("label.")).cause
