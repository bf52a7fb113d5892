"""Publishing on a Hub of our own: round trips, faults at every step, and what each leaves behind."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
import transformers
import typer
from common import error_of, make_tokenizer, outputs_of, save_base
from huggingface_hub import constants
from loopback_hub import READ_TOKEN, TOKEN, LoopbackHub
from processes import run_cli, run_python
from sentence_transformers import SentenceTransformer
from typer.testing import CliRunner

import hf_offline_compress
from hf_offline_compress import CompressionError, push_folder
from hf_offline_compress.card.snippets import with_model_id
from hf_offline_compress.card.writing import BEGIN, END
from hf_offline_compress.cli import app
from hf_offline_compress.cli.output import run
from hf_offline_compress.foundation import hub_errors
from hf_offline_compress.hub import push as publishing
from hf_offline_compress.verifying import Check, Verification, check_files, folder_files
from hf_offline_compress.verifying import _file_checks as verify_files

CARD = f"---\nlicense: mit\ntags:\n- compressed\n---\n# Ours\n{BEGIN}\n{{}}{END}\nNumbers.\n"


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    base = save_base(tmp_path_factory.mktemp("base") / "tiny", "bert", "BertForMaskedLM")
    return hf_offline_compress.compress(base, "svd", calibration=None, progress=False)


@pytest.fixture(scope="module")
def finished(result, tmp_path_factory):
    """A folder with a card, in shards."""
    folder = result.save(tmp_path_factory.mktemp("finished") / "out", max_shard_size="40KB")
    (folder / "README.md").write_text(CARD.format(""))
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "out")


@pytest.fixture
def naps():
    return []


@pytest.fixture
def hub(monkeypatch, naps):
    """A Hub that this process talks to, logged in; waiting takes no time, and folders count as verified."""
    server = LoopbackHub()
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + template)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)  # it keeps the endpoint
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(hub_errors.time, "sleep", naps.append)
    monkeypatch.setattr(publishing, "verify_folder", lambda folder, **_: Verification(folder.name, ()))
    yield server
    server.close()


def published(hub, name="me/x", branch="main"):
    """Return what is there besides what every new repository has."""
    repository = hub.repositories.get(("model", name))
    files = repository.files(branch) if repository else {}
    return {path: data for path, data in files.items() if path != ".gitattributes"}


def contents(folder):
    return {name: (folder / name).read_bytes() for name in folder_files(folder)}


def test_one_commit_of_exactly_the_folder(hub, folder, finished):
    (folder / ".env").write_text("HF_TOKEN=secret")
    (folder / ".git").mkdir()
    (folder / ".git/config").write_text("secret")
    (folder / "model.safetensors.partial").write_bytes(b"half")
    (folder / "training_args.bin").write_bytes(b"of Trainer")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5/optimizer.pt").write_bytes(b"of Trainer")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text("{}")
    pushed = push_folder(folder, "x", message="First")
    assert pushed.remarks == ("Trainer's files were left out: checkpoint-5/optimizer.pt, training_args.bin.",)
    assert published(hub) == {**contents(finished), "1_Pooling/config.json": b"{}"}
    assert set(pushed.files) == published(hub).keys()
    assert pushed.changed and pushed.repo_id == "me/x" and pushed.url == f"{hub.url}/me/x/commit/{pushed.commit}"
    assert hub.model("me/x").titles == ["First"] and not hub.model("me/x").private
    again = push_folder(folder, "me/x")
    assert not again.changed and again.commit == pushed.commit and len(hub.model("me/x").titles) == 1


def test_files_beside_the_model_are_published_only_on_request(hub, folder, finished):
    (folder / "notes").mkdir()
    (folder / "notes/mine.txt").write_text("Mine.")
    (folder / "x.dat").write_bytes(b"unknown")
    torch.save({}, folder / "training_args.bin")
    for include, words in (
        (["none.txt"], "'notes/mine.txt'"),
        (["training_args.bin"], "never"),
        (["notes"], "no file"),
    ):
        with pytest.raises(CompressionError, match=words):
            push_folder(folder, "x", include=include)
    assert not hub.repositories
    pushed = push_folder(folder, "x")
    assert published(hub) == contents(finished)
    assert pushed.left_out == ("notes/mine.txt", "x.dat", "training_args.bin")
    remarks = " ".join(pushed.remarks)
    assert (
        "Trainer's files were left out: training_args.bin" in remarks
        and "notes/mine.txt, x.dat. `push --include NAME`" in remarks
    )
    options = ["push", str(folder), "me/x", "--include", "./notes/mine.txt", "--include", "x.dat", "--json"]
    found = CliRunner().invoke(app, options)
    assert json.loads(found.stdout)["left_out"] == ["training_args.bin"], found.output
    assert published(hub) == {**contents(finished), "notes/mine.txt": b"Mine.", "x.dat": b"unknown"}


def test_tokens_with_blanks(hub, folder, monkeypatch, naps):
    """Blanks around one go away; in one, nothing is asked. The one that is passed is looked for, too."""
    used = []
    monkeypatch.setattr(
        publishing, "verify_folder", lambda f, token, **_: used.append(token) or Verification("out", ())
    )
    monkeypatch.delenv("HF_TOKEN")
    assert push_folder(folder, "x", token=f"{TOKEN} \n").changed
    assert used == [TOKEN]
    before = len(hub.requests)
    for token in (" ", f"{TOKEN} x", f"{TOKEN}\nx"):
        with pytest.raises(CompressionError, match="The token for the Hub"):
            push_folder(folder, "x", token=token)
    assert len(hub.requests) == before and not naps
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("{", f'{{"x": "{TOKEN}",', 1))
    assert [check.name for check in verify_files(folder, TOKEN)[0] if check.status == "failed"] == ["tokens"]


def test_snippets_of_the_published_card_load_the_repository(hub, folder, result):
    """The card that is uploaded alone: the folder's own stays, and so does what users wrote, snippets too."""
    hf_offline_compress.write_card(folder, overwrite=True)
    local = (folder / "README.md").read_text()
    notes = '```python\nAutoModel.from_pretrained("my-own")\n```\n'
    local = local.replace(f"{BEGIN}\n", f"{BEGIN}\n{notes}")
    (folder / "README.md").write_text(local)
    push_folder(folder, "x")
    card = published(hub)["README.md"].decode()
    assert (folder / "README.md").read_text() == local and 'from_pretrained("out"' in local
    assert card.count('from_pretrained("me/x"') == local.count('from_pretrained("out"') >= 4
    assert "out" not in re.findall(r'\("([^"]*)"', card) and notes in card
    assert not push_folder(folder, "me/x").changed
    result.push_to_hub("me/y")
    made = published(hub, "me/y")["README.md"].decode()
    assert "\n# y\n" in made and 'from_pretrained("me/y")' in made and '("model"' not in made


@pytest.mark.parametrize(
    "call",
    [
        'AutoModel.from_pretrained("{}", trust_remote_code=True)',
        'SentenceTransformer("{}")',
        'get_class_from_dynamic_module("modeling_compressed.X", "{}", trust_remote_code=True)',
    ],
)
@pytest.mark.parametrize("name", ["local", r"a\"b\\"])
def test_every_way_that_snippets_load_is_renamed(call, name):
    card = f"{BEGIN}\n{END}\n```python\n{{}}\n```\n```bash\ncompress('{{}}')\n```\n"
    ours = card.format(call.format(name), call.format(name))
    assert with_model_id(ours, "me/x") == card.format(call.format("me/x"), call.format(name))
    theirs = ours.replace(BEGIN, "")
    assert with_model_id(theirs, "me/x") == theirs


def test_private_branch_and_pull_request(hub, folder):
    pushed = push_folder(folder, "team/x", private=True, revision="small/v2")
    assert hub.model("team/x").private and published(hub, "team/x") == {}
    assert pushed.revision == "small/v2" and published(hub, "team/x", "small/v2") == contents(folder)
    hub.create("you/x")
    proposed = push_folder(folder, "you/x", create_pr=True)
    assert proposed.pull_request == f"{hub.url}/you/x/discussions/1" and published(hub, "you/x") == {}
    assert published(hub, "you/x", "refs/pr/1") == contents(folder)


def test_weights_and_code_of_an_earlier_push_go_away(hub, folder, result, tmp_path):
    push_folder(folder, "me/x")
    shards = {name for name in published(hub) if ".safetensors" in name}
    assert len(shards) > 2
    hub.model("me/x").files().update({"figure.png": b"\x89PNG", "old_compressed.py": b"", "other.safetensors": b"x"})
    whole = result.save(tmp_path / "whole")
    (whole / "README.md").unlink()
    pushed = push_folder(whole, "me/x")
    assert set(pushed.removed) == {*shards, "old_compressed.py"}
    assert set(published(hub)) == {*contents(whole), "figure.png", "other.safetensors", "README.md"}
    assert "no README.md" in pushed.remarks[0]


@pytest.mark.parametrize(
    "mine,theirs,kept",
    [
        ("", CARD.format("Written on the Hub.\n"), "Written on the Hub.\n"),
        ("Written here.\n", CARD.format("Written on the Hub.\n"), "Written on the Hub.\n"),
        ("Written here.\n", CARD.format(""), "Written here.\n"),
        ("", "---\nlicense: mit\n---\n# By hand\n\nMuch to say.\n", "# By hand\n\nMuch to say.\n"),
        ("", "---\nlicense: mit\n---\nThis model card has been automatically generated.", ""),
        ("Written here.\n", None, "Written here.\n"),
    ],
)
def test_notes_on_the_hub_are_kept(hub, folder, mine, theirs, kept):
    (folder / "README.md").write_text(CARD.format(mine))
    if theirs:
        hub.create("me/x").files()["README.md"] = theirs.encode()
    pushed = push_folder(folder, "me/x")
    assert published(hub)["README.md"].decode() == CARD.format(kept)
    assert bool(pushed.remarks) == bool(mine and kept != mine)
    assert (folder / "README.md").read_text() == CARD.format(mine)


STEPS = {
    "token": "GET /api/whoami",
    "look": "GET /api/models/me/x$",
    "other types": "GET /api/datasets/me/x",
    "make": "POST /api/repos/create",
    "branch": "POST /api/models/me/x/branch/small",
    "look at branch": "GET /api/models/me/x/revision/small",
    "card": "(GET|HEAD) /me/x/resolve/small/README.md",
    "preupload": "POST /api/models/me/x/preupload",
    "batch": r"POST /me/x.git/info/lfs/objects/batch",
    "upload": "PUT /_lfs/",
    "check upload": "POST /_verify",
    "validate card": "POST /api/validate-yaml",
    "commit": "POST /api/models/me/x/commit",
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("action", [500, 429, "cut", "lost"])
def test_a_fault_that_passes_is_waited_for(hub, folder, naps, step, action):
    hub.fault(STEPS[step], action, **({"Retry_After": 7} if action == 429 else {}))
    pushed = push_folder(folder, "me/x", revision="small")
    assert hub.faults[0].times == 0, "the fault did not happen"
    assert published(hub, branch="small") == contents(folder)
    assert hub.model("me/x").titles == ["Upload compressed model (hf-offline-compress 0.1.0)"]
    assert pushed.commit == hub.model("me/x").branches["small"]
    if step != "card":  # huggingface_hub asks for it again at once
        assert naps or (step, action) == ("commit", "lost"), "the first answer was taken"
        assert action != 429 or max(naps) >= 7


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    "action,words",
    [
        (500, "server error (HTTP 500)"),
        (403, "may not write"),
        (401, "The Hub does not accept the token"),
        ("cut", "was interrupted"),
        (429, "asks to wait 900 seconds"),
    ],
)
def test_a_fault_that_stays_leaves_nothing_and_says_so(hub, folder, step, action, words):
    if action == 429 and step in ("preupload", "batch", "upload", "check upload"):
        pytest.skip("huggingface_hub waits here as long as it is told to")
    hub.fault(STEPS[step], action, times=99, **({"Retry_After": 900} if action == 429 else {}))
    with pytest.raises(CompressionError) as caught:
        push_folder(folder, "me/x", revision="small")
    sentence = str(caught.value)
    if not (action == 401 and step != "token"):  # what the Hub says of repositories that one may not see
        assert words in sentence, sentence
    assert "nothing was published" in sentence and "\n" not in sentence
    assert published(hub) == {}
    repository = hub.repositories.get(("model", "me/x"))
    assert ("now exists and is empty" in sentence) == (repository is not None)
    assert repository is None or published(hub, branch="small" if "small" in repository.branches else "main") == {}


def test_lost_answers_to_the_commit_are_looked_after(hub, folder):
    hub.fault(STEPS["commit"], "lost", times=99)
    pushed = push_folder(folder, "me/x")
    assert published(hub) == contents(folder) and pushed.commit == hub.model("me/x").branches["main"]
    (folder / "LICENSE").write_text("More.")
    hub.fault("paths-info", 500, times=99)
    with pytest.raises(CompressionError, match="received the commit, but it has all of it or nothing"):
        push_folder(folder, "me/x")
    assert published(hub) == contents(folder)


def test_a_pull_request_is_never_made_twice(hub, folder):
    hub.create("you/x")
    hub.fault("POST /api/models/you/x/commit", "lost")
    with pytest.raises(CompressionError, match="not known.*look among its pull requests"):
        push_folder(folder, "you/x", create_pr=True)
    assert hub.model("you/x").titles == ["Upload compressed model (hf-offline-compress 0.1.0)"]


def test_somebody_else_commits_meanwhile(hub, folder, monkeypatch):
    hub.create("me/x")
    upload = huggingface_hub.HfApi.preupload_lfs_files

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.HfApi, "preupload_lfs_files", lambda *a, **o: (upload(*a, **o), _theirs(hub))[0])
        with pytest.raises(CompressionError, match="changed by someone else.*nothing was published; run this again"):
            push_folder(folder, "me/x")
    assert published(hub) == {"README.md": b"theirs"}
    push_folder(folder, "me/x")
    assert contents(folder).keys() <= published(hub).keys()


def _theirs(hub):
    if len(hub.model("me/x").commits) == 1:
        hub.model("me/x").add("main", {"README.md": b"theirs"})


def test_what_has_arrived_is_not_sent_again(hub, folder):
    shards = [name for name in folder_files(folder) if name.endswith(".safetensors")]
    last = hashlib.sha256((folder / shards[-1]).read_bytes()).hexdigest()
    hub.fault(f"PUT /_lfs/{last}", "cut", times=99)
    with pytest.raises(CompressionError, match="was interrupted; nothing was published.*to resume"):
        push_folder(folder, "me/x")
    assert published(hub) == {} and len(hub.blobs) == len(shards) - 1
    hub.faults.clear()
    hub.requests.clear()
    push_folder(folder, "me/x")
    assert [request for request in hub.requests if request.startswith("PUT")] == [f"PUT /_lfs/{last}"]
    assert published(hub) == contents(folder)


@pytest.mark.parametrize(
    "name,options,words",
    [
        ("me/x/y", {}, "is not a repository name"),
        ("me/-x", {}, "is not a repository name"),
        ("me/data", {}, "is a dataset on the Hub and not a model"),
        ("you/x", {}, "may not write to 'you/x'"),
        ("me/none", {"create_pr": True}, "no repository 'me/none' to open a pull request in"),
        ("me/public", {"private": True}, "is already public"),
        ("me/public", {"create_pr": True, "revision": "small"}, "leave one of the two out"),
        ("me/public", {"token": "hf_wrong"}, "does not accept the token"),
        ("me/public", {"token": READ_TOKEN}, "is read-only"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_made(hub, folder, name, options, words):
    hub.create("me/data", "dataset")
    hub.create("me/public")
    before = set(hub.repositories)
    with pytest.raises(CompressionError) as caught:
        push_folder(folder, name, **options)
    assert words in str(caught.value), caught.value
    assert set(hub.repositories) == before and published(hub, "me/public") == {} and not hub.blobs
    assert TOKEN not in str(caught.value) and "hf_wrong" not in str(caught.value)


def test_no_token_no_network_offline_and_a_card_that_the_hub_refuses(hub, folder, monkeypatch, tmp_path):
    (folder / "README.md").write_text("---\nlicense: nonsense\n---\n")
    with pytest.raises(CompressionError, match="must be one of the licences.*nothing was published"):
        push_folder(folder, "me/x")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CompressionError, match="no connection to http://127.0.0.1:9; nothing was published"):
        push_folder(folder, "me/x")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CompressionError, match="HF_HUB_OFFLINE is set"):
        push_folder(folder, "me/x")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(CompressionError, match="no token for the Hub.*hf auth login"):
        push_folder(folder, "me/x")


def test_what_fails_a_check_is_not_published(hub, folder, monkeypatch):
    failing = Verification("out", (Check("paths", "failed", "config.json holds a path."),))
    monkeypatch.setattr(publishing, "verify_folder", lambda *_, **__: failing)
    with pytest.raises(CompressionError, match="was not published, because.*paths: config.json holds a path"):
        push_folder(folder, "me/x")
    assert not hub.repositories
    with pytest.raises(CompressionError, match="not a compressed folder"):
        push_folder(folder.parent, "me/x")


def test_pushing_a_result_and_a_model(hub, folder, result):
    pushed = result.push_to_hub("me/result", private=True, message="A result")
    assert hub.model("me/result").titles == ["A result"] and hub.model("me/result").private
    assert {"model.safetensors", "compression_report.json", "verification.json", "tokenizer.json"} <= set(pushed.files)
    model = hf_offline_compress.CompressedBertForMaskedLM.from_pretrained(folder)
    with torch.no_grad():
        model.cls.predictions.bias += 1
    url = model.push_to_hub("me/model", commit_message="A model", tags=["small"], max_shard_size="40KB")
    assert url.endswith(hub.model("me/model").branches["main"]) and hub.model("me/model").titles == ["A model"]
    there = published(hub, "me/model")
    card = there["README.md"].decode()
    assert "# Ours" in card and "small" in card and "license: mit" in card and BEGIN in card
    assert len([name for name in there if name.endswith(".safetensors")]) > 1
    assert {"modeling_compressed.py", "config.json", "verification.json"} <= there.keys()
    hub.model("me/model").files()["README.md"] = CARD.format("Mine.\n").encode()
    model.push_to_hub("me/model")
    assert b"Mine." in published(hub, "me/model")["README.md"]


def by_save_pretrained(model, folder, name, **options):
    model.save_pretrained(folder, push_to_hub=True, repo_id=name, **options)


def by_save_pretrained_without_the_package(model, folder, name):
    model.publish = None  # as in a process that has the folder's code alone
    by_save_pretrained(model, folder, name)


def by_trainer(model, folder, name):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), hub_model_id=name, report_to="none", use_cpu=True
    )
    transformers.Trainer(model, arguments).push_to_hub()


def by_sentence_transformers(model, folder, name):
    model.bert.save_pretrained(folder)
    make_tokenizer("bert").save_pretrained(folder)
    SentenceTransformer(str(folder)).push_to_hub(name)


OTHER_WAYS = (by_save_pretrained, by_save_pretrained_without_the_package, by_trainer, by_sentence_transformers)


def test_weights_that_are_given_are_those_that_are_published(hub, folder, tmp_path):
    """Not the model's own; and only the main process publishes."""
    model = hf_offline_compress.CompressedBertForMaskedLM.from_pretrained(folder)
    given = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given["bert.embeddings.LayerNorm.bias"] += 1
    by_save_pretrained(model, tmp_path / "saved", "me/given", state_dict=given)
    stored = safetensors.torch.load(published(hub, "me/given")["model.safetensors"])
    assert torch.equal(stored["bert.embeddings.LayerNorm.bias"], given["bert.embeddings.LayerNorm.bias"])
    assert "modeling_compressed.py" in published(hub, "me/given")
    by_save_pretrained(model, tmp_path / "other", "me/other", is_main_process=False)
    assert "me/other" not in {name for _, name in hub.repositories}


def test_a_corrupted_download_is_found(hub, folder, tmp_path):
    push_folder(folder, "me/x")
    place = huggingface_hub.snapshot_download("me/x", cache_dir=tmp_path / "fine")
    assert check_files(place).passed
    hub.fault("GET /_cdn", "corrupt")
    place = huggingface_hub.snapshot_download("me/x", cache_dir=tmp_path / "corrupted")
    assert [check.name for check in check_files(place).failed] in (["weights"], ["formats", "weights"])


LOAD = """
import sys
if sys.argv[1] == "package":
    import hf_offline_compress
else:
    sys.modules["hf_offline_compress"] = None
import torch, transformers
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from inputs import inputs_for
trust = {"trust_remote_code": True} if sys.argv[1] == "remote" else {}
found = {}
for name, revision in (("me/x", "main"), ("me/x", "small"), ("me/whole", "main")):
    options = {"revision": revision, **trust}
    model = transformers.AutoModelForMaskedLM.from_pretrained(name, **options)
    transformers.AutoTokenizer.from_pretrained(name, **options)
    with torch.no_grad():
        found[name, revision] = model.eval()(**inputs_for("BertForMaskedLM")).logits
    assert model.compressed_modules()
for name in sys.argv[4:-1]:
    model = transformers.AutoModelForMaskedLM.from_pretrained(name, **trust)
    with torch.no_grad():
        found[name] = model.eval()(**inputs_for("BertForMaskedLM")).logits
    assert model.compressed_modules()
if sys.argv[1] == "remote":
    from sentence_transformers import SentenceTransformer
    found["vector"] = torch.tensor(SentenceTransformer(sys.argv[-1], device="cpu", **trust).encode("A sentence."))
torch.save(found, sys.argv[3])
if sys.argv[1] == "remote":
    model.push_to_hub("me/from-a-stranger")
"""


def test_round_trip_for_strangers(hub, finished, result, tmp_path):
    """The command as a user types it, with a real verification; main, a branch, one file instead of shards; other ways."""
    online = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
    }
    command = ("push", finished, "me/x", "--private", "--message", "By hand")
    run = run_cli(*command, **online, HF_TOKEN=TOKEN)
    assert run.returncode == 0, run.stderr
    assert f"files verified and published on 'main': {hub.url}/me/x/commit/" in run.stdout
    assert hub.model("me/x").private and hub.model("me/x").titles == ["By hand"]
    assert published(hub) == contents(finished)
    push_folder(finished, "me/x", revision="small")
    result.push_to_hub("me/whole")
    hub.create("me/from-a-stranger").files()["README.md"] = CARD.format("Mine.\n").encode()
    others = [f"me/{publish.__name__}" for publish in OTHER_WAYS]
    for publish, name in zip(OTHER_WAYS, others, strict=True):
        model = hf_offline_compress.CompressedBertForMaskedLM.from_pretrained(finished)
        publish(model, tmp_path / publish.__name__, name)
        assert json.loads(published(hub, name)["config.json"])["auto_map"]["AutoModelForMaskedLM"]
    expected = outputs_of(result.model, "BertForMaskedLM")
    encoder = SentenceTransformer(str(tmp_path / OTHER_WAYS[-1].__name__), device="cpu")
    vector = torch.tensor(encoder.encode("A sentence."))
    for mode in ("package", "remote"):
        out = tmp_path / f"{mode}.pt"
        environment = {**online, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / mode)}
        names = others if mode == "remote" else ()
        run = run_python("-c", LOAD, mode, Path(__file__).parent, out, *names, **environment)
        assert run.returncode == 0, run.stderr
        found = torch.load(out)
        torch.testing.assert_close(found.pop("vector", vector), vector)
        for logits in found.values():
            torch.testing.assert_close(logits.flatten(), expected)
    pushed = published(hub, "me/from-a-stranger")
    assert {"model.safetensors", "config.json", "modeling_compressed.py", "layers_compressed.py"} <= pushed.keys()
    assert "Mine." in pushed["README.md"].decode()


def test_the_command_refuses_in_one_sentence(hub, folder, tmp_path):
    (folder / "weights.pt").write_bytes(b"\x80\x02")
    online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    for name, token, words in (("me/a/b", TOKEN, "not a repository name"), ("me/x", "", "no token for the Hub")):
        run = run_cli("push", folder, name, **online, HF_TOKEN=token)
        assert run.returncode == 1 and words in run.stderr and len(error_of(run.stderr).splitlines()) == 1, run.stderr


@pytest.mark.parametrize(
    "step,said",
    [
        ("create_repo", "nothing was published"),
        ("preupload_lfs_files", "now exists and is empty"),
        ("create_commit", "not known"),
    ],
)
def test_an_interrupted_push_says_what_is_there(hub, folder, monkeypatch, capsys, step, said):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub.HfApi, step, interrupted)
    with pytest.raises(typer.Exit) as left:
        run(lambda: push_folder(folder, "me/x"), debug=False)
    errors = capsys.readouterr().err.strip().splitlines()[-1]
    assert left.value.exit_code == 130 and errors.startswith("interrupted; ") and said in errors
    assert not published(hub)
