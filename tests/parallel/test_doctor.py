"""What is wrong with a cluster is told, with the node: judged from figures of many nodes, found by ranks on this machine."""

import io
import itertools
import os
import socket
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from ds_pretrain.parallel import board, doctor, links
from ds_pretrain.parallel.diagnosis import Clock, Findings, Folder, Link, Rank
from ds_pretrain.parallel.launch import Place
from ds_pretrain.parallel.mesh import start
from ds_pretrain.parallel.spawn import spawn

FACTS = {"python": "3.11.7", "torch": "2.7.1", "sources": "8f88", "driver": "550.54", "device": "H100"}
OUT = Folder("/data/out", 0.01, 10**12, 1e9)


def rank(node, local=0, **changed):
    """A rank that is as it should be."""
    uuid, visible = f"GPU-{node}-{local}", [f"GPU-{node}-{number}" for number in range(2)]
    sound = Rank(
        host=f"gpu{node:02}", boot=f"boot{node}", facts=FACTS, uuid=uuid, visible=visible, free=79 * 10**9,
        total=80 * 10**9, cores=64, load=3.0, flops=600e12,
    )  # fmt: skip
    return replace(sound, **changed)


def cluster(nodes, slow=None, **changed):
    """Nodes of two ranks each that are as they should be, but for the cable of one."""
    leaders = [*range(0, 2 * nodes, 2)]
    rates = {pair: 2e9 if slow in pair else 25e9 for pair in itertools.permutations(leaders, 2)}
    sound = Findings(
        [rank(node, local) for node in range(nodes) for local in range(2)],
        dict.fromkeys(leaders, OUT),
        {leader: Clock(0.002, 0.001) for leader in leaders},
        [Link(*pair, 1e-5, rate) for pair, rate in rates.items()],
        reduced=40e9,
    )
    return replace(sound, **changed)


def sick(found, number, **changed):
    """The same with another rank in one place."""
    ranks = [*found.ranks]
    ranks[number] = replace(ranks[number], **changed)
    return replace(found, ranks=ranks)


def told(found):
    return found.problems(), found.warnings()


@pytest.mark.parametrize("nodes", [1, 2, 3, 17, 64])
def test_a_sound_cluster_is_not_blamed(nodes):
    assert told(cluster(nodes)) == ([], [])


def test_who_differs_from_most_is_named_and_in_what():
    found = sick(sick(cluster(64), 14, facts=FACTS | {"torch": "2.6.0"}), 15, facts=FACTS | {"torch": "2.6.0"})
    [problem], [] = told(found)
    assert problem.startswith("torch: 2.6.0 on gpu07, but 2.7.1 on gpu00, gpu01, gpu02, gpu03 and 59 more: ")
    two = sick(sick(cluster(2), 2, facts=FACTS | {"sources": "beef"}), 3, facts=FACTS | {"sources": "beef"})
    assert two.problems()[0].startswith("sources: beef on gpu01, but 8f88 on gpu00: "), "of equals rank 0's is right"
    assert sick(cluster(3), 5, facts=FACTS | {"NCCL": "2.21.5"}).problems()[0].startswith("NCCL: 2.21.5 on gpu02, but none on")


def test_other_drivers_and_devices_only_warn():
    [], [warning] = told(sick(cluster(8), 3, facts=FACTS | {"driver": "535.1"}))
    assert "A100 on gpu01, but H100 on" in sick(cluster(8), 3, facts=FACTS | {"device": "A100"}).warnings()[0]
    assert warning.startswith("driver: 535.1 on gpu01, but 550.54 on")


def test_two_ranks_on_one_gpu_are_a_problem():
    [problem], [idle] = told(sick(cluster(3), 3, uuid="GPU-1-0"))
    assert problem.startswith("ranks 2, 3 on gpu01 share one GPU (GPU-1-0)")
    assert idle.startswith("gpu01 has 2 GPUs and 2 ranks: 1 GPUs stay idle")


def test_memory_of_others_and_idle_gpus_are_told():
    [], [warning] = told(sick(cluster(3), 4, free=30 * 10**9, own=9 * 10**9))
    assert "GPU of rank 4 on gpu02 (GPU-2-0) another process holds 41.0 of 80.0 GB" in warning
    alone = replace(cluster(2), ranks=[rank(0), rank(1)], links=[], folders={}, clocks={})
    assert alone.warnings()[0].startswith("gpu00 has 2 GPUs and 1 ranks: 1 GPUs stay idle")


def test_busy_cores_and_little_memory_are_told():
    host = {"uuid": "", "visible": []}
    ranks = [rank(0, **host, cores=2, load=9.5), rank(1, **host, free=10**9), *[rank(2, **host, cores=1)] * 2]
    busy, crowded, full = Findings(ranks).warnings()
    assert "on gpu00 (9.5 on 2 cores): " in busy and "on gpu02 (2 on 1): " in crowded and "on gpu01 (1.0 of 80.0 GB): " in full


def test_folders_that_are_not_shared_not_written_full_slow_or_late():
    changed = {
        2: Folder("/elsewhere", None),
        4: Folder("/data/out", 0.1, error="Permission denied"),
        6: OUT._replace(free=10**8),
        8: OUT._replace(rate=3e6),
        10: OUT._replace(seen=4.0),
    }
    [closed, elsewhere], [full, slow, late] = told(cluster(6, folders={0: OUT, **changed}))
    assert closed.startswith("output /data/out cannot be written on gpu02 (Permission denied): make it writable there, or ")
    assert elsewhere.startswith("what gpu00 has written in output /data/out is not there on gpu01 (/elsewhere): ")
    assert "on gpu03 (0.10 GB): " in full and "on gpu04 (3.0 MB/s): " in slow and "on gpu05 (after 4.0 s): " in late


def test_clocks_that_are_surely_off_are_told():
    clocks = {0: Clock(0, 0), 2: Clock(-1.5, 0.1), 4: Clock(1.05, 0.2), 6: Clock(3.0, 0.1)}
    [], [behind, before] = told(cluster(4, clocks=clocks))
    assert behind.startswith("the clock of gpu01 is 1.50 s behind that of gpu00 (to 100.0 ms)")
    assert before.startswith("the clock of gpu03 is 3.00 s ahead of that of gpu00")


@pytest.mark.parametrize("nodes", [3, 4, 64])
def test_the_node_with_the_slow_cable_is_named_and_no_other(nodes):
    [], [warning] = told(cluster(nodes, slow=2))
    assert warning.startswith("gpu01 is slow: its links carry 2.00 GB/s, those of a usual node 25.00 GB/s")


@pytest.mark.parametrize("end", [0, 1], ids=["sending", "receiving"])
def test_one_direction_that_is_slow_is_enough(end):
    found = cluster(5)
    slow = [link._replace(rate=1e9) if link[end] == 8 else link for link in found.links]
    assert [text.split()[0] for text in replace(found, links=slow).warnings()] == ["gpu04"]


def test_a_broken_pair_is_named_once_and_a_slow_network_is_told():
    found = cluster(4)
    broken = [link._replace(rate=0, error="Timed out") if {2, 6} == {*link[:2]} else link for link in found.links]
    [problem], [] = told(replace(found, links=broken))
    assert problem.startswith("gpu01 and gpu03 do not get through to each other (Timed out)")
    slow = [link._replace(rate=11e6) for link in found.links]
    assert "joined by 11 MB/s only" in replace(found, links=slow).warnings()[0]


def test_of_two_nodes_with_one_slow_direction_both_are_named():
    found = cluster(2)
    slow = [link._replace(rate=link.rate / 10) if link.source < link.target else link for link in found.links]
    [warning] = replace(found, links=slow).warnings()
    assert warning.startswith("from gpu00 to gpu01 goes") and "two nodes cannot tell which of them is slow" in warning
    assert cluster(2).warnings() == []


def test_the_gpu_with_the_slow_links_is_named_and_a_broken_pair():
    whole = sick(cluster(3), 5, uuid="GPU-2-0")
    assert whole.gpus == [[0, 1], [2, 3], [4]], "ranks that share a GPU play once"
    nodes = [[4 * node + local for local in range(4)] for node in range(3)]
    rates = {pair: 20e9 if 6 in pair else 300e9 for node in nodes for pair in itertools.permutations(node, 2)}
    ranks = [rank(number // 4, number % 4, visible=()) for number in range(12)]
    found = Findings(ranks, inside=[Link(*pair, 1e-6, rate) for pair, rate in rates.items()])
    assert found.gpus == nodes and not found.broken
    [], [warning] = told(found)
    assert warning.startswith(
        "rank 6 on gpu01 is slow: its links carry 20.00 GB/s, those of a usual GPU 300.00 GB/s; look at `n"
    )
    [problem], [warning] = told(replace(found, inside=[Link(1, 3, 0, 0, "NCCL has not moved 8 bytes"), *found.inside]))
    assert problem.startswith(
        "rank 1 on gpu00 and rank 3 on gpu00 do not get through to each other (NCCL has not moved 8 bytes)"
    )
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(found.tables()[1])
    assert "36 of 36 directions" in console.export_text()
    assert not replace(found, ranks=[rank(0, uuid="")]).gpus, "on CPUs a node has no links inside"


def test_a_rank_that_computes_slowly_is_named():
    [], [warning] = told(sick(cluster(64), 77, flops=300e12))
    assert "rank 77 on gpu38 (50%)" in warning and "600.0 TFLOP/s" in warning
    assert told(sick(cluster(64), 77, flops=450e12)) == ([], [])


def test_hosts_of_one_name_are_told_apart():
    found = Findings([rank(node, local, host="localhost") for node in range(2) for local in range(2)])
    assert found.nodes == [f"localhost (from rank {first})" for first in (0, 0, 2, 2)] and found.leaders == [0, 2]


@pytest.mark.parametrize("players", [1, 2, 3, 5, 8, 33, 64])
def test_every_pair_meets_once_and_nobody_plays_twice_in_a_round(players):
    names = [*range(0, 8 * players, 8)]
    rounds = links.schedule(names)
    met = [tuple(sorted(pair)) for pairs in rounds for pair in pairs]
    assert sorted(met) == [*itertools.combinations(names, 2)]
    assert all(len({end for pair in pairs for end in pair}) == 2 * len(pairs) for pairs in rounds)
    assert len(rounds) == (players - 1 + players % 2 if players > 1 else len(rounds))


def test_messages_grow_to_their_share_of_the_time_and_no_further():
    assert links.grown(1000, 0.01, 0.02) == 2000 and links.grown(1000, 1e-6, 1.0) == 8000
    assert links.grown(links.LARGE // 2, 1e-6, 1.0) == links.LARGE


@pytest.mark.parametrize("nodes", [1, 3, 64])
def test_tables_fit_a_log_and_name_the_nodes(nodes):
    console = Console(width=120, record=True, file=io.StringIO())
    for table in cluster(nodes, slow=2 if nodes > 1 else None).tables():
        console.print(table)
    text = console.export_text()
    assert all(f"gpu{node:02}" in text for node in range(nodes)) and "8f88" in text
    assert nodes == 1 or ("2.00 GB/s" in text and f"{nodes * (nodes - 1)} of {nodes * (nodes - 1)} directions" in text)


@pytest.mark.parametrize("kind", ["NVIDIA UNIX x86_64 Kernel Module ", "NVIDIA UNIX Open Kernel Module for x86_64 "])
def test_what_a_rank_says_of_its_gpu(monkeypatch, kind):
    cuda, gib = torch.cuda, 1 << 30
    monkeypatch.setattr(
        doctor, "_read", lambda path: f"NVRM version: {kind} 550.54.15  Release Build  Sat Mar\nGCC version: 12.2"
    )
    monkeypatch.setattr(cuda, "device_count", lambda: 2)
    monkeypatch.setattr(cuda, "get_device_properties", lambda number: SimpleNamespace(uuid=f"GPU-{number}"))
    monkeypatch.setattr(cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(cuda, "mem_get_info", lambda device: (60 * gib, 80 * gib))
    monkeypatch.setattr(cuda, "memory_reserved", lambda device: gib)
    monkeypatch.setattr(cuda.nccl, "version", lambda: (2, 21, 5))
    device = torch.device("cuda", 1)
    facts = doctor._facts(device)
    assert (facts["driver"], facts["NCCL"], facts["device"]) == ("550.54.15", "2.21.5", "NVIDIA H100")
    found = Findings([doctor._with_gpu(rank(0, facts=facts), device)])
    assert found.ranks[0].uuid == "GPU-1" and [text[:40] for text in found.warnings()] == [
        "of the GPU of rank 0 on gpu00 (GPU-1) an", "gpu00 has 2 GPUs and 1 ranks: 1 GPUs sta",
    ]  # fmt: skip


def knocked(name, shut):
    """Whether ranks before any group reach each other, if the door of the second is shut."""
    store, rank, world = next(dist.rendezvous("env://"))

    def door():
        made = socket.socket()
        made.bind(("127.0.0.1", 0))
        if not (shut and rank == 1):
            made.listen()
        return made

    links._listening = door
    try:
        links.reach(dist.PrefixStore(name, store), Place(rank, world, rank))
    except ConnectionError as error:
        return str(error)
    return ""


def gathered(seconds, done, late):
    """What a rank is told whose partner takes so long to answer."""
    board.DONE, board.LATE = done, late
    with doctor._board() as own:
        own.meet()
        try:
            own.gather("its disk", lambda: time.sleep(seconds))
        except board.CutShortError as error:
            return Findings(cut=error.found)
    return Findings()


def left(seconds):
    """How long a rank takes to leave a board on which its partner stays for so long."""
    with doctor._board() as own:
        own.meet()
        time.sleep(seconds)
        began = time.monotonic()
    return time.monotonic() - began


def examined(folder):
    """Two ranks that take each other for another node: what they find while the second is well, and ill in many ways."""
    second = os.environ["RANK"] == "1"
    socket.gethostname = lambda: f"node{second:d}"
    told = {"connections": [knocked("shut", True), knocked("open", False)]}
    start()
    told["nodes"] = doctor.several()
    doctor.SEEN = 1.0

    def case(name, seconds=0.0, output=folder / "new" / "out", **patches):
        well = {key: getattr(doctor, key) for key in patches}
        for key, value in patches.items() if second else ():
            setattr(doctor, key, value)
        found = doctor.examine(output, seconds)
        for key, value in well.items():
            setattr(doctor, key, value)
        both = [None, None]
        dist.all_gather_object(both, (found.problems(), found.warnings()))
        assert both[0] == both[1], "every rank knows the same"
        told[name] = found

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    late = SimpleNamespace(**{**vars(time), "time": lambda: time.time() + 5.0})
    case("well", 0.5)
    case("versions", _version=lambda name: "0.0.1" if name == "torch" else doctor.version(name))
    case("readonly", _written=denied)
    case("private", output=folder / ("b" if second else "a"))
    case("late", time=late)
    case("failing", _facts=denied)
    told["left"] = left(1.5 * second)
    told["hanging"] = gathered(3.0 * second, done=1.0, late=30.0)
    told["silent"] = gathered(6.0 * second, done=30.0 if second else 1.0, late=1.0)
    return told


def played(groups):
    """What ranks find that play in groups."""
    start()
    with doctor._board() as own:
        own.meet()
        return links.tournament(own, "links between GPUs of a node", groups, torch.device("cpu"), 0.2)


def test_groups_of_unequal_size_play_at_the_same_time():
    found = spawn(4, played, [[0, 2, 3], [1]])
    assert sorted(link[:2] for link in found) == [*itertools.permutations((0, 2, 3), 2)]
    assert all(link.rate > 1e6 and not link.error for link in found)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examined")
    told = spawn(2, examined, folder)
    assert [*folder.iterdir()] == [], "nothing is left behind"
    return told


def test_ranks_that_are_well_find_nothing_and_measure_everything(found):
    well = found["well"]
    assert well.problems() == [] and well.nodes == ["node0", "node1"] and found["nodes"]
    assert [(link.source, link.target) for link in well.links] == [(0, 1), (1, 0)]
    assert all(link.rate > 1e6 and 0 < link.latency < 1 for link in well.links) and well.reduced > 1e6
    assert all(folder.free and folder.rate and folder.seen < 1 for folder in well.folders.values()) and len(well.folders) == 2
    assert abs(well.clocks[1].offset) <= well.clocks[1].error + 0.01, "it is the same clock"
    assert all(each.flops > 1e8 and each.facts["torch"] == torch.__version__ for each in well.ranks)


@pytest.mark.parametrize(
    "case, told",
    [
        ("versions", "torch: 0.0.1 on node1, but "),
        ("readonly", "output {}/new/out cannot be written on node1 (Permission denied): make"),
        ("private", "what node0 has written in output {}/a is not there on node1 ({}/b): output is not on a shared"),
        ("failing", "rank 1 on node1: versions and devices: PermissionError: [Errno 13] Permission denied"),
        ("hanging", "rank 1 on node1: its disk: hangs, it is not done after 1 s"),
        ("silent", "no answer from rank 1 on node1 (its disk, within 2 s)"),
    ],
)
def test_a_rank_that_is_ill_is_named(found, case, told):
    [problem] = found[case].problems()
    folder = found["private"].folders[0].path.removesuffix("/a") if case in ("readonly", "private") else ""
    assert problem.startswith(told.replace("{}", folder))


def test_rank_0_who_may_hold_the_store_leaves_last(found):
    assert found["left"] > 1.0


def test_a_clock_that_is_off_is_measured(found):
    assert found["late"].clocks[1].offset == pytest.approx(5.0, abs=found["late"].clocks[1].error + 0.1)
    assert found["late"].problems() == [] and any("node1 is 5.0" in text for text in found["late"].warnings())


def test_alone_there_is_a_disk_and_a_device_to_look_at(tmp_path):
    start()
    found = doctor.examine(tmp_path / "out", 1.0)
    assert found.problems() == [] and not found.links and found.reduced == 0 and found.folders[0].rate > 0
    assert not doctor.several() and not (tmp_path / "out").exists() and len(found.tables()) == 2
    (tmp_path / "file").touch()
    [problem] = doctor.examine(tmp_path / "file" / "out", 0.0).problems()
    assert problem.startswith(f"output {tmp_path}/file/out cannot be written on ") and "Not a directory" in problem


def test_nodes_that_cannot_connect_are_named_before_there_is_a_group(found):
    shut, before = found["connections"]
    assert before == ""
    assert shut.startswith("node0 cannot open a connection to node1 (127.0.0.1): Connection refused; nodes of a job must reach")
