"""The project's modules as a package that stands alone: what an exported model computes with, wherever it is."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent
ABOUT = '''"""Modules of the project that trained this model, as they were when it was written: see LICENSE."""\n'''


def write_package(folder: Path, *names: str) -> None:
    """Write modules, and all of the project's that they import, as a package whose imports are relative."""
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(ABOUT, encoding="utf-8")
    (folder / "LICENSE").write_bytes((ROOT / "LICENSE").read_bytes())
    for path in sources(*names):
        place = folder / path.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(with_relative_imports(path), encoding="utf-8")


def sources(*names: str) -> list[Path]:
    """The files of modules, and of all that they import of the project, wherever in them that stands."""
    found, waiting = set(), list(names)
    while waiting:
        name = waiting.pop()
        path = source(name)
        if path is None or path in found:
            continue
        found.add(path)
        waiting += [name.rpartition(".")[0]] if "." in name else []
        waiting += [imported for _, imported in _imports(path.read_text(encoding="utf-8"))]
    return sorted(found)


def source(name: str) -> Path | None:
    """The file of a module of the project; None for those of others."""
    stem = ROOT.joinpath(*name.split(".")) if name else None
    places = [] if stem is None else [stem.with_suffix(".py"), stem / "__init__.py"]
    return next((place for place in places if place.is_file()), None)


def with_relative_imports(path: Path) -> str:
    """The text of a module, whose imports of the project's are relative to the package that they are all in."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    dots = "." * len(path.relative_to(ROOT).parts)
    for node, imported in _imports(text):
        if source(imported) is None:
            continue
        line, start = lines[node.lineno - 1], node.col_offset
        if isinstance(node, ast.ImportFrom):
            changed = line[start:].replace(f"from {imported} ", f"from {dots}{imported} ", 1)
        else:
            assert "." not in imported and len(node.names) == 1, f"{path}: {line.strip()} has no relative form"
            changed = f"from {dots} {line[start:]}"
        lines[node.lineno - 1] = line[:start] + changed
    return "".join(lines)


def _imports(text: str) -> list[tuple[ast.Import | ast.ImportFrom, str]]:
    """The statements that import modules by their full names, and these names."""
    statements = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    named = [(node, alias.name) for node in statements if isinstance(node, ast.Import) for alias in node.names]
    return named + [(node, node.module) for node in statements if isinstance(node, ast.ImportFrom) and not node.level]
