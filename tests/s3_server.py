"""A real S3 server on loopback for tests: Debian's Ceph, whole and in memory, behind its RADOS Gateway."""

from __future__ import annotations

import http.client
import os
import secrets
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.daemons import Daemons, free_ports

PROGRAMS = ("radosgw", "ceph-mon", "ceph-osd", "ceph-mgr", "ceph", "monmaptool", "radosgw-admin")
START_SECONDS = 90.0
STOP_SECONDS = 10.0  # for one daemon, between asking and forcing

# One monitor and one OSD must do: one replica, no spreading over hosts, no keys between the daemons. A foreground
# daemon logs to stderr, which goes to one file each.
CONFIGURATION = """\
[global]
fsid = {fsid}
mon host = {monitor}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
ms mon client mode = crc
ms cluster mode = crc
ms service mode = crc
ms client mode = crc
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 1000
mon data avail crit = 1
osd objectstore = memstore
memstore device bytes = 4294967296
mon data = {directory}/mon
osd data = {directory}/osd
mgr data = {directory}/mgr
crash dir = {directory}/crash
run dir = {sockets}
admin socket = {sockets}/$name.asok
pid file = {sockets}/$name.pid
log to file = false
mon cluster log to file = false
[client.rgw]
rgw data = {directory}/rgw
rgw dns name = localhost
"""


@dataclass(frozen=True)
class S3Server:
    """Where the server is, and the keys of its one user."""

    endpoint: str
    access_key: str
    secret_key: str


def missing() -> list[str]:
    """The programs of the server that this machine does not have."""
    return [program for program in PROGRAMS if shutil.which(program) is None]


@contextmanager
def serving(directory: Path) -> Iterator[S3Server]:
    """An S3 server, empty, that lives as long as the context. `directory` is its own and keeps the logs."""
    if absent := missing():
        raise RuntimeError(f"no S3 server without {', '.join(absent)}")
    with tempfile.TemporaryDirectory(prefix="s3-", dir="/tmp") as sockets:  # a unix socket's path has 107 bytes
        cluster = _Cluster(directory.resolve(), Path(sockets))
        try:
            yield cluster.start()
        finally:
            cluster.stop()


class _Cluster:
    """The daemons run in the foreground as our children, so that we can end exactly them, however far they came."""

    def __init__(self, directory: Path, sockets: Path) -> None:
        self.directory = directory
        self.sockets = sockets
        self.configuration = directory / "ceph.conf"
        self.daemons = Daemons("the S3 server", directory, START_SECONDS)

    def start(self) -> S3Server:
        self._configure()
        self._daemon("ceph-mon", "-i", "a")
        self._tool("osd-create", "ceph", "osd", "create")  # waits for the monitor
        self._tool("osd-mkfs", "ceph-osd", "-i", "0", "--mkfs")
        self._daemon("ceph-osd", "-i", "0")
        self._daemon("ceph-mgr", "-i", "x")
        (port,) = free_ports(1)
        self._daemon("radosgw", "-n", "client.rgw", f"--rgw-frontends=beast endpoint=127.0.0.1:{port}")
        while not _answers(port):
            self.daemons.keep_waiting("radosgw")
        access_key, secret_key = secrets.token_hex(10), secrets.token_hex(20)
        keys = (f"--access-key={access_key}", f"--secret-key={secret_key}")
        self._tool("user-create", "radosgw-admin", "user", "create", "--uid=tests", "--display-name=tests", *keys)
        return S3Server(f"http://127.0.0.1:{port}", access_key, secret_key)

    def stop(self) -> None:
        for process in reversed(self.daemons.running.values()):  # the gateway first: it would wait for a lost OSD
            _end(process)
        self.daemons.running.clear()

    def _configure(self) -> None:
        for name in ("mon", "osd", "mgr", "rgw", "crash", "log"):
            (self.directory / name).mkdir(parents=True)
        fsid, ports = str(uuid.uuid4()), free_ports(2)
        monitor = f"[v2:127.0.0.1:{ports[0]},v1:127.0.0.1:{ports[1]}]"
        self.configuration.write_text(
            CONFIGURATION.format(fsid=fsid, monitor=monitor, directory=self.directory, sockets=self.sockets)
        )
        monmap = str(self.directory / "monmap")
        self._tool("monmap", "monmaptool", "--create", "--fsid", fsid, "--addv", "a", monitor, monmap)
        self._tool("mon-mkfs", "ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap)

    def _daemon(self, program: str, *arguments: str) -> None:
        self.daemons.start(program, *self._command(program, *arguments, "-f"), environment=_environment())

    def _tool(self, name: str, program: str, *arguments: str) -> None:
        """Runs a command to its end; it may wait for a daemon, so the daemons are watched meanwhile."""
        process = self._launch(name, program, *arguments)
        try:
            while process.poll() is None:
                self.daemons.keep_waiting(name)
        finally:
            _end(process)
        if process.returncode:
            raise self.daemons.failure(name, f"exit code {process.returncode}")

    def _launch(self, name: str, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        return self.daemons.launch(name, *self._command(program, *arguments), environment=_environment())

    def _command(self, program: str, *arguments: str) -> list[str]:
        return [program, "-c", str(self.configuration), *arguments]


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("CEPH_")}


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()  # nothing, if it has ended
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
