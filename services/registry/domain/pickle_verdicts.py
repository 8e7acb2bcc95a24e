"""Decide which imports of a pickle are dangerous. Pure."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterable, Sequence

from services.registry.domain.pickle_machine import UNKNOWN, Import
from tidegate.kernel.errors import BadRequest

# Names of the standard library that estimators use and that cannot run code from the file. All other names of
# the standard library are dangerous in a pickle.
_SAFE: dict[str, frozenset[str]] = {
    "builtins": frozenset(
        [
            "object",
            "list",
            "dict",
            "set",
            "frozenset",
            "tuple",
            "bytearray",
            "bytes",
            "complex",
            "slice",
            "range",
            "int",
            "float",
            "str",
            "bool",
            "type",
            "Ellipsis",
            "NotImplemented",
            "ValueError",
            "TypeError",
            "map",
            "zip",
            "enumerate",
            "reversed",
            "len",
            "min",
            "max",
            "sum",
            "abs",
            "sorted",
            "round",
        ]
    ),
    "__builtin__": frozenset(
        [
            "object",
            "list",
            "dict",
            "set",
            "frozenset",
            "tuple",
            "bytearray",
            "complex",
            "slice",
            "xrange",
            "int",
            "float",
            "str",
            "unicode",
            "bool",
            "long",
            "type",
        ]
    ),
    # Single classes are listed here, not whole modules. A module also has dangerous names: `enum.bltns`, for
    # example, is the module `builtins`.
    "collections": frozenset(
        {"OrderedDict", "defaultdict", "deque", "Counter", "ChainMap", "UserDict", "UserList", "UserString"}
    ),
    "copy_reg": frozenset({"_reconstructor"}),
    "copyreg": frozenset({"_reconstructor", "__newobj__", "__newobj_ex__"}),
    "datetime": frozenset({"datetime", "date", "time", "timedelta", "timezone", "tzinfo"}),
    "decimal": frozenset({"Decimal", "Context", "DecimalTuple"}),
    "fractions": frozenset({"Fraction"}),
    "enum": frozenset({"Enum", "IntEnum", "StrEnum", "Flag", "IntFlag", "EnumMeta", "EnumType", "auto"}),
    "zoneinfo": frozenset({"ZoneInfo", "ZoneInfo._unpickle"}),
    "array": frozenset({"array", "_array_reconstructor"}),
    "math": frozenset(name for name in dir(math) if not name.startswith("_")),
    "_codecs": frozenset({"encode"}),
    "types": frozenset({"SimpleNamespace", "NoneType"}),
    "random": frozenset({"Random"}),
    "functools": frozenset({"partial"}),
    "re": frozenset({"_compile"}),
    "pathlib": frozenset({"PosixPath", "PurePosixPath", "Path", "PurePath"}),
    "abc": frozenset({"ABCMeta"}),
    "uuid": frozenset({"UUID", "SafeUUID"}),
}
# Dangerous functions of well-known packages: they load another pickle, read or write files, or evaluate text.
_DANGEROUS: dict[str, frozenset[str]] = {
    "numpy": frozenset(
        {
            "load",
            "loadtxt",
            "genfromtxt",
            "fromfile",
            "fromregex",
            "memmap",
            "save",
            "savez",
            "savez_compressed",
            "savetxt",
            "lib",
            "distutils",
            "f2py",
            "testing",
            "ctypeslib",
        }
    ),
    "joblib": frozenset({"load", "dump", "Memory", "Parallel", "delayed", "wrap_non_picklable_objects"}),
    "pandas": frozenset(
        {"eval", "read_pickle", "read_csv", "read_json", "read_html", "read_sql", "read_table"}
    ),
}
_DANGEROUS_MODULES = (
    "numpy.f2py", "numpy.testing", "numpy.distutils", "numpy.ctypeslib", "numpy.lib", "joblib.externals",
    "pandas.io", "pandas.core.computation", "scipy.io", "sklearn.datasets", "sklearn.externals", "pip",
    "setuptools", "pkg_resources", "cloudpickle", "dill", "torch.hub", "torch.serialization", "IPython",
)  # fmt: skip
# An import of one of these names from another module returns the module itself: `joblib.disk.os` is `os`.
_MODULES = frozenset({
    "os", "sys", "subprocess", "shutil", "builtins", "importlib", "pickle", "marshal", "ctypes", "socket",
    "runpy", "pty", "code", "tempfile", "inspect",
})  # fmt: skip
_FAMILIAR = frozenset({
    "sklearn", "numpy", "scipy", "joblib", "pandas", "xgboost", "lightgbm", "catboost", "imblearn",
})  # fmt: skip


def dangerous(found: Iterable[Import], flagged: Collection[Import]) -> list[str]:
    """Return the imports that can run code or access files, as ``module.name``, sorted.

    ``flagged``: the imports that picklescan reports as dangerous.
    """
    return sorted({_text(name) for name in found if _is_dangerous(name, name in flagged)})


def notes(found: Iterable[Import]) -> list[str]:
    """Return a warning if a pickle needs packages that the models' environment may lack."""
    tops = {module.partition(".")[0] for module, _ in found}
    others = sorted(tops - _FAMILIAR - set(sys.stdlib_module_names) - {"__builtin__", "copy_reg", UNKNOWN})
    if not others:
        return []
    return [
        f"The pickle needs the packages {', '.join(others)[:300]}, and loading it runs their code. If the "
        "models' environment does not have them, name them in --requirements FILE."
    ]


def check(names: Sequence[str], trusted: Collection[str]) -> None:
    """Raise BadRequest for dangerous imports, unless the publisher trusts each of them."""
    refused = [name for name in names if name not in trusted]
    if not refused:
        return
    shown = ", ".join(refused[:8]) + (f" and {len(refused) - 8} more" if len(refused) > 8 else "")
    flags = " ".join(f"--trust {name}" for name in refused[:8])
    raise BadRequest(
        f"The pickle imports {shown[:400]}, which can run programs or change files when a worker loads the "
        "pickle. An estimator needs no such imports. Get the file from its author, or export the model to "
        f"ONNX or skops. If you trust the file nevertheless: {flags[:400]} (in the API: trust)."
    )


def _is_dangerous(name: Import, flagged: bool) -> bool:
    module, attribute = name
    top = module.partition(".")[0]
    if UNKNOWN in name or not module or not attribute:
        return True
    if module in _SAFE:
        return attribute not in _SAFE[module]
    if top in sys.stdlib_module_names or top in ("__builtin__", "commands", "httplib"):
        return True
    below = any(module == each or module.startswith(f"{each}.") for each in _DANGEROUS_MODULES)
    whose = top if top in ("numpy", "pandas") else module
    listed = attribute.partition(".")[0] in _DANGEROUS.get(whose, frozenset())
    return flagged or below or listed or _reaches_out(module, attribute)


def _reaches_out(module: str, attribute: str) -> bool:
    """Return True if an import leads from its module into another module.

    For example, `joblib.disk` imports os. So the name `joblib.disk.os.system` leads to `os.system`, which
    runs programs. A dotted attribute is safe only if all its parts look like classes.
    """
    if module.startswith("joblib.numpy_pickle"):
        return attribute != "NumpyArrayWrapper"
    parts = attribute.split(".")
    if len(parts) > 1:
        return not all(part.removeprefix("_")[:1].isupper() for part in parts)
    return attribute in _MODULES


def _text(name: Import) -> str:
    return f"{name[0]}.{name[1]}"[:200]
