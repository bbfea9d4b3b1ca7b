"""The generated pages are those of this version, and links in the documents lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PATTERNS = ("*.md", "bench/*.md", "docs/**/*.md", "examples/*.md")
PAGES = [page for pattern in PATTERNS for page in sorted(REPOSITORY.glob(pattern))]
_LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)")


def test_reference_is_current() -> None:
    made = subprocess.run(
        [sys.executable, REPOSITORY / "docs/make_reference.py"], check=True, capture_output=True, text=True, timeout=60
    ).stdout
    page = (REPOSITORY / "docs/rawfuse/reference.md").read_text()
    assert page == made, "docs/rawfuse/reference.md is not of this version: run make docs"


def anchors(page: Path) -> set[str]:
    """The headings of a page, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    for path, anchor in _LINK.findall(re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)):
        if "://" in path:
            continue
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {path}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {path}#{anchor}"
