"""Figures of the report that real evidence rarely stretches."""

import re
from dataclasses import replace
from itertools import pairwise

import msgspec

from audit.accountants import Epsilons
from audit.bundle import judge
from audit.figures import figures
from audit.ledgers import BudgetReport
from audit.report import render
from tests.fuzz import audits

NAME = re.compile(r'<text[^>]* y="([0-9.]+)"[^>]*>(university-hospital-[0-9]+)</text>')


def test_names_of_many_hospitals_do_not_overlap() -> None:
    answer = Epsilons(1e-5, {"rdp": 3.0, "prv": 2.5, "pld": 2.4}, {})
    for count in (1, 12, 40):
        budgets = {f"university-hospital-{index}": (None if index == 3 else 3.0, answer) for index in range(count)}
        report = BudgetReport((), (), budgets, {}, "record")
        (drawn,) = figures(audits.alone(records=report))["records"]
        places = {name: float(y) for y, name in NAME.findall(drawn.svg)}
        assert places.keys() == budgets.keys()
        heights = sorted(places.values())
        assert all(below - above >= 12.0 for above, below in pairwise(heights))


def test_the_report_speaks_of_the_unit_that_is_protected() -> None:
    evidence = audits.alone()
    for unit, other in (("record", "patient"), ("patient", "record")):
        privacy = msgspec.structs.replace(evidence.study.agreement.privacy, unit=unit, records_per_patient=2)
        agreement = msgspec.structs.replace(evidence.study.agreement, privacy=privacy)
        study = replace(evidence.study, agreement=agreement)
        page = render(judge(evidence), replace(evidence, study=study))
        assert f"every {unit}&#39;s gradient clipped" in page
        assert f"A made-up {unit}" in page
        assert f"the number of {unit}s" in page
        assert f"made-up {other}" not in page
        assert f"every {other}" not in page
        assert "{unit}" not in page
