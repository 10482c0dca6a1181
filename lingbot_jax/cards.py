"""README.md of a bundle or a data set: a card with the front matter that the Hugging Face Hub reads."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

README = "README.md"
UNKNOWN = "unknown"  # licence, as the Hub has it
_FRONT = re.compile(r"---\n(.*?)\n---\n", re.S)


def front_matter(text: str) -> dict[str, Any]:
    """The YAML between the first two `---` of a card; empty where there is none, or none that can be read."""
    found = _FRONT.match(text)
    try:
        values = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return {}
    return values if isinstance(values, dict) else {}


def card(front: Mapping[str, Any], title: str, sections: Mapping[str, str]) -> str:
    """A whole card. Sections that are empty are left out."""
    head = yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True)
    body = "".join(f"\n## {name}\n\n{text.strip()}\n" for name, text in sections.items() if text)
    return f"---\n{head}---\n\n# {title}\n{body}"


def section(text: str, name: str) -> str:
    """The text below `## name` of a card; empty where there is none."""
    found = re.search(rf"^## {re.escape(name)}\n(.*?)(?=^## |\Z)", text, re.S | re.M)
    return found[1].strip() if found else ""


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    line = lambda cells: "| " + " | ".join(str(cell).replace("|", r"\|") for cell in cells) + " |"
    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])
