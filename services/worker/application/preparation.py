"""Prepares what a Triton needs to serve a version: its environment, its artifact, its model repository."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from services.worker.adapters import llm_engines, model_repository, signatures
from services.worker.adapters.artifacts import ArtifactCache
from services.worker.adapters.environments import Environments
from services.worker.adapters.host_cache import HostCache
from services.worker.adapters.sandbox import Sandbox
from services.worker.adapters.triton_command import TritonOptions
from services.worker.adapters.triton_install import TritonInstall
from services.worker.adapters.triton_process import repository_in
from services.worker.application.model_loader import ModelLoader
from services.worker.domain import llm_plan
from services.worker.domain.formats import config_is_complete
from services.worker.domain.phases import Phases
from services.worker.settings import WorkerSettings
from tidegate.kernel import telemetry
from tidegate.kernel.precision.embedded import Embedded
from tidegate.kernel.precision.embedded import read as read_embedded
from tidegate.kernel.protocol.models import Assignment

log = telemetry.logger(__name__)


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """A written model repository, and the options of the Triton that will serve it.

    ``models`` are loaded in this order. Requests go to the last one.

    ``embedded``: the precision of a lower-precision model, and samples to measure its loss of precision. Both
    are read from the model's file. It is None for other models.
    """

    install: TritonInstall
    options: TritonOptions
    loader: ModelLoader
    models: list[str]
    repository: Path
    embedded: Embedded | None = None


class Preparation:
    """Prepares the version of one assignment, in the worker's ``folder``.

    ``on_step`` is called with a text for each step. ``phases`` records the duration of each.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        assignment: Assignment,
        folder: Path,
        sandbox: Sandbox,
        phases: Phases,
        on_step: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._version = assignment.version
        self._deployment = assignment.deployment
        self._replica = assignment.replica
        self._folder = folder
        self._sandbox = sandbox
        self._phases = phases
        self._on_step = on_step
        self._cache = HostCache(
            settings.state_path / "cache", settings.cache_max_bytes, settings.cache_min_free_bytes
        )

    async def install(self) -> TritonInstall:
        """Return this machine's Triton, with a Python environment for the version if it has requirements.

        On a host without this environment, the call is slow, because it downloads packages.
        """
        settings = self._settings
        requirements = llm_plan.requirements(self._version, self._deployment)
        install = TritonInstall.find(settings.runtime_path, settings.triton_server, settings.triton_backends)
        if llm_engines.needs_vllm(self._version, self._deployment):
            install = install.with_engine(llm_engines.vllm_python(settings.runtime_path))
        if not requirements:
            return install
        environments = Environments(self._cache, install, self._on_step, self._sandbox)
        with self._phases.measure("environment"):
            return await environments.provide(
                requirements, self._deployment.env, settings.environment_timeout_s
            )

    async def prepare(self, install: TritonInstall, registry_url: str, token: str) -> PreparedModel:
        """Fetch and check the artifact, and write the model repository.

        ``token`` lets the replica download the artifact from the registry. Raises ModelFailed if the settings
        name trusted signing keys, and none of them has signed the artifact.
        """
        self._on_step("fetching the artifact")
        with self._phases.measure("fetch"):
            artifact = await ArtifactCache(self._cache).fetch(
                registry_url, token, self._version.artifact_sha256, self._version.artifact_size
            )
        if self._settings.trusted_keys is not None:
            self._on_step("checking the signature")
            signer = await signatures.check(
                registry_url, token, artifact, self._version.artifact_sha256, self._settings.trusted_keys
            )
            log.info("the artifact is signed by a trusted key", extra={"key": signer})
        repository = repository_in(self._folder)
        write = partial(
            model_repository.prepare,
            self._version,
            self._deployment,
            artifact,
            repository,
            install,
            symlinks=not self._sandbox.mounts,
            answer_bytes=self._settings.max_fetched_bytes,
        )
        loader = ModelLoader(self._deployment, write)
        models = await loader.prepare()
        options = TritonOptions(
            replica=self._replica,
            threads=self._deployment.threads,
            env=self._deployment.env,
            auto_complete=not config_is_complete(self._version),
            start_timeout_s=self._deployment.start_timeout_s,
            response_cache_mb=model_repository.cache_mb(repository, models, self._deployment, install),
            log_bytes_per_s=self._settings.model_log_bytes_per_s,
            secrets=llm_engines.secrets(self._deployment, self._settings.credentials_path),
        )
        onnx = self._version.format == "onnx"
        embedded = await asyncio.to_thread(read_embedded, artifact) if onnx else None
        return PreparedModel(install, options, loader, models, repository, embedded)

    def close(self) -> None:
        """Let other workers delete this version's files from the host's cache to free disk space."""
        self._cache.close()
