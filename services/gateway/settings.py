"""Settings of the gateway; read by ``app.py`` only."""

from __future__ import annotations

from pydantic import Field

from tidegate.settings import Settings


class GatewaySettings(Settings):
    """What only the gateway needs."""

    gateway_workers: int = Field(1, ge=1, le=64, description="Gateway processes behind the one port.")
    envelope_max_frames: int = Field(256, ge=1, le=4096, description="Most requests in one envelope.")
    max_body_bytes: int = Field(256 * 2**20, description="Largest request body the gateway takes, in bytes.")
    max_json_bytes: int = Field(
        64 * 2**20, description="Largest JSON part of a body, in bytes; larger tensors go as binary data."
    )
    max_inflight_bytes: int = Field(
        512 * 2**20,
        description="Bodies that a gateway process holds at once, in bytes; and as much again for answers.",
    )
    report_interval_s: float = Field(0.5, description="How often a gateway reports its load, in seconds.")
