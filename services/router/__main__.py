"""``python -m services.router``."""

import gc


def main() -> None:
    """Serve until told to stop."""
    gc.disable()  # tidegate.service enables it again once all is loaded
    from services.router.app import build
    from services.router.settings import RouterSettings
    from tidegate import service, telemetry

    settings = RouterSettings()
    telemetry.configure("router", settings.log_level)
    service.run(build(settings), settings, settings.router_port)


if __name__ == "__main__":
    main()
