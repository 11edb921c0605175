"""What is decided about a request before its body is read: may it come in here, by this door, now.

    1. the door: with a port for metrics of its own, that one serves them and the probes, and the main one no metrics
    2. the key, on every path but /health and the files of the playground, which hold no data; below /admin one with
       `admin`, and without keys nobody may go there
    3. the room: so many requests of /v1 at once, each of which may hold a body of the largest size
    4. the key's requests a minute

Plain ASGI outside of every route, so that nothing is served by forgetting to ask. The port of metrics asks for no key:
whoever listens there chose the address for it.
"""

from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from server.config import Settings
from server.errors import ForbiddenError, NbestError, OverloadedError
from server.http import playground
from server.http.api_keys import ANYONE, Account, Keys
from server.http.errors import not_served

HEALTH = "/health"
ALWAYS_OPEN = frozenset({HEALTH, *playground.FILES})
METRICS = "/metrics"
ON_THE_METRICS_PORT = (METRICS, "/ready", HEALTH)
WORK = "/v1/"
ADMIN = "/admin/"
CROWDED_RETRY_AFTER_S = 1.0

ACCOUNT = "nbest.account"
"""The key of the scope under which later stages find who asks."""


class AccessMiddleware:
    """Middleware that lets requests in or answers them by `refuse`."""

    def __init__(
        self, app: ASGIApp, *, settings: Settings, keys: Keys | None, refuse: Callable[[NbestError], ASGIApp]
    ) -> None:
        self._app = app
        self._settings = settings
        self._keys = keys
        self._refuse = refuse
        self._num_working = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_work = scope["path"].startswith(WORK)
        self._num_working += is_work
        try:
            scope[ACCOUNT] = self._admit(scope, is_work=is_work)
        except NbestError as error:
            await self._refuse(error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)
        finally:
            self._num_working -= is_work

    def _admit(self, scope: Scope, *, is_work: bool) -> Account:
        path, metrics_port = scope["path"], self._settings.metrics_port
        if metrics_port is not None:
            _, port = scope.get("server") or (None, None)  # where the connection came in, not what the client says
            by_the_metrics_port = port == metrics_port
            is_served = path in ON_THE_METRICS_PORT if by_the_metrics_port else path != METRICS
            if not is_served:
                raise not_served(scope["method"], path)
            if by_the_metrics_port:
                return ANYONE
        account = ANYONE
        if self._keys is not None and path not in ALWAYS_OPEN:
            account = self._keys.account(scope["headers"])
        if path.startswith(ADMIN) and not account.entry.admin:
            if self._keys is None:
                raise not_served(scope["method"], path)
            raise ForbiddenError(
                f"The key {account.name} is no admin's; use one made with `nbest keys new NAME --admin`."
            )
        if is_work:
            self._check_room()
            account.count_request()
        return account

    def _check_room(self) -> None:
        most = self._settings.max_concurrent_requests
        if self._num_working > most:
            raise OverloadedError(
                f"{most} requests are under way, and no more are taken; try again after the seconds of Retry-After.",
                retry_after_s=CROWDED_RETRY_AFTER_S,
                reason="connections",
            )
