"""A hub on loopback: an HTTP server that answers the requests of huggingface_hub which the tests cause."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading

COMMIT = "c0ffee" * 6 + "c0ff"


class Hub:
    """The repositories of a simulated hub.

    Attributes:
      files: content of each file by repository and path.
      private, gated: repositories that need the token "secret".
      breaks: number of times that the connection is cut in the middle of a download.
      requests: method, path and Range header of each request.
    """

    def __init__(self):
        self.files, self.private, self.gated, self.breaks, self.requests = {}, set(), set(), 0, []

    def add(self, repo, folder):
        """Adds all files of a folder as a repository."""
        paths = [path for path in folder.rglob("*") if path.is_file()]
        self.files[repo] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, content=b"", headers=None, body=True):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(content)

    def refused(self, status, code):
        self.answer(status, headers={"X-Error-Code": code, "X-Error-Message": code})

    def permitted(self, repo):
        hub = self.server.hub
        allowed = self.headers.get("authorization") == "Bearer secret"
        if repo not in hub.files or repo in hub.private and not allowed:
            self.refused(401, "RepoNotFound")
        elif repo in hub.gated and not allowed:
            self.refused(403, "GatedRepo")
        else:
            return True
        return False

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub = self.server.hub
        hub.requests.append((self.command, self.path, self.headers.get("Range")))
        if found := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", self.path):
            repo, revision, name = found.groups()
            if not self.permitted(repo):
                return
            if revision not in ("main", COMMIT):
                self.refused(404, "RevisionNotFound")
            elif name not in hub.files[repo]:
                self.refused(404, "EntryNotFound")
            else:
                self.send_file(hub.files[repo][name])
        elif found := re.match(r"/api/models/([\w.-]+/[\w.-]+)/tree/", self.path):
            if self.permitted(found[1]):
                listed = [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in hub.files[found[1]].items()
                ]
                self.answer(200, json.dumps(listed).encode(), {"Content-Type": "application/json"})
        else:
            self.refused(404, "EntryNotFound")

    def send_file(self, content):
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        start, status = 0, 200
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start, status = int(found[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        content = content[start:]
        if self.command == "GET" and self.server.hub.breaks and len(content) > 1000:
            self.server.hub.breaks -= 1
            self.answer(status, content, headers, body=False)
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        else:
            self.answer(status, content, headers)

    def do_POST(self):
        hub, body = self.server.hub, self.rfile.read(int(self.headers["Content-Length"]))
        hub.requests.append((self.command, self.path, None))
        if self.headers.get("authorization") != "Bearer secret":
            self.answer(401)
        elif self.path == "/api/repos/create":
            repo = "owner/" + json.loads(body)["name"]
            hub.files.setdefault(repo, {})
            self.json({"url": f"http://{self.headers['Host']}/{repo}"})
        elif self.path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            self.json({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})
        elif found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/commit/main", self.path):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    hub.files[found[1]][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self.json({"commitUrl": f"http://{self.headers['Host']}/{found[1]}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self.json({})

    def json(self, values):
        self.answer(200, json.dumps(values).encode(), {"Content-Type": "application/json"})


@contextlib.contextmanager
def serve():
    """Serves a `Hub`; yields it and the address of the server."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub, server.daemon_threads = Hub(), True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
