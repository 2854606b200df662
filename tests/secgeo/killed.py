"""Processes that run `secgeo aggregator` or `secgeo node` under observation and, when it is ordered, kill themselves (SIGKILL).

What a node hands to its socket, and digests of the secrets that it draws for its attempts, stand in the files `sent` and `drawn` of the
folder of this life. `order`, in the folder of the site, says who is to die, and just before it sends which kind of message; or, the
aggregator, just before it takes what all have sent of one kind. "dealer" and "other" are nodes that deal a tag seed in their attempt,
and that do not. Whoever obeys makes `hold` of the order: while that is there, no node announces that it is ready for a round.

The processes are forked from one that has imported everything and done nothing else, since to import torch takes seconds.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from protocols.attempt_node import AttemptNode
from protocols.sealing import AttemptSecrets
from secgeo import transport
from secgeo.cli import main
from tests.keys.factory import AGGREGATOR
from tests.protocols.network import body_type
from tests.secgeo.site import HOSPITALS


def obey(base: Path, roles: set[str], kind: str) -> None:
    """Die, if that is the order; of several that may, the first one does."""
    with suppress(FileNotFoundError):
        who, before = (base / "order").read_text().split()
        if who in roles and kind == before:
            (base / "order").rename(base / "hold")
            os.kill(os.getpid(), signal.SIGKILL)


def append(path: Path, data: bytes) -> None:
    with path.open("ab", buffering=0) as file:
        file.write(len(data).to_bytes(4) + data)


def entries(path: Path) -> Iterator[bytes]:
    """What was appended; the last may be under way."""
    data = path.read_bytes() if path.exists() else b""
    while data:
        size = 4 + int.from_bytes(data[:4])
        if len(data) < size:
            return
        yield data[4:size]
        data = data[size:]


def watch_node(base: Path, life: Path) -> None:
    send, receive, fresh = transport.NodeEndpoint.send, AttemptNode.receive, AttemptSecrets.fresh
    roles = {life.parent.name}

    def sending(self: transport.NodeEndpoint, message: bytes) -> None:
        kind = body_type(message)
        obey(base, roles, kind)
        append(life / "sent", message)
        while kind == "Ready" and (base / "hold").exists():
            time.sleep(0.02)
        send(self, message)

    def receiving(self: AttemptNode, body: Any) -> list[bytes]:
        answer = receive(self, body)
        roles.difference_update({"dealer", "other"})
        roles.add("dealer" if self._me in self._graph.dealers else "other")
        return answer

    def drawing(coins: Any) -> AttemptSecrets:
        secrets = fresh(coins)
        for secret in (secrets.self_seed, secrets.share_master, secrets.pair_master, secrets.tag_seed):
            append(life / "drawn", hashlib.sha256(secret).digest())
        return secrets

    transport.NodeEndpoint.send = sending  # type: ignore[method-assign]
    AttemptNode.receive = receiving  # type: ignore[method-assign]
    AttemptSecrets.fresh = staticmethod(drawing)  # type: ignore[method-assign, assignment]


def watch_aggregator(base: Path, life: Path) -> None:
    send, receive = transport.AggregatorEndpoint.send, transport.AggregatorEndpoint.receive
    roles, said = {life.parent.name}, defaultdict[str, set[str]](set)

    def sending(self: transport.AggregatorEndpoint, node_id: str, message: bytes) -> bool:
        obey(base, roles, body_type(message))
        return send(self, node_id, message)

    def receiving(self: transport.AggregatorEndpoint, timeout_seconds: float) -> tuple[str, bytes] | None:
        received = receive(self, timeout_seconds)
        if received is not None:
            kind = body_type(received[1])
            said[kind].add(received[0])
            if said[kind] == set(HOSPITALS):
                obey(base, roles, kind)
        return received

    transport.AggregatorEndpoint.send = sending  # type: ignore[method-assign]
    transport.AggregatorEndpoint.receive = receiving  # type: ignore[method-assign]


CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["secgeo.aggregator", "secgeo.node", "secgeo.training", __name__])


def live(base: Path, life: Path, config: Path) -> None:
    """One life of the party whose folder is `life.parent`."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(life / name, os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
    is_aggregator = life.parent.name == AGGREGATOR
    (watch_aggregator if is_aggregator else watch_node)(base, life)
    sys.argv = ["secgeo", "aggregator" if is_aggregator else "node", str(config), "--json"]
    main()
