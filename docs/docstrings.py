# Copyright (c) mmscalablevit contributors. All rights reserved.
"""What the API pages change in docstrings before they are rendered."""

import re

import griffe

ROLE = re.compile(r':(?:class|func|meth|mod):(?=`)')
# Griffe knows the plural as a section of code and takes the singular for prose.
EXAMPLE = re.compile(r'^(\s*)Example:', flags=re.MULTILINE)


class Docstrings(griffe.Extension):
    """Drops Sphinx' roles and makes every example a block of code."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        """Change the docstring of an object that has one."""
        if obj.docstring:
            text = EXAMPLE.sub(r'\1Examples:', ROLE.sub('', obj.docstring.value))
            # What Sphinx reads as the start of a block of code.
            obj.docstring.value = re.sub(r'(?<=\w)::$', ':', text, flags=re.MULTILINE)
