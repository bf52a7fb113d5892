"""A compression shared by several processes: the bytes of one process, one that writes, and an end when one dies."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Queue
from threading import Barrier, get_ident

import pytest
import torch
from common import content, save_inputs
from processes import run_python

from hf_offline_compress import Objective, Rule, compress
from hf_offline_compress.architectures.layout import Matrix
from hf_offline_compress.foundation.processes import ALONE, Processes, shared_out
from hf_offline_compress.measure import sharing
from hf_offline_compress.measure.sharing import Sums
from hf_offline_compress.plan.groups import Group
from hf_offline_compress.solve.sharing import expected_work
from hf_offline_compress.structures import Storage, Trellis

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


class Threads:
    """Processes played by threads: they hand each other values and tensors."""

    def __init__(self, count):
        self.count, self.told, self.barrier = count, [None] * count, Barrier(count, timeout=60)
        self.sent = {(source, to): Queue() for source in range(count) for to in range(count)}

    def run(self, work):
        """Return what `work` returns of each process."""
        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(work, [Played(index, self.count, "cpu", self) for index in range(self.count)]))


@dataclass(frozen=True)
class Played(Processes):
    threads: Threads | None = None

    def gather(self, value):
        self.threads.told[self.index] = value
        self.threads.barrier.wait()
        found = list(self.threads.told)
        self.threads.barrier.wait()
        return found

    def broadcast_(self, tensor, source):
        tensor.copy_(self.gather(tensor.clone())[source])

    def exchange(self, sent, received):
        for other, tensor in sent:
            self.threads.sent[self.index, other].put(tensor.clone())
        for other, tensor in received:
            tensor.copy_(self.threads.sent[other, self.index].get(timeout=60))


def add_all(processes, portions, begun=None):
    """Return sums over portions, of which each has another set of names."""
    sums = Sums(processes)
    if begun is not None:
        sums.tensors["begun"] = begun.clone()
    for place, portion in sums.over(portions):
        x = portion.clone()
        sums.add_gram("gram", x)
        sums.add_gram("gram", x * 3)  # as of a module that is called twice
        sums.add_gram("wide", torch.cat([x, x.sin(), x.cos()], dim=1))
        if place % 3:
            sums.add_gram("at times", x.T)
        if begun is not None:
            sums.add_gram("begun", x)
        sums.add_gram("empty", x[:0])
        sums.add("sum", x.sum(dim=0))
        sums.count("rows", len(x) / 3)
        x.zero_()  # the model goes on
    return sums


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("portions", [1, 7])
def test_sums_have_the_bits_of_one_process(count, portions):
    torch.manual_seed(0)
    portions = [torch.randn(5, 4) * 10**i for i in range(-3, portions - 3)]
    begun = torch.randn(4, 4)
    one = add_all(ALONE, portions, begun)
    for sums in Threads(count).run(lambda process: add_all(process, portions, begun)):
        assert sums.numbers == one.numbers
        assert sums.tensors.keys() == one.tensors.keys()
        assert all(torch.equal(sums.tensors[name], one.tensors[name]) for name in one.tensors)


def test_each_product_is_formed_once_by_the_owner_of_its_sum(monkeypatch):
    """And owners have about as much to do."""
    formed = []

    def add(total, x, known=sharing.add_gram_):
        formed.append((get_ident(), x.shape[1]))
        known(total, x)

    monkeypatch.setattr(sharing, "add_gram_", add)

    def work(process):
        sums = Sums(process)
        for _, portion in sums.over(portions):
            for columns in (8, 8, 8, 32, 8, 8, 8, 32):
                sums.add_gram(f"{columns} {len(sums._shares)}", portion[:, :columns])

    portions = [torch.randn(5, 32) for _ in range(4)]
    Threads(2).run(work)
    assert len(formed) == 8 * len(portions)
    loads = [sorted(columns for thread, columns in formed if thread == own) for own in {thread for thread, _ in formed}]
    assert loads == [[8] * 12 + [32] * 4] * 2


def test_results_of_a_map_are_in_the_order_of_the_items():
    items = [3, 1, 4, 1, 5, 9, 2, 6]
    done = [[], [], []]

    def work(process):
        return process.map(lambda item: done[process.index].append(item) or item * 10, items, works=items)

    assert Threads(3).run(work) == [[item * 10 for item in items]] * 3
    assert max(map(sum, done)) <= 11 and sorted(item for own in done for item in own) == sorted(items)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_work_is_divided_evenly(count):
    works = [8.0, 1.0, 1.0, 5.0, 3.0, 3.0, 2.0, 1.0]
    loads = [0.0] * count
    chosen = shared_out(works, loads)
    assert loads == [sum(w for w, own in zip(works, chosen, strict=True) if own == i) for i in range(count)]
    assert sum(loads) == sum(works) and max(loads) <= max(8.0, 1.34 * sum(works) / count)


@pytest.mark.parametrize(
    ("objective", "least", "most"), [(Objective(l2=1.0, calibrated=True), 1.8, 3.0), (Objective(l2=1.0), 1.0, 1.0)]
)
def test_wide_metrics_are_work(objective, least, most):
    """Of two groups with as many weights, the one of wider inputs; measured, 2.2 times as much of BERT-base."""
    works = []
    for rows, columns in ((3072, 768), (768, 3072)):
        matrix = Matrix("dense", "output", 0, rows, columns, "dense")
        works.append(expected_work(Group("one", Rule(Trellis(), objective), (matrix,), 4, Storage("float32"))))
    assert least <= works[1] / works[0] <= most
