"""``python -m services.router``."""

from services.router.app import build
from services.router.settings import RouterSettings
from tidegate import service, telemetry


def main() -> None:
    """Serve until told to stop."""
    settings = RouterSettings()
    telemetry.configure("router", settings.log_level)
    service.run(build(settings), settings, settings.router_port)


if __name__ == "__main__":
    main()
