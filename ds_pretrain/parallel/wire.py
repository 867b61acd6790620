"""Bytes that this process has handed to TCP, read from the kernel's own counters.

gloo sends everything over TCP connections of the process itself, on one host over loopback too: it has no shared memory
transport. Each socket knows what it was given (`tcp_info` of linux/tcp.h), so nothing has to be wrapped, no root is needed,
and libraries underneath are counted with the rest, whatever they call. The price: a socket that closes takes its count
with it, so a measurement is a difference over steps in which none does, which is checked. NCCL's bytes are not in it.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Mapping

NOTSENT, SENT, RETRANSMITTED = 144, 200, 208
"""Offsets of tcpi_notsent_bytes (u32), tcpi_bytes_sent and tcpi_bytes_retrans (u64): Linux 4.19 and later have all three."""
SIZE = RETRANSMITTED + 8


def sent() -> int:
    """Payload bytes that this process has handed to TCP so far, over the sockets that are open now."""
    return sum(counts().values())


def since(before: Mapping[str, int]) -> int:
    """Payload bytes handed to TCP since `before` (`counts` of then). RuntimeError if a socket has closed since: its count is
    lost."""
    now = counts()
    if gone := before.keys() - now.keys():
        raise RuntimeError(
            f"{len(gone)} of {len(before)} sockets have closed since the first count, and theirs are lost: measure over steps "
            "that neither make nor end process groups, after a gc.collect()"
        )
    return sum(now.values()) - sum(before[name] for name in before)


def counts() -> dict[str, int]:
    """Payload bytes handed to TCP by socket (`socket:[inode]`), retransmissions left out."""
    found: dict[str, int] = {}
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            name, copy = os.readlink(f"/proc/self/fd/{descriptor}"), os.dup(int(descriptor))
        except OSError:  # the listing's own descriptor, or one that another thread has closed
            continue
        if not name.startswith("socket:"):
            os.close(copy)
            continue
        with socket.socket(fileno=copy) as one:
            if one.family in (socket.AF_INET, socket.AF_INET6) and one.type == socket.SOCK_STREAM:
                found[name] = _handed(one)
    return found


def _handed(one: socket.socket) -> int:
    """What a TCP socket was given: sent once, and waiting to be sent."""
    info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, SIZE)
    if len(info) < SIZE:
        raise RuntimeError(f"this kernel's tcp_info has {len(info)} bytes, {SIZE} are needed to count: Linux 4.19 or later")
    (waiting,) = struct.unpack_from("=I", info, NOTSENT)
    all_sent, again = struct.unpack_from("=QQ", info, SENT)
    return int(all_sent - again + waiting)
