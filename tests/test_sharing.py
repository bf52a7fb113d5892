"""A compression shared by several processes: the bytes of one process, one that writes, and an end when one dies."""

import json

import pytest
import torch
from common import content, save_inputs
from processes import run_python

from hf_offline_compress import compress
from hf_offline_compress.foundation.processes import Processes
from hf_offline_compress.measure.sharing import Sums
from hf_offline_compress.solve.sharing import owners

RECIPE = """
name: mine
modules: [all]
rules:
- {modules: [query, key], structure: low_rank, objective: sensitive, ratio: 2}
- {modules: [value], structure: low_rank, objective: {l2: 1, importance: fisher}, ratio: 2}
- {modules: [word_embeddings], structure: trellis, objective: sensitive, ratio: 8}
- {structure: quantized, objective: calibrated, ratio: 3}
"""
# A process that imports everything once, and forks two for each way to end that it is given.
SHARED = """
import os, signal, socket, sys
import accelerate, torch
from transformers.models.bert import modeling_bert
import hf_offline_compress.artifact.writing as writing
import hf_offline_compress.compressor as compressor
import hf_offline_compress.solve.groups as groups
from hf_offline_compress.cli import app

base, recipe, text, folder, *ends = sys.argv[1:]
torch.set_num_threads(1)

def die(*args, **options):
    os.kill(os.getpid(), signal.SIGKILL)

def work(rank, end, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    if end == "measure" and rank == 1:
        compressor.measure = die
    if end in ("solve", "resumable") and rank == 1:
        groups.solve_all = die
    out = f"{folder}/{'resumed' if end.startswith('resum') else end}"
    more = ["--resume"] if end.startswith("resum") else []
    app(["compress", base, out, "--recipe", recipe, "--calibration", text, "--quiet", *more])

for end in ends:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(2):
        if not (child := os.fork()):
            sys.stderr = open(f"{folder}/{end}.{rank}.err", "w", buffering=1)
            try:
                work(rank, end, port)
            except SystemExit as error:
                sys.stderr.flush()
                os._exit(error.code or 0)
            os._exit(99)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(end, *codes, flush=True)
"""


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Return base, recipe and text, as files."""
    return save_inputs(tmp_path_factory.mktemp("given"), RECIPE)


@pytest.fixture(scope="module")
def alone(given, tmp_path_factory):
    """Return the bytes that one process writes."""
    base, recipe, text = given
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        result = compress(base, recipe, calibration=text, progress=False)
    finally:
        torch.set_num_threads(threads)
    return content(result.save(tmp_path_factory.mktemp("alone") / "out"))


def launched(command):
    run = run_python(*command, CUDA_VISIBLE_DEVICES="")
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def test_two_processes_write_the_bytes_of_one_and_end_together(given, alone, tmp_path):
    """Where one is killed, the other says so in a sentence and leaves nothing, or what a run may be resumed from."""
    told = launched(["-c", SHARED, *given, tmp_path, "whole", "measure", "solve", "resumable", "resumed"]).splitlines()
    assert told == ["whole 0 0", "measure 1 -9", "solve 1 -9", "resumable 1 -9", "resumed 0 0"]
    assert content(tmp_path / "whole") == content(tmp_path / "resumed") == alone
    for end in ("measure", "solve", "resumable"):
        said = (tmp_path / f"{end}.0.err").read_text()
        assert said.startswith("error: Another of the processes") and said.count("\n") == 1, said
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".err"} == {"whole", "resumed"}


def test_accelerate_launches_a_compression(given, alone, tmp_path):
    base, recipe, text = given
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    command = ["--module", "hf_offline_compress", "compress", base, tmp_path / "out", "--recipe", recipe]
    printed = launched([*launch, *command, "--calibration", text, "--json", "--quiet"])
    assert json.loads(printed)["architecture"] == "BertForMaskedLM"  # by one process only
    assert content(tmp_path / "out") == alone


def test_sums_are_added_in_the_order_of_the_portions():
    """As one process adds them: three processes, played one after the other."""
    torch.manual_seed(0)
    portions = [torch.randn(5, 4) * 10**i for i in range(-3, 4)]

    def add(sums, portion):
        sums.add_gram("gram", portion)
        sums.add_gram("gram", portion * 3)  # as of a module that is called twice
        sums.add("sum", portion.sum(dim=0))
        sums.count("rows", len(portion) / 3)

    one = Sums()
    for _, portion in one.over(portions):
        add(one, portion)

    class Played(Processes):
        def gather(self, value):
            return told[self.rounds()]

        def broadcast_(self, tensor, source):
            place = self.rounds() * 3 + source
            shares = found[place]
            tensor.copy_(shares[self.asked.setdefault(place, 0)])
            self.asked[place] += 1

        def rounds(self):
            return self.state["round"]

    def shares(portion):
        kept = Sums(Processes(0, 2, "cpu"))
        add(kept, portion)
        return kept._added

    every = [shares(portion) for portion in portions] + [[], []]
    found = [[each for _, each in added if isinstance(each, torch.Tensor)] for added in every]
    as_told = [[(n, tuple(e.shape) if isinstance(e, torch.Tensor) else e) for n, e in added] for added in every]
    told = [as_told[i : i + 3] for i in range(0, 9, 3)]
    for index in range(3):
        played = Played(index, 3, "cpu")
        object.__setattr__(played, "state", {"round": 0})
        object.__setattr__(played, "asked", {})
        sums = Sums(played)
        exchange = sums._exchange

        def exchanged(exchange=exchange, played=played):
            exchange()
            played.state["round"] += 1

        sums._exchange = exchanged
        for _, portion in sums.over(portions):
            add(sums, portion)
        assert sums.numbers == one.numbers
        assert all(torch.equal(sums.tensors[name], one.tensors[name]) for name in ("gram", "sum"))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_work_is_divided_evenly(count):
    works = [8.0, 1.0, 1.0, 5.0, 3.0, 3.0, 2.0, 1.0]
    chosen = owners(works, count)
    loads = [sum(w for w, owner in zip(works, chosen, strict=True) if owner == process) for process in range(count)]
    assert sum(loads) == sum(works) and max(loads) <= max(8.0, 1.34 * sum(works) / count)
