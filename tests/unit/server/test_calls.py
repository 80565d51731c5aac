"""What one read costs a port, in Python calls: how long a read takes follows from it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

import ucxx_transport
from tests.unit.server.port_rig import PortRig
from ucxx_transport.wire.frames import Kind, Status

PACKAGE = str(Path(ucxx_transport.__file__).parent)
LINK = (str(Path(PACKAGE, "testing")), str(Path(PACKAGE, "link")))
A_FURTHER_NAME = 17


class Calls:
    """Counts the calls into the package while it is installed, those into links apart."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(PACKAGE) and not file.startswith(LINK):
            self.names.append(frame.f_code.co_qualname)


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
    calls = Calls()
    sys.setprofile(calls)
    while rig.reactor.poll():
        pass
    sys.setprofile(None)
    rig.settle()
    assert [answer.status for answer in answers] == [Status.OK] * names
    assert peer.ask(Kind.BYE).status is Status.OK
    return calls.names


def test_a_further_name_of_a_frame_costs_less_than_a_frame_of_its_own(rig: PortRig) -> None:
    one, three = calls_of_fetch(rig, 1), calls_of_fetch(rig, 3)
    assert len(three) - len(one) <= 2 * A_FURTHER_NAME, three
