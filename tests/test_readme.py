"""What the README shows is run as it stands there."""

import re
from pathlib import Path

from conftest import README, examples


def test_the_examples_run_in_turn():
    # The adapters' need their libraries: tests/integrations.
    blocks = [block for block in examples(README) if "eman_kernels.integrations" not in block]
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
    code = "".join(path.read_text() for path in (Path(__file__).parent.parent / "eman_kernels").rglob("*.py"))
    code = re.sub(r'"\s*\n\s*f?"', "", code)
    section = README.split("## Troubleshooting")[1].split("\n\n")[1]
    quoted = [text for row in section.splitlines()[2:] for text in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert len(quoted) >= 8
    for text in quoted:
        if text.startswith("cudaError"):
            continue  # CUDA's own word
        for part in re.split(r"backend 'cuda' | tensors on \.\.\.: |the found_inf is on", text):
            assert part in code, part


def test_it_is_short_and_its_links_lead_somewhere():
    assert len(README.splitlines()) <= 250
    root = Path(__file__).parent.parent
    for page in (
        "README.md",
        "CONTRIBUTING.md",
        "csrc/README.md",
        "benchmarks/README.md",
        "benchmarks/methods/README.md",
    ):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (root / page).read_text()):
            assert (root / page).parent.joinpath(link).exists(), f"{page}: {link}"
