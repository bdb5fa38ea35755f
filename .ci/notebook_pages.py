"""The notebooks as pages of the guides, with the outputs that are stored in them: a hook of mkdocs.

`notebooks/NAME.ipynb` becomes the page `notebooks/NAME.md`: prose, code, what was printed, and pictures. Guides link
`../notebooks/NAME.ipynb`, which is there where the guides themselves are read, too.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def on_files(files: Files, config: Any) -> Files:
    """Called by mkdocs when it has listed the pages."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        pictures: list[bytes] = []
        text = "\n\n".join(_cell(cell, path.stem, pictures) for cell in cells)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for number, picture in enumerate(pictures, 1):
            files.append(File.generated(config, _picture(path.stem, number), content=picture))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs with the text of each page."""
    return re.sub(r"\]\(\.\./notebooks/(\w+)\.ipynb\)", r"](notebooks/\1.md)", markdown)


def _cell(cell: dict[str, Any], name: str, pictures: list[bytes]) -> str:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return source
    parts = [f"```python\n{source}\n```"]
    for output in cell["outputs"]:
        data = output.get("data", {})
        if "image/png" in data:
            pictures.append(base64.b64decode(data["image/png"]))
            parts.append(f"![what the code above draws]({Path(_picture(name, len(pictures))).name})")
        else:
            printed = "".join(output.get("text") or data["text/plain"]).rstrip("\n")
            parts.append(f"```text\n{printed}\n```")
    return "\n\n".join(parts)


def _picture(name: str, number: int) -> str:
    return f"notebooks/{name}-{number}.png"
