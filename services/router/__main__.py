"""``python -m services.router``: run the router."""

from tidegate.kernel import quick_start


def main() -> None:
    """Serve until a signal ends the process."""
    quick_start.begin()
    from services.router.app import build
    from services.router.settings import RouterSettings
    from tidegate.kernel import telemetry
    from tidegate.kernel.blobs import object_store
    from tidegate.kernel.service import app as service

    settings = RouterSettings()
    object_store.require("router", blob_url=settings.blob_url)
    telemetry.configure("router", settings.log_level)
    service.run(build(settings), settings, settings.router_port)


if __name__ == "__main__":
    main()
