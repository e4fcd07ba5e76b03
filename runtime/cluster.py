"""A Ray cluster before it is used: whether one answers at an address, and how much room it has.

Ray itself tries for minutes where none answers, and waits without a word where there is no room. The module ray, which
has no types, is an argument, so that this is imported without it.
"""

from __future__ import annotations

import contextlib
import importlib
import ipaddress
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kvx.runtime.errors import DeviceError, OptionError

PROBE_SECONDS = 5.0
CLIENT = "ray://"  # the scheme of Ray's clients, which need no node where they run
SHOWN_NODES = 8


@dataclass(frozen=True, slots=True)
class Node:
    """The logical CPUs and GPUs of a node."""

    cpus: float
    gpus: float = 0.0

    def __str__(self) -> str:
        """In words."""
        return f"{self.cpus:g} CPUs and {self.gpus:g} GPUs"


@dataclass(frozen=True, slots=True)
class Room:
    """The nodes that are alive, and how much of all of them is free."""

    nodes: tuple[Node, ...]
    free: Node

    @classmethod
    def of(cls, ray: Any) -> Room:  # noqa: ANN401
        """That of the cluster which the process is connected to."""
        nodes = tuple(_node(one["Resources"]) for one in ray.nodes() if one["Alive"])
        return cls(nodes, _node(ray.available_resources()))

    @classmethod
    def alone(cls, cpus: int) -> Room:
        """That of a cluster of one node that is yet to be started."""
        return cls((Node(cpus),), Node(cpus))

    def holds(self, cpus: int, gpus: int) -> int:
        """How many actors of this size fit, one of them on one node, if nothing else runs."""
        return sum(_fitting(node, cpus, gpus) for node in self.nodes)

    def holds_now(self, cpus: int, gpus: int) -> int:
        """How many fit beside what else the cluster does, at most: free room may be split among nodes."""
        return min(self.holds(cpus, gpus), _fitting(self.free, cpus, gpus))

    def __str__(self) -> str:
        """In words."""
        shown = "; ".join(map(str, self.nodes[:SHOWN_NODES])) + ("; …" if len(self.nodes) > SHOWN_NODES else "")
        return f"{len(self.nodes)} node{'s' * (len(self.nodes) != 1)} ({shown}), of which {self.free} are free"


def size_in_words(cpus: int, gpus: int) -> str:
    """What an actor takes of its node."""
    words = f"{cpus} logical CPU{'s' * (cpus != 1)}"
    return f"{words} and {gpus} GPU{'s' * (gpus != 1)}" if gpus else words


def _node(resources: dict[str, float]) -> Node:
    return Node(resources.get("CPU", 0.0), resources.get("GPU", 0.0))


def _fitting(node: Node, cpus: int, gpus: int) -> int:
    return int(min(node.cpus // cpus, node.gpus // gpus if gpus else node.cpus // cpus))


def reachable(ray: Any, address: str, *, clients: bool = False) -> str:  # noqa: ANN401
    """An address as Ray takes it, if a cluster answers there; with `clients` also one of ray://. Raises DeviceError and
    OptionError.
    """
    host, _, port = (address.removeprefix(CLIENT) if clients else address).rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise OptionError(
            f"`address` is {address!r}",
            expected="HOST:PORT of the head of a Ray cluster, such as 192.0.2.1:6379, or auto",
            remedy="Use the address that `ray start --head` has printed.",
            option="address",
        )
    host = host.strip("[]")
    asked = ray.util.get_node_ip_address() if _is_loopback(host) and not address.startswith(CLIENT) else host
    because = f" ({asked}, for which Ray takes {host})" if asked != host else ""
    try:
        _connect(asked, port)
    except (OSError, OverflowError) as error:
        raise no_cluster(f"{address}{because}", error) from None
    if address.startswith(CLIENT):
        return address
    _greet(found := f"{asked}:{port}")
    return found


def answers(head: str) -> bool:
    """Whether something listens at the address of a head."""
    host, _, port = head.rpartition(":")
    try:
        _connect(host.strip("[]"), port)
    except OSError:
        return False
    return True


def _connect(host: str, port: str) -> None:
    socket.create_connection((host, int(port)), PROBE_SECONDS).close()


def _greet(address: str) -> None:
    """Raises DeviceError where what listens is no cluster, or one with another token."""
    client = getattr(importlib.import_module("ray._raylet"), "GcsClient", None)
    if client is None:  # it is Ray's own affair, and may be gone; ray.init then says it, later
        return
    try:
        with hushed():
            client(address=address)
    except Exception as error:
        if "auth" in str(error).lower():
            raise DeviceError(
                f"The Ray cluster at {address} does not let this process in ({_one_line(error)})",
                expected="the cluster's token, where it has RAY_AUTH_MODE=token",
                remedy="Set RAY_AUTH_MODE as on the cluster, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to its token.",
                option="address",
            ) from None
        raise no_cluster(address, error) from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def no_cluster(address: str, error: Exception) -> DeviceError:
    """The error of an address where no cluster is."""
    return DeviceError(
        f"No Ray cluster answers at {address} ({_one_line(error)})",
        expected="the head of a Ray cluster of the same version of Ray and Python",
        remedy="Check the address with `ray status`, and that RAY_AUTH_MODE and the token are those of the cluster. A "
        "head on 127.0.0.1 cannot be reached: start it with an address of its network (ray start --node-ip-address).",
        option="address",
    )


def _one_line(error: Exception) -> str:
    return f"{' '.join(str(error).split()):.300}".rstrip(".")


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Without what Ray's C++ writes to the standard error; what goes wrong is raised."""
    with contextlib.ExitStack() as stack:
        kept = os.dup(2)
        stack.callback(os.close, kept)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        stack.callback(os.close, nowhere)
        os.dup2(nowhere, 2)
        stack.callback(os.dup2, kept, 2)
        yield
