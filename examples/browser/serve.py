"""Serve the demo page and a folder of models, on this machine alone.

usage: python examples/browser/serve.py MODELS [--port 8000] [--no-threads]
       python examples/browser/serve.py MODELS --index

MODELS holds one folder a model, in the layout of ONNX repositories: config.json, tokenizer.json, onnx/model_quantized.onnx,
and more files in onnx/ to compare it with. The page asks for `models/index.json`, which says what there is; --index prints
it, for a server of another kind: put this folder there with node_modules, and MODELS in it as `models`, with that index.
With --no-threads the headers are left out that a browser wants before it gives a page threads; the page works all the same.
"""

import argparse
import functools
import http.server
import json
import sys
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

HERE = Path(__file__).resolve().parent
INDEX = "/models/index.json"
# The names by which transformers.js asks for each file, in the order of preference.
DTYPES = {"model_quantized": "q8", "model_int8": "int8", "model_uint8": "uint8", "model_q4": "q4", "model": "fp32"}
# A page is isolated by these two, which is what shared memory asks for; the third keeps it from asking anybody else.
THREADS = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}
POLICY = "default-src 'self' blob: data: 'wasm-unsafe-eval'; style-src 'self' 'unsafe-inline'"


def read_json(file: Path) -> Any:
    """Return what is in a file, or nothing if there is none."""
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def pooling_of(folder: Path) -> str:
    """Return how a sentence encoder pools, by the name that transformers.js has for it; mean where nothing is said."""
    pooling = next(
        (each for each in read_json(folder / "modules.json") or [] if each["type"].endswith("Pooling")), None
    )
    options = read_json(folder / pooling["path"] / "config.json") if pooling else {}
    modes = {
        name.removeprefix("pooling_mode_").removesuffix("_token") for name, value in options.items() if value is True
    }
    return "cls" if "cls" in modes or options.get("pooling_mode") == "cls" else "mean"


def model_in(folder: Path) -> dict[str, Any] | None:
    """Return what the page must know of a model, or nothing if the folder has no ONNX file that it could load."""
    files = [(f"{stem}.onnx", dtype) for stem, dtype in DTYPES.items() if (folder / f"onnx/{stem}.onnx").is_file()]
    # A compressed folder's own config is ours; the stock one then lies beside the files that it belongs to.
    place = "onnx/config.json" if (folder / "onnx/config.json").is_file() else "config.json"
    config = read_json(folder / place)
    if not files or not config:
        return None
    template = folder / "chat_template.jinja"  # where the library does not look
    names = " ".join(config.get("architectures") or [])
    prompts = read_json(folder / "config_sentence_transformers.json").get("prompts") or {}
    return {
        "name": folder.name,
        "task": "chat" if "CausalLM" in names or "LMHead" in names else "search",
        "config": place,
        "pooling": pooling_of(folder),
        "template": template.read_text("utf-8") if template.is_file() else None,
        "prompts": [prompts.get("query") or "", prompts.get("document") or prompts.get("passage") or ""],
        "files": [
            {"file": file, "dtype": dtype, "bytes": (folder / "onnx" / file).stat().st_size} for file, dtype in files
        ],
    }


def index(models: Path) -> list[dict[str, Any]]:
    """Return all models of a folder, by name."""
    found = [model_in(folder) for folder in sorted(models.iterdir()) if folder.is_dir()]
    return [model for model in found if model]


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of the page, and below `/models/` those of the models."""

    extensions_map = {  # noqa: RUF012 # that of the base class
        **http.server.SimpleHTTPRequestHandler.extensions_map,
        ".mjs": "text/javascript",
        ".js": "text/javascript",
        ".wasm": "application/wasm",
    }

    def __init__(self, *arguments: Any, models: Path, threads: bool, **options: Any) -> None:
        self.models, self.threads = models, threads
        super().__init__(*arguments, directory=str(HERE), **options)

    def translate_path(self, path: str) -> str:
        """Return the file that a path of a request means; what leads out of the two folders means none."""
        parts = PurePosixPath(unquote(urlsplit(path).path)).parts[1:]
        if ".." in parts:
            return str(HERE / "nothing")
        return str(self.models.joinpath(*parts[1:]) if parts[:1] == ("models",) else HERE.joinpath(*parts))

    def do_GET(self) -> None:  # the name that http.server calls
        """Answer with a file, or with the list of models."""
        if urlsplit(self.path).path != INDEX:
            return super().do_GET()
        content = json.dumps(index(self.models)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        return None

    def end_headers(self) -> None:
        """Add the headers that every answer has."""
        for name, value in THREADS.items() if self.threads else ():
            self.send_header(name, value)
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing of single requests."""


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, help="folder with one folder a model")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any that is free")
    parser.add_argument("--no-threads", action="store_true", help="without the headers that allow threads")
    parser.add_argument("--index", action="store_true", help="print the list of models, and serve nothing")
    options = parser.parse_args()
    if not options.models.is_dir():
        sys.exit(f"error: {options.models} is no folder; give one that holds a folder for each model")
    if options.index:
        print(json.dumps(index(options.models), indent=1))
        return
    if not (HERE / "node_modules").is_dir():
        sys.exit(f"error: transformers.js is not installed; run npm ci --ignore-scripts in {HERE}")
    handler = functools.partial(Handler, models=options.models.resolve(), threads=not options.no_threads)
    with http.server.ThreadingHTTPServer(("127.0.0.1", options.port), handler) as server:
        print(f"http://127.0.0.1:{server.server_port}/", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    main()
