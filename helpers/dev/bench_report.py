"""The 7B benchmark's report as tables, and the block of the README that holds its summary.

python -m helpers.dev.bench_report [--report notebooks/performance_7b.json] [--write | --check]
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "notebooks" / "performance_7b.json"
BLOCK = re.compile(r"(<!-- speed: [^\n]* -->\n).*?(<!-- end of speed -->)", re.S)
SMALL_GIB = 24  # the card that r1 and r4 are promised to fit
NOT_RUN = "Not run yet: there is no report of `python -m helpers.dev.bench_7b` (`make bench` on a GPU makes it)."


def read(path: Path = REPORT) -> dict | None:
    """The report, or None where the benchmark has not run."""
    return json.loads(path.read_text()) if path.is_file() else None


def stock_of(report: dict, row: dict) -> dict | None:
    """The stock row that `row` is compared with: of its recipe, in NF4; None where that has failed or is missing."""
    same = [other for other in report["train"] if other["kind"] == "stock" and other["precision"] == "nf4"
            and other["recipe"] == row["recipe"] and "failed" not in other]  # fmt: skip
    return same[0] if same else None


def times_stock(report: dict, row: dict) -> float | None:
    stock = stock_of(report, row)
    return row["pictures_per_s"] / stock["pictures_per_s"] if stock and "failed" not in row else None


def markdown(rows: list[list[str]]) -> str:
    """A table: the first row is its head."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def training_table(report: dict) -> str:
    """Every variant that was measured, in Markdown."""
    table = [["training", "recipe", "base", "micro-batch", "pictures/s", "× stock", "tokens/s", "peak GiB", "MFU",
              "vision", "language", "head, loss", "optimiser", "data, rest"]]  # fmt: skip
    for row in report["train"]:
        start = [row["name"], row["recipe"], row["precision"], str(row["micro_batch"])]
        if "failed" in row:
            table.append([*start, row["failed"], *["–"] * 9])
            continue
        split, times = row["split_s"], times_stock(report, row)
        whole = sum(split.values())
        parts = [split["vision"], split["language"], split["head and loss"], split["optimiser"]]
        shares = [f"{part / whole:.0%}" for part in [*parts, whole - sum(parts)]]
        table.append([
            *start, f"{row['pictures_per_s']:.2f}", f"{times:.2f}" if times else "–", f"{row['tokens_per_s']:.0f}",
            f"{row['peak_gib']:.1f}" if row["peak_gib"] else "–", f"{row['mfu']:.0%}", *shares])  # fmt: skip
    return markdown(table)


def answering_table(report: dict) -> str:
    """Seconds for 123 answers, in Markdown."""
    table = [["answers", "at once", "s for 123", "× one by one", "measured"]]
    answers = [row for row in report["answer"] if "failed" not in row]
    if not answers:
        return "Answers were not measured."
    for row in answers:
        alone = [other for other in answers if other["precision"] == row["precision"] and other["batch"] == 1]
        seconds = row["s_for_123"]
        times = f"{alone[0]['s_for_123'] / seconds:.1f}" if alone else "–"
        measured = f"{row['pictures']} pictures, {row['new_tokens']} new tokens"
        name = row["precision"] + ", compiled" * row["compiled"]
        table.append([name, str(row["batch"]), f"{seconds:.1f}", times, measured])
    return markdown(table)


def curves_text(report: dict) -> str:
    """How far the losses of ours are from those of stock, in words."""
    curves = {name: losses for name, losses in report["curves"].items() if isinstance(losses, list)}
    if len(curves) < 2:
        return "The losses of TRL's trainer and ours were not compared."
    first, *others = curves
    parts = [f"{name}: at most {max(abs(a / b - 1) for a, b in zip(curves[name], curves[first], strict=False)):.2%} "
             f"from {first}" for name in others]  # fmt: skip
    ends = f"from {curves[first][0]:.3f} to {curves[first][-1]:.3f}"
    return f"Losses of {len(curves[first])} steps, {first} {ends}; {'; '.join(parts)}."


def summary(report: dict | None) -> str:
    """What the README says: stock, ours, Unsloth and the limit for r4 and r1, and answering; or that it has not run."""
    if report is None:
        return NOT_RUN
    machine = f"{report['device']}, {report['model']}, torch {report['torch']}, commit {report['commit'] or '?'}"
    table = [["", "pictures/s", "× stock", "peak GiB", "MFU"]]
    for recipe in dict.fromkeys(row["recipe"] for row in report["train"]):
        good = [row for row in report["train"] if row["recipe"] == recipe and "failed" not in row]
        ours = [row for row in good if row["kind"] == "ours" and row["dropout"]]  # without it is another training
        named = {f"stock, batches of {row['micro_batch']}": row for row in good if row["kind"] == "stock"}
        for where, most in ((f"in {SMALL_GIB} GiB", SMALL_GIB), ("fastest", math.inf)):
            fit = [row for row in ours if (row["peak_gib"] or 0) <= most and row not in named.values()]
            if fit:
                best = max(fit, key=lambda row: row["pictures_per_s"])
                named[f"ours, {where}: {best['name'].removesuffix(', r1')}"] = best
        for dropout in (True, False):  # Unsloth's own kernels need none
            theirs = [row for row in good if row["kind"] == "unsloth" and bool(row["dropout"]) == dropout]
            if theirs:
                best = max(theirs, key=lambda row: row["pictures_per_s"])
                named[best["name"].removesuffix(", r1")] = best
        rows = list(named.values())
        for name, row in named.items():
            times, peak = times_stock(report, row), row["peak_gib"]
            table.append([f"{recipe}, {name}", f"{row['pictures_per_s']:.2f}", f"{times:.2f}" if times else "–",
                          f"{peak:.1f}" if peak else "–", f"{row['mfu']:.0%}"])  # fmt: skip
        if rows:
            limit = rows[-1]["pictures_per_s"] / rows[-1]["mfu"]
            ratio = f"{limit / rows[0]['pictures_per_s']:.2f}" if rows[0]["kind"] == "stock" else "–"
            table.append([f"{recipe}, limit: what is needed, at the rate of a matrix product", f"{limit:.2f}", ratio,
                          "–", "100%"])  # fmt: skip
    head = f"`{report['command'].strip()}` ({machine}, {report['pictures_per_update']} random pictures an update):"
    return "\n\n".join([head, markdown(table), answering_table(report), curves_text(report)])


def table(report: dict) -> str:
    """Everything, as the benchmark prints it at its end."""
    left = ", ".join(row["what"] for row in report["left_out"]) or "nothing"
    return "\n\n".join([training_table(report), answering_table(report), curves_text(report), f"Left out: {left}.",
                        summary(report)])  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, default=REPORT)
    parser.add_argument("--write", action="store_true", help="into README.md")
    parser.add_argument("--check", action="store_true", help="fail where README.md says something else")
    options = parser.parse_args()
    report, readme = read(options.report), ROOT / "README.md"
    text = readme.read_text()
    wanted = BLOCK.sub(lambda found: f"{found[1]}{summary(report)}\n{found[2]}", text)
    if options.write:
        readme.write_text(wanted)
    elif options.check and wanted != text:
        print("README.md's block on speed is stale: python -m helpers.dev.bench_report --write")
        return 1
    else:
        print(table(report) if report else NOT_RUN)
    return 0


if __name__ == "__main__":
    sys.exit(main())
