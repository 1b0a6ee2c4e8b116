"""The evaluation's command line; `python -m helpers.evaluate --help` lists the commands."""

import argparse
import sys

from helpers.evaluate import ledger
from helpers.evaluate.intervals import with_interval
from helpers.evaluate.reports import compare, rescore

LEDGER, README = "results.json", "README.md"


def main(arguments: list[str] | None = None) -> None:
    """Run one command and print its result; a fault in the input ends in one sentence and exit status 1."""
    parser = argparse.ArgumentParser(prog="python -m helpers.evaluate", description="Scores of finished runs.")
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("table", help="the results of all runs found")
    table.add_argument("runs_dir", nargs="?", default="runs")
    table.add_argument("--write", action="store_true", help="write the ledger and the README's results from the runs")
    table.add_argument("--check", action="store_true", help="fail where README, ledger and runs do not agree")
    pair = commands.add_parser("compare", help="two runs on the same pictures, by a paired bootstrap")
    pair.add_argument("a", help="a run's name or folder; name:base for its baseline")
    pair.add_argument("b")
    pair.add_argument("--runs-dir", default="runs")
    again = commands.add_parser("score", help="score the predictions in a run's folder again, rewrite metrics.json")
    again.add_argument("folder")
    given = parser.parse_args(arguments)
    try:
        if given.command == "compare":
            print(compare(given.a, given.b, given.runs_dir))
        elif given.command == "score":
            _print_scores(rescore(given.folder))
        elif given.check:
            problems = ledger.stale(given.runs_dir, LEDGER, README)
            if problems:
                raise ValueError("\n".join([*problems, f"{len(problems)} stale; make table ARGS=--write"]))
            print(f"every number of the results in {README} is that of {LEDGER}")
        elif given.write:
            print(ledger.write(given.runs_dir, LEDGER, README))
        else:
            print(ledger.results_table(given.runs_dir))
    except (ValueError, OSError) as error:
        sys.exit(f"{error}")


def _print_scores(metrics: dict) -> None:
    for name, result in metrics["scores"].items():
        print(f"{name}, {result['pictures']} pictures")
        for metric, numbers in result["summary"].items():
            if numbers["value"] is not None:
                print(f"  {metric}: {with_interval(numbers)}, n = {numbers['n']}")
        for problem, names in result["problems"].items():
            print(f"  problem, {len(names)} x {problem}: {'; '.join(names[:5])}{' ...' if len(names) > 5 else ''}")


if __name__ == "__main__":
    main()
