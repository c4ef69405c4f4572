"""The guide and the API reference: every public name has an example, every example is run, links lead somewhere, and
`make docs` has a page for each topic and an entry for each name."""

import doctest
import importlib.util
import inspect
import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT, examples

import eman_kernels

# No docstrings can be given to these.
ALIASES = {"Momentum", "Rule"}


def public():
    """Each public name, the classes and functions of public modules among them."""
    for name in eman_kernels.__all__:
        thing = getattr(eman_kernels, name)
        if isinstance(thing, ModuleType):
            own = vars(thing).items()
            for inner, one in own:
                if not inner.startswith("_") and getattr(one, "__module__", None) == thing.__name__:
                    yield f"{name}.{inner}", one
        if name not in ALIASES and name != "schedules":
            yield name, thing


@pytest.mark.parametrize(("name", "thing"), public())
def test_every_public_name_has_an_example(name, thing):
    assert ">>> " in inspect.getdoc(thing)


def modules():
    walked = pkgutil.walk_packages(eman_kernels.__path__, "eman_kernels.")
    return sorted(module.name for module in walked if module.name.rpartition(".")[2] not in ("__main__", "_C"))


@pytest.mark.parametrize("name", modules())
def test_the_examples_give_what_they_show(name):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        pytest.skip(str(error))
    done = doctest.testmod(module)
    assert done.failed == 0


# ---------------------------------------------------------------- the guide

PAGES = sorted((ROOT / "docs").glob("*.md"))
LINKED = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "SECURITY.md", *PAGES]
LINKED += [
    ROOT / "csrc" / "README.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "benchmarks" / "methods" / "README.md",
]


def on_cuda(block: str) -> bool:
    return ".cuda()" in block


LIBRARIES = ("eman_kernels.integrations", "stable_baselines3", "torchrl")


def runnable() -> Iterator[pytest.param]:
    """Each page with examples, except those that need a library: see tests/integrations and test_switching.py."""
    for page in PAGES:
        blocks = [block for block in examples(page.read_text()) if not any(name in block for name in LIBRARIES)]
        for cuda in (False, True):
            if chosen := [block for block in blocks if on_cuda(block) == cuda]:
                marks = [pytest.mark.cuda] if cuda else []
                yield pytest.param(chosen, id=page.stem, marks=marks)


@pytest.mark.parametrize("blocks", runnable())
def test_the_examples_of_a_page_run_in_turn(blocks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write a file
    names = {}
    for block in blocks:
        exec(block, names)


def test_enough_pages_have_examples():
    assert len(list(runnable())) >= 6


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_a_page_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert page.parent.joinpath(link).exists(), link


def test_every_page_is_in_the_menu_and_in_the_overview():
    menu = set(re.findall(r": docs/(\S+\.md)$", (ROOT / "properdocs.yml").read_text(), re.M))
    overview = set(re.findall(r"\]\(([\w-]+\.md)\)", (ROOT / "docs" / "README.md").read_text()))
    assert menu == {page.name for page in PAGES}
    assert overview == menu - {"README.md"}


def test_every_adapter_has_a_row_with_the_version_that_its_docstring_names():
    table = [row.lower() for row in (ROOT / "docs" / "adapters.md").read_text().splitlines() if row.startswith("| ")]
    api = (ROOT / "docs" / "api-adapters.md").read_text()
    folder = ROOT / "eman_kernels" / "integrations"
    libraries = {path.stem: path.read_text() for path in folder.glob("*.py") if path.stem != "__init__"}
    assert len(libraries) == len(table) - 1
    for library, text in libraries.items():
        version = re.search(r"Tested with \w+ ([\d.]*\d)", text)[1]
        assert any(row.startswith(f"| {library} {version} ") for row in table), f"{library} {version}"
        assert f"::: eman_kernels.integrations.{library}\n" in api


# ---------------------------------------------------------------- make docs


@pytest.fixture(scope="module")
def site() -> Path:
    """What `make docs` writes, with the packages of this Python."""
    for module in ("properdocs", "mkdocstrings"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install -r docs/requirements.txt")
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    command = ["make", "docs", "--old-file=.venv/.docs", f"BIN={Path(sys.executable).parent}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return ROOT / "build" / "docs"


def test_the_site_has_a_page_per_topic(site):
    for page in PAGES:
        name = "index" if page.stem == "README" else page.stem
        title = page.read_text().splitlines()[0].removeprefix("# ")
        assert f">{title}</h1>" in (site / "docs" / f"{name}.html").read_text()


def test_the_reference_has_every_public_name(site):
    text = (site / "docs" / "api.html").read_text()
    for name, _ in public():
        assert f'id="eman_kernels.{name}"' in text, name
    for name in eman_kernels.__all__:
        assert f'id="eman_kernels.{name}"' in text, name
    assert ">&gt;&gt;&gt; <" in text
    assert "<blockquote>" not in text, "an example taken for a quotation"


class Page(HTMLParser):
    """The links and the anchors of a built page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors = {""}
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.links |= {value for name, value in attributes if name in ("href", "src", "srcset") and value}
        self.anchors |= {value for name, value in attributes if name == "id" and value}


def test_the_links_of_the_site_lead_somewhere(site):
    # Those of 404.html are relative to a server's root.
    pages = {path: Page(path) for path in site.resolve().rglob("*.html") if path.name != "404.html"}
    count = 0
    for path, page in pages.items():
        for link in page.links:
            if ":" in link:
                continue
            file, _, anchor = link.partition("#")
            to = (path.parent / file.partition("?")[0]).resolve() if file else path
            assert to.exists(), f"{path}: {link}"
            assert to not in pages or anchor in pages[to].anchors, f"{path}: {link}"
            count += 1
    assert count > 500
