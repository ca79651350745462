"""A small Hub on this machine, for huggingface_hub to push to and to load from.

It has enough of the real one's HTTP interface: repositories of models and data sets with branches and commits, private
ones, tokens that may write or only read, files by LFS or in the commit, ranges; and faults on demand. Everything is in
memory.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import ModelCard

USERS = {"hf_writes": ("ada", True), "hf_reads": ("ada", False)}


def describe(path, content):
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


class Repository:
    """Hold a repository's commits and branches.

    Branches name commits; a commit is all files of the repository, by path.
    """

    def __init__(self, private):
        self.private = private
        self.commits = {}
        self.branches = {"main": self.commit({})}

    def commit(self, files):
        sha = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[sha] = files
        return sha

    def resolve(self, revision):
        """Find the commit that a branch or a hash names, or None."""
        sha = self.branches.get(revision, revision)
        return sha if sha in self.commits else None


class Hub(ThreadingHTTPServer):
    """Serve repositories: `with Hub() as hub:` serves at `hub.endpoint`.

    `hub.seen` holds methods and paths, `hub.resumed` the files of which only the rest was asked for, `hub.parts` those
    of which a part was. `hub.faults` holds `(method, pattern, fault)`, each taken once. A fault is a status code (429
    comes with Retry-After: 1), or `"cut"`: the connection breaks in mid-body.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories, self.objects, self.faults, self.seen = {}, {}, [], []
        self.resumed, self.parts = [], []
        self.lock = threading.Lock()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def add(self, name, folder):
        """Put a folder's files into a new public repository."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        repository = self.repositories[name] = Repository(private=False)
        repository.branches["main"] = repository.commit(files)

    def take_fault(self, method, path):
        """Find the fault for a request, if there is one, and remove it from the list."""
        with self.lock:
            for fault in self.faults:
                if fault[0] == method and re.search(fault[1], path):
                    self.faults.remove(fault)
                    return fault[2]
        return None

    def handle_error(self, request, client_address):
        pass  # clients may hang up: tests cut their connections


class Handler(BaseHTTPRequestHandler):
    """Answer one client's requests."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self, status, content=b"", **headers):
        if isinstance(content, dict | list):
            content, headers["Content_Type"] = json.dumps(content).encode(), "application/json"
        self.send_response(status)
        headers.setdefault("Content_Length", len(content))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status, code, message):
        self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def do_any(self):
        """Answer a request of any method, or fail on demand."""
        path = unquote(urlsplit(self.path).path)
        self.server.seen.append((self.command, path))
        fault = self.server.take_fault(self.command, path)
        length = int(self.headers.get("Content-Length") or 0)
        # An upload is cut while it is read, a download while it is sent (see resolve).
        if fault == "cut" and self.command in ("PUT", "POST"):
            self.rfile.read(length // 2)
            self.hang_up()
            return
        self.body = self.rfile.read(length)
        if isinstance(fault, int):
            self.answer(fault, b"", **({"Retry_After": 1} if fault == 429 else {}))
            return
        self.cuts = fault == "cut"
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.user, self.may_write = USERS.get(token, (None, False))
        if token and self.user is None:
            self.refuse(401, "InvalidToken", "Invalid credentials in Authorization header")
            return
        for method, pattern, handle in ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                handle(self, *match.groups())
                return
        self.refuse(404, "NotFound", f"no route {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = do_any  # noqa: N815

    def hang_up(self):
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(2)

    # --- who may do what ---

    def repository(self, name, writes=False):
        """Find a repository, or refuse as the real Hub does and return None."""
        found = self.server.repositories.get(name)
        if found is None or (found.private and self.user is None):
            self.refuse(404 if self.user else 401, "RepoNotFound", "Repository not found")
            return None
        if writes and not self.may_write:
            self.refuse(403 if self.user else 401, "Forbidden", "This token may not write")
            return None
        return found

    def commit_of(self, name, revision):
        """Find a commit's hash and files, or refuse and return None twice."""
        repository = self.repository(name)
        if repository is None:
            return None, None
        sha = repository.resolve(revision)
        if sha is None:
            self.refuse(404, "RevisionNotFound", f"no revision {revision}")
            return None, None
        return sha, repository.commits[sha]

    # --- routes ---

    def create(self):
        if not self.may_write:
            self.refuse(403 if self.user else 401, "Forbidden", "This token may not write")
            return
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or self.user}/{wanted['name']}"
        exists = name in self.server.repositories
        if not exists:
            self.server.repositories[name] = Repository(wanted.get("visibility") == "private")
        self.answer(409 if exists else 200, {"url": f"{self.server.endpoint}/{name}", "name": name})

    def branch(self, name, branch):
        if (repository := self.repository(name, writes=True)) is not None:
            exists = branch in repository.branches
            repository.branches.setdefault(branch, repository.branches["main"])
            self.answer(409 if exists else 200, {})

    def validate(self):
        content = json.loads(self.body)["content"]
        try:
            ModelCard(content)
        except ValueError as error:
            self.answer(400, {"errors": [{"message": str(error)}], "warnings": []})
        else:
            self.answer(200, {"errors": [], "warnings": []})

    def preupload(self, name, revision):
        if self.repository(name, writes=True) is not None:
            files = json.loads(self.body)["files"]
            kinds = {True: "lfs", False: "regular"}
            answers = [
                {
                    "path": file["path"],
                    "uploadMode": kinds[file["path"].endswith((".safetensors", ".png", ".parquet"))],
                    "shouldIgnore": False,
                }
                for file in files
            ]
            self.answer(200, {"files": answers})

    def lfs_batch(self, name):
        if self.repository(name, writes=True) is not None:
            objects = []
            for wanted in json.loads(self.body)["objects"]:
                upload = {"upload": {"href": f"{self.server.endpoint}/lfs/{wanted['oid']}", "header": {}}}
                known = wanted["oid"] in self.server.objects
                objects.append({**wanted, "authenticated": True} | ({} if known else {"actions": upload}))
            self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid):
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.objects[oid] = self.body
        self.answer(200)

    def commit(self, name, revision):
        repository = self.repository(name, writes=True)
        if repository is None:
            return
        files = dict(repository.commits[repository.branches[revision]])
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = repository.branches[revision] = repository.commit(files)
        self.answer(
            200, {"commitUrl": f"{self.server.endpoint}/{name}/commit/{sha}", "commitOid": sha, "success": True}
        )

    def info(self, name, revision="main"):
        sha, files = self.commit_of(name, revision)
        if sha:
            private = self.server.repositories[name].private
            siblings = [{"rfilename": path} for path in files]
            self.answer(200, {"_id": sha, "id": name, "sha": sha, "private": private, "siblings": siblings})

    def tree(self, name, revision, below=None):
        sha, files = self.commit_of(name, revision)
        if not sha:
            return
        prefix = f"{below}/" if below else ""
        files = {path: content for path, content in files.items() if path.startswith(prefix)}
        if below and not files:
            self.refuse(404, "EntryNotFound", f"no folder {below}")
            return
        folders = {path[: end.start() + len(prefix)] for path in files for end in re.finditer("/", path[len(prefix) :])}
        if "recursive=true" not in self.path.lower():
            folders = {path for path in folders if "/" not in path[len(prefix) :]}
            files = {path: content for path, content in files.items() if "/" not in path[len(prefix) :]}
        listed = [
            {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest()} for path in folders
        ]
        self.answer(200, listed + [describe(path, content) for path, content in files.items()])

    def paths_info(self, name, revision):
        sha, files = self.commit_of(name, revision)
        if sha:
            wanted = parse_qs(self.body.decode()).get("paths") or json.loads(self.body or b"{}").get("paths", [])
            self.answer(200, [describe(path, files[path]) for path in wanted if path in files])

    def resolve(self, name, revision, path):
        sha, files = self.commit_of(name, revision)
        if not sha:
            return
        if path not in files:
            self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
            return
        content, status, headers = files[path], 200, {}
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X_Repo_Commit": sha, "Accept_Ranges": "bytes"}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(match[1]), int(match[2] or len(content) - 1)
            if match[2]:
                self.server.parts.append(path)
            elif first:
                self.server.resumed.append(path)
            headers["Content_Range"] = f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
            content, status = content[first : last + 1], 206
        if not self.cuts:
            self.answer(status, content, **headers)
            return
        self.answer(status, content[: len(content) // 2], Content_Length=len(content), **headers)
        self.wfile.flush()
        self.hang_up()


REPO = r"([^/]+/[^/]+)"
REVISION = r"(refs/convert/\w+|[^/]+)"
API, FILES = rf"/api/(?:models|datasets)/{REPO}", rf"(?:/datasets)?/{REPO}"
ROUTES = [
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", rf"{API}/branch/(.+)", Handler.branch),
    ("POST", rf"{API}/preupload/(.+)", Handler.preupload),
    ("POST", rf"{API}/commit/(.+)", Handler.commit),
    ("POST", rf"{API}/paths-info/(.+)", Handler.paths_info),
    ("POST", rf"{FILES}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs/(\w+)", Handler.lfs_put),
    ("GET", API, Handler.info),
    ("GET", rf"{API}/revision/(.+)", Handler.info),
    ("GET", rf"{API}/tree/{REVISION}(?:/(.+))?", Handler.tree),
    ("HEAD", rf"{FILES}/resolve/{REVISION}/(.+)", Handler.resolve),
    ("GET", rf"{FILES}/resolve/{REVISION}/(.+)", Handler.resolve),
]
