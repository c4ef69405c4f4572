"""Find a piece of code by the name of the function, class or constant around it, in whatever file that is."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

# Comments and literals of C++, in which braces and parentheses do not count.
_CPP_TEXT = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.S)


def find_code(project: Path, where: str, code: str) -> list[tuple[Path, int, int]]:
    """Each occurrence of the code inside a definition with this name: file, and first and last character.

    where: the end of a dotted name in eman_kernels/ ("Guards.check", "foreach.run"), or a name in csrc/ ("draw",
    "Philox", "narrow<Half>"). All definitions with this name are searched. White space in the code stands for any.
    """
    pattern = re.compile(r"\s+".join(map(re.escape, code.split())))
    found = set()
    for path, text, definitions in _definitions(project, where):
        for begin, end in definitions:
            found |= {(path, match.start(), match.end()) for match in pattern.finditer(text, begin, end)}
    return sorted(found)


def _definitions(project: Path, where: str) -> Iterator[tuple[Path, str, list[tuple[int, int]]]]:
    for path in (project / "eman_kernels").rglob("*.py"):
        text = path.read_text()
        if where.rpartition(".")[2] in text:
            yield (
                path,
                text,
                [(begin, end) for name, begin, end in _python(path, text) if f".{name}".endswith(f".{where}")],
            )
    for path in (project / "csrc").iterdir():
        if path.suffix in (".h", ".cpp", ".cu", ".cuh"):
            text = path.read_text()
            yield path, text, list(_cpp(text, where))


def _python(path: Path, text: str) -> Iterator[tuple[str, int, int]]:
    """The dotted name, begin and end of each function, class and assigned name."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def visit(node: ast.AST, prefix: str) -> Iterator[tuple[str, int, int]]:
        for child in ast.iter_child_nodes(node):
            names: list[str] = []
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                names = [child.name]
            elif isinstance(child, ast.Assign | ast.AnnAssign):
                targets = child.targets if isinstance(child, ast.Assign) else [child.target]
                names = [target.id for target in targets if isinstance(target, ast.Name)]
            for name in names:
                yield f"{prefix}.{name}", starts[child.lineno - 1], starts[child.end_lineno or child.lineno]
            yield from visit(child, f"{prefix}.{names[0]}" if names else prefix)

    return visit(ast.parse(text), path.stem)


def _cpp(text: str, name: str) -> Iterator[tuple[int, int]]:
    """The body of each function, struct or class with this name."""
    blank = _CPP_TEXT.sub(lambda match: re.sub(r"\S", " ", match[0]), text)
    for match in re.finditer(rf"(?<![\w.]){re.escape(name)}(?=\s*\(|\s*\{{)", blank):
        at = match.end() + blank[match.end() :].index(blank[match.end() :].lstrip()[0])
        if blank[at] == "(":
            after = _closing(blank, at, "()")
            body = re.compile(r"\s*(?:const\s*)?\{").match(blank, after)
            at = body.end() - 1 if body else -1
        if at >= 0:
            yield match.start(), _closing(blank, at, "{}")


def _closing(text: str, at: int, pair: str) -> int:
    """The index behind the bracket that closes the one at this index."""
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] == pair[0]) - (text[i] == pair[1])
        if depth == 0:
            return i + 1
    return len(text)
