"""What one read costs a port, in Python calls: how long a read takes follows from it."""

from __future__ import annotations

from tests.support.calls import LINK, counting
from tests.unit.server.port_rig import PortRig
from ucxx_transport.wire.frames import Kind, Status

A_FURTHER_NAME = 17


def calls_of_fetch(rig: PortRig, names: int) -> list[str]:
    """What the port calls for a FETCH of so many names, with as many ends of those before."""
    peer = rig.peer()
    refs = [rig.write(bytes(4096)) for _ in range(names)]
    peer.fetch(*refs)
    ended = range(peer.attempt - names + 1, peer.attempt + 1)
    peer.end(*ended, delivered=False)
    peer.fetch(*refs)
    ends = [(peer.attempt - offset, False) for offset in range(names)]
    answers = peer.begin_fetch(*refs, ends=ends)
    rig.peers.poll()
    called: list[str] = []
    with counting(called, but=LINK):
        while rig.reactor.poll():
            pass
    rig.settle()
    assert [answer.status for answer in answers] == [Status.OK] * names
    assert peer.ask(Kind.BYE).status is Status.OK
    return called


def test_a_further_name_of_a_frame_costs_less_than_a_frame_of_its_own(rig: PortRig) -> None:
    one, three = calls_of_fetch(rig, 1), calls_of_fetch(rig, 3)
    assert len(three) - len(one) <= 2 * A_FURTHER_NAME, three
