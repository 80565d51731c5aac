"""A client's connections: opened, pooled, aged out, closed; and the acknowledgements sent over them again.

One of these belongs to one event loop, like the link it opens on first need.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import TYPE_CHECKING

from ucxx_transport.client.channel import Channel
from ucxx_transport.client.exchange import ReadExchange
from ucxx_transport.client.ports import EndpointPool, PortKey
from ucxx_transport.errors import ConfigError, PeerLostError, ProtocolError, StaleSlotError, TransportError
from ucxx_transport.link.base import DATA_PORT_SILENT, was_data_port_silent
from ucxx_transport.schema import Schema, SlotRef

if TYPE_CHECKING:
    from ucxx_transport.client.statistics import ClientCounters
    from ucxx_transport.config import ClientConfig
    from ucxx_transport.link.base import Link

LinkFactory = Callable[[], AbstractAsyncContextManager["Link"]]

# Deliveries whose acknowledgement may be lost, remembered per ring; beyond it the server's own timeout frees them. And
# discarded payloads whose server did not hear of it in time; beyond it these stay until they are overwritten.
UNSETTLED_PER_RING = 1024
UNSETTLED_RINGS = 256
GOODBYE_TIMEOUT_S = 0.5


class Connections:
    """Channels to any port of any source.

    Attributes:
        link: None until the first is opened.
        closed: whether `aclose` has been called.
    """

    def __init__(
        self, config: ClientConfig, link_factory: LinkFactory, *, reader: int, counters: ClientCounters
    ) -> None:
        self._config = config
        self._link_factory = link_factory
        self._reader = reader
        self._counters = counters
        self._stack = AsyncExitStack()
        self.link: Link | None = None
        self._opening = asyncio.Lock()
        self.closed = False
        self._idle: EndpointPool[Channel] = EndpointPool(
            max_age_s=config.pool_endpoint_max_age_s, max_idle=config.max_pooled_endpoints
        )
        self._schemas: dict[int, Schema] = {}
        self._unsettled: OrderedDict[bytes, deque[ReadExchange]] = OrderedDict()
        self._closing: set[asyncio.Task[bool]] = set()

    @property
    def pooled_endpoints(self) -> int:
        """Idle connections now."""
        return len(self._idle)

    async def aclose(self) -> None:
        """Take leave of every server, close every connection and the link. Bounded; idempotent."""
        self.closed = True
        channels = self._idle.drain()
        try:
            async with asyncio.timeout(GOODBYE_TIMEOUT_S):
                await asyncio.gather(*(channel.say_goodbye() for channel in channels), return_exceptions=True)
        except TimeoutError:
            pass  # a server that does not answer finds out by itself
        for channel in channels:
            await channel.close()
        await asyncio.gather(*self._closing, return_exceptions=True)
        async with self._opening:  # a read that is just opening the link must not leave it behind
            self.link = None
            await self._stack.aclose()

    def evict(self, key: PortKey) -> None:
        """Close what lies idle at a port that has just proved unhealthy."""
        self.close_aside(self._idle.evict(key))

    def at_hand(self, key: PortKey, ref: SlotRef) -> Channel | None:
        """A connection over which `ref` can be read at once; None when something has to be waited for first.

        That is: opening one (`checkout`), what it owes (`settle`), or its ring's schema (`schema_of`).
        """
        if ref.ring_id in self._unsettled or (ref.fingerprint and ref.fingerprint not in self._schemas):
            return None
        channel = self._idle.take(key, asyncio.get_running_loop().time())
        if channel is not None and not channel.alive:
            self.close_aside((channel,))
            return None
        return channel

    def known_schema(self, ref: SlotRef) -> Schema | None:
        """The schema that `schema_of` has returned before; None for raw bytes."""
        return self._schemas[ref.fingerprint] if ref.fingerprint else None

    async def checkout(self, key: PortKey, until_s: float) -> Channel:
        """A connection to `key` for one exchange; give it to `checkin` or `close_aside`. Errors as `Channel.open`."""
        loop = asyncio.get_running_loop()
        while True:
            checkout = self._idle.checkout(key, loop.time())
            self._counters.add("aged_out", len(checkout.expired))
            self.close_aside(checkout.expired)  # not awaited: a cancellation here would lose the others
            channel = checkout.endpoint
            if channel is None:
                return await self._connect(key, until_s)
            if channel.alive:
                return channel
            self.close_aside((channel,))  # the server closed it while it lay idle: no reason to distrust the port

    async def _connect(self, key: PortKey, until_s: float) -> Channel:
        link = await self._opened_link()
        now = asyncio.get_running_loop().time()
        self.close_aside(self._idle.expired(now))  # also those to sources that are not read any more
        limit_s = now + self._config.connect_timeout_s
        try:
            async with asyncio.timeout_at(min(limit_s, until_s)):
                channel = await Channel.open(link, key, reader=self._reader, token=self._config.token_bytes)
        except TimeoutError as error:
            if isinstance(error, TransportError):
                raise
            silent = was_data_port_silent(error)
            unknown = "no answer to the handshake within connect_timeout_s; is a ucxx_transport server there?"
            message = DATA_PORT_SILENT if silent else unknown
            raise PeerLostError(message, host=key[0], port=key[1], reason="unreachable") from None
        self._counters.add("connections")
        return channel

    async def _opened_link(self) -> Link:
        async with self._opening:
            if self.closed:
                raise ConfigError("the client is closed")
            if self.link is None:
                self.link = await self._stack.enter_async_context(self._link_factory())
            return self.link

    def checkin(self, channel: Channel) -> None:
        """Keep a connection for the next call."""
        loop = asyncio.get_running_loop()
        surplus = (channel,) if self.closed else self._idle.checkin(channel.key, channel, loop.time())
        if surplus:
            self.close_aside(surplus)

    def close_aside(self, channels: Iterable[Channel]) -> None:
        """Close connections without letting a read wait for it; `aclose` does.

        What they owe is known at once. A buffer that UCX may still write into stays out of the pool until it may not.
        """
        for channel in channels:
            if channel.unsettled is not None:
                self._owe(channel.unsettled)
            closing = asyncio.get_running_loop().create_task(channel.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    def _owe(self, exchange: ReadExchange) -> None:
        """Remember a delivery that the server may not know of."""
        self._unsettled.setdefault(exchange.ring_id, deque(maxlen=UNSETTLED_PER_RING)).append(exchange)
        while len(self._unsettled) > UNSETTLED_RINGS:
            self._unsettled.popitem(last=False)

    async def settle(self, channel: Channel, ring_id: bytes) -> None:
        """Send again the acknowledgements that a lost connection may have lost: their slots wait for them."""
        while waiting := self._unsettled.get(ring_id):
            exchange = waiting.popleft()  # this task's from here on: other reads of this ring settle at the same time
            try:
                await channel.confirm(exchange)
                self._counters.add("confirms")
            except (PeerLostError, asyncio.CancelledError):
                self._owe(exchange)
                raise
            except TransportError as error:
                if error.retryable:
                    self._owe(exchange)  # the ring cannot say just now: with the next read
                    return
                # settled already, or overwritten: nothing is left to say
        self._unsettled.pop(ring_id, None)

    async def discard(self, key: PortKey, waiting: deque[ReadExchange], found: list[bool], until_s: float) -> None:
        """Say of payloads of one ring, until `until_s` on the loop's clock, that they arrived, though none was fetched.

        What was said is taken out of `waiting`, and `found` grows by whether that payload was still there. A
        TransportError or TimeoutError: the others could not be said.
        """
        channel: Channel | None = None
        try:
            async with asyncio.timeout_at(until_s):
                channel = await self.checkout(key, until_s)
                await self.settle(channel, waiting[0].ring_id)
                while waiting:
                    there = True
                    try:
                        await channel.confirm(waiting[0])
                    except StaleSlotError:
                        there = False
                    waiting.popleft()
                    found.append(there)
        except BaseException:
            if channel is not None:
                self.close_aside((channel,))
            raise
        self.checkin(channel)

    def owe(self, exchanges: Iterable[ReadExchange]) -> None:
        """Say of these with the next read of their ring that they arrived."""
        for exchange in exchanges:
            self._owe(exchange)

    async def schema_of(self, channel: Channel, ref: SlotRef) -> Schema | None:
        """The schema a reference names, asked for once; None for raw bytes. A ProtocolError: the server has another."""
        if ref.fingerprint == 0:
            return None
        schema = self._schemas.get(ref.fingerprint)
        if schema is None:
            schema = Schema.from_bytes(await channel.describe(ref.ring_id))
            if schema.fingerprint != ref.fingerprint:
                raise ProtocolError(
                    "the server's schema is not the one the reference names",
                    expected=f"{ref.fingerprint:#018x}",
                    found=f"{schema.fingerprint:#018x}",
                )
            self._schemas[schema.fingerprint] = schema
        return schema
