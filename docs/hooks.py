# Copyright (c) mmscalablevit contributors. All rights reserved.
"""MkDocs' view of the repository: pages lie in the site where their files lie here."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# Pages, their pictures, and the files that pages link to.
PARTS = (
    '*.md',
    'LICENSE',
    'configs/**/*.*',
    'demo/*.*',
    'docs/*.css',
    'docs/*.md',
    'docs/images/*',
    'tools/**/*.*',
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace MkDocs' own list, which knows the folder ``docs/`` alone."""
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    for path in sorted({path for part in PARTS for path in ROOT.glob(part)}):
        if path.is_file() and '__pycache__' not in path.parts:
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files
