"""The trainer's end: payloads by reference."""

from ucxx_transport.client.async_client import UCXXClient
from ucxx_transport.client.client import SyncUCXXClient
from ucxx_transport.client.payload import Payload
from ucxx_transport.client.statistics import ClientStatistics, WayStatistics

__all__ = ["ClientStatistics", "Payload", "SyncUCXXClient", "UCXXClient", "WayStatistics"]
