from __future__ import annotations

import pytest

from tests.support.memory_store import MemoryStore
from ucxx_transport.errors import ProtocolError
from ucxx_transport.groups.group_picture import GroupPicture, policy_version_from
from ucxx_transport.groups.group_view import GroupView
from ucxx_transport.groups.member_record import MemberRecord
from ucxx_transport.membership.keys import member_key, policy_key, rank_of, view_key

GROUP = "a/b"


def record(rank: int) -> MemberRecord:
    return MemberRecord(rank=rank, incarnation="x", epoch=0, ttl_s=6.0)


def test_a_picture_of_a_snapshot_and_one_that_followed_a_watch_are_the_same() -> None:
    store = MemoryStore()
    watch = store.watch("groups/", after=0)
    picture = GroupPicture.of(GROUP, store.snapshot("groups/"))
    assert (picture.view, picture.view_revision, dict(picture.members), picture.policy_version) == (None, 0, {}, None)
    lease = store.grant(60)
    store.put(member_key(GROUP, 3), record(3).to_bytes(), lease_id=lease.lease_id)
    store.put(member_key(GROUP, 12), record(12).to_bytes())
    store.put(view_key(GROUP), GroupView(epoch=4).to_bytes())
    store.put(policy_key(GROUP), b"7")
    store.put(view_key(GROUP), GroupView(epoch=5).to_bytes())
    store.revoke(lease.lease_id)
    store.put(view_key("other"), GroupView(epoch=9).to_bytes())
    while (batch := watch.next(0.0)) is not None:
        picture = picture.after(batch)
    assert picture == GroupPicture.of(GROUP, store.snapshot("groups/"))
    assert picture.view == GroupView(epoch=5)
    assert (picture.view_revision, picture.policy_version, picture.revision) == (5, 7, 7)
    assert dict(picture.members) == {12: record(12)}
    assert dict(picture.member_revisions) == {12: 2}
    store.close()


def test_what_is_not_understood_is_as_if_it_were_not_there_and_is_named() -> None:
    store = MemoryStore()
    store.put(view_key(GROUP), b"garbage")
    store.put(policy_key(GROUP), b"-1")
    store.put(member_key(GROUP, 0), record(5).to_bytes())
    store.put(member_key(GROUP, 1), b"{}")
    store.put(member_key(GROUP, 2) + "x", b"{}")
    picture = GroupPicture.of(GROUP, store.snapshot())
    assert set(picture.problems) == {
        view_key(GROUP),
        policy_key(GROUP),
        member_key(GROUP, 0),
        member_key(GROUP, 1),
    }
    assert (picture.view, picture.view_revision, dict(picture.members)) == (None, 1, {})
    store.put(member_key(GROUP, 1), record(1).to_bytes())
    assert member_key(GROUP, 1) not in GroupPicture.of(GROUP, store.snapshot()).problems


def test_a_member_s_key_names_its_rank_and_no_other_key_does() -> None:
    assert rank_of(member_key(GROUP, 12), GROUP) == 12
    for key in (view_key(GROUP), member_key("other", 1), member_key(GROUP, 1) + "/x", "12", "groups/a%2Fb/members/²"):
        assert rank_of(key, GROUP) is None


@pytest.mark.parametrize("value", [b"", b"-1", b"1.5", b"9" * 19, "²".encode()])
def test_a_policy_version_is_digits(value: bytes) -> None:
    with pytest.raises(ProtocolError):
        policy_version_from(value)
