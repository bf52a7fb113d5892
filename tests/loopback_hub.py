"""A Hub on 127.0.0.1 that serves local folders: the endpoints that downloads call, no more."""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

COMMIT = "c0ffee" + "0" * 34


@contextmanager
def loopback_hub(repositories, gated=()):
    """Serve folders by repository id; give the endpoint and the list of requests, which grows."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def answer(self, status, body=b"", **headers):
            self.send_response(status)
            length = headers.pop("length", len(body))
            for name, value in {"Content-Length": length, "X-Repo-Commit": COMMIT, **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            path = unquote(urlparse(self.path).path)
            requests.append(f"{self.command} {path}")
            info = re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/(?:revision|tree)/([^/]+))?(/.*)?", path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            found = info or file
            if found is None or found[1] not in repositories:
                return self.answer(404, b"{}", X_Error_Code="RepoNotFound")
            if found[1] in gated:
                return self.answer(403, b"{}", X_Error_Code="GatedRepo")
            if found[2] not in (None, "main", COMMIT):
                return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
            folder = repositories[found[1]]
            files = {str(f.relative_to(folder)): f for f in sorted(folder.rglob("*")) if f.is_file()}
            if file:
                if file[3] not in files:
                    return self.answer(404, b"{}", X_Error_Code="EntryNotFound")
                body = files[file[3]].read_bytes()
                return self.answer(200, body, ETag=f'"{hashlib.sha256(body).hexdigest()}"', length=len(body))
            if "/tree/" in path:
                listed = [
                    {"type": "file", "path": n, "size": f.stat().st_size, "oid": "0" * 40} for n, f in files.items()
                ]
                return self.answer(200, json.dumps(listed).encode())
            siblings = [{"rfilename": name} for name in files]
            described = {
                "_id": "1",
                "id": found[1],
                "modelId": found[1],
                "sha": COMMIT,
                "tags": [],
                "siblings": siblings,
            }
            return self.answer(200, json.dumps({**described, "private": False, "downloads": 0, "likes": 0}).encode())

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
    finally:
        server.shutdown()
        server.server_close()
