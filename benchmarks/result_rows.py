"""What pages need of a results file: its rows by where they stand, and the page's head."""

from collections.abc import Mapping
from typing import Any


def rows_at(file: Mapping[str, Any], **where: Any) -> list[dict[str, Any]]:
    """The rows of a results file with these values of the condition, name or metric."""
    return [
        row
        for row in file["rows"]
        if where.items()
        <= {**row["condition"], "name": row["name"], "metric": row["metric"]}.items()
    ]


def plain(file: Mapping[str, Any], **where: Any) -> dict[str, Any]:
    """The results file with the rows of no recipe at `where`."""
    rows = [row for row in rows_at(file, **where) if "recipe" not in row["condition"]]
    return {**file, "rows": rows}


def page_head(title: str, file: Mapping[str, Any]) -> list[str]:
    """The paragraphs that a results page starts with: what, when and where, and what is missing."""
    made = f"{file['date']}, {file['device']}, {file['cores']} cores; `{file['command']}`"
    parts = [f"# {title}\n", f"{made}; {file['seconds'] / 3600:.1f} hours of runs.\n"]
    if file.get("partial"):
        left = ", ".join(f"{n} on {source}" for source, n in file["unfinished_runs"].items() if n)
        parts.append(f"**Partial**: runs still to do: {left}.\n")
    return parts
