"""Throw broken input at the parser, the audit and the parameters: `python -m helpers.dev.fuzz` (or `make fuzz`).

100 000 model outputs (half are real ones mutated, half hypothesis'), 10 000 broken rows and 1 000 broken parameter
sets, by a seed. Only the documented errors may come, none may take long, and no box may be another than the one that
was written. A counter-example is printed and ends the run with status 1; it then belongs into tests/test_fuzz.py.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from helpers.dev import fuzz_outputs, fuzz_parameters, fuzz_rows

SLOW = 2.0  # seconds one case may take on a busy machine
SHOWN = 5


def hunt(name: str, cases: Iterable[Any], check: Callable[[Any], str]) -> list[str]:
    """Check every case (`check` gives "" where all is well); prints counts, returns the counter-examples."""
    found, counted, slowest = [], 0, 0.0
    for case in cases:
        start = time.perf_counter()
        try:
            fault = check(case)
        except Exception as error:  # exactly what is hunted here
            fault = f"{type(error).__name__}: {error}"
        seconds = time.perf_counter() - start
        counted, slowest = counted + 1, max(slowest, seconds)
        if seconds > SLOW:
            fault = fault or f"takes {seconds:.1f} s"
        if fault:
            found.append(f"{fault}: {case!r}")
    print(f"{name}: {counted} cases, {len(found)} counter-examples, slowest {slowest * 1000:.0f} ms", flush=True)
    print(*(f"  {one[:600]}" for one in found[:SHOWN]), sep="\n", end="\n" if found else "")
    return found


def run(outputs: int, rows: int, parameter_sets: int, seed: int = 0) -> list[str]:
    """All three hunts; returns the counter-examples."""
    found = hunt("mutated outputs", fuzz_outputs.mutated(outputs - outputs // 2, seed), fuzz_outputs.check)
    found += hunt("hypothesis' outputs", fuzz_outputs.generated(outputs // 2, seed), fuzz_outputs.check)
    found += hunt("rows, in tables of 100", fuzz_rows.tables(rows - rows // 5, seed), fuzz_rows.check_table)
    found += hunt("rows in metadata.jsonl", fuzz_rows.lines(rows // 5, seed), fuzz_rows.check_line)
    return found + hunt("parameter sets", fuzz_parameters.sets(parameter_sets, seed), fuzz_parameters.check)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns 1 where a counter-example was found."""
    parser = argparse.ArgumentParser(prog="python -m helpers.dev.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--outputs", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--parameter-sets", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    return int(bool(run(chosen.outputs, chosen.rows, chosen.parameter_sets, chosen.seed)))


if __name__ == "__main__":
    sys.exit(main())
