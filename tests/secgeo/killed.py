"""Runs `secgeo ARGUMENTS` and kills its own process (SIGKILL) just before it sends the first message of a kind.

python -m tests.secgeo.killed KIND aggregator config.toml --json
"""

import os
import signal
import sys

from secgeo import transport
from secgeo.cli import main
from tests.protocols.network import body_type


def kill_before(endpoint: type, kind: str) -> None:
    send = endpoint.send  # type: ignore[attr-defined]

    def sending(self: object, *arguments: object) -> object:
        if body_type(bytes(arguments[-1])) == kind:  # type: ignore[arg-type]
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return send(self, *arguments)

    endpoint.send = sending  # type: ignore[attr-defined]


if __name__ == "__main__":
    kill_before(transport.NodeEndpoint, sys.argv[1])
    kill_before(transport.AggregatorEndpoint, sys.argv[1])
    del sys.argv[1]
    main()
