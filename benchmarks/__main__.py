"""Measure how fast the package is, one claim at a time, and write the tables of docs/.

    python -m benchmarks NAME [NAME ...]     # or all; measures NAME again and replaces results/performance/NAME.json
    python -m benchmarks --report            # writes the tables of these pages, measures nothing

Every speed is a ratio to a bare loop that runs in turns with it, so that a noisy machine disturbs both alike.
"""

import argparse

from benchmarks import harness, summary


def main() -> None:
    claims = harness.claims()
    described = "\n".join(f"  {name}: {(module.__doc__ or '').splitlines()[0]}" for name, module in claims.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=f"{__doc__}\n{described}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--report", action="store_true", help="Write the tables from the results, measure nothing.")
    options = parser.parse_args()
    unknown = set(options.names) - {*claims, "all"}
    if unknown or not (options.names or options.report):
        parser.error(f"name claims ({', '.join(claims)}, all), or pass --report.")
    for name in claims if "all" in options.names else options.names:
        harness.write_results(name, claims[name].measure())
        print(claims[name].table(harness.read_results(name)), flush=True)
    harness.write_pages()
    summary.write()


if __name__ == "__main__":
    main()
