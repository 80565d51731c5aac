from ucxx_transport.groups.group import RankGroup as RankGroup
from ucxx_transport.groups.state import GroupState as GroupState
from ucxx_transport.groups.state import GroupStatistics as GroupStatistics
from ucxx_transport.groups.state import Member as Member
from ucxx_transport.groups.view import GroupView as GroupView
from ucxx_transport.groups.view import RankState as RankState
