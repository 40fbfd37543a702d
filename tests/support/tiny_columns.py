"""The tables of columns in docs/columns.md, which ``python -m support.tiny_columns`` (in tests/) writes."""

from __future__ import annotations

from pathlib import Path

from rft_fast import results

PAGE = Path(__file__).parents[2] / "docs" / "columns.md"
TABLES = ("rows", "correlation", "claim", "ensemble", "choice", "pairs", "soups", "cost")


def markdown(table: str) -> str:
    """A table of the page."""
    everyone = {results.describe()["filled_by"][0]: "all that measure"}  # those of the column study
    lines = ["| column | unit | meaning | filled by | example |", "| --- | --- | --- | --- | --- |"]
    for _, row in results.describe(table).iterrows():
        cells = [
            f"`{row['name']}`",
            row["unit"],
            row["meaning"],
            everyone.get(row["filled_by"], row["filled_by"]),
            f"`{row['example']}`",
        ]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def updated(text: str) -> str:
    """The page with these tables."""
    for table in TABLES:
        start, end = f"<!-- columns of {table} -->\n\n", "\n\n<!-- end -->"
        head, _, rest = text.partition(start)
        text = head + start + markdown(table) + end + rest.partition("<!-- end -->")[2]
    return text


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text("utf-8")), "utf-8")
