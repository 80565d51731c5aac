"""One endpoint's connections in an event loop: a stream of JSON lines, and requests beside it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from ucxx_transport.errors import StoreUnavailableError
from ucxx_transport.membership.etcd.access import Access, httpx_module
from ucxx_transport.membership.etcd.calls import answer_of
from ucxx_transport.membership.etcd.failures import unreachable
from ucxx_transport.membership.etcd.messages import Json, Reply, parsed

if TYPE_CHECKING:
    import httpx

__all__ = ["Link", "opened_link"]


class Link:
    """Requests to one endpoint. How long they take is bounded by `within` alone."""

    def __init__(self, transport: httpx.AsyncHTTPTransport, access: Access, endpoint: str, token: str) -> None:
        self.endpoint = endpoint
        self._transport = transport
        self._access = access
        self._token = token

    async def ask(self, path: str, body: Json) -> Reply:
        """The answer to one request.

        Raises:
            TransportError: see `failures`.
        """
        async with self._answering(path, body) as response:
            return answer_of(
                response.status_code, b"".join([piece async for piece in response.aiter_raw()]), self.endpoint
            )

    @asynccontextmanager
    async def lines(self, path: str, body: Json) -> AsyncIterator[AsyncIterator[Json]]:
        """The objects that the answer streams, one a line. They end where the stream ends or is cut.

        Raises:
            TransportError: it is refused: see `failures`.
        """
        async with self._answering(path, body) as response:
            if response.status_code != 200:
                text = b"".join([piece async for piece in response.aiter_raw()])
                answer_of(response.status_code, text, self.endpoint)
            yield self._objects(response)

    @asynccontextmanager
    async def within(self, timeout_s: float) -> AsyncIterator[None]:
        """Bound what is done in this block.

        Raises:
            StoreUnavailableError: it took longer.
        """
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError as error:
            raise StoreUnavailableError(
                "etcd does not answer in time", endpoint=self.endpoint, timeout_s=round(timeout_s, 3)
            ) from error

    async def _objects(self, response: httpx.Response) -> AsyncIterator[Json]:
        pieces: list[bytes] = []
        async for piece in response.aiter_raw():
            pieces.append(piece)
            if b"\n" not in piece:
                continue
            *whole, rest = b"".join(pieces).split(b"\n")
            pieces = [rest]
            for line in whole:
                if line:
                    yield parsed(line, self.endpoint)

    @asynccontextmanager
    async def _answering(self, path: str, body: Json) -> AsyncIterator[httpx.Response]:
        unbounded = dict.fromkeys(("connect", "read", "write", "pool"))
        request = self._access.request(self.endpoint, path, body, token=self._token, timeouts=unbounded)
        httpx = httpx_module()
        try:
            response = await self._transport.handle_async_request(request)
            try:
                yield response
            finally:
                await response.aclose()
        except (httpx.TransportError, httpx.StreamError) as error:
            raise unreachable(error, self.endpoint) from error


@asynccontextmanager
async def opened_link(access: Access, endpoint: str, token: str) -> AsyncIterator[Link]:
    """A link whose connections are closed at the end."""
    async with httpx_module().AsyncHTTPTransport(verify=access.tls, trust_env=False) as transport:
        yield Link(transport, access, endpoint, token)
