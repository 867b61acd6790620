"""Hosts on one machine, for what must run on several.

Each has a name, an address, processes, shared memory, temporary files and an ssh server of its own (Linux namespaces); all
are on one switch and share the file system. Needs root and what install.sh installs.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

SUBNET, OTHER = "10.77.0", "10.78.0"
"""Of eth0, which the names of hosts lead to, and of ib0, a network of its own."""


def missing(*more):
    """Why there can be no hosts here, with these programs on them; None if there can."""
    if os.geteuid():
        return "network namespaces need root: sudo tests/cluster/install.sh, then sudo python3 run.py test tests/cluster"
    lacking = [tool for tool in ("ip", "sshd", "ssh-keygen", "nsenter", "unshare", *more) if not shutil.which(tool, path=PATH)]
    if lacking:
        return f"{', '.join(lacking)} missing: tests/cluster/install.sh installs what it takes"
    allowed = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True)
    return f"no namespaces here ({allowed.stderr.strip()}): start the container --privileged" if allowed.returncode else None


LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What tests in this process have set for themselves."""
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"


def needed(why):
    """Skip the test that there is this reason against; where all must run, fail it."""
    if why and os.environ.get("DS_PRETRAIN_ALL_TESTS"):
        pytest.fail(why)
    if why:
        pytest.skip(why)


class Hosts:
    """`with Hosts() as hosts: hosts.run("host1", [...])`"""

    def __init__(self, *names):
        self.folder = Path(tempfile.mkdtemp(prefix="hosts-"))  # short: names of sockets have a limit
        self.names = names or ("host1", "host2")
        self._mark = self.folder.name.removeprefix("hosts-")
        self._outer, self._inner = {}, {}

    def __enter__(self):
        try:
            self._keys()
            self._switch()
            for number, name in enumerate(self.names, start=1):
                self._boot(number, name)
            for name in self.names:
                self._wait_for_ssh(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for name in self.names:
            self.crash(name)
            self._ip("netns", "del", self._space(name), check=False)
        self._ip("netns", "del", self._space("switch"), check=False)
        shutil.rmtree(self.folder, ignore_errors=True)
        deadline = time.monotonic() + 20
        while left := self.left():
            assert time.monotonic() < deadline, f"still there: {left}"
            time.sleep(0.1)

    def left(self):
        """What is left of the hosts on this machine: processes and namespaces."""
        spaces = subprocess.run(["ip", "netns"], capture_output=True, text=True, env={**os.environ, "PATH": PATH}).stdout
        return [name for name in spaces.split() if name.startswith(self._mark)] + [
            process.name for process in Path("/proc").glob("[0-9]*") if self._ours(process)
        ]

    def _ours(self, process):
        with contextlib.suppress(OSError):
            return f"TMPDIR={self.folder}/".encode() in (process / "environ").read_bytes()
        return False

    def run(self, host, command, timeout=120, **env):
        """Run a command on a host."""
        return subprocess.run(
            self.entering(host, command), env=self._env(host, env), capture_output=True, text=True, timeout=timeout
        )

    def start(self, host, command, **env):
        """The same, running."""
        into = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(self.entering(host, command), env=self._env(host, env), text=True, **into)

    def entering(self, host, command):
        return [
            "nsenter",
            "-t",
            str(self._inner[host]),
            "-n",
            "-u",
            "-m",
            "-p",
            "-i",
            f"--wd={os.getcwd()}",
            *map(str, command),
        ]

    def meets(self, host, port, network=OTHER):
        """Whether processes of a host are joined to others by a port of its address in a network."""
        joined = self.run(host, ["ss", "-Htn", "state", "established"]).stdout.replace("]", "")  # [::ffff:10.78.0.1]:10009
        return f"{network}.{self.names.index(host) + 1}:{port} " in joined

    def plug(self, host, plugged):
        """Put the network cable in, or pull it."""
        port = f"p{self.names.index(host) + 1}"
        self._ip("-n", self._space("switch"), "link", "set", port, "up" if plugged else "down")

    def crash(self, host):
        """The power goes: every process of the host is gone at once."""
        for pid in (self._inner.pop(host, None), self._outer.pop(host, None)):
            if pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def restart(self, host):
        """The power comes back."""
        shutil.rmtree(self.folder / host)
        self._ip("netns", "del", self._space(host))
        for port in "pq":
            self._ip("-n", self._space("switch"), "link", "del", f"{port}{self.names.index(host) + 1}", check=False)
        self._boot(self.names.index(host) + 1, host)
        self._wait_for_ssh(host)

    def limit(self, host, mbit):
        """Let so many million bits a second through a host's cable, in each direction; 0: all."""
        number = self.names.index(host) + 1
        for space, device in ((self._space(host), "eth0"), (self._space("switch"), f"p{number}")):
            on = ["netns", "exec", space, "tc", "qdisc"]
            self._ip(*on, "del", "dev", device, "root", check=False)
            if mbit:
                bucket = ["rate", f"{mbit}mbit", "burst", "64kb", "latency", "50ms"]
                self._ip(*on, "add", "dev", device, "root", "tbf", *bucket)

    def part(self, one, other):
        """Nothing that one of these hosts sends to the other arrives from now on."""
        for host, lost in ((one, other), (other, one)):
            nobody = ["lladdr", "02:00:00:00:00:99", "dev", "eth0", "nud", "permanent"]
            address = f"{SUBNET}.{self.names.index(lost) + 1}"
            self._ip("-n", self._space(host), "neigh", "replace", address, *nobody)

    def rejoin(self, one, other):
        for host, lost in ((one, other), (other, one)):
            address = f"{SUBNET}.{self.names.index(lost) + 1}"
            self._ip("-n", self._space(host), "neigh", "del", address, "dev", "eth0")

    def _env(self, host, more):
        ours = {key: value for key, value in os.environ.items() if key not in LAUNCHED}
        return {**ours, "PATH": PATH, "TMPDIR": str(self.folder / host), **more}

    def _space(self, name):
        return f"{self._mark}{name}"

    def _ip(self, *arguments, check=True):
        subprocess.run(["ip", *arguments], check=check, capture_output=True, env={**os.environ, "PATH": PATH})

    def _keys(self):
        ssh = self.folder / "ssh"
        ssh.mkdir(parents=True, mode=0o700)
        for key in (ssh / "id_ed25519", self.folder / "hostkey"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        shutil.copy(ssh / "id_ed25519.pub", ssh / "authorized_keys")
        public = " ".join((self.folder / "hostkey.pub").read_text().split()[:2])
        addresses = [(name, f"{SUBNET}.{number}") for number, name in enumerate(self.names, start=1)]
        (ssh / "known_hosts").write_text("".join(f"{name},{address} {public}\n" for name, address in addresses))
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses)]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        (self.folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")  # DNS would wait 10 s

    def _switch(self):
        space = self._space("switch")
        self._ip("netns", "add", space)
        for bridge in ("br0", "br1"):
            self._ip("-n", space, "link", "add", bridge, "type", "bridge")
            self._ip("-n", space, "link", "set", bridge, "up")

    def _boot(self, number, name):
        space = self._space(name)
        self._ip("netns", "add", space)
        self._ip("-n", space, "link", "set", "lo", "up")
        self._lay(space, "eth0", f"{SUBNET}.{number}", f"p{number}", "br0")
        self._lay(space, "ib0", f"{OTHER}.{number}", f"q{number}", "br1")
        own = self.folder / name
        own.mkdir()
        (own / "init.sh").write_text(self._init(name, own))
        isolate = ["unshare", "--uts", "--mount", "--pid", "--ipc", "--fork", "--kill-child", "--mount-proc"]
        with (own / "log").open("w") as log:
            command = ["ip", "netns", "exec", space, *isolate, "bash", str(own / "init.sh")]
            quiet = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "start_new_session": True}
            self._outer[name] = subprocess.Popen(command, env=self._env(name, {}), **quiet).pid
        self._inner[name] = self._wait_for_init(name, own / "ready")

    def _lay(self, space, device, address, port, bridge):
        """A cable from a device of a host to a port of the switch."""
        cable, switch = f"{self._mark}{port}", self._space("switch")
        self._ip("link", "add", cable, "netns", space, "type", "veth", "peer", "name", port, "netns", switch)
        self._ip("-n", space, "link", "set", cable, "name", device)
        self._ip("-n", space, "addr", "add", f"{address}/24", "dev", device)
        self._ip("-n", space, "link", "set", device, "up")
        self._ip("-n", switch, "link", "set", port, "master", bridge, "up")

    def _init(self, name, own):
        home = Path.home()
        (home / ".ssh").mkdir(mode=0o700, exist_ok=True)
        config = ["Port 22", f"HostKey {self.folder}/hostkey", "PidFile none", "PermitRootLogin prohibit-password", "UsePAM no",
                  f"AuthorizedKeysFile {home}/.ssh/authorized_keys", "StrictModes no", "PasswordAuthentication no",
                  f"SetEnv TMPDIR={own}"]  # fmt: skip
        (own / "sshd_config").write_text("\n".join(config) + "\n")
        lines = [
            "set -e",
            f"hostname {name}",
            f"mount --bind {self.folder}/hosts /etc/hosts",
            f"mount --bind {self.folder}/nsswitch.conf /etc/nsswitch.conf",
            f"mount --bind {self.folder}/ssh {home}/.ssh",
            "mount -t tmpfs tmpfs /dev/shm",
            "mkdir -p /run/sshd",
            f"touch {own}/ready",
            f"exec {shutil.which('sshd', path=PATH)} -D -e -f {own}/sshd_config",
        ]
        return "\n".join(lines) + "\n"

    def _wait_for_ssh(self, name):
        deadline = time.monotonic() + 20
        while self.run(name, ["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/22"]).returncode:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{name} has no ssh server: {(self.folder / name / 'log').read_text()}")
            time.sleep(0.05)

    def _wait_for_init(self, name, ready):
        """The host's first process, seen from here."""
        deadline = time.monotonic() + 20
        while not ready.exists():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{name} did not start: {(ready.parent / 'log').read_text()}")
            time.sleep(0.02)
        children = Path(f"/proc/{self._outer[name]}/task/{self._outer[name]}/children").read_text().split()
        return int(children[0])
