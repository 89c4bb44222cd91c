"""Hooks of mkdocs: links to files of the repository lead to copies in the site, and no page loads from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()\.\./([^)#\s]+)")  # in a page, to a file outside docs/
FOLDER = "repository"  # of the copies
RESOURCE = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|srcset|href)=[\"']?(?:https?:)?//[^>]*>")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the files that pages link to; mkdocs warns of those that are not there."""
    for page in files.documentation_pages():
        for link in LINK.findall(page.content_string):
            uri = f"{FOLDER}/{link}"
            if (ROOT / link).is_file() and uri not in files.src_uris:
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / link)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Turn links to files of the repository to their copies."""
    return LINK.sub(rf"{FOLDER}/\1", markdown)


def on_post_page(output: str, *, page: Page, config: MkDocsConfig) -> str:
    """Fail where a page would load something from another server."""
    found = RESOURCE.search(output)
    if found:
        raise PluginError(f"{page.file.src_uri} loads from another server: {found[0]}")
    return output
