"""The files in config/ that start the agent: each is valid, and they agree with one another."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from agent.config import Config, parse
from tests.conftest import find_kubernetes_validate
from tests.support import require

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "config"
UNIT = CONFIG / "servefit-agent.service"
CONTAINER = CONFIG / "Containerfile"
KUBERNETES = CONFIG / "kubernetes.yaml"
PORT = int(Config().agent.listen.rpartition(":")[2])
COMMAND = ["run", "--config", "/etc/servefit/agent.toml"]
STATE = "/var/lib/servefit"

# ----------------------------------------------------------------------------------------- systemd


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(UNIT.read_text("utf-8"))
    return parser


def test_the_unit_tells_systemd_when_it_is_ready_and_that_it_lives() -> None:
    service = unit()["Service"]
    assert service["Type"] == "notify"
    assert int(service["WatchdogSec"]) > 0
    assert service["ExecReload"].endswith("-HUP $MAINPID")
    assert service["ExecStart"].split()[1:] == COMMAND
    assert service["Restart"] == "always"


def test_the_unit_keeps_the_store_where_the_agent_looks_for_it() -> None:
    service = unit()["Service"]
    assert f"/var/lib/{service['StateDirectory']}" == STATE
    assert service["Environment"] == "XDG_DATA_HOME=%S"  # %S: /var/lib
    assert Config().agent.db.parts[-2:] == (service["StateDirectory"], "agent.db")


def test_the_unit_is_hardened_and_leaves_gpus_and_processes_visible() -> None:
    service = unit()["Service"]
    assert service["ProtectSystem"] == "strict"
    for key in ("NoNewPrivileges", "ProtectHome", "PrivateTmp", "ProtectKernelModules",
                "ProtectControlGroups", "RestrictNamespaces", "DynamicUser"):  # fmt: skip
        assert service[key] == "yes", key
    assert service["CapabilityBoundingSet"] == ""
    for key in ("PrivateDevices", "ProtectClock", "DeviceAllow", "ProtectProc", "PrivateNetwork"):
        assert key not in service, f"{key} would hide what the agent observes"


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    """With another program in place of the agent's, which is not installed where it says."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd here; the keys are tested without it")
    copy = tmp_path / UNIT.name
    copy.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", UNIT.read_text(), flags=re.M))
    said = subprocess.run([analyze, "verify", "--man=no", copy], capture_output=True, text=True)
    assert (said.returncode, said.stdout + said.stderr) == (0, "")


# --------------------------------------------------------------------------------------- container


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", CONTAINER.read_text("utf-8"), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [
        (word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines) if word
    ]


def test_the_container_runs_the_wheels_command_as_nobody_special() -> None:
    said = dict(instructions())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert re.fullmatch(r"docker\.io/library/python:3\.\d+-slim", said["FROM"])
    assert said["COPY"] == f"dist/{project['name']}-*.whl /tmp/"
    assert yaml.safe_load(said["ENTRYPOINT"]) == ["agent"]
    assert "agent" in project["scripts"]
    assert yaml.safe_load(said["CMD"]) == COMMAND
    assert said["USER"] == "10001"
    assert f"--uid {said['USER']}" in said["RUN"]
    assert said["EXPOSE"] == str(PORT)
    assert f":{PORT}/livez" in said["HEALTHCHECK"]


def test_the_container_keeps_the_store_on_its_volume() -> None:
    said = dict(instructions())
    assert said["VOLUME"] == STATE
    assert "XDG_DATA_HOME=/var/lib" in said["ENV"].split()
    assert STATE in said["RUN"]


# -------------------------------------------------------------------------------------- Kubernetes


def objects() -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(KUBERNETES.read_text("utf-8")) if one]


def named(kind: str) -> dict[str, dict[str, Any]]:
    return {one["metadata"]["name"]: one for one in objects() if one["kind"] == kind}


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    for one in objects():
        if one["kind"] in ("DaemonSet", "Deployment"):
            wanted = one["spec"]["selector"]["matchLabels"]
            assert wanted == one["spec"]["template"]["metadata"]["labels"]
            yield one["kind"], one["spec"]["template"]["spec"]


def agent_of(pod: dict[str, Any]) -> dict[str, Any]:
    (agent,) = (one for one in pod["containers"] if one["name"] == "agent")
    return dict(agent)


def test_the_manifest_is_valid_by_kubernetes_own_schemas() -> None:
    command = find_kubernetes_validate()
    require(command, "Kubernetes' schemas (make real-parts)")
    said = subprocess.run(
        [str(command), "--strict", str(KUBERNETES)], capture_output=True, text=True
    )
    assert said.returncode == 0, said.stdout + said.stderr
    assert said.stdout.count("passed for resource") == len(objects())


def test_both_ways_are_there() -> None:
    assert [kind for kind, _ in pods()] == ["DaemonSet", "Deployment"]


@pytest.mark.parametrize("pod", [pod for _, pod in pods()], ids=[kind for kind, _ in pods()])
def test_a_pod_names_only_what_is_there(pod: dict[str, Any]) -> None:
    agent = agent_of(pod)
    volumes = {one["name"]: one for one in pod["volumes"]}
    mounts = {one["name"]: one["mountPath"] for one in agent["volumeMounts"]}
    assert mounts.keys() == volumes.keys()
    assert mounts["store"] == STATE
    configmap = named("ConfigMap")[volumes["config"]["configMap"]["name"]]
    assert mounts["config"] + "/agent.toml" == COMMAND[-1]
    config = parse(configmap["data"]["agent.toml"], folder=Path(mounts["config"]))
    assert config.agent.db == Path(STATE) / "agent.db"
    assert config.agent.token_file == Path(mounts["secret"]) / "token"
    assert config.agent.listen == f"0.0.0.0:{PORT}"
    claim = volumes["store"].get("persistentVolumeClaim", {}).get("claimName")
    assert claim is None or claim in named("PersistentVolumeClaim")
    (port,) = agent["ports"]
    assert port["containerPort"] == PORT
    for probe in (agent["livenessProbe"], agent.get("readinessProbe", agent["livenessProbe"])):
        assert probe["httpGet"]["port"] == port["name"]
        # The agent answers only under names that are its own.
        assert probe["httpGet"]["httpHeaders"] == [{"name": "Host", "value": "localhost"}]


@pytest.mark.parametrize("pod", [pod for _, pod in pods()], ids=[kind for kind, _ in pods()])
def test_a_pod_is_hardened_and_takes_no_gpu_from_the_scheduler(pod: dict[str, Any]) -> None:
    agent = agent_of(pod)
    security = agent["securityContext"]
    assert security["allowPrivilegeEscalation"] is False
    assert security["readOnlyRootFilesystem"] is True
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert not any("gpu" in name for name in agent["resources"]["limits"])
    assert pod["automountServiceAccountToken"] is False
    assert pod["runtimeClassName"] == "nvidia"
    # The servers' URLs are those of the pod: what is observed is on the loopback.
    configmap = named("ConfigMap")[pod["volumes"][0]["configMap"]["name"]]
    ports = [p["containerPort"] for one in pod["containers"] for p in one["ports"]]
    for server in parse(configmap["data"]["agent.toml"]).server:
        assert int(server.url.rpartition(":")[2]) in ports


def test_the_images_are_of_this_version() -> None:
    from agent import __version__

    assert {agent_of(pod)["image"].rpartition(":")[2] for _, pod in pods()} == {__version__}


# -------------------------------------------------------------------------------------- Prometheus


def test_prometheus_scrapes_the_agents_default_address() -> None:
    said = yaml.safe_load((CONFIG / "prometheus.yml").read_text("utf-8"))
    (job,) = said["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
    assert job["static_configs"] == [{"targets": [Config().agent.listen]}]
