"""Access control before the body is read: listener, API key, rate and concurrency.

The checks, in this order:

    1. listener      with the setting `metrics_port`, `/metrics` is served on that port only, and that port serves
                     nothing but `/metrics`, `/ready` and `/health`
    2. API key       required on every path except `/health` and the files of the playground, which hold no data; paths
                     below `/admin` require a key with `admin`, and are not served at all without a keys file
    3. concurrency   at most `max_concurrent_requests` requests of `/v1` at once, since each may hold a body of the
                     largest size
    4. rate          the key's requests per minute

This is plain ASGI middleware outside of all routes, so no new route can be served unchecked. The metrics port requires
no key: the operator controls who reaches it by the address that it listens on.
"""

from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from server.config import Settings
from server.errors import ForbiddenError, NbestError, OverloadedError
from server.http import playground
from server.http.api_keys import ANONYMOUS, Account, Keys
from server.http.errors import not_served

HEALTH = "/health"
PATHS_WITHOUT_KEY = frozenset({HEALTH, *playground.FILES})
METRICS = "/metrics"
METRICS_PORT_PATHS = (METRICS, "/ready", HEALTH)
API_PREFIX = "/v1/"
ADMIN_PREFIX = "/admin/"
CONCURRENCY_RETRY_AFTER_S = 1.0

ACCOUNT = "nbest.account"
"""The key of the ASGI scope under which endpoints find the client's `Account`."""


class AccessMiddleware:
    """Passes a request on to the app, or answers it with the reply that `refuse` makes of the error."""

    def __init__(
        self, app: ASGIApp, *, settings: Settings, keys: Keys | None, refuse: Callable[[NbestError], ASGIApp]
    ) -> None:
        self._app = app
        self._settings = settings
        self._keys = keys
        self._refuse = refuse
        self._num_in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_api = scope["path"].startswith(API_PREFIX)
        self._num_in_flight += is_api
        try:
            scope[ACCOUNT] = self._check(scope, is_api=is_api)
        except NbestError as error:
            await self._refuse(error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)
        finally:
            self._num_in_flight -= is_api

    def _check(self, scope: Scope, *, is_api: bool) -> Account:
        """The account of the client.

        Raises:
            server.errors.NbestError: the request is refused.
        """
        path, metrics_port = scope["path"], self._settings.metrics_port
        if metrics_port is not None:
            _, port = scope.get("server") or (None, None)  # of the listening socket, not of the Host header
            on_metrics_port = port == metrics_port
            is_served = path in METRICS_PORT_PATHS if on_metrics_port else path != METRICS
            if not is_served:
                raise not_served(scope["method"], path)
            if on_metrics_port:
                return ANONYMOUS
        account = ANONYMOUS
        if self._keys is not None and path not in PATHS_WITHOUT_KEY:
            account = self._keys.account(scope["headers"])
        if path.startswith(ADMIN_PREFIX) and not account.entry.admin:
            if self._keys is None:
                raise not_served(scope["method"], path)
            raise ForbiddenError(
                f"The key {account.name} is not an admin key; use one made with `nbest keys new NAME --admin`."
            )
        if is_api:
            self._check_concurrency()
            account.count_request()
        return account

    def _check_concurrency(self) -> None:
        limit = self._settings.max_concurrent_requests
        if self._num_in_flight > limit:
            raise OverloadedError(
                f"{limit} requests are in flight, the most that this server accepts at once; try again after the "
                "seconds of Retry-After.",
                retry_after_s=CONCURRENCY_RETRY_AFTER_S,
                reason="connections",
            )
