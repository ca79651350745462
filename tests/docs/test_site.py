"""The documentation site builds without a warning, with every link in its place. See test_tutorials.py too."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.docs


@pytest.fixture(scope="module")
def site():
    """Built where `make docs` leaves it."""
    folder = ROOT / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


class Links(HTMLParser):
    """The targets of a page's links and pictures, and what can be a target on it."""

    def __init__(self, page):
        super().__init__()
        self.targets, self.ids = [], set()
        self.feed(page.read_text())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids.add(found.get("id"))
        self.targets += [found[name] for name in ("href", "src") if found.get(name) and tag in ("a", "img")]


def test_every_link_leads_somewhere(site):
    pages = {page: Links(page) for page in site.rglob("*.html") if page.name == "index.html"}
    assert len(pages) > 20
    broken = []
    for page, links in pages.items():
        for target in links.targets:
            path, _, anchor = target.partition("#")
            if re.match(r"\w+:", target) or not target:
                continue
            file = (page.parent / path).resolve() if path else page
            file = file / "index.html" if file.is_dir() else file
            if not file.is_file() or (anchor and file in pages and anchor not in pages[file].ids):
                broken.append((page.relative_to(site), target))
    assert not broken


def test_the_first_page_is_the_readme_and_the_reference_has_the_docstrings(site):
    first = (site / "index.html").read_text()
    assert "make quickstart" in first
    assert "quickstart.png" in first
    training = (site / "reference" / "training" / "index.html").read_text()
    assert "Train a model through all stages" in training
    # A name in brackets in a docstring.
    assert "../model/#icone_hf.modeling.processing_icone.IConEProcessor" in training
    options = (site / "reference" / "command_line" / "index.html").read_text()
    assert "--instance_temperature" in options
    assert "--global_batch_size" in options
