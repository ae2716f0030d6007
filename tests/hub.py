"""A Hub for tests: models, datasets and Spaces over real HTTP, on the loopback interface, from the standard library.

    hub = Hub()                      # hub.url, hub.log, hub.repos; hub.close()
    hub.users["secret"] = User("ann")
    env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "secret", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}

The official client runs against it unchanged, in a process of its own: it reads `HF_ENDPOINT` once, at import. Git
blobs have their real SHA-1 and LFS files their SHA-256, because the client compares them with its local files. Not
here: pull requests, discussions, git clone, Xet.
"""

import base64
import hashlib
import json
import re
import threading
import traceback
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


TYPES = ("models", "datasets", "spaces")
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".parquet", ".arrow", ".png")
ZERO = "0" * 40


@dataclass
class User:
    """Who a token belongs to. `role` is "write" or "read"; `orgs` are the organisations it may write to."""

    name: str
    role: str = "write"
    orgs: tuple = ()


@dataclass(frozen=True)
class File:
    oid: str  # git blob SHA-1; of an LFS file: that of its pointer
    size: int
    sha256: str | None = None  # of an LFS file

    @property
    def etag(self):
        return self.sha256 or self.oid


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str
    title: str
    date: str
    files: dict


@dataclass
class Repo:
    kind: str
    id: str
    private: bool = False
    gated: str | bool = False
    readers: set = field(default_factory=set)  # users who were given access to a gated repository
    commits: dict = field(default_factory=dict)
    branches: dict = field(default_factory=dict)
    tags: dict = field(default_factory=dict)

    def commit(self, branch, files, title):
        parent = self.branches.get(branch, ZERO)
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        text = json.dumps(
            [self.kind, self.id, parent, title, date, len(self.commits), sorted(map(str, files.items()))]
        )
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = Commit(sha, parent, title, date, files)
        self.branches[branch] = sha
        return self.commits[sha]

    def find(self, revision):
        """The commit that a branch, a tag, a SHA or `HEAD` names; `None` if there is none."""
        name = "main" if revision == "HEAD" else revision.removeprefix("refs/heads/")
        return self.commits.get(self.branches.get(name) or self.tags.get(name) or name)

    def history(self, commit):
        while commit is not None:
            yield commit
            commit = self.commits.get(commit.parent)


@dataclass
class Request:
    method: str
    path: str
    status: int
    user: str | None
    size: int  # bytes of the request's body


class Fail(Exception):
    """An answer that is no success."""

    def __init__(self, status, message, code=None, **body):
        super().__init__(message)
        self.status, self.code, self.body = status, code, {"error": message, **body}


class Hub:
    """
    The server, running in a thread until `close()`.

    Attributes:
        url (`str`): What `HF_ENDPOINT` must be.
        users (`dict[str, User]`): Token to user.
        repos (`dict[tuple[str, str], Repo]`): `("models", "ann/model")` to repository.
        log (`list[Request]`): Every request, in the order answered.
        faults (`list[tuple[str, str, int]]`): Method, regular expression for the path, status. The first that fits a
            request is used up and answered instead; status 0 closes the connection without an answer.
    """

    def __init__(self):
        self.users, self.repos, self.log, self.faults = {}, {}, [], []
        self.blobs = {}  # git SHA-1, or SHA-256 of an LFS file, to bytes
        self.lock = threading.RLock()
        hub = self

        class Bound(_Handler):
            server_hub = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def calls(self, pattern, since=0):
        """Logged requests whose `METHOD path` matches."""
        return [r for r in self.log[since:] if re.search(pattern, f"{r.method} {r.path}")]

    def add_blob(self, content):
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        self.blobs[oid] = content
        return oid

    def read(self, kind, repo_id, path, revision="main"):
        """Content of a file, as bytes."""
        return self.blobs[self.repos[kind, repo_id].find(revision).files[path].etag]

    def write(self, kind, repo_id, path, content, revision="main"):
        """A commit as a person makes it in the browser."""
        repo = self.repos[kind, repo_id]
        files = {**repo.find(revision).files, path: File(self.add_blob(content), len(content))}
        repo.commit(revision, files, f"Update {path}")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: Hub

    def log_message(self, *args):
        pass

    def _serve(self):
        hub, split = self.server_hub, urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        self.body = (
            self.rfile.read(length) if "chunked" not in self.headers.get("Transfer-Encoding", "") else self._chunks()
        )
        # Split first, unquote then: a revision may hold an encoded slash.
        self.parts = [unquote(part) for part in split.path.strip("/").split("/")]
        self.query = {key: values[-1] for key, values in parse_qs(split.query).items()}
        self.user, self.sent = None, 0
        try:
            for fault in hub.faults:
                if fault[0] == self.command and re.search(fault[1], split.path):
                    hub.faults.remove(fault)
                    if not fault[2]:
                        self.close_connection = True
                        return
                    raise Fail(fault[2], "This fault was ordered")
            self._authenticate()
            with hub.lock:
                self._route()
        except Fail as error:
            self._json(error.body, error.status, {"X-Error-Code": error.code, "X-Error-Message": str(error)})
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        except Exception:
            traceback.print_exc()  # a client may turn a 500 into a misleading message
            self._json({"error": "The test Hub failed; see its traceback"}, 500)
        finally:
            name = self.user.name if self.user else None
            hub.log.append(Request(self.command, self.path, self.sent, name, len(self.body)))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _chunks(self):
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    # ------------------------------------------------------------------------------------------------------- answering

    def _json(self, value, status=200, headers=None):
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, content, status=200, headers=None):
        self.sent = status
        self.send_response(status)
        for name, value in (headers or {}).items():
            if value is not None:
                self.send_header(name, str(value))
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _authenticate(self):
        header = self.headers.get("Authorization")
        if header:
            self.user = self.server_hub.users.get(header.removeprefix("Bearer "))
            if self.user is None:
                raise Fail(401, "Invalid credentials in Authorization header")

    def _require_user(self):
        if self.user is None:
            raise Fail(401, "Invalid username or password.")

    def _require_write(self, namespace):
        self._require_user()
        if self.user.role != "write" or namespace not in (self.user.name, *self.user.orgs):
            raise Fail(403, f"You don't have the rights to write to the namespace {namespace}")

    def _repo(self, kind, repo_id):
        repo = self.server_hub.repos.get((kind, repo_id))
        owner = repo_id.split("/")[0]
        hidden = repo is not None and repo.private
        if repo is None or (hidden and (self.user is None or owner not in (self.user.name, *self.user.orgs))):
            # The Hub does not tell whether a repository is missing or private.
            raise Fail(401 if self.user is None else 404, "Repository not found", "RepoNotFound")
        return repo

    def _commit_of(self, repo, revision):
        commit = repo.find(revision)
        if commit is None:
            raise Fail(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # --------------------------------------------------------------------------------------------------------- routing

    def _route(self):
        method, parts = self.command, self.parts
        if parts[:2] == ["api", "whoami-v2"]:
            self._require_user()
            token = {"displayName": "test", "role": self.user.role}
            orgs = [{"name": name, "type": "org"} for name in self.user.orgs]
            return self._json(
                {
                    "type": "user",
                    "name": self.user.name,
                    "orgs": orgs,
                    "auth": {"type": "access_token", "accessToken": token},
                }
            )
        if parts[:2] == ["api", "repos"]:
            return self._create() if method == "POST" else self._delete()
        if parts[:2] == ["api", "validate-yaml"]:
            return self._validate_yaml()
        if parts[0] == "api" and parts[1] in TYPES:
            if len(parts) == 2:
                return self._list(parts[1])
            # Datasets of old have no namespace; here every repository has one.
            kind, repo_id, rest = parts[1], "/".join(parts[2:4]), parts[4:]
            action = getattr(self, f"_api_{(rest[0] if rest else 'info').replace('-', '_')}", None)
            if action is None:
                raise Fail(404, f"No such endpoint: {method} {self.path}")
            return action(self._repo(kind, repo_id), rest[1:])
        if parts[0] == "lfs":
            return self._upload(parts[1])
        kind = parts[0] if parts[0] in TYPES else "models"
        rest = parts[1:] if parts[0] in TYPES else parts
        if len(rest) > 3 and rest[1].endswith(".git") and rest[2:5] == ["info", "lfs", "objects"]:
            repo = self._repo(kind, f"{rest[0]}/{rest[1].removesuffix('.git')}")
            return self._lfs_batch(repo) if rest[5] == "batch" else self._lfs_verify()
        if len(rest) > 4 and rest[2] in ("resolve", "raw"):
            repo = self._repo(kind, "/".join(rest[:2]))
            return self._resolve(repo, rest[3], "/".join(rest[4:]), raw=rest[2] == "raw")
        raise Fail(404, f"No such endpoint: {method} {self.path}")

    def _create(self):
        self._require_user()
        order = json.loads(self.body)
        kind, name = order.get("type", "model") + "s", order["name"]
        namespace = order.get("organization") or self.user.name
        self._require_write(namespace)
        repo_id = f"{namespace}/{name}"
        url = self.server_hub.url + ("/" if kind == "models" else f"/{kind}/") + repo_id
        if (kind, repo_id) in self.server_hub.repos:
            raise Fail(409, "You already created this repo", url=url)
        private = order.get("private") or order.get("visibility") == "private"
        repo = self.server_hub.repos[kind, repo_id] = Repo(kind, repo_id, bool(private))
        content = b"".join(b"*%s filter=lfs diff=lfs merge=lfs -text\n" % s.encode() for s in LFS_SUFFIXES)
        repo.commit(
            "main", {".gitattributes": File(self.server_hub.add_blob(content), len(content))}, "initial commit"
        )
        for file in order.get("files") or ():  # the JavaScript client may send the first files along
            content = base64.b64decode(file["content"])
            files = {**repo.find("main").files, file["path"]: File(self.server_hub.add_blob(content), len(content))}
            repo.commit("main", files, f"Add {file['path']}")
        self._json({"url": url, "id": repo_id, "name": repo_id})

    def _delete(self):
        order = json.loads(self.body)
        kind, namespace = order.get("type", "model") + "s", order.get("organization") or self.user.name
        self._require_write(namespace)
        repo = self._repo(kind, f"{namespace}/{order['name']}")
        del self.server_hub.repos[kind, repo.id]
        self._json({})

    def _validate_yaml(self):
        content = json.loads(self.body)["content"]
        head = re.match(r"---\s*\n(.*?)\n---", content, re.S)
        errors = []
        if head and re.search(r"^license:\s*$", head[1], re.M):
            errors.append({"message": '"license" must be a string'})
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _list(self, kind):
        rows = [
            self._info(repo, repo.find("main"))
            for (found, _), repo in self.server_hub.repos.items()
            if found == kind and not repo.private
        ]
        author, search, tag = (self.query.get(name) for name in ("author", "search", "filter"))
        rows = [r for r in rows if not author or r["id"].startswith(f"{author}/")]
        rows = [r for r in rows if not search or search in r["id"]]
        self._json([r for r in rows if not tag or tag in r["tags"]])

    def _info(self, repo, commit):
        card = {}
        if "README.md" in commit.files:
            text = self.server_hub.blobs[commit.files["README.md"].etag].decode()
            if head := re.match(r"---\s*\n(.*?)\n---", text, re.S):
                import yaml  # a dependency of the client, so it is there

                card = yaml.safe_load(head[1]) or {}
        return {
            "_id": hashlib.sha1(repo.id.encode()).hexdigest()[:24],
            "id": repo.id,
            "modelId": repo.id,
            "author": repo.id.split("/")[0],
            "sha": commit.sha,
            "private": repo.private,
            "gated": repo.gated,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "createdAt": min(c.date for c in repo.commits.values()),
            "lastModified": commit.date,
            "tags": card.get("tags") or [],
            "pipeline_tag": card.get("pipeline_tag"),
            "library_name": card.get("library_name"),
            "cardData": card,
            "model-index": card.get("model-index"),
            "sdk": card.get("sdk"),
            "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        }

    def _api_info(self, repo, rest):
        self._json(self._info(repo, self._commit_of(repo, "main")))

    def _api_revision(self, repo, rest):
        self._json(self._info(repo, self._commit_of(repo, rest[0])))

    def _api_settings(self, repo, rest):
        self._require_write(repo.id.split("/")[0])
        order = json.loads(self.body)
        repo.gated = order.get("gated", repo.gated)
        if "visibility" in order or "private" in order:
            repo.private = order.get("private", order.get("visibility") == "private")
        self._json({})

    def _api_runtime(self, repo, rest):
        hardware = {"current": "cpu-basic", "requested": "cpu-basic"}
        self._json({"stage": "RUNNING", "hardware": hardware, "storage": None, "gcTimeout": None})

    # ----------------------------------------------------------------------------------------------------------- files

    def _row(self, path, file):
        row = {"type": "file", "path": path, "oid": file.oid, "size": file.size}
        if file.sha256:
            row["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": len(_pointer(file.sha256, file.size))}
        return row

    def _folder(self, path, files):
        text = "".join(f"{p}{f.oid}" for p, f in sorted(files.items()) if p.startswith(f"{path}/"))
        return {"type": "directory", "path": path, "oid": hashlib.sha1(text.encode()).hexdigest(), "size": 0}

    def _api_tree(self, repo, rest):
        files = self._commit_of(repo, rest[0]).files
        folder = "/".join(rest[1:]).strip("/")
        inside = f"{folder}/" if folder else ""
        if folder and not any(path.startswith(inside) for path in files):
            raise Fail(404, f"{folder} does not exist on {rest[0]}", "EntryNotFound")
        deep, rows, folders = self.query.get("recursive", "").lower() in ("1", "true"), [], set()
        for path, file in sorted(files.items()):
            if path.startswith(inside):
                steps = path[len(inside) :].split("/")
                folders.update(
                    inside + "/".join(steps[:i]) for i in range(1, len(steps) if deep else min(len(steps), 2))
                )
                if deep or len(steps) == 1:
                    rows.append(self._row(path, file))
        self._json([self._folder(path, files) for path in sorted(folders)] + rows)

    def _api_paths_info(self, repo, rest):
        files = self._commit_of(repo, rest[0]).files
        if "json" in self.headers.get("Content-Type", ""):
            paths = json.loads(self.body)["paths"]
        else:
            paths = parse_qs(self.body.decode()).get("paths", [])
        rows = [self._row(path, files[path]) for path in paths if path in files]
        rows += [self._folder(path, files) for path in paths if any(p.startswith(f"{path}/") for p in files)]
        self._json(rows)

    def _resolve(self, repo, revision, path, raw):
        if repo.gated and (self.user is None or self.user.name not in (repo.id.split("/")[0], *repo.readers)):
            status = 401 if self.user is None else 403
            raise Fail(status, f"Access to model {repo.id} is restricted. You must be authenticated.", "GatedRepo")
        commit = self._commit_of(repo, revision)
        file = commit.files.get(path)
        if file is None:  # the client remembers the miss for this commit
            headers = {
                "X-Error-Code": "EntryNotFound",
                "X-Error-Message": "Entry not found",
                "X-Repo-Commit": commit.sha,
            }
            return self._json({"error": "Entry not found"}, 404, headers)
        if raw:  # as git stores it
            file = File(file.oid, len(self.server_hub.blobs[file.oid]))
        content = self.server_hub.blobs[file.etag]
        headers = {"ETag": f'"{file.etag}"', "X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        if file.sha256:
            headers.update({"X-Linked-ETag": f'"{file.sha256}"', "X-Linked-Size": file.size})
        status, span = 200, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span:
            first, last = int(span[1]), min(int(span[2] or file.size - 1), file.size - 1)
            if first >= file.size:
                return self._send(b"", 416, {"Content-Range": f"bytes */{file.size}"})
            headers["Content-Range"] = f"bytes {first}-{last}/{file.size}"
            status, content = 206, content[first : last + 1]
        headers.update({"Content-Type": "application/octet-stream", "Content-Length": len(content)})
        self._send(content, status, headers)

    # ------------------------------------------------------------------------------------------------------- revisions

    def _api_refs(self, repo, rest):
        def rows(names, where):
            return [{"name": n, "ref": f"refs/{where}/{n}", "targetCommit": sha} for n, sha in names.items()]

        self._json({"branches": rows(repo.branches, "heads"), "tags": rows(repo.tags, "tags"), "converts": []})

    def _api_commits(self, repo, rest):
        self._json(
            [
                {"id": c.sha, "title": c.title, "message": "", "date": c.date, "authors": []}
                for c in repo.history(self._commit_of(repo, rest[0] if rest else "main"))
            ]
        )

    def _api_branch(self, repo, rest):
        self._require_write(repo.id.split("/")[0])
        name = "/".join(rest)
        if self.command == "DELETE":
            if repo.branches.pop(name, None) is None:
                raise Fail(404, f"Invalid rev id: {name}", "RevisionNotFound")
        elif name in repo.branches:
            raise Fail(409, f"Reference already exists: refs/heads/{name}")
        else:
            start = json.loads(self.body or b"{}").get("startingPoint") or "main"
            repo.branches[name] = self._commit_of(repo, start).sha
        self._json({})

    def _api_tag(self, repo, rest):
        self._require_write(repo.id.split("/")[0])
        if self.command == "DELETE":
            if repo.tags.pop("/".join(rest), None) is None:
                raise Fail(404, f"Invalid rev id: {'/'.join(rest)}", "RevisionNotFound")
        else:
            name = json.loads(self.body)["tag"]
            if name in repo.tags:
                raise Fail(409, f"Tag reference exists already: {name}")
            repo.tags[name] = self._commit_of(repo, "/".join(rest)).sha
        self._json({})

    # --------------------------------------------------------------------------------------------------------- writing

    def _api_preupload(self, repo, rest):
        self._require_write(repo.id.split("/")[0])
        files, answer = self._commit_of(repo, rest[0]).files, []
        for file in json.loads(self.body)["files"]:
            binary = b"\0" in base64.b64decode(file.get("sample") or "")
            large = file["size"] > 10_000_000 or file["path"].endswith(LFS_SUFFIXES) or binary
            answer.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": files[file["path"]].etag if file["path"] in files else None,
                }
            )
        self._json({"files": answer})

    def _lfs_batch(self, repo):
        self._require_write(repo.id.split("/")[0])
        hub, objects = self.server_hub, []
        base = f"{hub.url}/{'' if repo.kind == 'models' else repo.kind + '/'}{repo.id}.git/info/lfs/objects"
        for item in json.loads(self.body)["objects"]:
            row = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in hub.blobs:
                row["actions"] = {
                    "upload": {"href": f"{hub.url}/lfs/{item['oid']}"},
                    "verify": {"href": f"{base}/verify"},
                }
            objects.append(row)
        self._json({"transfer": "basic", "objects": objects})

    def _upload(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Fail(400, "The uploaded bytes do not have the announced SHA-256")
        self.server_hub.blobs[oid] = self.body
        self._json({})

    def _lfs_verify(self):
        item = json.loads(self.body)
        if len(self.server_hub.blobs.get(item["oid"], b"")) != item["size"]:
            raise Fail(404, f"LFS object {item['oid']} was not uploaded")
        self._json({})

    def _api_commit(self, repo, rest):
        self._require_write(repo.id.split("/")[0])
        hub, branch = self.server_hub, "/".join(rest)
        if branch not in repo.branches:
            raise Fail(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        files, title = dict(repo.find(branch).files), ""
        for line in self.body.splitlines():
            order = json.loads(line)
            key, value = order["key"], order["value"]
            if key == "header":
                title, expected = value["summary"], value.get("parentCommit")
                if expected and expected != repo.branches[branch]:
                    raise Fail(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                content = value["content"]
                content = base64.b64decode(content) if value.get("encoding") == "base64" else content.encode()
                files[value["path"]] = File(hub.add_blob(content), len(content))
            elif key == "lfsFile":
                content = hub.blobs.get(value["oid"])
                if content is None:
                    raise Fail(400, f"LFS object {value['oid']} of {value['path']} was not uploaded")
                oid = hub.add_blob(_pointer(value["oid"], len(content)))
                files[value["path"]] = File(oid, len(content), value["oid"])
            elif key in ("deletedFile", "deletedFolder", "deletedEntry"):
                path = value["path"].rstrip("/")
                gone = [p for p in files if p == path or p.startswith(f"{path}/")]
                if not gone:
                    raise Fail(400, f"{path} is to be deleted but does not exist")
                for p in gone:
                    del files[p]
            else:
                raise Fail(400, f"Unknown operation {key!r}")
        commit = repo.commit(branch, files, title)
        url = f"{hub.url}/{'' if repo.kind == 'models' else repo.kind + '/'}{repo.id}/commit/{commit.sha}"
        self._json({"success": True, "commitOid": commit.sha, "commitUrl": url, "pullRequestUrl": None})


def _pointer(sha256, size):
    """What git itself stores of an LFS file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
