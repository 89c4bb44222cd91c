"""Optional packages: imported where they are needed, and met with the exact pip line where they are missing."""

from __future__ import annotations

import json
from importlib import import_module
from importlib.metadata import distributions
from types import ModuleType
from urllib.parse import urlsplit
from urllib.request import url2pathname

from ensembler.errors import MissingExtraError


def require(module: str, extra: str) -> ModuleType:
    """Return the imported `module`, or raise MissingExtraError with the command that installs `extra`."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise  # the package is there; something that it needs itself is not
        raise MissingExtraError(module.partition(".")[0], install_command(extra)) from error


def install_command(extra: str) -> str:
    """Return the pip line that installs `extra` from where this package came: a folder, a git URL or an archive.

    No index holds the package, and a stranger could take its name there. pip records the origin in direct_url.json
    (PEP 610); without that file the line is for a checkout.
    """
    found = (one.read_text("direct_url.json") for one in distributions(name="logit-ensembler"))
    origin = json.loads(next(filter(None, found), "{}"))
    if not origin:
        return f"pip install -e '.[{extra}]' (in a checkout of the package)"
    if "dir_info" in origin:
        flag = "-e " if origin["dir_info"].get("editable") else ""
        return f"pip install {flag}'{url2pathname(urlsplit(origin['url']).path)}[{extra}]'"
    url, vcs = origin["url"], origin.get("vcs_info")
    if vcs:
        url = f"{vcs['vcs']}+{url}@{vcs['commit_id']}"
    return f"pip install 'logit-ensembler[{extra}] @ {url}'"
