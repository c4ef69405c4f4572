"""The first page: its examples run, its figures are those of the results, and it stays short."""

import json
import re

import pytest
from conftest import README, ROOT, examples

RESULTS = ROOT / "benchmarks" / "results"


def test_the_examples_run_in_turn():
    blocks = examples(README)
    assert len(blocks) == 3
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["teacher"].step == 3 + 4 // 2
    followed, student = names["key_encoder"].bn1, names["student"].bn1
    assert followed.num_batches_tracked == 3
    assert student.num_batches_tracked == 3 + 4
    example = [line for line in blocks[0].splitlines() if line]
    assert len(example) == 10, "the ten-line example"


def test_every_error_that_it_explains_is_one_that_the_code_raises():
    code = "".join(path.read_text() for path in (ROOT / "eman_kernels").rglob("*.py"))
    code = re.sub(r'"\s*\n\s*f?"', "", code)
    section = README.split("## Troubleshooting")[1].split("\n\n")[1]
    quoted = [text for row in section.splitlines()[2:] for text in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert len(quoted) >= 8
    for text in quoted:
        if text.startswith("cudaError"):
            continue  # CUDA's own word
        for part in re.split(r"backend 'cuda' | tensors on \.\.\.: |the found_inf is on", text):
            assert part in code, part


def test_it_is_short():
    lines = README.splitlines()
    assert len(lines) <= 150
    for line in lines:
        assert len(line) <= 160 or line.startswith("|") or "](" in line, line


def test_its_parts_come_in_the_order_in_which_they_are_needed():
    first, *sections = README.split("\n## ")
    introduction, rest = first.split("\n\n<picture>")
    assert introduction.count(". ") + introduction.count(".\n") + introduction.endswith(".") == 3, "three sentences"
    assert "<img src=" in rest
    assert [section.splitlines()[0] for section in sections] == [
        "Install",
        "Use",
        "You already have both networks",
        "AMP and gradient accumulation",
        "Cost",
        "Troubleshooting",
        "Where to find the rest",
    ]
    cost = sections[4].splitlines()[1:]
    assert sum(line.startswith("- ") for line in cost) == 3


def test_the_placeholder_for_the_address_of_the_repository_is_in_one_place():
    pages = [
        *(page for kind in ("md", "toml", "cff", "yml", "py", "in") for page in ROOT.glob(f"*.{kind}")),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob(".github/**/*.*"),
        *ROOT.glob("eman_kernels/**/*.py"),
    ]
    assert [page.name for page in pages if page.is_file() and "OWNER" in page.read_text()] == ["README.md"]
    assert [section.splitlines()[0] for section in README.split("\n## ") if "OWNER" in section] == ["Install"]


@pytest.fixture(scope="module")
def on_a_gpu():
    """ResNet-50's rows of the newest report from a GPU, by method."""
    rows = json.loads(max(RESULTS.glob("nvidia-*.json")).read_text())
    return {
        row["method"]: row
        for row in rows
        if row["kind"] == "update" and (row["model"], row["dtype"]) == ("resnet50", "float32")
    }


def test_its_figures_are_those_of_the_newest_report(on_a_gpu):
    theirs, ours = on_a_gpu["published EMAN loop"], on_a_gpu["eman_kernels cuda"]
    text = README.replace("\n", " ")
    assert (
        f"the published EMAN loop takes {theirs['host_ms']:.2f} ms of host time and {theirs['median_ms']:.2f} ms of "
        f"GPU time per training step; this package takes {ours['host_ms']:.2f} ms and {ours['median_ms']:.2f} ms "
        f"({ours['device']}, torch {ours['torch']}, {ours['date']})"
    ) in text
    assert f"one update of ResNet-50 takes {ours['x_limit']:.2f} times as long as one `lerp_`" in text


def texts_of(chart):
    """matplotlib writes each text of an SVG as a comment before its outlines."""
    return re.findall(r"<!-- (.*?) -->", chart.read_text(), re.S)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_its_chart_shows_them_too(theme, on_a_gpu):
    assert f"docs/speed-{theme}.svg" in README
    texts = texts_of(ROOT / "docs" / f"speed-{theme}.svg")
    methods = ("published EMAN loop", "timm ModelEmaV3", "foreach, lists kept", "eman_kernels cuda")
    times = [f"{on_a_gpu[method][key]:.2f} ms" for key in ("host_ms", "median_ms") for method in methods]
    assert [text for text in texts if text.endswith(" ms")] == times
    ours = on_a_gpu["eman_kernels cuda"]
    assert any(f"{ours['device']}, torch {ours['torch']}, {ours['date']}" in text for text in texts)


def test_its_chart_is_what_a_report_draws(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install '.[bench]'")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from pictures import draw_speed

    draw_speed(json.loads(max(RESULTS.glob("nvidia-*.json")).read_text()), tmp_path)
    for theme in ("light", "dark"):
        name = f"speed-{theme}.svg"
        assert texts_of(tmp_path / name) == texts_of(ROOT / "docs" / name)
