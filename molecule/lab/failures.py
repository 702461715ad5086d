"""Names what failed, with the last of why.

failures.py REPORT...: reports of pytest in JUnit's form; one that is not there was not come to.
"""

import sys
from pathlib import Path
from xml.etree import ElementTree

LINES = 15


def failures(reports: list[str]) -> None:
    """Print each failed test's name and the last lines of what pytest said of it."""
    for report in filter(Path.exists, map(Path, reports)):
        for case in ElementTree.parse(report).iter("testcase"):
            for said in (*case.findall("failure"), *case.findall("error")):
                print(f"\n{report.stem}: {case.get('classname')}.{case.get('name')}",
                      *(said.text or "").splitlines()[-LINES:], sep="\n    ")


if __name__ == "__main__":
    failures(sys.argv[1:])
