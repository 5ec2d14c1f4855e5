"""A real SLURM cluster on loopback for tests: Debian's slurm-wlm and munge, two nodes that are daemons of this machine.

The nodes n1 and n2 are in two partitions: `low` (the default), whose jobs are requeued, after twenty seconds of grace,
for a job in `high` that needs their nodes. A job has its nodes for itself. There is no accounting, so no `sacct`.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.daemons import Daemons, free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sinfo", "scontrol", "sbatch", "srun", "scancel")
NODES = ("n1", "n2")
START_SECONDS = 60.0
STOP_SECONDS = 10.0  # for the processes of jobs, once killed
COMMAND_SECONDS = 120.0  # a command that waits for a job longer than this should be polled for instead

# A container has neither systemd nor cgroups, so jobs are tracked by /proc alone. Both nodes offer every core of this
# machine, whatever the daemons find (config_overrides). The daemons bind the address of the host's name, loopback, and
# nothing else (No*InAddrAny). A requeued job waits cred_expire and a second, by default 121 s; the scheduler, which
# looks at the queue once a minute by default, looks every second.
CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}({address})
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={sockets}/munge.socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30
ReturnToService=2
StateSaveLocation={directory}/state
SlurmdSpoolDir={sockets}/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr={address} Port={ports[1]} CPUs={cpus} RealMemory={megabytes}
NodeName=n2 NodeHostname={host} NodeAddr={address} Port={ports[2]} CPUs={cpus} RealMemory={megabytes}
PartitionName=DEFAULT Nodes=ALL OverSubscribe=EXCLUSIVE MaxTime=INFINITE State=UP
PartitionName=low Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high PriorityTier=2 PreemptMode=OFF
"""


@dataclass(frozen=True)
class Slurm:
    """How to reach the cluster: any SLURM command does, in this environment."""

    environment: dict[str, str]

    def run(self, *command: str) -> str:
        """What the command printed; raises with its complaint if it fails."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=COMMAND_SECONDS)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout


def missing() -> str | None:
    """Why this machine cannot run the cluster, or None if it can."""
    if absent := [program for program in PROGRAMS if shutil.which(program) is None]:
        return f"no SLURM here: install Debian's slurm-wlm and munge ({', '.join(absent)})"
    if os.geteuid() != 0:
        return "no SLURM here: its daemons need root"
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        return "no SLURM here: the name of this host has no address"
    if not ipaddress.ip_address(address).is_loopback:  # the daemons bind this one and would be open to the network
        return f"no SLURM here: the name of this host is {address}, not a loopback address, see /etc/hosts"
    return None


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[Slurm]:
    """A cluster, idle, that lives as long as the context. `folder` is its own and keeps the logs."""
    if reason := missing():
        raise RuntimeError(reason)
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as sockets:  # a unix socket's path has 107 bytes
        cluster = _Cluster(folder.resolve(), Path(sockets))
        try:
            yield cluster.start()
        finally:
            cluster.stop()


class _Cluster:
    """The daemons run in the foreground as our children, so that we can end exactly them, however far they came."""

    def __init__(self, directory: Path, sockets: Path) -> None:
        self.directory = directory
        self.sockets = sockets
        self.configuration = directory / "slurm.conf"
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH_"))}
        self.environment = {**inherited, "SLURM_CONF": str(self.configuration)}
        self.daemons = Daemons("SLURM", directory, START_SECONDS)

    def start(self) -> Slurm:
        self._configure()
        # A munged of our own, with its own key and socket: clusters side by side do not meet in the machine's one.
        key, socket_path = self.sockets / "munge.key", self.sockets / "munge.socket"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        files = [f"--{name}-file={self.sockets}/munged.{name}" for name in ("pid", "seed")]
        self._daemon("munged", "munged", "--foreground", f"--key-file={key}", f"--socket={socket_path}", *files)
        while not socket_path.exists():
            self.daemons.keep_waiting("munged")
        self._daemon("slurmctld", "slurmctld", "-D")
        for node in NODES:
            self._daemon(f"slurmd-{node}", "slurmd", "-D", "-N", node)
        while not self._idle():
            self.daemons.keep_waiting("slurmctld")
        return Slurm(dict(self.environment))

    def stop(self) -> None:
        for (
            process
        ) in self.daemons.running.values():  # killed, not asked: a slurmd would wait for its jobs, and none has
            process.kill()  # anything to save
            process.wait()
        self.daemons.running.clear()
        self._kill_jobs()

    def _configure(self) -> None:
        for folder in (self.directory / "state", self.directory / "log", *(self.sockets / node for node in NODES)):
            folder.mkdir(parents=True)
        self.sockets.chmod(0o755)  # munged refuses to start where not everybody reaches its socket
        host = socket.gethostname()
        self.configuration.write_text(
            CONFIGURATION.format(
                host=host,
                address=socket.gethostbyname(host),
                ports=free_ports(1 + len(NODES)),
                sockets=self.sockets,
                directory=self.directory,
                cpus=os.cpu_count(),
                megabytes=psutil.virtual_memory().total // 2**20 // len(NODES),
            )
        )

    def _daemon(self, name: str, *command: str) -> None:
        self.daemons.start(name, *command, environment=self.environment)

    def _idle(self) -> bool:
        command = ("sinfo", "--noheader", "--Node", "--partition=low", "--states=idle")
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=COMMAND_SECONDS)
        return len(done.stdout.splitlines()) == len(NODES)

    def _kill_jobs(self) -> None:
        """Ends what the nodes left running: jobs outlive their daemons, and cancelling waits KillWait for each."""
        deadline = time.monotonic() + STOP_SECONDS
        while left := [process for process in psutil.process_iter() if self._is_ours(process)]:
            if time.monotonic() > deadline:
                raise RuntimeError(f"SLURM's jobs do not end: {left}")
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.05)

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            if process.environ().get("SLURM_CONF") == str(self.configuration):
                return True
            # A slurmstepd writes its title over its environment; it has a socket in its node's spool folder.
            connections = process.net_connections("unix") if process.name() == "slurmstepd" else []
            return any(str(connection.laddr).startswith(f"{self.sockets}/") for connection in connections)
        except psutil.Error:  # it has ended
            return False
