"""A SLURM cluster on one machine: a controller and nodes, each a host of its own (see hosts.py), with Debian's own daemons."""

import os
import shutil
import stat
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

from hosts import PATH, Hosts
from hosts import missing as no_hosts

HEAD, SPARE = "head", "node3"
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "DEADLINE", "OUT_OF_MEMORY"}
CONF = """
ClusterName=test
SlurmctldHost=head
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
SlurmctldTimeout=10
SlurmdTimeout=10
InactiveLimit=0
KillWait=5
MessageTimeout=10
ReturnToService=2
JobRequeue=1
BatchStartTimeout=10
CompleteWait=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
GresTypes=gpu
{nodes}
PartitionName=main Nodes={names},{spare} Default=YES State=UP PriorityTier=5 PreemptMode=OFF
PartitionName=low Nodes={names} State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes={names} State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing():
    """Why there can be no cluster here; None if there can."""
    lacking = [tool for tool in ("slurmctld", "slurmd", "sbatch", "munged") if not shutil.which(tool, path=PATH)]
    return no_hosts() or (f"{', '.join(lacking)} missing: tests/cluster/install.sh installs what it takes" if lacking else None)


class Slurm(Hosts):
    """`with Slurm() as cluster: cluster.sbatch("launchers/slurm.sbatch", ...)`; nodes are node1 and node2 with 4 CPUs each. A
    third, in the partition main, is down until it is lent."""

    def __init__(self):
        super().__init__(HEAD, "node1", "node2", SPARE)
        self.nodes = [name for name in self.names if name not in (HEAD, SPARE)]

    def __enter__(self):
        super().__enter__()
        try:
            self._configure()
            self._munge()
            self.start_daemon(HEAD, "slurmctld", "-D", "-i")
            for node in self.nodes:
                self.start_daemon(node, "slurmd", "-D", "-N", node)
            self.wait(lambda: self.states() == dict.fromkeys(self.nodes, "idle"), 30, "nodes are not idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def start_daemon(self, host, program, *arguments):
        with (self.folder / f"{program}.{host}.out").open("w") as log:
            command = self.entering(host, [shutil.which(program, path=PATH), *arguments])
            quiet = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "start_new_session": True}
            subprocess.Popen(command, env=self._env(host, {}), **quiet)

    def boot(self, node):
        """A node that crashed comes back."""
        self.restart(node)
        self.start_daemon(node, "slurmd", "-D", "-N", node)

    @contextmanager
    def spare(self):
        """Inside, the third node is there too."""
        self.start_daemon(SPARE, "slurmd", "-D", "-N", SPARE)
        self.client("scontrol", "update", f"nodename={SPARE}", "state=resume")
        self.wait(lambda: self.states(SPARE) == {SPARE: "idle"}, 30, f"{SPARE} is not idle")
        yield SPARE
        self.client("scontrol", "update", f"nodename={SPARE}", "state=down", "reason=spare")

    def client(self, *command, timeout=30, **env):
        """A SLURM command on the head; its output."""
        ran = self.run(HEAD, command, timeout=timeout, **env)
        assert ran.returncode == 0, (command, ran.stdout, ran.stderr)
        return ran.stdout

    def sbatch(self, *arguments, **env):
        """Submit; the job's number."""
        return int(self.client("sbatch", "--parsable", *map(str, arguments), **env).split(";")[0])

    def states(self, *nodes):
        """What nodes are to the controller: of node1 and node2, or of these."""
        asked = ",".join(nodes or self.nodes)
        return dict(
            line.split() for line in self.client("sinfo", "-h", "-N", "-p", "main", "-n", asked, "-o", "%N %t").splitlines()
        )

    def job(self, number):
        """What the controller knows of a job."""
        words = self.client("scontrol", "-o", "show", "job", str(number)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def ended(self, number, seconds=300, log=lambda: ""):
        """A job's last state, when it has one."""
        self.wait(lambda: self._over(number), seconds, f"job {number} does not end", log)
        return self.job(number)["JobState"]

    def _over(self, number):
        """Whether a job has ended; one that was requeued starts soon: SLURM would let it wait two minutes."""
        job = self.job(number)
        if job["JobState"] == "PENDING" and job["Reason"] == "BeginTime":
            time.sleep(2)  # what is left of it must be gone
            self.run(HEAD, ["scontrol", "update", f"jobid={number}", "StartTime=now"])
        return job["JobState"] in OVER

    def wait(self, until, seconds, what, log=lambda: "", every=0.2):
        deadline = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < deadline, f"{what}:\n{self.log()}\n{log()}"
            time.sleep(every)

    def log(self):
        return "\n".join(path.read_text()[-3000:] for path in sorted(self.folder.glob("slurm*.log")))

    def _env(self, host, more):
        return super()._env(host, {"SLURM_CONF": str(self.folder / "slurm.conf"), **more})

    def _configure(self):
        begin = {**dict.fromkeys(self.nodes, "UNKNOWN"), SPARE: "DOWN"}
        nodes = "\n".join(f"NodeName={name} CPUs=4 RealMemory=8000 Gres=gpu:4 State={state}" for name, state in begin.items())
        text = CONF.format(folder=self.folder, nodes=nodes, names=",".join(self.nodes), spare=SPARE)
        (self.folder / "slurm.conf").write_text(text)
        for number in range(4):  # devices that do nothing, so that scripts that ask for GPUs run unchanged
            os.mknod(self.folder / f"gpu{number}", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-3]\n")
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # not looked for: a host has none
        for name in ("state", *(f"spool.{node}" for node in (*self.nodes, SPARE))):
            (self.folder / name).mkdir()

    def _munge(self):
        folder = self.folder / "munge"
        folder.mkdir(mode=0o755)
        key = folder / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self.folder.chmod(0o755)
        files = [f"--{name}={folder / name}" for name in ("pid-file", "log-file", "seed-file")]
        self.start_daemon(
            HEAD, "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder / 'socket'}", *files
        )
        self.wait(lambda: Path(folder / "socket").exists(), 10, "munged does not start")
