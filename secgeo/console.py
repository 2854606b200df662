"""What the commands print: plain lines for people on standard output, or one JSON object per line for machines."""

from __future__ import annotations

import json
import sys


def show(text: str) -> None:
    """Print a line for a person."""
    sys.stdout.write(text + "\n")


def emit(as_json: bool, **fields: object) -> bool:
    """Print `fields` as one JSON line if asked for; gives back whether it did."""
    if as_json:
        sys.stdout.write(json.dumps(fields, allow_nan=False) + "\n")
        sys.stdout.flush()
    return as_json
