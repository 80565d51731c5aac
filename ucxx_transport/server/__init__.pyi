from ucxx_transport.membership.sources import RingSource as RingSource
from ucxx_transport.server.counters import PortStatistics as PortStatistics
from ucxx_transport.server.counters import ServerStatistics as ServerStatistics
from ucxx_transport.server.server import UCXXServer as UCXXServer
