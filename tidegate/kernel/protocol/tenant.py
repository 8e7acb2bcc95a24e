"""The tenant of a request frame: the caller, the endpoint that it called, and the flow's weight.

A Deployment is shared by its flows. A flow is one caller at one endpoint. The weight of a flow is the weight
of the caller's key times the weight of the endpoint. The byte 1f separates the parts of a tenant:

    tenant  caller | 1f | endpoint | 1f | weight

Frames of earlier versions have only the caller.
"""

from __future__ import annotations

_PART = b"\x1f"
_MOST_BYTES = 255


def tenant_of(caller: str, endpoint: str = "", weight: int = 1) -> bytes:
    """Return the tenant of a frame. If a caller's id is too long, keep only its beginning."""
    rest = _PART + endpoint.encode() + _PART + b"%d" % weight
    return caller.encode()[: _MOST_BYTES - len(rest)] + rest


def caller_of(tenant: bytes) -> str:
    """Return the caller's id in a tenant; empty if the tenant has none."""
    return tenant.partition(_PART)[0].decode("utf-8", "replace")


def endpoint_of(tenant: bytes) -> str:
    """Return the endpoint in a tenant; empty if the tenant has none."""
    return tenant.partition(_PART)[2].partition(_PART)[0].decode("utf-8", "replace")


def weight_of(tenant: bytes) -> int:
    """Return the weight in a tenant; 1 if the weight is missing or cannot be read."""
    digits = tenant.rpartition(_PART)[2]
    return max(1, int(digits)) if _PART in tenant and digits.isdigit() and len(digits) < 9 else 1
