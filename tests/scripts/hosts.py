"""Several machines on this one: namespaces of processes, network, names and mounts, joined by a bridge."""

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from tests.conftest import ROOT


class Host:
    """Namespaces, which are gone with every process in them when they are left, or when this process ends.

    Their first process waits until its pipe from this one is closed.

    Raises:
        OSError: the system refuses.
    """

    def __init__(self, name: str):
        self.name = name
        unshare = [
            "unshare",
            "--net",
            "--uts",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ]
        wait = f"hostname {name} && ip link set lo up && echo ready && read _"
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self.first = subprocess.Popen([*unshare, "sh", "-c", wait], **pipes)
        if not self.first.stdout.readline():
            raise OSError(self.first.communicate()[1].decode())

    def __enter__(self) -> "Host":
        return self

    def __exit__(self, *_) -> None:
        self.first.communicate()

    def inside(self, *command: str) -> list:
        """What runs a command in here, in the checkout."""
        files = {"net": "net", "uts": "uts", "mount": "mnt", "pid": "pid_for_children"}
        enter = [f"--{kind}=/proc/{self.first.pid}/ns/{file}" for kind, file in files.items()]
        return ["nsenter", *enter, "env", f"--chdir={ROOT}", *command]

    def run(self, command: str) -> None:
        """Runs a command that must succeed."""
        subprocess.run(self.inside(*command.split()), check=True)

    def link(self, command: str) -> None:
        """Runs ``ip link`` in its network alone: numbers of processes are those that this process sees."""
        subprocess.run(
            ["nsenter", f"--net=/proc/{self.first.pid}/ns/net", "ip", "link", *command.split()],
            check=True,
        )

    def kill(self) -> None:
        """Kills all processes but the first at once."""
        subprocess.run(self.inside("sh", "-c", "kill -9 -1"), check=True)

    def slow_down(self) -> None:
        """Lets it send 2.5 MB a second: a second or two for the gradients of the tiny model."""
        self.run("tc qdisc replace dev eth0 root tbf rate 20mbit burst 64kb latency 1s")

    def speed_up(self) -> None:
        """Ends :meth:`slow_down`."""
        self.run("tc qdisc del dev eth0 root")


class Cluster:
    """Hosts node0, node1, ... of addresses 10.77.0.1, ..., joined by a bridge, which is a host, too.

    Args:
        folder: for what the nodes say, and their own folders.
        local: a folder to make that is another one, ``folder/<node>``, on each node.
    """

    def __init__(self, stack: ExitStack, count: int, folder: Path, local: Path):
        self.folder = folder
        names = [f"node{number}" for number in range(count)]
        self.switch, *self.nodes = (stack.enter_context(Host(name)) for name in ("switch", *names))
        lines = [
            f"{prefix}10.77.0.{number} {name}\n"
            for number, name in enumerate(names, 1)
            for prefix in ("", "::ffff:")
        ]
        (folder / "hosts").write_text("".join(["127.0.0.1 localhost\n", *lines]))
        local.mkdir()
        self.switch.link("add bridge type bridge")
        self.switch.link("set bridge up")
        for number, node in enumerate(self.nodes, 1):
            self.switch.link(f"add {node.name} type veth peer name eth0 netns {node.first.pid}")
            self.switch.link(f"set {node.name} up master bridge")
            node.run(f"ip address add 10.77.0.{number}/24 dev eth0")
            node.link("set eth0 up")
            (folder / node.name).mkdir()
            node.run(f"mount --bind {folder}/hosts /etc/hosts")
            node.run(f"mount --bind {folder}/{node.name} {local}")

    def cut_off(self, node: Host) -> None:
        """Pulls a node's cable out of the bridge: what is sent gets lost, and nobody is told."""
        self.switch.link(f"set {node.name} nomaster")

    def plug_in(self, node: Host) -> None:
        """Ends :meth:`cut_off`."""
        self.switch.link(f"set {node.name} master bridge")

    def start(self, node: Host, command: str, restarts: int = 3) -> subprocess.Popen:
        """Starts a command on one node as docs/training.md says."""
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nnodes={len(self.nodes)}",
            "--nproc_per_node=1",
        ]
        launcher += [
            f"--max_restarts={restarts}",
            "--rdzv_backend=c10d",
            "--rdzv_endpoint=node0:29400",
            "--rdzv_id=test",
        ]
        variables = [
            "OMP_NUM_THREADS=1",
            f"PYTHONPATH={ROOT}",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
        ]
        with self.log(node).open("a") as log:
            return subprocess.Popen(
                node.inside("env", *variables, *launcher, *command.split()), stdout=log, stderr=log
            )

    def start_all(self, command: str, restarts: int = 3) -> list[subprocess.Popen]:
        """Starts a command on all nodes, whose logs begin anew."""
        for node in self.nodes:
            self.log(node).unlink(missing_ok=True)
        return [self.start(node, command, restarts) for node in self.nodes]

    def finish(self, launchers: list[subprocess.Popen]) -> list[int]:
        """The exit statuses of a command."""
        self.wait(lambda: all(launcher.poll() is not None for launcher in launchers))
        return [launcher.returncode for launcher in launchers]

    def wait(self, condition: Callable[[], bool], seconds: float = 600) -> None:
        """Waits for a condition; kills all and raises TimeoutError with what the nodes said if it does not come."""
        until = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > until:
                for node in self.nodes:
                    node.kill()
                raise TimeoutError("\n".join(self.said(node) for node in self.nodes))
            time.sleep(0.05)

    def log(self, node: Host) -> Path:
        """The file of what a node's processes say."""
        return self.folder / f"{node.name}.log"

    def said(self, node: Host) -> str:
        """What a node's processes have said."""
        return f"{node.name}:\n{self.log(node).read_text()}"
