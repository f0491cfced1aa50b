"""The HTTP side of the Hub: routes, transfers, and a fault injector."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from .process import environment
from .repositories import API, repository
from .store import HubError, Store, card_errors

LARGE = re.compile(r"\.(safetensors|bin|pt|pth|onnx|h5|msgpack|arrow|parquet|zip|npz|model)$")


@dataclass
class Answer:
    """What a route gives back. A file's bytes come from `path`, from `start` to before `end`."""

    body: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    path: Any = None
    start: int = 0
    end: int = 0


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, list[str]]
    body: bytes
    user: str | None
    role: str  # "write" or "read"
    base: str
    range: str | None

    def json(self) -> Any:
        return json.loads(self.body or b"{}")


class LocalHub:
    """A running Hub.

    Args:
        folder: where everything is kept.
        port (`int`, defaults to 0): 0 for any free one.
        large (`bool`, defaults to `True`): files with the names of weights go through LFS, as on the Hub; else all are
            regular, as for a client that has hf_xet on.
        part_size (`int`, *optional*): LFS files above this many bytes are uploaded in parts.
    """

    def __init__(self, folder: str | os.PathLike, port: int = 0, *, large: bool = True, part_size: int | None = None) -> None:
        self.store, self.large, self.part_size = Store(folder), large, part_size
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.connections: list[socket.socket] = []
        self._fault: dict[str, Any] | None = None
        self._server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def __enter__(self) -> LocalHub:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """As if it were killed: connections break. `LocalHub(folder, port)` comes back with what was there."""
        self._server.shutdown()
        self._server.server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):  # closed by the client
                connection.shutdown(socket.SHUT_RDWR)

    def environment(self, home: str | os.PathLike, user: str | None = None) -> dict[str, str]:
        """For a process of this user (or of nobody), whose cache is `home`."""
        return environment(self.endpoint, home, None if user is None else f"hf_{user}")

    # --- faults ------------------------------------------------------------------------------------------------------

    def cut(self, at: int, how: str = "before", only: str = "", down: bool = False) -> None:
        """Close the connection at the request number `at` from now (the first is 0).

        `how`: `"before"` the server acted, `"after"` it (so that only the answer is lost), or `"midway"` through the bytes
        of a file. `only`: count requests whose path contains this. `down`: every later request is cut too, until `heal`.
        """
        self._fault = {"left": at, "how": how, "only": only, "down": down}

    def heal(self) -> bool:
        """No more faults; whether there was one."""
        fault, self._fault = self._fault, None
        return fault is not None and fault["left"] < 0

    def fault(self, path: str) -> str | None:
        """What happens to the request that has come in: called once for each, under the lock."""
        fault = self._fault
        if fault is None or fault["only"] not in path:
            return None
        fault["left"] -= 1
        if fault["left"] == -1:
            return fault["how"]
        return "before" if fault["left"] < -1 and fault["down"] else None

    def is_large(self, path: str, size: int) -> bool:
        return self.large and bool(LARGE.search(path) or size > 10 << 20)


def serve(folder: str | os.PathLike, port: int = 0, **options: Any) -> LocalHub:
    """Start a Hub whose state is in `folder`; see `LocalHub`."""
    return LocalHub(folder, port, **options)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LocalHub

    def setup(self) -> None:
        super().setup()
        self.hub.connections.append(self.connection)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_one(self) -> None:
        body = self._body()
        hub, url = self.hub, urlsplit(self.path)
        with hub.store.lock:
            hub.requests.append((self.command, self.path, self.headers.get("Range")))
            fault = hub.fault(self.path)
            if fault != "before":
                answer = self._answer(url, body)
        if fault in ("before", "after"):
            self.close_connection = True
            return
        try:
            self._send(answer, midway=fault == "midway")
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_one  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, url: Any, body: bytes) -> Answer:
        try:
            user, role = self._user()
            base = f"http://{self.headers['Host']}"
            request = Request(self.command, url.path, parse_qs(url.query), body, user, role, base, self.headers.get("Range"))
            return route(self.hub, request)
        except HubError as error:
            headers = {"X-Error-Message": error.message, **error.headers}
            if error.code:
                headers["X-Error-Code"] = error.code
            return Answer({"error": error.message}, error.status, headers)

    def _user(self) -> tuple[str | None, str]:
        given = self.headers.get("Authorization", "")
        if not given:
            return None, "read"
        found = re.fullmatch(r"Bearer hf_([\w-]+?)(\.read)?", given)
        if found is None:
            raise HubError(401, None, "Invalid credentials in Authorization header")
        return found[1], "read" if found[2] else "write"

    def _send(self, answer: Answer, midway: bool) -> None:
        body = answer.body
        if isinstance(body, dict | list):
            body = json.dumps(body).encode()
            answer.headers.setdefault("Content-Type", "application/json")
        length = answer.end - answer.start if answer.path is not None else len(body)
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command == "HEAD":
            return
        if answer.path is None:
            self.wfile.write(body)
            return
        with open(answer.path, "rb") as file:
            file.seek(answer.start)
            left = length // 2 if midway else length
            while left:
                piece = file.read(min(left, 1 << 20))
                self.wfile.write(piece)
                left -= len(piece)
        if midway:
            self.wfile.flush()
            self.close_connection = True


# --- routes ----------------------------------------------------------------------------------------------------------


def route(hub: LocalHub, request: Request) -> Answer:
    for pattern, function in ROUTES:
        found = re.fullmatch(pattern, request.path)
        if found is not None:
            return function(hub, request, *(part and unquote(part) for part in found.groups()))
    raise HubError(404, None, f"no route {request.method} {request.path}")


def who_am_i(hub: LocalHub, request: Request) -> Answer:
    user = _known(request)
    token = {"type": "access_token", "accessToken": {"role": request.role, "displayName": "t"}}
    return Answer({"type": "user", "name": user, "fullname": user, "orgs": [], "auth": token})


def validate_card(hub: LocalHub, request: Request) -> Answer:
    errors = [{"message": message} for message in card_errors(request.json()["content"])]
    return Answer({"errors": errors, "warnings": []}, 400 if errors else 200)


def create(hub: LocalHub, request: Request) -> Answer:
    asked, user = request.json(), _known(request)
    kind = f"{asked.get('type') or 'model'}s"
    repo_id = f"{asked.get('organization') or user}/{asked['name']}"
    if repo_id.split("/")[0] != user or request.role != "write":
        raise HubError(
            403, None, f"You don't have the rights to create a {kind[:-1]} under the namespace {repo_id.split('/')[0]}"
        )
    answer = {"url": f"{request.base}/{'' if kind == 'models' else kind + '/'}{repo_id}", "name": repo_id, "id": "0"}
    if f"{kind}/{repo_id}" in hub.store.repos:
        message = f"You already created this {kind[:-1]} repo"
        return Answer({**answer, "error": message}, 409, {"X-Error-Message": message})
    hub.store.create(kind, repo_id, asked.get("visibility") == "private" or bool(asked.get("private")), user)
    return Answer(answer)


def delete(hub: LocalHub, request: Request) -> Answer:
    asked, user = request.json(), _known(request)
    kind = f"{asked.get('type') or 'model'}s"
    repo_id = f"{asked.get('organization') or user}/{asked['name']}"
    hub.store.repo(kind, repo_id, user, write=True, role=request.role)
    del hub.store.repos[f"{kind}/{repo_id}"]
    hub.store.save()
    return Answer({})


def listing(hub: LocalHub, request: Request, kind: str) -> Answer:
    found = []
    for key, repo in hub.store.repos.items():
        of, repo_id = key.split("/", 1)
        if of == kind and (not repo["private"] or request.user == repo_id.split("/")[0]):
            found.append(hub.store.info(kind, repo_id, repo))
    author, wanted = request.query.get("author", [None])[0], request.query.get("filter", [])
    search = request.query.get("search", [""])[0].lower()
    return Answer(
        [
            info
            for info in found
            if author in (None, info["author"]) and set(wanted) <= set(info["tags"]) and search in info["id"].lower()
        ]
    )


def api(hub: LocalHub, request: Request, kind: str, repo_id: str, rest: str | None) -> Answer:
    parts = [unquote(part) for part in (rest or "").strip("/").split("/")]
    found = repository(hub.store, request, kind, repo_id, parts, hub.is_large)
    return Answer(*found) if isinstance(found, tuple) else Answer(found)


def large_files(hub: LocalHub, request: Request, kind: str | None, repo_id: str) -> Answer:
    """git-lfs's batch endpoint: where to put each object; nothing for one that this repository has."""
    repo = hub.store.repo(kind or "models", repo_id, _known(request))  # anyone who may open a pull request
    objects = []
    for wanted in request.json()["objects"]:
        found = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in repo["objects"]:
            put = f"{request.base}/_lfs/{kind or 'models'}/{repo_id}/{wanted['oid']}"
            upload: dict[str, Any] = {"href": put, "header": {}}
            if hub.part_size is not None and wanted["size"] > hub.part_size:
                count = -(-wanted["size"] // hub.part_size)
                upload["header"] = {"chunk_size": str(hub.part_size), **{str(i + 1): f"{put}/{i + 1}" for i in range(count)}}
            found["actions"] = {"upload": upload, "verify": {"href": f"{request.base}/_lfs_verify", "header": {}}}
        objects.append(found)
    return Answer({"transfer": "basic", "objects": objects}, 200, {"Content-Type": "application/vnd.git-lfs+json"})


def put_large(hub: LocalHub, request: Request, key: str, oid: str, part: str | None) -> Answer:
    folder = hub.store.folder / "parts" / oid
    if part is not None:
        folder.mkdir(exist_ok=True)
        (folder / part).write_bytes(request.body)
        return Answer(headers={"ETag": f'"{part}"'})
    data = request.body
    if request.method == "POST":  # all parts are here
        data = b"".join((folder / str(p["partNumber"])).read_bytes() for p in request.json()["parts"])
    if hub.store.put(data) != oid:
        raise HubError(400, None, "the content does not have this sha256")
    hub.store.repos[key]["objects"].append(oid)
    hub.store.save()
    return Answer({}, headers={"ETag": '"whole"'})


def verify_large(hub: LocalHub, request: Request) -> Answer:
    asked = request.json()
    path = hub.store.blob(asked["oid"])
    if not path.is_file() or path.stat().st_size != asked["size"]:
        raise HubError(404, None, "no such object")
    return Answer({})


def resolve(hub: LocalHub, request: Request, kind: str | None, repo_id: str, revision: str, path: str) -> Answer:
    repo = hub.store.repo(kind or "models", repo_id, request.user)
    if repo["gated"] and request.user not in (*repo["granted"], repo_id.split("/")[0]):
        message = f"Access to model {repo_id} is restricted. You must have access to it and be authenticated to access it."
        raise HubError(401 if request.user is None else 403, "GatedRepo", message)
    sha, commit = hub.store.commit(repo, revision)
    headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
    file = commit["files"].get(path)
    if file is None:
        raise HubError(404, "EntryNotFound", "Entry not found", headers)
    etag = file["sha256"] if file["lfs"] else file["oid"]
    headers.update({"ETag": f'"{etag}"', "Content-Type": "application/octet-stream"})
    if file["lfs"]:
        headers.update({"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(file["size"])})
    start, end, status = 0, file["size"], 200
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.range or "")
    if asked is not None and request.method == "GET":
        start = int(asked[1]) if asked[1] else max(0, end - int(asked[2]))
        end = min(int(asked[2]) + 1, end) if asked[1] and asked[2] else end
        if start >= end:
            return Answer(b"", 416, {**headers, "Content-Range": f"bytes */{file['size']}"})
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{file['size']}"
        status = 206
    return Answer(b"", status, headers, hub.store.blob(file["sha256"]), start, end)


def _known(request: Request) -> str:
    if request.user is None:
        raise HubError(401, None, "Invalid username or password.")
    return request.user


REPO = r"(?:(datasets|spaces)/)?([^/]+/[^/]+)"
ROUTES: list[tuple[str, Callable[..., Answer]]] = [
    (r"/api/whoami-v2", who_am_i),
    (r"/api/validate-yaml", validate_card),
    (r"/api/repos/create", create),
    (r"/api/repos/delete", delete),
    (r"/api/(models|datasets|spaces)", listing),
    (API, api),
    (rf"/{REPO}\.git/info/lfs/objects/batch", large_files),
    (r"/_lfs/(\w+/[^/]+/[^/]+)/([0-9a-f]{64})(?:/(\d+))?", put_large),
    (r"/_lfs_verify", verify_large),
    (rf"/{REPO}/(?:resolve|raw)/([^/]+)/(.+)", resolve),
]
