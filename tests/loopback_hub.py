"""A Hub on 127.0.0.1 for tests: the endpoints that huggingface_hub calls, in memory, with faults on demand."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse

COMMIT = "c0ffee" + "0" * 34
TOKEN = "hf_" + "w" * 34
READ_TOKEN = "hf_" + "r" * 34
LARGE = (".safetensors", ".bin")  # kept as LFS objects, as the Hub's own .gitattributes says
KINDS = {"": "model", "datasets/": "dataset", "spaces/": "space"}


@dataclass
class Repository:
    """Branches of commits of files, in memory."""

    private: bool = False
    gated: bool = False
    commits: dict = field(default_factory=dict)  # sha → {path: bytes}
    branches: dict = field(default_factory=dict)  # name → sha
    titles: list = field(default_factory=list)  # of all commits that were pushed

    def add(self, branch, files, sha=None):
        content = json.dumps([len(self.commits), sorted((p, hashlib.sha1(d).hexdigest()) for p, d in files.items())])
        sha = sha or hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def sha(self, revision):
        return self.branches.get(revision or "main") or (revision if revision in self.commits else None)

    def files(self, revision="main"):
        return self.commits[self.sha(revision)]


@dataclass
class Fault:
    """What goes wrong with requests that match: a status, or a way in which the connection breaks."""

    pattern: str
    action: int | str  # a status; "cut" in the middle of the body, "lost" after the work is done, "corrupt" the answer
    times: int
    headers: dict


class LoopbackHub:
    """A Hub; the account `me`, whose tokens are TOKEN (writes) and READ_TOKEN, may write to me/… and team/…."""

    def __init__(self):
        self.repositories = {}  # (kind, id) → Repository
        self.blobs = {}  # sha256 → bytes
        self.requests = []  # "METHOD /path", as they came
        self.faults = []
        self.lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.storage = self.url.replace("127.0.0.1", "localhost")
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def create(self, name, kind="model", **options):
        """Make an empty repository; like the Hub's, it begins with a commit."""
        repository = self.repositories[kind, name] = Repository(**options)
        repository.add("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return repository

    def model(self, name):
        return self.repositories["model", name]

    def fault(self, pattern, action, times=1, **headers):
        """Let the next requests that match go wrong; headers are those of the answer, with _ for -."""
        self.faults.append(Fault(pattern, action, times, {n.replace("_", "-"): v for n, v in headers.items()}))

    def take_fault(self, request):
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None

    def count(self, pattern):
        return sum(bool(re.search(pattern, request)) for request in self.requests)


class _RefusedError(Exception):
    """An answer that is an error."""

    def __init__(self, status, code="", message="", **content):
        self.status, self.code, self.message, self.content = status, code, message, content


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *args):
        pass

    def handle(self):
        try:
            super().handle()
        except (ConnectionError, ValueError):  # the client has gone, or we cut its connection
            self.close_connection = True

    def body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while length := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def respond(self, status, content=b"", **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        if self.fault and self.fault.action == "lost":
            return self.cut()
        if self.fault and self.fault.action == "corrupt":
            data = bytes(byte ^ 0x10 if i % 97 == 50 else byte for i, byte in enumerate(data))
        self.send_response(status)
        length = headers.pop("length", len(data))
        for name, value in {"Content-Length": length, **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        return None

    def cut(self):
        self.close_connection = True
        self.connection.shutdown(2)

    def serve(self):
        url = urlparse(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        self.fault = self.hub.take_fault(request)
        if self.fault and self.fault.action == "cut":
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            return self.cut()
        body = self.body()
        if self.fault and isinstance(self.fault.action, int):
            return self.respond(self.fault.action, {"error": "as the test asked"}, **self.fault.headers)
        try:
            for pattern, answer in _ROUTES:
                if matched := re.fullmatch(pattern, f"{self.command} {url.path}"):
                    found = [group and unquote(group) for group in (matched[0], *matched.groups())]
                    with self.hub.lock:
                        reply = answer(self, found, body, query)
                    return self.respond(*reply[:2], **(reply[2] if len(reply) > 2 else {}))
            raise _RefusedError(404, message=f"no such endpoint: {request}")
        except _RefusedError as refused:
            headers = {"X_Error_Code": refused.code, "X_Error_Message": refused.message}
            content = {"error": refused.message, **refused.content}
            return self.respond(refused.status, content, **{n: v for n, v in headers.items() if v})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    # Who asks, and for what

    def token(self):
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def user(self, *, writes=False, name=None):
        token = self.token()
        if writes and not token:
            raise _RefusedError(401, message="Invalid username or password.")
        if writes and token not in (TOKEN, READ_TOKEN):
            raise _RefusedError(401, message="Invalid credentials in Authorization header")
        if writes and (token == READ_TOKEN or (name and name.partition("/")[0] not in ("me", "team"))):
            raise _RefusedError(403, message=f"You don't have the rights to write to {name}")
        return token

    def repository(self, kind, name, *, writes=False):
        repository = self.hub.repositories.get((kind, name))
        if repository is None or (repository.private and self.token() not in (TOKEN, READ_TOKEN)):
            raise _RefusedError(404 if self.token() else 401, "RepoNotFound", "Repository not found")
        if repository.gated:
            raise _RefusedError(403, "GatedRepo", "Access to this repository is restricted")
        if writes:
            self.user(writes=True, name=name)
        return repository

    def commit_of(self, repository, revision):
        sha = repository.sha(revision)
        if sha is None:
            raise _RefusedError(404, "RevisionNotFound", "Invalid rev id")
        return sha, repository.commits[sha]

    # What they ask for

    def who(self, found, body, query):
        if self.token() not in (TOKEN, READ_TOKEN):
            raise _RefusedError(401, message="Invalid credentials in Authorization header")
        role = "write" if self.token() == TOKEN else "read"
        account = {"name": "me", "type": "user", "orgs": [{"name": "team"}], "auth": {"accessToken": {"role": role}}}
        return 200, account

    def create(self, found, body, query):
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        self.user(writes=True, name=name)
        kind, url = asked.get("type", "model"), f"{self.hub.url}/{name}"
        if (kind, name) in self.hub.repositories:
            raise _RefusedError(409, message="You already created this repo", url=url)
        self.hub.create(name, kind, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        return 200, {"url": url, "name": name, "id": name}

    def info(self, found, body, query):
        repository = self.repository(found[1], found[2])
        sha, files = self.commit_of(repository, found[3])
        return 200, {
            "_id": "1",
            "id": found[2],
            "modelId": found[2],
            "sha": sha,
            "private": repository.private,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [{"rfilename": path} for path in sorted(files)],
        }

    def listed(self, path, data):
        large = path.endswith(LARGE)
        entry = {"type": "file", "path": path, "size": len(data), "oid": _git_hash(data)}
        if large:
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry

    def tree(self, found, body, query):
        _, files = self.commit_of(self.repository(found[1], found[2]), found[3])
        listed = [self.listed(path, data) for path, data in sorted(files.items()) if path.startswith(found[4] or "")]
        if found[4] and not listed:
            raise _RefusedError(404, "EntryNotFound", "Entry not found")
        return 200, listed

    def paths(self, found, body, query):
        _, files = self.commit_of(self.repository(found[1], found[2]), found[3])
        asked = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
        return 200, [self.listed(path, files[path]) for path in asked if path in files]

    def refs(self, found, body, query):
        repository = self.repository(found[1], found[2])
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
            for name, sha in repository.branches.items()
        ]
        return 200, {"branches": branches, "converts": [], "tags": []}

    def branch(self, found, body, query):
        repository = self.repository(found[1], found[2], writes=True)
        if found[3] in repository.branches:
            raise _RefusedError(409, message="Reference already exists")
        repository.branches[found[3]] = repository.branches["main"]
        return 200, {}

    def card(self, found, body, query):
        content = json.loads(body)["content"]
        if "\nlicense: nonsense\n" in content:
            message = '"license" must be one of the licences'
            raise _RefusedError(400, message=message, errors=[{"message": message}], warnings=[])
        return 200, {"errors": [], "warnings": []}

    def preupload(self, found, body, query):
        repository = self.repository(found[1], found[2], writes=not query.get("create_pr"))
        _, files = self.commit_of(repository, found[3])
        answers = []
        for file in json.loads(body)["files"]:
            path, large = file["path"], file["path"].endswith(LARGE)
            there = files.get(path)
            oid = None if there is None else hashlib.sha256(there).hexdigest() if large else _git_hash(there)
            mode = "lfs" if large else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": answers}

    def batch(self, found, body, query):
        self.repository(KINDS[found[1] or ""], found[2])
        answers = []
        for wanted in json.loads(body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"], "authenticated": True}
            if wanted["oid"] not in self.hub.blobs:
                upload = {"href": f"{self.hub.url}/_lfs/{wanted['oid']}", "header": {}}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/_verify", "header": {}}}
            answers.append(answer)
        return 200, {"transfer": "basic", "objects": answers}

    def upload(self, found, body, query):
        if hashlib.sha256(body).hexdigest() != found[1]:
            raise _RefusedError(400, message="the content is not what its name says")
        self.hub.blobs[found[1]] = body
        return 200, b""

    def uploaded(self, found, body, query):
        asked = json.loads(body)
        if len(self.hub.blobs.get(asked["oid"], b"")) != asked["size"]:
            raise _RefusedError(404, message="no such object")
        return 200, {}

    def commit(self, found, body, query):
        proposes = bool(query.get("create_pr"))
        repository = self.repository(found[1], found[2], writes=not proposes)
        sha, files = self.commit_of(repository, found[3])
        files, operations = dict(files), [json.loads(line) for line in body.splitlines()]
        header = operations[0]["value"]
        if header.get("parentCommit", sha) != sha:
            raise _RefusedError(412, message="A commit has happened since. Please refresh and try again.")
        for operation in operations[1:]:
            key, value = operation["key"], operation["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        number = sum(name.startswith("refs/pr/") for name in repository.branches) + 1
        target = f"refs/pr/{number}" if proposes else found[3]
        made = repository.add(target, files)
        repository.titles.append(header["summary"])
        url = f"{self.hub.url}/{found[2]}"
        answer = {"success": True, "commitOid": made, "commitUrl": f"{url}/commit/{made}"}
        return 200, answer | ({"pullRequestUrl": f"{url}/discussions/{number}"} if proposes else {})

    def resolve(self, found, body, query):
        repository = self.repository(KINDS[found[1] or ""], found[2])
        sha, files = self.commit_of(repository, found[3])
        if found[4] not in files:
            raise _RefusedError(404, "EntryNotFound", "Entry not found")
        data = files[found[4]]
        large = found[4].endswith(LARGE)
        etag = hashlib.sha256(data).hexdigest() if large else _git_hash(data)
        headers = {"X_Repo_Commit": sha, "ETag": f'"{etag}"', "Accept_Ranges": "bytes"}
        if large:  # the Hub sends everybody on to its storage, which is another host
            self.hub.blobs[etag] = data
            links = {
                "Location": f"{self.hub.storage}/_cdn/resolve/{etag}/{found[4]}",
                "X_Linked_Etag": f'"{etag}"',
                "X_Linked_Size": len(data),
            }
            return 302, b"", headers | links
        return 200, data, headers | {"length": len(data)}

    def storage(self, found, body, query):
        data = self.hub.blobs[found[1]]
        headers = {"ETag": f'"{found[1]}"', "Accept_Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return 200, data, headers | {"length": len(data)}
        start, stop = int(asked[1]), int(asked[2] or len(data) - 1) + 1
        part = data[start:stop]
        return 206, part, headers | {"Content_Range": f"bytes {start}-{start + len(part) - 1}/{len(data)}"}


def _git_hash(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


_API = r"/api/(model|dataset|space)s/([^/]+/[^/]+?)"
_ROUTES = [
    (r"GET /api/whoami-v2", _Handler.who),
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.card),
    (rf"GET {_API}/tree/([^/]+)/?(.*)", _Handler.tree),
    (rf"POST {_API}/paths-info/([^/]+)", _Handler.paths),
    (rf"GET {_API}/refs", _Handler.refs),
    (rf"POST {_API}/branch/([^/]+)", _Handler.branch),
    (rf"POST {_API}/preupload/([^/]+)", _Handler.preupload),
    (rf"POST {_API}/commit/([^/]+)", _Handler.commit),
    (rf"GET {_API}(?:/revision/([^/]+))?", _Handler.info),
    (r"POST /(datasets/|spaces/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /_lfs/(\w+)", _Handler.upload),
    (r"POST /_verify", _Handler.uploaded),
    (r"(?:GET|HEAD) /_cdn/resolve/(\w+)/.+", _Handler.storage),
    (r"(?:GET|HEAD) /(datasets/|spaces/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", _Handler.resolve),
]


@contextmanager
def loopback_hub(repositories, gated=()):
    """Serve folders by repository id; give the endpoint and the list of requests, which grows."""
    hub = LoopbackHub()
    for name, folder in repositories.items():
        files = {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
        hub.repositories["model", name] = Repository(gated=name in gated)
        hub.model(name).add("main", files, sha=COMMIT)
    try:
        yield hub.url, hub.requests
    finally:
        hub.close()
