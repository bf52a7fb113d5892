"""ONNX files in a browser: bytes, seconds to load, memory, milliseconds a query, tokens a second.

usage: python benchmarks/browser.py MODELS [--text FILE] [--rounds 3] [--threads 2] [--ask "Why is the sky blue?"]

MODELS is a folder for examples/browser (docs/browser.md). All files of a model are loaded in one page of headless Chromium
and answer the same queries in turns, so that a load on the machine falls on all alike; the last one, say stock int8 as
model_int8.onnx, is what the others are measured by. FILE has the lines that are searched (the page's own without it); every
twelfth of them is a query too. Each round is a page of its own, and figures are medians of the rounds. The first file of a
model, ours, has a row for each way: unpacked before its session (examples/browser/unpack.js), and by it. "process" is what the
whole process of the page had at most, the page itself included.
Needs node, chromium and examples/browser/node_modules: .ci/browser installs them.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "examples/browser"
QUERIES, TOKENS = 20, 64
QUESTIONS = [
    "animals in the sea",
    "a delayed journey",
    "news about money",
    "staying healthy",
    "when does it rain",
    "football",
]


def drive(address: str, *steps: tuple[Any, ...]) -> list[Any]:
    """Run steps of drive.mjs on a fresh page, and return what they give."""
    chromium = shutil.which("chromium") or sys.exit("error: no chromium; .ci/browser installs it")
    command = ["node", str(PAGE / "drive.mjs"), chromium, address]
    done = subprocess.run(command, input=json.dumps(steps), capture_output=True, text=True, check=False)
    result = json.loads(done.stdout or '{"console": []}')
    if done.returncode:
        sys.exit(f"error: {' '.join(result['console']) or done.stderr}")
    return result["answers"]


def medians(rounds: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the rows of one round with every number the median of all."""
    return [
        {
            key: statistics.median(row[key] for row in rows) if isinstance(value, int | float) else value
            for key, value in rows[0].items()
        }
        for rows in zip(*rounds, strict=True)
    ]


def search(address: str, place: int, lines: list[str], rounds: int) -> list[dict[str, Any]]:
    """Return a row for each file of the encoder at a place in the page's list."""
    text = [("fill", "#text", "\n".join(lines))] if lines else []
    queries = lines[::12][:QUERIES] or QUESTIONS
    choose = ("select", "#search-model", str(place))
    steps = [("open",), *text, choose, ("idle",), ("compare", queries)]
    return medians([drive(address, *steps)[-1] for _ in range(rounds)])


def talk(address: str, place: int, question: str, rounds: int) -> dict[str, Any]:
    """Return the row of the chat model at a place in the page's list."""
    steps = [("open",), ("select", "#chat-model", str(place)), ("say", question, TOKENS), ("process",)]
    rows = []
    for _ in range(rounds):
        *_, row, process = drive(address, *steps)
        rows.append([{**row, "process": process or 0}])
    return medians(rows)[0]


def main() -> None:
    """Print a table of encoders and one of chat models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--ask", default="Why is the sky blue?")
    options = parser.parse_args()
    lines = options.text.read_text("utf-8").splitlines() if options.text else []
    lines = [line.strip() for line in lines if line.strip()]

    command = [sys.executable, str(PAGE / "serve.py"), str(options.models), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        try:
            address = f"{server.stdout.readline().strip()}?query=&threads={options.threads}"
            models = drive(address, ("open",))[0]
            print(f"Chromium, {options.threads} threads, medians of {options.rounds} pages\n")
            print("| model | file | MB | load, s | memory, MB | query, ms | query, of the last file's | agreement |")
            print("|---|---|---|---|---|---|---|---|")
            for place, model in enumerate(models["search"]):
                rows = search(address, place, lines, options.rounds)
                other = search(f"{address}&unpack=no", place, lines, options.rounds)[0]
                names = [f"{rows[0]['file']}, unpacked before", *(row["file"] for row in rows[1:])]
                for name, row in (*zip(names, rows, strict=True), (f"{other['file']}, by the session", other)):
                    numbers = f"{row['bytes'] / 1e6:.1f} | {row['load'] / 1e3:.2f} | {row['memory'] / 1e6:.0f}"
                    speed = f"{row['query']:.1f} | {row['relative']:.2f} | {row['agreement']:.4f}"
                    print(f"| {model['name']} | {name} | {numbers} | {speed} |", flush=True)
            if models["chat"]:
                print(
                    "\n| model | unpacked | MB | load, s | memory, MB | process, MB | first token, s | tokens a second |\n"
                    "|---|---|---|---|---|---|---|---|"
                )
            for place, model in enumerate(models["chat"]):
                for name, way in (("before", ""), ("by the session", "&unpack=no")):
                    row = talk(address + way, place, options.ask, options.rounds)
                    numbers = f"{row['bytes'] / 1e6:.1f} | {row['load'] / 1e3:.2f} | {row['memory'] / 1e6:.0f}"
                    speed = f"{row['first'] / 1e3:.2f} | {row.get('rate') or 0:.2g}"
                    print(
                        f"| {model['name']} | {name} | {numbers} | {row['process'] / 1e6:.0f} | {speed} |", flush=True
                    )
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
