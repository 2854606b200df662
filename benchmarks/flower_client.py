"""The time of one client in Flower's SecAgg+ (flwr 1.42.0), from a float vector to the serialised masked upload.

    python benchmarks/flower_client.py --values 1000000 --neighbours 9 --repeats 5

Nothing of Flower is rewritten here: every party is Flower's own `flwr.client.mod.secaggplus_mod`, driven by the messages that
its `SecAggPlusWorkflow` would send. Timed are the stages up to the upload, for one client whose neighbours all answer:

* `setup`: two key pairs;
* `share_keys`: key agreement with each neighbour, Shamir shares of the mask seed and of a private key, sealing of the shares;
* `collect_masked_vectors`: opening what the neighbours sealed, clipping and stochastic quantisation, self mask, key
  agreement and pair mask for each neighbour, modulus, bytes.

Not timed: the other parties, messages to the client, its training and the encoding of the result as `FitRes`.
The seconds per part are those of the functions that the mod calls (`PARTS`); `other` is what remains of the mod, such as its
checks and the keeping of its state between stages. Clipping, quantisation, weight and modulus are the workflow's defaults.
The workflow has no default for shares and threshold: here each party holds a share, and a majority opens a secret.
In a comparison, mind that `pseudo_rand_gen` folds a seed to 32 bits and expands it by MT19937, which is quick
but no cryptographic generator; the masked values travel as 64-bit integers.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import numpy as np

try:
    from flwr.app import ConfigRecord, Context, Message, MessageType, Metadata, RecordDict
    from flwr.client.mod import secaggplus_mod
    from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
    from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
    from flwr.compat.common.recorddict_compat import fitres_to_recorddict
    from flwr.server.workflow import SecAggPlusWorkflow
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"flwr is not installed ({error}): pip install -r benchmarks/requirements.txt")

PARTS = {
    "key_pairs": ("generate_key_pairs", "private_key_to_bytes", "public_key_to_bytes"),
    "key_agreement": ("bytes_to_private_key", "bytes_to_public_key", "generate_shared_key"),
    "shares": ("create_shares",),
    "sealing": ("share_keys_plaintext_concat", "encrypt"),
    "opening": ("decrypt", "share_keys_plaintext_separate"),
    "quantisation": ("parameters_to_ndarrays", "parameters_multiply", "quantize", "factor_combine"),
    "mask_generation": ("pseudo_rand_gen",),
    "mask_addition": ("parameters_addition", "parameters_subtraction"),
    "modulo": ("parameters_mod",),
    "bytes": ("ndarray_to_bytes",),
}
MODULE = inspect.getmodule(secaggplus_mod)  # its public name is shadowed by the function's


class Party:
    """One Flower client: its state between stages, and the mod that answers a message."""

    def __init__(self, node: int, values: np.ndarray, weight: int) -> None:
        self.node = node
        self.context = Context(run_id=0, node_id=node, node_config={}, state=RecordDict(), run_config={})
        fit = FitRes(Status(Code.OK, ""), ndarrays_to_parameters([values]), weight, {})
        self.trained = fitres_to_recorddict(fit, keep_input=True)

    def prepare(self, stage: str, configs: dict[str, Any]) -> Callable[[], ConfigRecord]:
        """The client's answer to a stage's message, as a call that does the client's work and nothing else."""
        content = RecordDict({RECORD_KEY_CONFIGS: ConfigRecord({Key.STAGE: stage, **configs})})
        metadata = Metadata(0, "", 0, self.node, "", "", time.time(), 3600.0, MessageType.TRAIN)
        message = Message(content, metadata=metadata)
        trained = Message(self.trained, reply_to=message)
        answer = partial(secaggplus_mod, message, self.context, lambda *_: trained)
        return lambda: answer().content.config_records[RECORD_KEY_CONFIGS]


def setup_configs(parties: int) -> dict[str, Any]:
    """What the workflow sends first, with Flower's defaults."""
    defaults = SecAggPlusWorkflow(num_shares=1.0, reconstruction_threshold=0.5)
    return {
        Key.SAMPLE_NUMBER: parties,
        Key.SHARE_NUMBER: parties,
        Key.THRESHOLD: parties // 2 + 1,
        Key.CLIPPING_RANGE: defaults.clipping_range,
        Key.TARGET_RANGE: defaults.quantization_range,
        Key.MOD_RANGE: defaults.modulus_range,
        Key.MAX_WEIGHT: defaults.max_weight,
    }


def upload(values: np.ndarray, neighbours: int, seconds: dict[str, float] | None = None) -> bytes:
    """The masked upload of one client for `values` ([d] float); puts its `total` and parts into `seconds`."""
    spent: dict[str, float] = defaultdict(float)

    def timed(part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = work(*arguments)
            spent[part] += time.perf_counter() - started
            return result

        return call

    clocks = {name: timed(part, getattr(MODULE, name)) for part, names in PARTS.items() for name in names}

    def client(stage: str, configs: dict[str, Any]) -> ConfigRecord:
        answer = timed("total", own.prepare(stage, configs))
        with mock.patch.multiple(MODULE, **clocks):
            return answer()

    configs = setup_configs(neighbours + 1)
    own = Party(neighbours // 2, values, weight=int(configs[Key.MAX_WEIGHT]))  # as many pair masks added as subtracted
    others = [Party(node, values[:1], weight=1) for node in range(neighbours + 1) if node != own.node]
    keys = {party.node: party.prepare(Stage.SETUP, configs)() for party in others}
    keys[own.node] = client(Stage.SETUP, configs)
    public = {str(node): [pair[Key.PUBLIC_KEY_1], pair[Key.PUBLIC_KEY_2]] for node, pair in sorted(keys.items())}
    sealed = [party.prepare(Stage.SHARE_KEYS, public)() for party in others]
    client(Stage.SHARE_KEYS, public)
    received = [answer[Key.CIPHERTEXT_LIST][answer[Key.DESTINATION_LIST].index(own.node)] for answer in sealed]
    collect = {Key.CIPHERTEXT_LIST: received, Key.SOURCE_LIST: [party.node for party in others]}
    masked = client(Stage.COLLECT_MASKED_VECTORS, collect)[Key.MASKED_PARAMETERS]
    spent["other"] = spent["total"] - sum(spent[part] for part in PARTS)
    if seconds is not None:
        seconds.update(spent)
    return b"".join(masked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--values", type=int, default=1_000_000, help="length of the float64 vector")
    parser.add_argument("--neighbours", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    values = np.random.default_rng(0).uniform(-1.0, 1.0, arguments.values)
    runs: list[dict[str, float]] = [{} for _ in range(arguments.repeats)]
    sizes = [len(upload(values, arguments.neighbours, run)) for run in runs]
    best, median = min(runs, key=lambda run: run["total"]), statistics.median(run["total"] for run in runs)
    report = {"flower_seconds": best.pop("total"), "median": median, "bytes_per_value": sizes[0] / arguments.values}
    print(json.dumps(report | {"parts": best}))


if __name__ == "__main__":
    main()
