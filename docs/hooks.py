"""What mkdocs does besides (a hook of mkdocs.yml): pages from outside docs/, links to them, and roles of docstrings.

Links in the pages are those that work in the repository. In the site, one to a file that is a page there leads to it;
one to any other file of the repository is left out, and its text stays. One that leads nowhere is an error.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "develop.md",
    "flame/README.md": "training.md",
    "flash-linear-attention/README.md": "backend.md",
}
"""Files outside docs/ -> the pages that they are in the site."""
_SOURCES = {page: file for file, page in PAGES.items()}
_LINK = re.compile(r"(?<!!)\[([^][]*)\]\(([^()\s]+)\)")
_TITLE, _HEADING = (re.compile(rf"^{signs} ", flags=re.MULTILINE) for signs in ("#", "#+"))
_ROLE = re.compile(r":(?:class|data|func|meth|mod):<code>~?(?:[\w.]*\.)?(\w+)</code>")


def on_files(files, config):
    """Add the pages from outside docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn links of the repository into those of the site, but in code; a page of several titles gets none."""
    here = page.file.src_uri
    folder = posixpath.dirname(_SOURCES.get(here, f"docs/{here}"))

    def changed(link):
        text, (target, _, anchor) = link[1], link[2].partition("#")
        if not target or ":" in target:
            return link[0]
        target = posixpath.normpath(posixpath.join(folder, target))
        if not (ROOT / target).exists():
            raise PluginError(f"{here}: {link[0]} leads to {target}, which is not there")
        leads_to = PAGES.get(target, target.removeprefix("docs/") if target.startswith("docs/") else None)
        if leads_to is None:
            return text
        return f"[{text}]({leads_to}{f'#{anchor}' if anchor else ''})"  # all pages of the site lie in one folder

    blocks = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    texts = [_LINK.sub(changed, text) for text in blocks[::2]]
    if sum(len(_TITLE.findall(text)) for text in texts) > 1:  # the contents at the side have one title alone
        texts = [_HEADING.sub(r"#\g<0>", text) for text in texts]
    blocks[::2] = texts
    return "".join(blocks)


def on_page_content(html, page, config, files):
    """Take the roles away that docstrings name other objects with."""
    return _ROLE.sub(r"<code>\1</code>", html)
