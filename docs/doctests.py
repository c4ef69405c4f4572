"""For `make docs`: griffe leaves ``>>>`` examples outside an "Examples:" section as text, which Markdown takes for a
quotation. Make code blocks of them."""

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)  # ends at an empty line, as a doctest does


class Doctests(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)
