"""Two hosts: network namespaces joined by a cable, torchrun in each, a shared run folder."""

import os
import shutil
import subprocess
import sys

import pytest

from tests import tiny
from tests.numerics.test_layouts import command
from tests.train.test_torchrun import SCRIPT, assert_equal_weights
from whet.cli import main

HOSTS = {"a": "10.77.31.1", "b": "10.77.31.2"}


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True)


@pytest.fixture
def hosts():
    """Names of two namespaces whose only network is a veth pair between them."""
    names = {host: f"whet_{host}_{os.getpid()}" for host in HOSTS}
    cables = {host: f"wh{host}{os.getpid() % 10**8}" for host in HOSTS}
    if shutil.which("ip") is None:
        pytest.skip("two hosts are made with `ip netns`, which is not installed")
    try:
        ip(f"netns add {names['a']}")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not allowed here: {error.stderr.decode().strip()}")
    try:
        ip(f"netns add {names['b']}")
        ip(f"link add {cables['a']} type veth peer name {cables['b']}")
        for host, address in HOSTS.items():
            ip(f"link set {cables[host]} netns {names[host]}")
            ip(f"-n {names[host]} addr add {address}/24 dev {cables[host]}")
            ip(f"-n {names[host]} link set {cables[host]} up")
            ip(f"-n {names[host]} link set lo up")
        yield {host: (names[host], cables[host]) for host in HOSTS}
    finally:
        for name in names.values():
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "fsdp"])
def test_two_hosts_train_one_model(hosts, tmp_path, shard):
    tiny.model_directory(tmp_path / "base")
    tiny.packed_file(tmp_path / "train.h5", n_rows=8)
    tiny.packed_file(tmp_path / "dev.h5", n_rows=3, seed=1)
    flags = {"save_every": 3} | ({"shard": True} if shard else {})
    words = command(tmp_path, tmp_path / "out", **flags)
    agents, logs = [], []
    for rank, (namespace, cable) in enumerate(hosts.values()):
        logs.append(tmp_path / f"{rank}.log")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
        torchrun += ["--nproc_per_node=2", f"--node_rank={rank}", f"--master_addr={HOSTS['a']}"]
        torchrun += ["--master_port=29431", str(SCRIPT), *words[1:]]
        with open(logs[-1], "w") as out:
            agents.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", namespace, *torchrun],
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": cable},
                )
            )
    try:
        codes = [agent.wait(300) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    assert main(command(tmp_path, tmp_path / "one")) == 0
    assert_equal_weights(tmp_path / "out", tmp_path / "one")
