"""The class that every section of the config tree derives from."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A typed part of a run's configuration.

    Unknown keys and wrong types are errors; values cannot be changed after loading, so that the tree that is saved
    with a run is the tree that the run used. A field's docstring is its documentation.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
