# Copyright (c) mmscalablevit contributors. All rights reserved.
"""Draw ``images/architecture_code.svg`` from the code: ``python docs/architecture_drawing.py``."""

import ast
import textwrap
from collections.abc import Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE = ROOT / 'docs' / 'images' / 'architecture_code.svg'
# From top to bottom: each part may import those of the rows under it. All else comes from the code.
ROWS = [
    ['tools', 'demo'],
    ['cli'],
    ['models', 'engine'],
    ['work_dirs', 'published'],
    ['checkpoint', 'checks'],
    ['errors'],
]
WIDTH, MARGIN, GAP, LINE = 960, 20, 46, 17
COLORS = {'tools': '#fdf1e3', 'demo': '#fdf1e3', 'models': '#e9f6ec'}


def files(part: str) -> list[Path]:
    """The Python files of a part of the repository."""
    folder = ROOT / part if part in ROWS[0] else ROOT / 'mmscalablevit' / part
    if not folder.is_dir():
        return [folder.with_suffix('.py')]
    return sorted(path for path in folder.rglob('*.py') if path.name != '__init__.py')


def imports(path: Path) -> Iterator[str]:
    """Names of the modules that a file imports, relative ones in full, at any depth of the file."""
    here = path.relative_to(ROOT).parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(here[: len(here) - node.level]) if node.level else ''
            name = '.'.join(filter(None, [base, node.module or '']))
            yield name
            yield from (f'{name}.{alias.name}' for alias in node.names)


def arrows() -> dict[str, set[str]]:
    """For each part the parts that it imports."""
    parts = [part for row in ROWS for part in row]
    found = {}
    for part in parts:
        names = {name for path in files(part) for name in imports(path)}
        modules = {name.split('.')[1] for name in names if name.startswith('mmscalablevit.')}
        modules |= {name.split('.')[0] for name in names} & set(ROWS[0])
        found[part] = (modules & set(parts)) - {part}
    return found


def reduced(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The arrows without those that follow from others."""

    def below(part):
        return graph[part].union(*map(below, graph[part]))

    return sorted(
        (part, other)
        for part, others in graph.items()
        for other in others
        if not any(other in below(step) for step in others)
    )


def lines(part: str) -> list[str]:
    """What is written into the box of a part: its files, a line for each folder."""
    base = ROOT / part if part in ROWS[0] else ROOT / 'mmscalablevit' / part
    folders = {}
    for path in files(part):
        folder = path.parent.relative_to(base).as_posix() if base.is_dir() else '.'
        folders.setdefault(folder, []).append(path.stem)
    if len(folders) == 1 and not base.is_dir():
        return []
    return [
        ', '.join(names) if folder == '.' else f'{folder}: {", ".join(names)}'
        for folder, names in sorted(folders.items())
    ]


def wrapped(text: str, width: float) -> list[str]:
    """The text in lines that fit a width in pixels."""
    return textwrap.wrap(text, int(width / 6), subsequent_indent='    ', break_on_hyphens=False)


def drawing() -> str:
    """The whole picture as SVG."""
    boxes, shapes, top = {}, [], 48
    for row in ROWS:
        width = (WIDTH - MARGIN * (len(row) + 1)) / len(row)
        texts = {
            part: [piece for text in lines(part) for piece in wrapped(text, width - 24)]
            for part in row
        }
        height = 32 + LINE * max(map(len, texts.values()))
        for column, part in enumerate(row):
            left = MARGIN + column * (width + MARGIN)
            boxes[part] = left, top, width, height
            shapes.append(
                f'<rect x="{left:.0f}" y="{top}" width="{width:.0f}" height="{height}" rx="6" '
                f'fill="{COLORS.get(part, "#eef2fb")}" stroke="#5b6fae"/>'
            )
            title = f'{part}/' if len(files(part)) > 1 else f'{part}.py'
            shapes.append(label(left + 12, top + 20, title, 'font-weight="bold" fill="#222"'))
            for number, text in enumerate(texts[part], 1):
                y = top + 20 + LINE * number
                shapes.append(label(left + 12, y, text, 'font-size="11.5" fill="#444"'))
        top += height + GAP
    # Behind the boxes.
    shapes = [arrow(boxes[start], boxes[end]) for start, end in reduced(arrows())] + shapes
    height = top - GAP + MARGIN
    return '\n'.join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            'font-family="Helvetica, Arial, DejaVu Sans, sans-serif" font-size="13">',
            '<title>The parts of the code and what they import</title>',
            '<defs><marker id="arrow" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
            'markerHeight="7" orient="auto"><path d="M0 0L10 5L0 10z"/></marker></defs>',
            f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#ffffff"/>',
            label(MARGIN, 30, 'An arrow is an import; those that follow from others are left out'),
            *shapes,
            '</svg>\n',
        ]
    )


def label(x: float, y: float, text: str, style: str = 'fill="#222"') -> str:
    """A line of text."""
    return f'<text x="{x:.0f}" y="{y}" xml:space="preserve" {style}>{escape(text)}</text>'


def arrow(start: tuple, end: tuple) -> str:
    """A line from the lower edge of a box to the upper edge of another."""
    (left, top, width, height), (other, below, breadth, _) = start, end
    x1, x2 = left + width / 2, other + breadth / 2
    x1 += width * 0.25 * ((x2 > x1) - (x2 < x1))
    x2 += breadth * 0.25 * ((x1 > x2) - (x1 < x2))
    return (
        f'<line x1="{x1:.0f}" y1="{top + height}" x2="{x2:.0f}" y2="{below}" stroke="#555" '
        'stroke-width="1.4" marker-end="url(#arrow)"/>'
    )


if __name__ == '__main__':
    FILE.write_text(drawing())
