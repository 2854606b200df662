"""The TOML configuration files of a node and of the aggregator: frozen structs, unknown keys refused, paths relative to the file.

Nothing here weakens an agreement or comes from the network. Secrets are never in a configuration: it names key folders and
passphrase files only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from keys.errors import ConfigError
from protocols.policy import LocalPolicy

Fingerprint = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class StudyFiles(Struct, frozen=True, forbid_unknown_fields=True):
    """Where the study's public documents lie, and the two digests by which this site pins them.

    `folder` is what `secgeo agreement make` writes: the agreement, the roster, their signatures, the root and the anchors.
    """

    folder: str
    agreement_digest: Fingerprint
    authority_fingerprint: Fingerprint


class TableData(Struct, frozen=True, forbid_unknown_fields=True, tag="table", tag_field="kind"):
    """A CSV or Parquet table: one record per row, a label column with class numbers, numeric feature columns, and whose a record is."""

    path: str
    label_column: str
    feature_columns: tuple[str, ...] = ()
    patient_column: str | None = None


class ArrayData(Struct, frozen=True, forbid_unknown_fields=True, tag="arrays", tag_field="kind"):
    """An NPZ file with `features` [n, ...], `labels` [n] and maybe `patients` [n]."""

    path: str


class EntryPointData(Struct, frozen=True, forbid_unknown_fields=True, tag="entry-point", tag_field="kind"):
    """A Python function `module:function` that returns (features, labels) or (features, labels, patients); it may lie in `folder`."""

    function: str
    folder: str = "."


AnyData = TableData | ArrayData | EntryPointData


class NodeConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """A hospital's node."""

    keys: str
    aggregator_address: str
    state: str
    study: StudyFiles
    data: AnyData
    policy: LocalPolicy = LocalPolicy()
    evaluation: AnyData | None = None
    passphrase_file: str | None = None
    unencrypted_keys: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    autocast: bool = False
    embeddings: str | None = None


class AggregatorConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """The aggregator: one listening port, a folder of public records, and one for what it needs after a crash.

    `state` is `records` with ".state" appended unless it is given.
    """

    keys: str
    listen_address: str
    records: str
    study: StudyFiles
    state: str | None = None
    passphrase_file: str | None = None
    unencrypted_keys: bool = False


Config = TypeVar("Config", NodeConfig, AggregatorConfig)


def read_config(path: Path, kind: type[Config]) -> Config:
    """Read a configuration file.

    Raises:
        ConfigError: missing, not TOML, an unknown or missing key, or a value of the wrong type.
    """
    try:
        return msgspec.toml.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deep") from None
