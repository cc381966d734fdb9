"""A hook of MkDocs: makes pages of README.md and other documents outside of docs/, and adapts all links."""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
# Page → document, and the section of the document if the page is not all of it
PAGES = {
    "clip.md": ("README.md", "Your own clip"),
    "settings.md": ("README.md", "Configuration"),
    "tpu.md": ("launch/README.md", None),
    "plan.md": ("benchmarks/TPU_PLAN.md", None),
    "architecture.md": ("CONTRIBUTING.md", None),
    "changelog.md": ("CHANGELOG.md", None),
    "index.md": ("README.md", None),  # without the sections that have a page
}
ASSETS = ("benchmarks/long_run.svg", "benchmarks/scaling.svg")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def on_files(files, config):
    for page, (document, section) in PAGES.items():
        content = _section(document, section)
        files.append(File.generated(config, page, content=content))
    for asset in ASSETS:
        files.append(File.generated(config, Path(asset).name, abs_src_path=str(ROOT / asset)))
    return files


def on_page_markdown(markdown, page, config, files):
    document = PAGES.get(page.file.src_uri, (f"docs/{page.file.src_uri}", None))[0]
    return LINK.sub(lambda link: _link(document, *link.groups()), markdown)


def _section(document: str, title: str | None) -> str:
    text = (ROOT / document).read_text("utf-8")
    sections = _sections(text)
    if title is None:
        pages = [section for page, section in PAGES.values() if page == document and section]
        return "".join(part for name, part in sections if name not in pages)
    (part,) = (part for name, part in sections if name == title)
    return _outside_fences(part, lambda text: re.sub(r"^#(#+ )", r"\1", text, flags=re.MULTILINE))


def _sections(text: str) -> list[tuple[str, str]]:
    """The titles and texts of the sections of level 2, and what comes before them under the title ""."""
    fences = [match.span() for match in FENCE.finditer(text)]
    headings = [
        match
        for match in re.finditer(r"^## (.*)$", text, re.MULTILINE)
        if not any(start <= match.start() < end for start, end in fences)
    ]
    starts = [0, *(match.start() for match in headings), len(text)]
    titles = ["", *(match[1] for match in headings)]
    return [(title, text[a:b]) for title, a, b in zip(titles, starts, starts[1:], strict=False)]


def _outside_fences(text: str, change) -> str:
    parts, end = [], 0
    for match in FENCE.finditer(text):
        parts += [change(text[end : match.start()]), match[0]]
        end = match.end()
    return "".join([*parts, change(text[end:])])


def _link(document: str, image: str, text: str, target: str) -> str:
    """A link of a document as a link of the site. Files that are not on the site are named instead."""
    if "://" in target:
        return f"{image}[{text}]({target})"
    path, _, anchor = target.partition("#")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(document), path)) if path else document
    if path in ASSETS or path.startswith("docs/"):
        page = path.removeprefix("docs/") if path.startswith("docs/") else Path(path).name
        return f"{image}[{text}]({page}{'#' * bool(anchor)}{anchor})"
    for page, (source, section) in PAGES.items():
        sections = dict(_sections((ROOT / source).read_text("utf-8")))
        if source == path and (section is None or (anchor and anchor in _anchors(sections[section]))):
            return f"[{text}]({page}{'#' * bool(anchor)}{anchor})"
    return text if path in text else f"{text} (`{path}`)"


def _anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}
