"""``python -m services.gateway``."""

from services.gateway.app import build
from services.gateway.settings import GatewaySettings
from tidegate import service, telemetry


def main() -> None:
    """Serve until told to stop."""
    settings = GatewaySettings()
    telemetry.configure("gateway", settings.log_level)
    service.run(build(settings), settings, settings.gateway_port)


if __name__ == "__main__":
    main()
