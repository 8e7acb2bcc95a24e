"""Decide which types in a skops file need the publisher's trust. Pure.

skops constructs only objects of the types that the file names. skops has a list of types that it trusts. The
publisher must trust all other types by name. This module also trusts all classes of scikit-learn. The list of
skops lacks some of these classes, because a crafted file can crash the process that loads them. In Tidegate,
such a crash ends only the model's process.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from tidegate.kernel.errors import BadRequest

# The nodes of a skops file that only construct objects. A class of scikit-learn is trusted only in such a
# node, because other nodes may call functions.
_OBJECTS = frozenset({"ObjectNode", "TreeNode", "LossNode", "TypeNode", "CachedNode"})
_BUILTINS = [
    "int",
    "float",
    "str",
    "bool",
    "list",
    "set",
    "dict",
    "tuple",
    "map",
    "slice",
    "bytes",
    "bytearray",
]
_DATA: dict[str, frozenset[str]] = {
    "builtins": frozenset(_BUILTINS),
    "collections": frozenset({"OrderedDict", "defaultdict"}),
}
_DATA_NODES = frozenset({
    "DictNode", "DefaultDictNode", "ListNode", "SetNode", "TupleNode", "JsonNode", "SliceNode", "BytesNode",
    "BytearrayNode", "TypeNode", "CachedNode", "NdArrayNode", "MaskedArrayNode", "RandomStateNode",
    "RandomGeneratorNode", "DTypeNode", "SparseMatrixNode", "PRNGNode",
})  # fmt: skip
_ARRAYS = ("numpy", "scipy.sparse")


@dataclass(frozen=True, slots=True)
class SkopsType:
    """A type in a skops file. ``loader``: the kind of skops node that constructs it."""

    module: str
    name: str
    loader: str

    @property
    def path(self) -> str:
        """Return the name that a publisher writes to trust the type."""
        return f"{self.module}.{self.name}"[:200]


def untrusted(types: Iterable[SkopsType]) -> list[str]:
    """Return the types that a publisher must trust by name, sorted."""
    return sorted({each.path for each in types if not _is_trusted(each)})


def check(names: Sequence[str], trusted: Collection[str]) -> None:
    """Raise BadRequest for types that are not trusted."""
    refused = [name for name in names if name not in trusted]
    if refused:
        flags = " ".join(f"--trust {name}" for name in refused[:8])
        raise BadRequest(
            f"The skops file has types that are neither plain data nor from scikit-learn: "
            f"{', '.join(refused[:8])[:400]}. Loading the file can run the code of their packages. If you "
            f"trust the file: {flags[:400]} (in the API: trust)."
        )


def _is_trusted(each: SkopsType) -> bool:
    if each.module in _DATA:
        return each.name in _DATA[each.module] and each.loader in _DATA_NODES
    if each.loader == "FunctionNode":
        return _is_ufunc_module(each.module) and each.name.isidentifier()
    if each.loader in _DATA_NODES and _is_below(each.module, _ARRAYS):
        return True
    return each.loader in _OBJECTS and is_sklearn_class(each.path)


def is_sklearn_class(path: str) -> bool:
    """Return True for a class of scikit-learn, but not for a function or a method."""
    return path.startswith("sklearn.") and path.rpartition(".")[2].lstrip("_")[:1].isupper()


def _is_below(module: str, packages: Sequence[str]) -> bool:
    return any(module == each or module.startswith(f"{each}.") for each in packages)


def _is_ufunc_module(module: str) -> bool:
    return module in ("numpy", "scipy.special") or module.endswith(("_multiarray_umath", "_ufuncs"))
