"""Settings of the registry, in addition to the shared ones."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from tidegate.kernel.settings.base import Settings

GIB = 1024**3


class RegistrySettings(Settings):
    """The registry's settings. Each field is ``TIDEGATE_<FIELD>`` in the environment."""

    service: ClassVar[str] = "registry"

    max_artifact_bytes: int = Field(8 * GIB, ge=1, description="Largest artifact, in bytes.")
    max_unpacked_bytes: int = Field(
        32 * GIB, ge=1, description="Largest size of an unpacked archive, in bytes."
    )
    max_archive_members: int = Field(10_000, ge=1, description="Maximum number of entries of an archive.")
    max_archive_ratio: int = Field(
        100, ge=1, description="Highest ratio of an archive's unpacked size to its packed size."
    )
    default_max_batch: int = Field(
        64,
        ge=1,
        description="max_batch_size of an ONNX model whose first axis is dynamic in all inputs and outputs.",
    )
    verification: Literal["on", "off"] = Field(
        "on", description="`off`: new versions may serve without a scratch replica that verifies them first."
    )
    pending_artifact_s: float = Field(
        3600.0, gt=0, description="Seconds for which a finished upload is kept if no version uses it."
    )
    deleted_version_s: float = Field(
        7 * 86_400.0,
        ge=0,
        le=3650 * 86_400.0,
        description="Seconds for which a deleted version can be restored; 0: it is removed immediately.",
    )
    probe_every_s: float = Field(
        5.0,
        gt=0,
        description="Seconds between two checks of the database and the artifact store.",
    )
    max_uploads_per_caller: int = Field(
        32, ge=1, description="Maximum number of unfinished uploads of one caller."
    )
    max_upload_bytes_per_caller: int = Field(
        64 * GIB,
        ge=1,
        description="Maximum number of bytes that the unfinished uploads of one caller may have together.",
    )
    upload_idle_s: float = Field(
        86_400.0,
        gt=0,
        description="Seconds for which an unfinished upload is kept after its last bytes.",
    )
    presigned_downloads: bool = Field(
        True, description="With an artifact store on S3, replicas download from it directly, by signed URLs."
    )
