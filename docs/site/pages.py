"""Hooks of the documentation site: pages that stand outside docs/ in the repository are pages of the site too.

README.md is the overview. Links to these files, and from them into docs/, become links within the site.
"""

import re
from dataclasses import fields
from html import escape
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
# Path in the repository → page of the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "LICENSE": "license.md",
    "examples/space/README.md": "space.md",
}
# Files that pages link to, as they are.
ASSETS = {"examples/quickstart.ipynb": "quickstart.ipynb"}
CARDS = sorted(path.parent.name for path in (ROOT / "model_cards").glob("*/README.md"))
PAGES |= {f"model_cards/{name}/README.md": f"model_cards/{name}.md" for name in CARDS}
CARD_LIST = "model_cards/index.md"
# The heading of an options dataclass in the reference, and the first paragraph below it.
OPTIONS = re.compile(r'<h3 id="(hf_offline_compress[\w.]*)\.(\w+Options)".*?</p>', re.DOTALL)
LINK = re.compile(r"(\]\(|(?:src|srcset|href)=\")([^)#\s\"]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are files outside of docs/, and the list of model cards."""
    for source, page in PAGES.items():
        text = _without_metadata((ROOT / source).read_text("utf-8"))
        files.append(File.generated(config, page, content=_moved(text, source, page)))
    for source, place in ASSETS.items():
        files.append(File.generated(config, place, content=(ROOT / source).read_bytes()))
    rows = "\n".join(f"- [{name}]({name}.md)" for name in CARDS)
    listed = f"# Example cards\n\nCards of real runs, as `hf-offline-compress card` writes them:\n\n{rows}\n"
    files.append(File.generated(config, CARD_LIST, content=listed))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links of pages in docs/ lead to where the others are on the site."""
    source = f"docs/{page.file.src_uri}"
    return markdown if page.file.generated_by else _moved(markdown, source, page.file.src_uri)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Show the fields of options dataclasses, whose texts stand in metadata and not in a docstring."""
    return OPTIONS.sub(lambda match: match[0] + _fields(getattr(import_module(match[1]), match[2])), html)


def _fields(kind: type[Any]) -> str:
    """Return a table of what each option is for."""
    rows = ""
    for item in fields(kind):
        text = re.sub(r"`(.+?)`", r"<code>\1</code>", escape(item.metadata["text"], quote=False))
        name, typed, default = (f"<code>{escape(str(x))}</code>" for x in (item.name, item.type, repr(item.default)))
        rows += f"<tr><td>{name}</td><td>{typed}</td><td>{text}</td><td>{default}</td></tr>"
    head = "<th>Name</th><th>Type</th><th>Description</th><th>Default</th>"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _without_metadata(text: str) -> str:
    """Return a page without a card's YAML header, which is for the Hub."""
    return re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)


def _moved(text: str, source: str, page: str) -> str:
    """Return a page whose relative links are those of its place on the site."""

    def link(match: re.Match[str]) -> str:
        target = match[2]
        if re.match(r"\w+:|/", target):
            return match[0]
        parts = []
        for part in (PurePosixPath(source).parent / target).parts:
            if part == "..":
                parts = parts[:-1]
            elif part != ".":
                parts.append(part)
        place = "/".join(parts)
        if place == "model_cards":
            place = CARD_LIST
        elif place in PAGES or place in ASSETS:
            place = (PAGES | ASSETS)[place]
        elif place.startswith("docs/"):
            place = place.removeprefix("docs/")
        else:  # a file that is only in the repository
            return match[0]
        up = "../" * (len(PurePosixPath(page).parts) - 1)
        return f"{match[1]}{up}{place}"

    return LINK.sub(link, text)
