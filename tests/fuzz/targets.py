"""The registry of targets, and the findings that are open.

Every input that once broke a property is kept in `findings/TARGET/`, and is tried again by `test_targets`. `OPEN` names those that
still break it: the runner goes on past them, and the test fails as soon as one of them is mended, so that its entry goes.
"""

from __future__ import annotations

import traceback
from pathlib import Path

from tests.fuzz import documents, files, messages
from tests.fuzz.planted import PLANTED
from tests.fuzz.property import PropertyBroken, Target

TARGETS: dict[str, Target] = messages.TARGETS | documents.TARGETS | files.TARGETS

FINDINGS = Path(__file__).parent / "findings"

OPEN: dict[str, str] = {
    "aggregator/fault-after-the-end": "PropertyBroken: the transcript of an honest aggregator verifies: the transcript has no closing line",
    "anchors/header-cut-off": "TokenError in secgeo/datasets.py:_read_numpy",
    "anchors/shape-of-a-petabyte": "MemoryError in secgeo/datasets.py:_read_numpy",
    "anchors/type-not-python": "SyntaxError in secgeo/datasets.py:_read_numpy",
    "anchors/zip-version": "NotImplementedError in secgeo/datasets.py:_read_numpy",
    "arrays/compression": "NotImplementedError in secgeo/datasets.py:load_arrays",
    "arrays/deflate": "error in secgeo/datasets.py:load_arrays",
    "arrays/header-cut-off": "TokenError in secgeo/datasets.py:_read_numpy",
    "arrays/member-header-cut-off": "TokenError in secgeo/datasets.py:load_arrays",
    "arrays/member-of-a-petabyte": "MemoryError in secgeo/datasets.py:load_arrays",
    "arrays/member-type-not-python": "SyntaxError in secgeo/datasets.py:load_arrays",
    "arrays/not-a-character": "SystemError in secgeo/datasets.py:_checked",
    "arrays/shape-of-a-petabyte": "MemoryError in secgeo/datasets.py:_read_numpy",
    "arrays/type-not-python": "SyntaxError in secgeo/datasets.py:_read_numpy",
    "arrays/zip-version": "NotImplementedError in secgeo/datasets.py:_read_numpy",
    "config/nested": "RecursionError in secgeo/config.py:read_config",
    "csv/dates-and-booleans": "DTypePromotionError in secgeo/datasets.py:load_table",
    "csv/name-not-utf8": "UnicodeDecodeError in secgeo/datasets.py:load_table",
    "key-content/authority-not-utf8": "UnicodeDecodeError in keys/authority.py:load",
    "key-content/identity-not-utf8": "UnicodeDecodeError in keys/identity.py:load",
    "records/manifest-not-utf8": "PropertyBroken: manifest.json fails by an error of ours: UnicodeDecodeError",
}
"""Input (TARGET/NAME below `findings`) -> how its failure begins, as `describe` gives it."""

_ROOT = Path(__file__).parents[2]
_PRODUCT = ("keys", "protocols", "secgeo", "audit")


def find(name: str) -> Target:
    """The target of that name; the planted ones are no part of the registry, but can be run."""
    return (TARGETS | PLANTED)[name]


def describe(error: BaseException) -> str:
    """What broke, and the last line of the product on its way, without line numbers: the same failure has the same text."""
    if isinstance(error, PropertyBroken):
        return f"PropertyBroken: {error}"
    place = ""
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename)
        if path.is_relative_to(_ROOT) and path.relative_to(_ROOT).parts[0] in _PRODUCT:
            place = f" in {path.relative_to(_ROOT)}:{frame.name}"
    return f"{type(error).__name__}{place}"


def is_open(name: str, error: BaseException) -> bool:
    """Whether this failure of a target is known."""
    return any(path.startswith(f"{name}/") and describe(error).startswith(text) for path, text in OPEN.items())
