"""Files for clusters: each is read by its own linter, and what it calls exists."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from flows.cli.main import main
from pretrain.config import PretrainConfig
from tests import slurm_cluster
from tests.daemons import Daemons, free_ports

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "infra" / "docker" / "Dockerfile"
MANIFESTS = sorted((ROOT / "infra" / "kubernetes").glob("*.yaml"))
SCRIPTS = sorted((ROOT / "infra" / "slurm").glob("*.sbatch"))
TEMPLATE = ROOT / "infra" / "kubernetes" / "job-template.json"
KUBERNETES = "1.34"


def linted(program: str, *arguments: str) -> None:
    command = [str(Path(sys.executable).with_name(program)), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_image_is_built_as_its_linter_likes_and_runs_as_nobody_special() -> None:
    linted("hadolint", "--failure-threshold", "style", str(DOCKERFILE))
    lines = DOCKERFILE.read_text().splitlines()
    assert [line for line in lines if line.startswith("USER ")] == ["USER 1000"]
    assert lines.index("USER 1000") > max(number for number, line in enumerate(lines) if line.startswith("FROM "))
    stages = {line.split()[3] for line in lines if line.startswith("FROM ")}
    for line in (line for line in lines if line.startswith("COPY ")):
        *sources, _ = line.split()[1:]
        if sources[0].startswith("--from="):
            assert sources[0].removeprefix("--from=") in stages
        else:
            assert all((ROOT / source).exists() for source in sources)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    rooms = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    assert {"infra", "pretrain", "curation", "distill", "eval", "flows", "pyproject.toml", "constraints.txt"} < rooms
    extras = re.findall(r"--extra (\w+)", DOCKERFILE.read_text())
    import tomllib

    assert set(extras) <= set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_are_what_kubernetes_knows(path: Path) -> None:
    documents = list(yaml.safe_load_all(path.read_text()))
    assert documents
    for each in documents:
        kubernetes_validate.validate(each, KUBERNETES, strict=True)
        assert list(complaints(each)) == []


def test_complaints_are_made() -> None:
    """The checks of this file, which the schemas lack, find what is wrong."""
    wrong = {
        "kind": "Deployment",
        "spec": {
            "selector": {"matchLabels": {"app": "a"}},
            "template": {
                "metadata": {"labels": {"app": "b"}},
                "spec": {
                    "containers": [
                        {
                            "name": "c",
                            "env": [{"name": "PASSWORD", "value": "hunter2"}],
                            "volumeMounts": [{"name": "gone", "mountPath": "/x"}],
                            "readinessProbe": {"httpGet": {"path": "/", "port": "nowhere"}},
                            "resources": {"limits": {"nvidia.com/gpu": "2", "memory": "3GiB"}},
                        }
                    ]
                },
            },
        },
    }
    found = sorted(each.split(":")[0] for each in complaints(wrong))
    assert found == ["GPUs", "image", "port", "quantity", "runs as root", "secret", "selector", "volume"]


def complaints(manifest: dict[str, Any]) -> Iterator[str]:
    """What a schema does not say: names that nothing has, amounts that are none, root, secrets."""
    spec = manifest.get("spec", {})
    template = spec.get("template", {})
    labels = template.get("metadata", {}).get("labels", {})
    if "matchLabels" in (spec.get("selector") or {}) and not spec["selector"]["matchLabels"].items() <= labels.items():
        yield f"selector: {spec['selector']}"
    pod = template.get("spec")
    if pod is None:
        return
    if not pod.get("securityContext", {}).get("runAsNonRoot"):
        yield "runs as root"
    claims = {each["metadata"]["name"] for each in spec.get("volumeClaimTemplates", [])}
    volumes = {each["name"] for each in pod.get("volumes", [])} | claims
    for container in pod["containers"]:
        if ":" not in container.get("image", "") or container["image"].endswith(":latest"):
            yield f"image: {container.get('image')}"
        ports = {each["name"] for each in container.get("ports", [])}
        for probe in ("readinessProbe", "livenessProbe"):
            port = container.get(probe, {}).get("httpGet", {}).get("port")
            if isinstance(port, str) and port not in ports:
                yield f"port: {port}"
        yield from (f"volume: {m['name']}" for m in container.get("volumeMounts", []) if m["name"] not in volumes)
        yield from _amounts(container.get("resources", {}))
        for variable in container.get("env", []):
            literal = variable.get("value", "").replace("$(PASSWORD)", "")
            if re.search("PASSWORD|SECRET|TOKEN", variable["name"]) and literal:
                yield f"secret: {variable['name']}"


def _amounts(resources: dict[str, dict[str, str]]) -> Iterator[str]:
    for amounts in resources.values():
        for name, amount in amounts.items():
            if not re.fullmatch(r"\d+(\.\d+)?(m|[kMGTP]i?)?", amount):
                yield f"quantity: {name} {amount}"
    gpus = [resources.get(which, {}).get("nvidia.com/gpu") for which in ("requests", "limits")]
    if gpus[0] != gpus[1]:
        yield f"GPUs: {gpus}"


def test_the_training_of_the_manifest_is_one_that_the_command_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import training

    (job,) = [
        each
        for each in yaml.safe_load_all((ROOT / "infra" / "kubernetes" / "training.yaml").read_text())
        if each["kind"] == "Job"
    ]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    seen: list[PretrainConfig] = []
    monkeypatch.setattr(training, "train", lambda _, config: seen.append(config))
    main([*container["command"][1:], *container["args"]])
    (config,) = seen
    assert config.launch.nnodes == job["spec"]["completions"]
    assert config.launch.nproc_per_node == int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert config.launch.rdzv_endpoint == "fovea-training-0.fovea-training:29500"


def test_the_job_template_makes_jobs() -> None:
    from prefect.workers.base import BaseWorker
    from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

    assert BaseWorker.get_worker_class_from_type("kubernetes") is not None
    template = json.loads(TEMPLATE.read_text())
    names = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(template["job_configuration"])))
    assert names == set(template["variables"]["properties"])
    values = {name: each.get("default") for name, each in template["variables"]["properties"].items()}
    filled = json.dumps(template["job_configuration"]["job_manifest"])
    for name, value in (values | {"labels": {"a": "b"}, "env": [], "command": ["x"], "name": "run"}).items():
        filled = filled.replace(f'"{{{{ {name} }}}}"', json.dumps(value)).replace(f"{{{{ {name} }}}}", str(value))
    job = json.loads(filled)
    kubernetes_validate.validate(job, KUBERNETES, strict=True)
    assert list(complaints(job)) == []
    assert set(template["job_configuration"]) <= set(KubernetesWorkerJobConfiguration.model_fields)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_as_their_linter_likes(path: Path) -> None:
    linted("shellcheck", str(path))
    lines = path.read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert any(line.startswith("#SBATCH ") for line in lines[:first])
    assert not any(re.match(r"#\s*SBATCH", line) for line in lines[first:])  # which SLURM would pass over
    assert not any("$" in line for line in lines[:first] if line.startswith("#SBATCH"))


CONTROLLER = """\
ClusterName=files
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
CommunicationParameters=NoCtldInAddrAny
SlurmUser=root
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
GresTypes=gpu
ResumeProgram=/bin/true
SuspendProgram=/bin/true
SuspendTime=60
EnforcePartLimits=ALL
NodeName=n[1-8] State=CLOUD CPUs=64 Boards=1 SocketsPerBoard=2 CoresPerSocket=32 RealMemory=1000000 Gres=gpu:8
PartitionName=gpu Nodes=ALL Default=YES MaxTime=2-00:00:00 State=UP
"""


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a SLURM controller of eight machines with GPUs that are not there: it judges requests."""
    folder = tmp_path_factory.mktemp("controller")
    for each in ("state", "log"):
        (folder / each).mkdir()
    (port,) = free_ports(1)
    file = folder / "slurm.conf"
    file.write_text(CONTROLLER.format(host=socket.gethostname(), port=port, folder=folder))
    environment = {**os.environ, "SLURM_CONF": str(file)}
    daemons = Daemons("SLURM's controller", folder, 60)
    daemons.start("slurmctld", "slurmctld", "-D", "-c", environment=environment)
    ping = ["scontrol", "ping"]
    while "UP" not in subprocess.run(ping, env=environment, capture_output=True, text=True, timeout=30).stdout:
        daemons.keep_waiting("slurmctld")
        time.sleep(0.2)
    yield environment
    daemons.running["slurmctld"].kill()
    daemons.running["slurmctld"].wait()


@pytest.mark.cluster
@pytest.mark.skipif(slurm_cluster.missing() is not None, reason=slurm_cluster.missing() or "")
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_slurm_takes_the_scripts(path: Path, controller: dict[str, str], tmp_path: Path) -> None:
    def asked(script: Path) -> subprocess.CompletedProcess[str]:
        command = ["sbatch", "--test-only", str(script)]
        return subprocess.run(command, env=controller, capture_output=True, text=True, timeout=60)

    done = asked(path)
    assert done.returncode == 0, done.stderr
    wrong = tmp_path / "wrong.sbatch"
    wrong.write_text(path.read_text().replace("#SBATCH --time=", "#SBATCH --time=9"))
    assert asked(wrong).returncode != 0  # nine times ten days is more than the partition has


def test_nothing_is_left_out_of_these_checks() -> None:
    folders = {"docker": [DOCKERFILE], "kubernetes": [*MANIFESTS, TEMPLATE], "slurm": SCRIPTS}
    for folder, checked in folders.items():
        assert sorted(each for each in (ROOT / "infra" / folder).iterdir()) == sorted(checked)
    assert shutil.which("bash")
