"""The kinds of objects in the registry whose changes a receiver may get."""

from __future__ import annotations

from typing import Literal, get_args

# Changes of keys and of artifacts are not sent.
ChangeKind = Literal["version", "alias", "policy", "deployment", "endpoint"]
CHANGE_KINDS: tuple[str, ...] = get_args(ChangeKind)
