"""Fill the page templates: every value is escaped, and control characters become symbols.

Only values of type ``Markup`` are not escaped. These are the pictures of report/pictures, and this program's own style
sheets and script.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from repro.store.text import escape_control_characters, escape_lines, short_site, shorten_rank_lists
from repro.verdict.result import list_ranks, name_ranks

_HERE = Path(__file__).parent
_MOST_CHARACTERS, _MOST_A_LINE = 4000, 2000


def render(template: str, **values: Any) -> str:
    """Fill a template with ``values``. Returns the text.

    template: the name of a file in this folder

    Raises jinja2.UndefinedError if the template uses a name that is not in ``values``.
    """
    return _environment().get_template(template).render(**values)


def read_own(name: str) -> Markup:
    """Return the text of a style sheet or script of this program. name: the path of the file in this folder"""
    return Markup((_HERE / name).read_text(encoding="utf-8"))


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    environment.filters |= {
        "block": lambda text: escape(escape_lines(text, _MOST_A_LINE)),
        "capitalised": lambda text: text[:1].upper() + text[1:],
        "cut": escape_control_characters,
        "list_ranks": _list_ranks,
        "name_ranks": _name_ranks,
        "short_site": short_site,
        "short": shorten_rank_lists,
    }
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment


def _visible(value: Any) -> Any:
    """Make the control characters of a string visible, before Jinja2 escapes the string for HTML."""
    return (
        escape_control_characters(value, _MOST_CHARACTERS)
        if isinstance(value, str) and not isinstance(value, Markup)
        else value
    )


def _list_ranks(ranks: Collection[int]) -> str:
    return shorten_rank_lists(list_ranks(ranks))


def _name_ranks(ranks: Collection[int]) -> str:
    return shorten_rank_lists(name_ranks(ranks))
