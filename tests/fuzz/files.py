"""Targets of local files: configurations, anchors, arrays and tables. They come from colleagues and downloads, and are checked."""

from __future__ import annotations

import io
import random
import re
import zipfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
from pyarrow import parquet

from keys.errors import ConfigError
from protocols.agreement import Modality
from protocols.policy import check_policy
from secgeo.config import AggregatorConfig, NodeConfig, read_config
from secgeo.datasets import LabelledRecords, anchor_digest, load_anchors, load_arrays, load_table
from tests.fuzz import mutate
from tests.fuzz.documents import DEEP, scratch
from tests.fuzz.property import Target, require
from tests.fuzz.world import study

SHAPE, CLASSES = (2,), 3
_ANCHORS = np.arange(8, dtype=np.float32).reshape(4, 2)
_NUMBER = re.compile(rb"[0-9]+")


# --- configurations


def _config(data: bytes) -> None:
    path = scratch() / "config.toml"
    path.write_bytes(data)
    for kind in (NodeConfig, AggregatorConfig):
        with suppress(ConfigError):
            config = read_config(path, kind)
            path.write_bytes(msgspec.toml.encode(_without_none(msgspec.to_builtins(config))))
            require(_same(read_config(path, kind), config), "a configuration that is written is read back")
            if isinstance(config, NodeConfig):
                check_policy(study().agreement, config.policy, epsilon=5.0)
        path.write_bytes(data)


def _same(left: Any, right: Any) -> bool:
    """NaN is not NaN, but has one spelling."""
    return repr(left) == repr(right)


def _without_none(value: Any) -> Any:
    """TOML has no null: what is not there is left out."""
    return {k: _without_none(v) for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def _config_seeds() -> list[bytes]:
    pins = {"folder": "study", "agreement_digest": "0" * 64, "authority_fingerprint": "f" * 64}
    data = {"kind": "table", "path": "a.csv", "label_column": "y", "feature_columns": ["a", "b"]}
    policy = {"max_epsilon": 3.0, "min_cohort": 4, "protocols": ["masked"]}
    keys = {"keys": "keys", "passphrase_file": "passphrase", "unencrypted_keys": False}
    node = keys | {"aggregator_address": "tcp://a:1", "state": "state", "study": pins, "data": data, "policy": policy}
    more = {"evaluation": {"kind": "entry-point", "function": "a:b"}, "device": "cpu", "embeddings": "e.npy"}
    aggregator = keys | {"listen_address": "tcp://*:1", "records": "records", "state": "state", "study": pins}
    arrays = node | {"data": {"kind": "arrays", "path": "a.npz"}} | more
    return [*(msgspec.toml.encode(document) for document in (node, arrays, aggregator)), b"a = " + DEEP]


# --- anchors and arrays


def _anchors(data: bytes) -> None:
    """An array whose digest is not agreed on is refused, so what is accepted is always the same."""
    path = scratch() / "anchors.npy"
    path.write_bytes(data)
    modality = Modality("mean", "tabular", SHAPE, anchor_digest(_ANCHORS))
    with suppress(ConfigError):
        require(
            np.array_equal(load_anchors(path, modality, len(_ANCHORS)), _ANCHORS), "the anchors are those agreed on"
        )


def _npy(array: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(array), allow_pickle=True, **options)
    return buffer.getvalue()


def _anchor_seeds() -> list[bytes]:
    fortran, wide = np.asfortranarray(_ANCHORS), _ANCHORS.astype(np.float64)
    objects = np.array([None, "x"], dtype=object)
    versions = [_npy(_ANCHORS, version=version) for version in ((1, 0), (2, 0), (3, 0))]
    return [*versions, _npy(fortran), _npy(wide), _npy(objects), _array_seeds()[0]]


def _arrays(data: bytes) -> None:
    path = scratch() / "arrays.npz"
    path.write_bytes(data)
    with suppress(ConfigError):
        _check(load_arrays(path, shape=SHAPE, classes=CLASSES))


def _check(records: LabelledRecords) -> None:
    require(records.features.dtype == np.float32 and records.labels.dtype == np.int64, "records are float32 and int64")
    require(records.features.shape == (len(records), *SHAPE), "every record has the agreed shape")
    require(bool(np.isfinite(records.features).all()), "every value is finite")
    require(set(records.labels.tolist()) <= set(range(CLASSES)), "every label is a class number")
    require(records.patients is None or records.patients.shape == records.labels.shape, "every record has one patient")


@cache
def _array_seeds() -> list[bytes]:
    good = {"features": _ANCHORS, "labels": np.array([0, 1, 2, 0])}
    owned = good | {"patients": np.array(["a", "b", "b", "c"])}
    other = {"features": _ANCHORS.astype(np.float16), "labels": np.array([0.0, 1.0, 2.0, 0.0])}
    strange = {"features": np.array([[1 + 2j, 2], [3, 4]]), "labels": np.array(["a", "b"]), "more": np.zeros(0)}
    dates = {"features": np.zeros((2, 2), dtype="M8[s]"), "labels": np.array([True, False])}
    seeds = []
    empty = good | {
        "patients": np.array([""] * 4)
    }  # names that take no bytes in a file, so that their number costs nothing
    for arrays in (good, owned, empty, other, strange, dates):
        for save in (np.savez, np.savez_compressed):
            buffer = io.BytesIO()
            save(buffer, **arrays)  # type: ignore[arg-type]
            seeds.append(buffer.getvalue())
    return [*seeds, _npy(_ANCHORS)]


def _mutate_npy(data: bytes, rng: random.Random) -> bytes:
    """Change a number in the header, and mend the header's length."""
    end = data.find(b"\n") + 1
    numbers = list(_NUMBER.finditer(data, 10, max(end, 10)))
    if not data.startswith(b"\x93NUMPY\x01") or not numbers:
        return mutate.flip(data, rng)
    number = rng.choice(numbers)
    changed = str(rng.choice((*mutate.INTEGERS, rng.randrange(10)))).encode()
    header = data[10 : number.start()] + changed + data[number.end() : end]
    return data[:8] + len(header).to_bytes(2, "little") + header + data[end:]


def _mutate_npz(data: bytes, rng: random.Random) -> bytes:
    """Change a member of the archive, and pack it again with the right checksums."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        name = rng.choice(sorted(members))
        members[name] = rng.choice((mutate.flip, _mutate_npy))(members[name], rng)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
            for name, content in members.items():
                archive.writestr(zipfile.ZipInfo(name), content)
        return buffer.getvalue()
    except Exception:  # not an archive any more
        return mutate.flip(data, rng)


# --- tables


def _table(suffix: str) -> Callable[[bytes], None]:
    def run(data: bytes) -> None:
        path = (scratch() / "table").with_suffix(suffix)
        path.write_bytes(data)
        for columns in (None, ("a", "b")):
            with suppress(ConfigError):
                _check(load_table(path, label_column="y", shape=SHAPE, classes=CLASSES, feature_columns=columns))

    return run


def _csv_seeds() -> list[bytes]:
    return [
        b"a,b,y\n1,2,0\n3.5,-4e3,1\n",
        b"y,a,b\r\n0,1,2\r\n2,nan,inf\r\n",
        b'a,b,y\n"1","x",0\n,2,1\n',
        b"a,b,y\n2020-01-01,true,0\n",
        b"\xef\xbb\xbfa,b,y,y\n1,2,0,0\n",
    ]


def _parquet_seeds() -> list[bytes]:
    columns: tuple[dict[str, Any], ...] = (
        {"a": [1.0, 2.0], "b": [3, 4], "y": [0, 1]},
        {"a": ["x", "y"], "b": [[1], [2, 3]], "y": [{"z": 1}, None]},
        {"a": [b"x", b""], "b": [True, False], "y": [0, 1]},
    )
    seeds = []
    for table in columns:
        for compression in ("none", "snappy"):
            buffer = io.BytesIO()
            parquet.write_table(pa.table(table), buffer, compression=compression)
            seeds.append(buffer.getvalue())
    return seeds


TARGETS = {
    "config": Target(_config, _config_seeds, mutate.toml),
    "anchors": Target(_anchors, _anchor_seeds, _mutate_npy),
    "arrays": Target(_arrays, _array_seeds, _mutate_npz),
    "csv": Target(_table(".csv"), _csv_seeds),
    "parquet": Target(_table(".parquet"), _parquet_seeds),
}
