"""Links in the reference: [`name`] in a docstring becomes a link to the object of that name on the reference page.

Docstrings stay short to read in the source, and the page decides what is public: a name that is not on it, nor a
member of something that is, is a warning, with which `make docs` fails. A module `finetune` whose function has the
same name hides it from griffe; what `peft_sparse` exports is the function.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import griffe

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "index.md"
REFERENCE = re.compile(r"\[`([\w.]+)`\](?![\[(])")
log = logging.getLogger("mkdocs.plugins.crossrefs")


class CrossReferences(griffe.Extension):
    """An extension of mkdocstrings' reader of source, named in mkdocs.yml."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        if pkg.path != "peft_sparse":
            return
        names = re.findall(r"::: peft_sparse\.(\w+)", PAGE.read_text(encoding="utf-8"))
        for name in names:
            self._point_at_function(pkg[name])
        public = {name: pkg[name].final_target for name in names}
        for name, found in public.items():
            for documented in (found, *getattr(found, "members", {}).values()):
                if documented.docstring is not None:
                    self._link(documented.docstring, name, public)

    def _point_at_function(self, member: griffe.Object | griffe.Alias) -> None:
        if isinstance(member, griffe.Alias) and member.final_target.is_module:
            inner = member.final_target.members.get(member.name)
            if inner is not None and not inner.is_module:
                member.target = inner  # type: ignore[assignment]

    def _link(self, docstring: griffe.Docstring, inside: str, public: dict[str, Any]) -> None:
        def linked(match: re.Match[str]) -> str:
            name = match[1].removeprefix("peft_sparse.")
            first, _, member = name.partition(".")
            if first in public and (not member or member in public[first].all_members):
                return f"[`{name}`][peft_sparse.{name}]"
            if name in getattr(public[inside], "all_members", {}):
                return f"[`{name}`][peft_sparse.{inside}.{name}]"
            log.warning("%s: [`%s`] is not on the reference page; take the brackets off, or add it.", inside, match[1])
            return match[0]

        docstring.value = REFERENCE.sub(linked, docstring.value)
