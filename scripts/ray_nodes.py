"""A Ray cluster of several nodes on one machine, each with an address, processes and temporary files of its own.

    python scripts/ray_nodes.py --nodes 2 -- kvx batch … --engine ray --address auto

Runs a command on the head of such a cluster, for tests and to measure. The nodes share all other files and the
processors. Nothing of them is left when it ends. It needs Linux and root.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

NETWORK = "10.77.0."  # which exists inside the nodes alone
DEVICE = "kvx"  # of every node in it; that of the head is a bridge
PORT = 6379
FILES = "/tmp/ray"  # where Ray keeps its files, and these nodes all temporary ones
SHARED_MEMORY = "64m"  # of a node, as containers have it
STORE = 100_000_000  # bytes for objects, which Ray then keeps below /tmp
SPACES = ("--net", "--mount", "--uts", "--pid")
PATIENCE = 120.0
ENVIRONMENT = os.environ | {
    "RAY_AUTH_MODE": "disabled",  # it would write a token into the home of whoever tests
    "RAY_USAGE_STATS_ENABLED": "0",
    "TMPDIR": FILES,
}
ALIVE = """
import ray._raylet
nodes = ray._raylet.GcsClient(address={address!r}).get_all_node_info(timeout=10).values()
print(*(node.node_manager_address for node in nodes if node.state == 0))
"""


def is_possible() -> bool:
    """Whether this process may make networks, and has the commands for it."""
    line = ["unshare", *SPACES, "--fork", "ip", "link", "add", DEVICE, "type", "bridge"]
    tools = all(shutil.which(one) for one in ("unshare", "nsenter", "ip"))
    return tools and subprocess.run(line, capture_output=True, check=False).returncode == 0


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the cluster: namespaces, which live as long as their first process, which does nothing."""

    number: int
    maker: subprocess.Popen[bytes]
    first: int
    cores: str | None = None
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @classmethod
    def made(cls, number: int, cores: str | None = None) -> Node:
        """A node without a network or Ray. `cores`: the processors that it may use, as taskset has them."""
        line = ["unshare", *SPACES, "--fork", "--mount-proc", "cat"]  # which ends when this process does
        maker = subprocess.Popen(
            line, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        wait_for(lambda: any(command_of(one).strip() == "cat" for one in children(maker.pid)))
        node = cls(number, maker, children(maker.pid)[0], cores)
        try:
            node.run("hostname", f"kvx-{node.number}")
            node.run("mount", "-t", "tmpfs", "-o", f"size={SHARED_MEMORY}", "tmpfs", "/dev/shm")
            Path(FILES).mkdir(exist_ok=True)
            node.run("mount", "-t", "tmpfs", "tmpfs", FILES)
        except BaseException:
            node.end()
            raise
        return node

    @property
    def ip(self) -> str:
        """Its address among the nodes."""
        return f"{NETWORK}{self.number}"

    @property
    def files(self) -> Path:
        """Its temporary files, as they are seen from outside."""
        return Path(f"/proc/{self.first}/root{FILES}")

    def line(self, *command: str) -> list[str]:
        """A command → the same, to be run on the node. Its process is a child of the one that this starts: see kill."""
        pinned = [] if self.cores is None else ["taskset", "--cpu-list", self.cores]
        return ["nsenter", "--target", str(self.first), *SPACES, f"--wdns={Path.cwd()}", "--", *pinned, *command]

    def run(self, *command: str) -> None:
        """Runs a command on the node. Raises CalledProcessError."""
        subprocess.run(self.line(*command), check=True, capture_output=True, timeout=PATIENCE)

    def processes(self) -> list[int]:
        """All that runs on the node, with the numbers that they have outside."""
        network, found = Path(f"/proc/{self.first}/ns/net").readlink(), []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (path / "ns/net").readlink() == network:
                    found.append(int(path.name))
        return found

    def end(self) -> None:
        """Kills all that runs on the node, as a loss of power would."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.first, signal.SIGKILL)
        for process in (*self.started, self.maker):
            process.wait()
        assert self.maker.stdin is not None
        self.maker.stdin.close()


def children(pid: int) -> list[int]:
    """The processes that a process has started, in any of its threads."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text(encoding="ascii").split())
    return found


def command_of(pid: int) -> str:
    """The command of a process, empty where it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8").replace("\0", " ")
    return ""


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kills a command that runs on a node."""
    for pid in children(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()


@dataclass(slots=True)
class Cluster:
    """A head, nodes[0], and further nodes."""

    nodes: list[Node] = field(default_factory=list)
    _numbers: int = 0

    @property
    def address(self) -> str:
        """Of the head, for drivers on any of the nodes."""
        return f"{NETWORK}1:{PORT}"

    def start_head(self, *, cores: str | None = None, **resources: str) -> Node:
        """Starts the head, whose network connects all nodes. `resources` are options of `ray start`, as num_cpus."""
        head = self._made(cores)
        head.run("ip", "link", "add", DEVICE, "type", "bridge")
        _set_up(head)
        self._start(head, "--head", f"--port={PORT}", "--include-dashboard=false", **resources)
        return head

    def start_node(self, *, cores: str | None = None, **resources: str) -> Node:
        """Starts a further node, and returns it when the cluster has it."""
        node, head = self._made(cores), self.nodes[0]
        there = f"{DEVICE}{node.number}"
        cable = ["ip", "link", "add", there, "type", "veth", "peer", "name", DEVICE, "netns", str(node.first)]
        subprocess.run(["nsenter", "--target", str(head.first), "--net", "--", *cable], check=True, timeout=PATIENCE)
        head.run("ip", "link", "set", there, "master", DEVICE, "up")
        _set_up(node)
        self._start(node, f"--address={self.address}", **resources)
        return node

    def lose(self, node: Node) -> None:
        """Ends a node without notice."""
        node.end()
        self.nodes.remove(node)

    def alive(self) -> list[str]:
        """The addresses of the nodes that Ray takes for alive, as it does some seconds longer; none without a head."""
        line = self.nodes[0].line(sys.executable, "-c", ALIVE.format(address=self.address))
        done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=PATIENCE, env=ENVIRONMENT)
        return done.stdout.split()

    def close(self) -> None:
        """Ends all nodes."""
        for node in reversed(self.nodes):
            node.end()
        self.nodes.clear()

    def _made(self, cores: str | None) -> Node:
        self._numbers += 1
        self.nodes.append(node := Node.made(self._numbers, cores))
        return node

    def _start(self, node: Node, *arguments: str, **resources: str) -> None:
        line = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={node.ip}"]
        line += [f"--object-store-memory={STORE}", *arguments]
        line += [f"--{name.replace('_', '-')}={value}" for name, value in resources.items()]
        node.started.append(
            subprocess.Popen(
                node.line(*line),
                env=ENVIRONMENT,
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )
        wait_for(lambda: node.ip in self.alive())


def _set_up(node: Node) -> None:
    """Gives the node its address. All others, and the world, are beyond the same device."""
    node.run("ip", "link", "set", "lo", "up")
    node.run("ip", "address", "add", f"{node.ip}/24", "dev", DEVICE)
    node.run("ip", "link", "set", DEVICE, "up")
    node.run("ip", "route", "add", "default", "dev", DEVICE)


def wait_for(true: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """Returns when it is true. Raises TimeoutError after so many seconds."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"It did not come within {seconds:g} s.")
        time.sleep(0.05)


@contextlib.contextmanager
def cluster_of(count: int, *, cores: str | None = None, **resources: str) -> Iterator[Cluster]:
    """A cluster of so many equal nodes, with what `start_head` takes."""
    cluster = Cluster()
    try:
        cluster.start_head(cores=cores, **resources)
        for _ in range(count - 1):
            cluster.start_node(cores=cores, **resources)
        yield cluster
    finally:
        cluster.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command → its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--cpus", type=int, default=2, help="logical CPUs of each node")
    parser.add_argument("command", nargs="+")
    given = parser.parse_args(arguments)
    if not is_possible():
        parser.error("this process may not make networks, or has no unshare, nsenter or ip: be root on Linux")
    with cluster_of(given.nodes, num_cpus=str(given.cpus)) as cluster:
        return subprocess.run(cluster.nodes[0].line(*given.command), env=ENVIRONMENT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
