import os
import socket

import pytest
import torch

from ds_pretrain.parallel import wire
from ds_pretrain.parallel.comm import all_reduce
from ds_pretrain.parallel.mesh import start
from ds_pretrain.parallel.spawn import spawn


@pytest.fixture
def connection():
    """Two ends of a TCP connection on this host."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
        with one, other:
            yield one, other


def test_what_is_handed_over_counts_read_or_not(connection):
    one, other = connection
    before, total = wire.counts(), wire.sent()
    one.setblocking(False)
    handed = one.send(bytes(16 << 20))  # as much as fits: nobody reads
    assert wire.since(before) == wire.sent() - total == handed > 1000
    other.sendall(bytes(123))
    assert wire.since(before) == handed + 123


def test_only_tcp_counts():
    before = wire.counts()
    here, there = socket.socketpair()
    with here, there, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams, open(os.devnull, "rb"):
        here.sendall(bytes(100))
        datagrams.sendto(bytes(100), ("127.0.0.1", 9))
        assert wire.counts() == before


def test_counting_leaves_nothing_open(connection):
    before = os.listdir("/proc/self/fd")
    wire.counts()
    assert os.listdir("/proc/self/fd") == before


def test_a_socket_that_closes_takes_its_count_with_it(connection):
    before = wire.counts()
    connection[0].close()
    with pytest.raises(RuntimeError, match=f"1 of {len(before)} sockets have closed"):
        wire.since(before)


def test_a_kernel_that_does_not_count_is_told(connection, monkeypatch):
    monkeypatch.setattr(wire, "SIZE", 1000)
    with pytest.raises(RuntimeError, match=r"1000 are needed to count: Linux 4\.19"):
        wire.counts()


def reduced():
    """Bytes that this rank sends to sum 4 MB over two ranks."""
    start()
    x = torch.ones(1 << 20)
    all_reduce(x)
    before = wire.counts()
    all_reduce(x)
    return wire.since(before)


def test_gloo_sends_over_tcp_on_one_host(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # as torchrun says: some versions of gloo take shared memory then
    assert 4 << 20 <= spawn(2, reduced) < 1.001 * (4 << 20)
