"""The base classes of Tidegate's objects, and the types that several objects use."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints

from tidegate.kernel.protocol import names

NAME_PATTERN = names.PATTERN
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
# The largest number that users may set. Larger numbers do not fit the 32-bit integers of databases and other
# programs.
LARGEST = 2**31 - 1


class Noun(BaseModel):
    """The base class of all objects. Unknown fields are errors, so that a misspelt option is not ignored."""

    model_config = ConfigDict(extra="forbid")


class Written(Noun):
    """The base class of objects that users write. Numbers must be finite, because JSON has no others."""

    model_config = ConfigDict(allow_inf_nan=False)
