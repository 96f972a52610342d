"""Writes the README's tables: benchmarks from bench/results/*.json, the evaluation from docs/evaluation/results.json.

Each goes between its markers.

A result file is {"name": ..., "conditions": {...}, "rows": [{...}, ...]}; all rows have the same keys: the columns. It
may have several tables under the same conditions: "tables": [{"name": ..., "rows": [...]}, ...] in place of rows.
With --check, changes nothing and fails if the README is out of date.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def tables(folder: Path) -> str:
    """The tables of every result file, in the order of their names."""
    parts = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        missing = {"name", "conditions"} - result.keys()
        if not {"rows", "tables"} & result.keys():
            missing.add("rows")
        if missing:
            raise ValueError(
                f"{path}: expected the keys name, conditions and rows; {', '.join(sorted(missing))} missing"
            )
        parts += [f"**{part['name']}**\n\n{table(part['rows'], path)}" for part in result.get("tables", [result])]
        parts.append(conditions(result["conditions"]))
    return "\n\n".join(parts)


def table(rows: Sequence[Mapping[str, Any]], path: Path) -> str:
    """Rows of equal keys as Markdown; columns of numbers to the right; None is an empty cell."""
    if not rows or any(row.keys() != rows[0].keys() for row in rows):
        raise ValueError(f"{path}: expected rows with the same keys")
    columns = list(rows[0])
    rules = ["---:" if all(isinstance(row[c], (int, float, type(None))) for row in rows) else "---" for c in columns]
    lines = [columns, rules, *([cell(row[c]) for c in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def conditions(values: Mapping[str, Any]) -> str:
    """What the numbers hold under, on one line."""
    return "; ".join(f"{name}: {cell(value)}" for name, value in values.items()) + "."


def cell(value: Any) -> str:
    """A value as text: three significant digits, thousands apart."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value).replace("|", "\\|")


def evaluation(path: Path) -> str:
    """The PCM against every other method, from what ``pcm-fast evaluate`` wrote."""
    result = json.loads(path.read_text(encoding="utf-8"))
    rates, names = result["win_rates"], result["win_rates"]["methods"]
    rows = []
    for column, method in enumerate(result["methods"]):
        value, low, high = (100 * rates[end][names.index("pcm")][column] for end in ("value", "low", "high"))
        own = method["name"] == "pcm"
        rows.append(
            {
                "method": method["label"],
                "the PCM wins against it, %": "" if own else f"{value:.1f} ({low:.1f} to {high:.1f})",
                "composite reward": method["composite"]["value"],
                "change of fluency (nats a token)": method["fluency_change"]["value"],
                "tokens of an answer": method["tokens"]["value"],
                "tokens/s": method["tokens_per_second"],
            }
        )
    return f"{table(rows, path)}\n\n{conditions(result['conditions'])}"


def wordings(path: Path) -> str:
    """What the PCM makes of wordings that it was not trained on, from the same file."""
    rows = [
        {
            "asked for": row["dimension"],
            "wordings": row["wordings"],
            "that expert leads, %": round(100 * row["leads"]),
            "has more weight than without a preference, %": round(100 * row["raised"]),
            "its mean weight": row["weight"],
            "without a preference": row["without"],
        }
        for row in json.loads(path.read_text(encoding="utf-8"))["wordings"]
    ]
    return table(rows, path)


def updated(readme: str, section: str, text: str) -> str:
    """The README with the text between the markers of a section."""
    begin, end = f"<!-- {section}:begin -->", f"<!-- {section}:end -->"
    before, found, rest = readme.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"README: expected the markers {begin} and {end}")
    return f"{before}{begin}\n{text}\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--evaluation", type=Path, default=ROOT / "docs" / "evaluation" / "results.json")
    arguments = parser.parse_args()
    old = arguments.readme.read_text(encoding="utf-8")
    new = updated(old, "bench", tables(arguments.results))
    new = updated(new, "evaluation", evaluation(arguments.evaluation))
    new = updated(new, "wordings", wordings(arguments.evaluation))
    if arguments.check and new != old:
        sys.exit(
            f"{arguments.readme.name}: its tables are not those of the results; run {Path(__file__).name} on its own"
        )
    arguments.readme.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
