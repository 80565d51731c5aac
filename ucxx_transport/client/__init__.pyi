from ucxx_transport.client.async_client import UCXXClient as UCXXClient
from ucxx_transport.client.client import SyncUCXXClient as SyncUCXXClient
from ucxx_transport.client.payload import Payload as Payload
from ucxx_transport.client.statistics import ClientStatistics as ClientStatistics
from ucxx_transport.client.statistics import WayStatistics as WayStatistics
