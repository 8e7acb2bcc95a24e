"""Build and connect the parts that control access: keys, limits, usage, the control plane's proxy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from fastapi import APIRouter, FastAPI

from services.gateway.adapters.cost_facts import CostFactsReader
from services.gateway.adapters.key_cache import KeyCache
from services.gateway.adapters.limit_leases import LimitLeases
from services.gateway.adapters.store.job_usage import JobUsageStore
from services.gateway.adapters.store.limit_accounts import LimitAccounts
from services.gateway.adapters.store.token_accounts import TokenAccounts
from services.gateway.adapters.usage_reporter import UsageReporter
from services.gateway.api import proxy
from services.gateway.api.proxy import ControlPlaneProxy
from services.gateway.application.access import Access
from services.gateway.application.jwt_callers import JwtCallers
from services.gateway.application.llm.accounting import LlmAccounting
from services.gateway.application.llm.token_limits import TokenLimits
from services.gateway.domain.key_table import KeyTable
from services.gateway.domain.request_costs import RequestCosts
from services.gateway.settings import GatewaySettings
from tidegate.kernel.http.heads import LOOPBACK
from tidegate.kernel.store import Store

if TYPE_CHECKING:
    from services.gateway.adapters.jwks import Jwks


class AccessWiring:
    """The keys, limits, usage counts and control-plane proxy of a gateway.

    The gateway calls :meth:`start` before its first request, and :meth:`stop` after its last one.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        incarnation: str,
        processes: Callable[[], int],
        costs: RequestCosts,
    ) -> None:
        """``processes`` is a function. It returns the number of gateway processes that share the limits."""
        self._store = LimitAccounts.connect(settings.redis_url)
        self._live = Store.connect(settings.redis_url)
        self._cost_facts = CostFactsReader(self._live, costs)
        self._keys = KeyCache(
            settings.registry_url,
            settings.service_token,
            settings.state_path / "data" / "gateway-keys.json",
            self._on_keys,
            amqp_url=settings.amqp_url,
            incarnation=incarnation,
        )
        self._leases = LimitLeases(self._store, incarnation, processes, self._keys.prior_usage)
        self._token_accounts = TokenAccounts.connect(settings.redis_url)
        self.token_limits = TokenLimits(self._token_accounts, processes)
        self._job_usage = JobUsageStore.connect(settings.jobs_url)
        self._usage = UsageReporter(
            settings.amqp_url, incarnation, settings.usage_interval_s, self._job_usage
        )
        self._jwt_callers = JwtCallers(
            settings.jwt_limits, self._leases.set, self.token_limits.set, busy=self._leases.busy
        )
        self._jwks = _jwks(settings, self._jwt_callers)
        self.access = Access(
            # If the gateway listens on an address that other machines can reach, every caller needs a
            # credential, whatever the settings say.
            required=settings.auth == "required" or settings.host not in LOOPBACK,
            service_token=settings.service_token,
            count=self._usage.counts,
            limiters=self._leases.limiters,
            verify=self._jwks.verify if self._jwks is not None else None,
            costs=costs,
            limit_unknown=self._jwt_callers.unknown if settings.jwt_limits else None,
        )
        urls = {name: getattr(settings, f"{name}_url") for name in ("registry", "router", "autoscaler")}
        self.llm_accounting = LlmAccounting(
            self.access, self.token_limits, costs if settings.cost_header else None
        )
        self._proxy = ControlPlaneProxy(urls, settings.service_token)
        self.router = APIRouter(tags=["Control plane"])
        for method in proxy.METHODS:
            self.router.add_api_route(
                f"{proxy.PREFIX}/{{service}}/{{rest:path}}",
                self._proxy.__call__,
                methods=[method],
                name="pass_on",
                response_model=None,
            )

    def watch_callers(self, seen: Callable[[Iterable[tuple[str, str]]], None]) -> None:
        """Set the function that is called at each usage report.

        ``seen`` gets pairs (caller, endpoint): each caller in the report, with each endpoint that it called.
        """
        self._usage.on_callers = seen

    async def start(self, app: FastAPI) -> None:
        """Read the API keys and the JWT issuer's keys, then keep them up to date in the background."""
        app.state.health.add("keys", self.access.problem)
        if self._jwks is not None:
            await self._jwks.start()
        await self._keys.start()
        self._leases.start()
        self._cost_facts.start()
        self.token_limits.start()
        self._usage.start()

    async def stop(self) -> None:
        """Report the usage, return unused rate-limit tokens, and close the connections."""
        await self._usage.stop()
        await self._job_usage.close()
        await self._leases.stop()
        await self.token_limits.stop()
        await self._cost_facts.stop()
        await self._live.close()
        await self._store.close()
        await self._token_accounts.close()
        await self._keys.stop()
        await self._proxy.close()
        if self._jwks is not None:
            await self._jwks.stop()

    def _on_keys(self, table: KeyTable) -> None:
        limited = {id_: key.allowance for id_, key in table.keys.items() if not key.allowance.unlimited}
        self._leases.replace(limited)
        self.token_limits.replace(table.keys)
        self.access.replace(table)


def _jwks(settings: GatewaySettings, callers: JwtCallers) -> Jwks | None:
    if not settings.jwks_url:
        return None
    # Imported here because the library takes a tenth of the start time, and few gateways accept JWTs.
    from services.gateway.adapters.jwks import Jwks

    return Jwks(
        settings.jwks_url,
        issuer=settings.jwt_issuer,
        audience=settings.jwt_audience,
        roles_claim=settings.jwt_roles_claim,
        scopes_of=settings.jwt_role_scopes,
        limits=settings.jwt_limits,
        on_verified=callers.verified,
    )
