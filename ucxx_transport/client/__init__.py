"""The trainer's end: payloads by reference."""

from ucxx_transport.client.client import UCXXClient
from ucxx_transport.client.payload import Payload
from ucxx_transport.client.statistics import ClientStatistics, WayStatistics
from ucxx_transport.client.sync_client import SyncUCXXClient

__all__ = ["ClientStatistics", "Payload", "SyncUCXXClient", "UCXXClient", "WayStatistics"]
