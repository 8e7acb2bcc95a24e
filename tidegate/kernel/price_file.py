"""Read the price file (YAML or JSON) that the setting ``TIDEGATE_PRICES`` names."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from tidegate.kernel import telemetry
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.prices import PriceList

log = telemetry.logger(__name__)


def read_prices(path: Path | None) -> PriceList:
    """Return the prices in a file; without a ``path``, the defaults. Raise BadRequest for a bad file."""
    if path is None:
        return PriceList()
    import yaml

    try:
        document = yaml.safe_load(path.read_text())
    except OSError as error:
        raise BadRequest(f"The price file {path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadRequest(f"The price file {path} is not YAML: {error}") from None
    try:
        return PriceList.model_validate(document if document is not None else {})
    except ValidationError as error:
        found = error.errors()[0]
        place = ".".join(map(str, found["loc"])) or "the file"
        raise BadRequest(
            f"The price file {path} is wrong at {place}: {found['msg']}. docs/costs.md shows an example."
        ) from None


class PriceFile:
    """The prices of a file, which is read again after a change. ``problem``: why the file cannot be used."""

    def __init__(self, path: Path | None) -> None:
        """Read the file. If it cannot be used, use the default prices, because replicas must run anyway."""
        self._path = path
        self._version = self._version_now()
        self.problem: str | None = None
        try:
            self._prices = read_prices(path)
        except BadRequest as error:
            self._prices = PriceList()
            self._fail(f"{error.message} The default prices are used.")

    @property
    def path(self) -> Path | None:
        """Return the path of the file; None: no file is set, and the default prices are used."""
        return self._path

    def current(self) -> PriceList:
        """Return the prices. If a changed file cannot be used, return the prices from before the change."""
        version = self._version_now()
        if version != self._version:
            self._version = version
            try:
                self._prices, self.problem = read_prices(self._path), None
            except BadRequest as error:
                self._fail(f"{error.message} The prices from before the change are still used.")
        return self._prices

    def _fail(self, problem: str) -> None:
        self.problem = problem
        log.error("the price file cannot be used", extra={"problem": problem})

    def _version_now(self) -> tuple[int, int] | None:
        if self._path is None:
            return None
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size
