"""Reads the documents: their code, the commands that they show, links and headings."""

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "results/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"`((?:python|bash|torchrun|pytest|docker|sbatch|enroot)\s[^`]+)`")
_SEPARATORS = re.compile(r"\s*(?:&&|;|\|)\s*")


@dataclass(frozen=True)
class Command:
    """A command that a document shows."""

    document: str
    words: tuple[str, ...]
    """Program and arguments. Variables of a loop are 1, "..." and "[flags]" are left out."""
    environment: dict[str, str] = field(default_factory=dict, hash=False)
    comment: str = ""
    """What the line says about it, after a "#"."""
    in_text: bool = False
    """It stands in a sentence, not in a block of its own."""

    @property
    def line(self) -> str:
        """The command without its environment."""
        return " ".join(self.words)

    @property
    def flags(self) -> list[str]:
        """Its long flags."""
        return [word.partition("=")[0] for word in self.words if word.startswith("--")]


def blocks(text: str, *languages: str) -> list[str]:
    """Return the fenced code blocks of these languages."""
    return [code for language, code in _FENCED.findall(text) if language in languages]


def commands(document: Path) -> list[Command]:
    """Return the commands of a document: those of its shell blocks, then those in its sentences."""
    text = document.read_text()
    name = str(document.relative_to(ROOT))
    found = []
    for block in blocks(text, "sh", "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            shown, _, comment = line.partition(" #")
            found += [_command(name, part, comment.strip()) for part in _SEPARATORS.split(shown)]
    for span in _INLINE.findall(_FENCED.sub("", text)):
        found.append(_command(name, " ".join(span.split()), "", in_text=True))
    return [c for c in found if c.words and "<" not in c.line]  # "<row>" stands for anything


def _command(document: str, text: str, comment: str, *, in_text: bool = False) -> Command:
    words = [re.sub(r"\$\w+$", "1", word) for word in shlex.split(text)]
    words = [word for word in words if word not in ("...", "[flags]", "do", "done")]
    if words[:1] == ["for"]:
        words = []
    environment = {}
    while words and (assignment := re.fullmatch(r"([A-Z_]+)=(.*)", words[0])):
        environment[assignment[1]] = assignment[2]
        del words[0]
    return Command(document, tuple(words), environment, comment, in_text)


def anchors(text: str) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", _FENCED.sub("", text), re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        repeated = sum(bool(re.fullmatch(rf"{re.escape(anchor)}(-\d+)?", a)) for a in found)
        found.add(f"{anchor}-{repeated}" if repeated else anchor)
    return found


def links(text: str) -> list[str]:
    """Return the targets of all links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", _FENCED.sub("", text))


def names(text: str) -> list[str]:
    """Return what stands in `quotes` like these within a line of text."""
    return re.findall(r"`([^`\n]+)`", _FENCED.sub("", text))
