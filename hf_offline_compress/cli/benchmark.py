"""`benchmark`: speed, memory and bytes of a compressed folder beside its base and simple alternatives."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..foundation.progress import stage
from .options import AsJson, Debug, Device, Folder, Quiet, Revision, app
from .output import calm, megabytes, print_json, print_table, run

CELLS = 2  # that a table of times has beside names, which would be cut in a wider one


@app.command()
def benchmark(
    folder: Folder,
    base: Annotated[
        str | None,
        typer.Option(help="the base, a Hub id or a folder; by default the Hub id in its report", show_default=False),
    ] = None,
    batch: Annotated[str, typer.Option(help="sequences per forward pass, comma-separated")] = "1,32",
    length: Annotated[str, typer.Option(help="tokens per sequence, comma-separated")] = "128",
    models: Annotated[
        str, typer.Option(help="what to measure, comma-separated")
    ] = "base,bfloat16,int8,compressed,on_the_fly,ours-int8,onnxruntime-float32,onnxruntime-int8,openvino-int8",
    onnx: Annotated[
        Path | None, typer.Option(help="an ONNX file exported from FOLDER, one more to measure", show_default=False)
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="rounds over all models")] = 9,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; torch's default if not given", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="seed of the random tokens")] = 0,
    device: Device = None,
    revision: Revision = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure FOLDER, its base, and the base in other forms: bytes, loading, memory, latency, agreement."""

    def work() -> None:
        from ..errors import CompressionError, UnsavedError

        def numbers(option: str, text: str) -> list[int]:
            if not all(part.strip().isdecimal() for part in text.split(",")):
                raise CompressionError(f"--{option} takes integers separated by commas, e.g. 1,32, not '{text}'.")
            return [int(part) for part in text.split(",")]

        batches, lengths = numbers("batch", batch), numbers("length", length)
        calm(quiet)

        with stage("importing torch and transformers"):
            from ..evaluate.benchmarking import benchmark_folder

        unsaved = None
        try:
            result = benchmark_folder(
                folder,
                base=base,
                batches=batches,
                lengths=lengths,
                models=[name.strip() for name in models.split(",")],
                repeats=repeats,
                threads=threads,
                device=device,
                seed=seed,
                revision=revision,
                onnx=onnx,
                progress=not quiet,
            )
        except UnsavedError as error:
            result, unsaved = error.result, error
        if as_json:
            print_json({"folder": folder.resolve().name, "benchmark": result})
        elif unsaved or not quiet:
            _print(result)
            if not unsaved:
                print(f"\nwritten to {folder / 'evaluation.json'}")
        if unsaved:
            raise unsaved

    run(work, debug, quiet)


def _print(result: dict[str, Any]) -> None:
    threads = f"{result['threads']} thread{'s' if result['threads'] > 1 else ''}"
    print(f"{result['device']}, {threads}, medians of {result['repeats']} rounds with quartiles\n")
    models = result["models"]
    cells = [f"{cell['batch']} x {cell['length']}" for cell in models[0]["latency"]]
    rows = [
        (
            model["name"],
            megabytes(model["disk_bytes"]),
            f"{model['load_seconds']:.2f} s",
            megabytes(model["loaded_bytes"]),
            megabytes(model["memory_bytes"]),
            f"{model['agreement']:.4f}" if model.get("agreement") is not None else "",
        )
        for model in models
    ]
    print_table(("model", "on disk", "load", "loaded", "peak", "agreement"), rows)
    for start in range(0, len(cells), CELLS):
        chosen = slice(start, start + CELLS)
        times = [
            (m["name"], *(f"{c['median_ms']:.1f} ({c['low_ms']:.1f}-{c['high_ms']:.1f})" for c in m["latency"][chosen]))
            for m in models
        ]
        print()
        print_table(("milliseconds", *cells[chosen]), times)
    print()
    speeds = [(model["name"], *(f"{cell['tokens_per_second']:,.0f}" for cell in model["latency"])) for model in models]
    print_table(("tokens a second", *cells), speeds)
    for item in result["unavailable"]:
        print(f"\nnot measured: {item['name']}: {item['reason']}")
