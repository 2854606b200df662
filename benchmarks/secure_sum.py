"""How fast the secure sum is, as ratios against a peer or a physical floor that is measured in the same run.

    python benchmarks/secure_sum.py --protocol masked --values 1000000 --neighbours 9 --json

Prints one JSON line per part and at last a summary. The peer is Flower's SecAgg+ client (benchmarks/flower_client.py) in an
environment of its own; runs of the two alternate, so that both see the same noise. Ratios above 1 mean that we are
faster where they end in `_ratio`, and that we take longer than the floor where they end in `_over_floor`.

    python -m venv benchmarks/.flower && benchmarks/.flower/bin/pip install -r benchmarks/requirements.txt
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import homomorphic  # noqa: E402
from encrypted import encrypted  # noqa: E402
from masked import aggregator_add, bytes_per_value, growth, node_upload, one_mask, recovery  # noqa: E402
from memory import aggregator_memory  # noqa: E402
from parties import Row  # noqa: E402
from sockets import protocol_round, socket_round  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", choices=["masked", "homomorphic"], default="masked")
    parser.add_argument("--values", type=int, default=1_000_000)
    parser.add_argument("--neighbours", type=int, default=9, help="of a node; `masked` only")
    parser.add_argument("--value-bits", type=int, default=16, help="`homomorphic` only")
    parser.add_argument("--nodes", type=int, default=16, help="`homomorphic` only")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--socket-values", type=int, default=10_000_000, help="for the round over sockets; 0: leave it out"
    )
    parser.add_argument(
        "--growth", type=int, nargs="*", default=[4, 16, 64, 256], help="numbers of nodes; none: leave it out"
    )
    parser.add_argument("--plot", type=Path, help="write the plot of cost against nodes here")
    parser.add_argument("--flower-python", type=Path, default=ROOT / "benchmarks/.flower/bin/python")
    parser.add_argument(
        "--json", action="store_true", help="JSON lines are the only form; given for the sake of scripts"
    )
    arguments = parser.parse_args()
    flower = arguments.flower_python if arguments.flower_python.exists() else None
    summary: Row = {
        "part": "summary",
        "protocol": arguments.protocol,
        "values": arguments.values,
        "cores": os.cpu_count(),
    }

    def show(row: Row, *keys: str) -> None:
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()
        summary.update({key: row[key] for key in keys if key in row})

    values, neighbours = arguments.values, arguments.neighbours
    if arguments.protocol == "homomorphic":
        show(aggregator_memory(values, "homomorphic"))
        for row in encrypted(values, arguments.value_bits, arguments.nodes, max(1, arguments.repeats // 2)):
            show(row)
        if arguments.socket_values:
            for protocol in ("masked", "layered", "homomorphic"):
                show(protocol_round(arguments.socket_values, 8, protocol, arguments.value_bits))
        for row in homomorphic.measure(values, arguments.value_bits, arguments.nodes, arguments.repeats):
            show(row)
        return
    show(node_upload(values, neighbours, flower, arguments.repeats), "flower_ratio", "flower_ratio_medians")
    show(one_mask(values), "mask_over_floor")
    sizes = bytes_per_value(values)
    show(sizes)
    summary["bytes_per_value"] = sizes["ring_32"]
    show(aggregator_add(values, neighbours), "add_over_floor")
    memory = aggregator_memory(values)
    show(memory)
    summary["aggregator_vectors"] = max(value for key, value in memory.items() if key != "part")
    show(recovery(values, neighbours), "recovery_over_floor")
    if arguments.socket_values:
        show(socket_round(arguments.socket_values), "round_over_no_masks")
    if arguments.growth:
        show(growth(values // 5, arguments.growth, arguments.plot))
    if flower is None:
        summary["flower_ratio"] = None
        sys.stderr.write("Flower was not found, so there is no flower_ratio: see benchmarks/requirements.txt\n")
    show(summary)


if __name__ == "__main__":
    main()
