"""A python that has imported the slow libraries already: every process of a page, or of a command, is a fork of it.

usage: python warm_server.py SOCKET [EXTRAS | --bare]. What only other extras would install cannot be imported; without
EXTRAS nothing is forbidden. A bare one has imported what transformers imports, and not transformers itself. The package is
not imported yet, nor anything that belongs to a model but BERT's. A request is JSON, with the arguments of `python`, a
folder and an environment, and comes with the three standard streams; the answer is the exit code.
"""

import gc
import importlib
import importlib.metadata as metadata
import json
import os
import runpy
import signal
import socket
import sys
import traceback
from contextlib import suppress
from importlib.machinery import PathFinder

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKAGE = "hf-offline-compress"
BARE = "--bare"
# What takes longest of all that importing a model of transformers imports.
BELOW = (
    *("numpy", "scipy.optimize", "sympy", "torch", "torch._dynamo", "torch.export", "torch.distributed.checkpoint"),
    *("torch.distributed.fsdp", "torch.distributed.tensor", "torch.fx.experimental.symbolic_shapes"),
)


def installed_with(extras):
    """Return the names of all distributions that the package needs with some of its extras."""
    seen, waiting = set(), [(PACKAGE, extra) for extra in ("", *extras)]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            needed = map(Requirement, metadata.requires(name) or [])
        except metadata.PackageNotFoundError:  # for another system
            continue
        for item in needed:
            if not item.marker or item.marker.evaluate({"extra": extra}):
                waiting += [(canonicalize_name(item.name), each) for each in ("", *item.extras)]
    return {name for name, _ in seen}


def forbid_others(extras):
    allowed = installed_with(extras)
    owners = metadata.packages_distributions()
    others = {module for module, names in owners.items() if not allowed & set(map(canonicalize_name, names))}

    class Installed(PathFinder):
        @classmethod
        def find_spec(cls, name, path=None, target=None):
            return None if name.partition(".")[0] in others else super().find_spec(name, path, target)

        @classmethod
        def find_distributions(cls, *arguments):
            found = super().find_distributions(*arguments)
            return (each for each in found if canonicalize_name(each.name) in {*allowed, PACKAGE})

    sys.meta_path[sys.meta_path.index(PathFinder)] = Installed
    for name in [name for name in sys.modules if name.partition(".")[0] in others]:
        del sys.modules[name]


def import_all(names):
    for name in names:
        with suppress(ImportError):
            importlib.import_module(name)


def import_slow_libraries(of_pages):
    import transformers
    from transformers import AutoModel, AutoTokenizer, BertModel, BertTokenizer  # noqa: F401

    transformers.utils.logging.disable_progress_bar()
    if of_pages:
        import_all(("numba", "sentence_transformers", "accelerate", "datasets", "sklearn.linear_model"))


def interpret(arguments, folder, environment):
    """Be `python ARGUMENTS` in a folder."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    read_variables_again()
    sys.executable = environment["WARM_PYTHON"]
    safe = "-P" in arguments[:1]
    arguments = arguments[safe or arguments[0] == "-u" :]
    sys.path[:0] = [*([] if safe else [folder]), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<block>", "exec"), {"__name__": "__main__"})
    elif arguments[0] == "-m":
        sys.argv = [arguments[1], *arguments[2:]]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def read_variables_again():
    """Do with HF_HOME and the like what huggingface_hub and transformers, if they are imported, did when they were."""
    if "transformers" not in sys.modules:
        return
    from huggingface_hub import constants, hf_api
    from transformers import dynamic_module_utils, utils

    importlib.reload(constants)
    hf_api.api.endpoint = constants.ENDPOINT
    modules = os.environ.get("HF_MODULES_CACHE", os.path.join(constants.HF_HOME, "modules"))  # noqa: PTH118 (a string)
    for module in (utils.hub, utils, dynamic_module_utils):
        module.HF_MODULES_CACHE = modules


def answer(connection):
    """Fork for one request, and answer with the exit code."""
    message, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    code = 0
    try:
        interpret(*json.loads(message))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    connection.sendall(bytes([code]))
    os._exit(code)


def main():
    path = sys.argv[1]
    del sys.path[0]  # this folder: a user's processes do not find what tests share
    extras = "".join(sys.argv[2:])
    if extras not in ("", BARE):
        forbid_others(extras.split(","))
    import_all(BELOW)
    sys.modules["torch"].set_num_threads(1)
    if extras != BARE:
        import_slow_libraries(of_pages=extras != "")
    gc.collect()
    gc.freeze()  # what forks never look at is never copied for them
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are not waited for
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.bind(path)
    server.listen()
    print("ready", flush=True)
    while True:
        connection, _ = server.accept()
        if os.fork() == 0:
            server.close()
            answer(connection)
        connection.close()


if __name__ == "__main__":
    main()
