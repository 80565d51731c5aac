from ucxx_transport.groups.group import RankGroup as RankGroup
from ucxx_transport.groups.group_state import GroupState as GroupState
from ucxx_transport.groups.group_state import GroupStatistics as GroupStatistics
from ucxx_transport.groups.group_state import Member as Member
from ucxx_transport.groups.group_view import GroupView as GroupView
from ucxx_transport.groups.rank_states import RankState as RankState
