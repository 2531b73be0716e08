"""The class that every section of the config tree derives from."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A typed part of a run's configuration.

    Unknown keys and wrong types are errors; values cannot be changed after loading, so that the tree that is saved
    with a run is the tree that the run used. A field's docstring is its documentation.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def fill_from_defaults(config: type[Section], fields: Any, *names: str) -> Any:
    """`fields` of a `config`, with the keys that the sections `names` were not given taken from the config's own
    defaults, not the section's: whoever sets a climb's learning rate alone keeps the climb's other values."""
    if not isinstance(fields, dict):
        return fields
    given = {name: fields[name] for name in names if isinstance(fields.get(name), dict)}
    return fields | {name: config.model_fields[name].default.model_dump() | tree for name, tree in given.items()}
