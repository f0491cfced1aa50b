"""`/api/{models,datasets,spaces}/{owner}/{name}/...`: what can be asked of one repository and done to it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs

from .store import File, HubError, Repo, Store, entry

API = r"/api/(models|datasets|spaces)/([^/]+/[^/]+)(/.*)?"
WRITING = ("commit", "preupload", "branch", "tag", "settings", "user-access-request")


def repository(
    store: Store, request: Any, kind: str, repo_id: str, parts: list[str], is_large: Callable[[str, int], bool]
) -> Any:
    """The answer to one request: its JSON, or (JSON, status)."""
    operation = parts[0]
    proposes = bool(request.query.get("create_pr")) or operation == "discussions"  # anybody may propose
    writes = operation in WRITING and request.method != "GET" and not proposes
    repo = store.repo(kind, repo_id, request.user, write=writes, role=request.role)
    if proposes and request.user is None:
        raise HubError(401, None, "Invalid username or password.")
    revision = parts[1] if len(parts) > 1 else "main"
    if operation in ("", "revision"):
        return store.info(kind, repo_id, repo, revision, "blobs" in request.query)
    if operation == "auth-check":
        return {}
    if operation == "settings":
        return _settings(store, repo, request.json())
    if operation == "user-access-request":  # /user-access-request/grant
        repo["granted"].append(request.json()["user"])
        store.save()
        return {}
    if operation == "refs":
        return _refs(repo)
    if operation in ("branch", "tag"):
        return _reference(store, repo, operation, request, revision)
    if operation == "commits":
        return _commits(store, repo, revision)
    if operation == "tree":
        return _tree(store, repo, revision, "/".join(parts[2:]), request)
    if operation == "paths-info":
        files = store.commit(repo, revision)[1]["files"]
        paths = request.json()["paths"] if request.body[:1] == b"{" else parse_qs(request.body.decode()).get("paths", [])
        return [entry(path, files[path]) for path in paths if path in files]
    if operation == "preupload":
        return _preupload(store, repo, revision, request, is_large)
    if operation == "discussions" and request.method == "POST":
        ref = store.open_pull_request(repo, repo["refs"]["main"])
        store.save()
        number = int(ref.rpartition("/")[2])
        return {"num": number, "url": f"{request.base}/{repo_id}/discussions/{number}", "pullRequest": True}
    if operation == "commit":
        return _commit(store, repo, repo_id, revision, request)
    raise HubError(404, None, f"no route {request.method} {operation}")


def _settings(store: Store, repo: Repo, asked: dict[str, Any]) -> dict[str, Any]:
    if "visibility" in asked or "private" in asked:
        repo["private"] = asked.get("visibility") == "private" or bool(asked.get("private"))
    if "gated" in asked:
        repo["gated"] = asked["gated"]
    store.save()
    return {"private": repo["private"], "gated": repo["gated"]}


def _refs(repo: Repo) -> dict[str, Any]:
    def named(kind: str, refs: dict[str, str]) -> list[dict[str, str]]:
        return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in refs.items()]

    branches = {name: sha for name, sha in repo["refs"].items() if not name.startswith("refs/pr/")}
    proposals = [{"name": n, "ref": n, "targetCommit": sha} for n, sha in repo["refs"].items() if n.startswith("refs/pr/")]
    return {
        "branches": named("heads", branches),
        "tags": named("tags", repo["tags"]),
        "converts": [],
        "pullRequests": proposals,
    }


def _reference(store: Store, repo: Repo, kind: str, request: Any, name: str) -> Any:
    """Branches are named in the path; tags in the body, where the path names what they point to."""
    refs = repo["refs" if kind == "branch" else "tags"]
    asked = request.json()
    if request.method == "DELETE":
        if refs.pop(name, None) is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {name}")
        store.save()
        return {}
    new, start = (name, asked.get("startingPoint")) if kind == "branch" else (asked["tag"], name)
    if new in refs:
        raise HubError(409, None, "Reference already exists")
    refs[new] = store.commit(repo, start)[0]
    store.save()
    return {}, 201


def _commits(store: Store, repo: Repo, revision: str) -> list[dict[str, Any]]:
    found, sha = [], store.commit(repo, revision)[0]
    while sha:
        commit = repo["commits"][sha]
        author = [{"user": commit["user"]}]
        found.append({"id": sha, "title": commit["message"], "message": "", "authors": author, "date": commit["date"]})
        sha = commit["parent"]
    return found


def _tree(store: Store, repo: Repo, revision: str, path: str, request: Any) -> list[dict[str, Any]]:
    files = store.commit(repo, revision)[1]["files"]
    prefix = f"{path}/" if path else ""
    inside = {name: file for name, file in files.items() if name.startswith(prefix)}
    if prefix and not inside:
        raise HubError(404, "EntryNotFound", f"{path} does not exist on {revision}")
    deep = request.query.get("recursive", [""])[0].lower() in ("true", "1")
    found, seen = [], set()
    for name, file in sorted(inside.items()):
        tail = name[len(prefix) :].split("/")
        for i in range(1, len(tail) if deep else min(2, len(tail))):
            folder = prefix + "/".join(tail[:i])
            if folder not in seen:
                seen.add(folder)
                oid = hashlib.sha1(folder.encode()).hexdigest()
                found.append({"type": "directory", "path": folder, "oid": oid, "size": 0})
        if deep or len(tail) == 1:
            found.append(entry(name, file))
    return found


def _preupload(store: Store, repo: Repo, revision: str, request: Any, is_large: Callable[[str, int], bool]) -> dict[str, Any]:
    files = store.commit(repo, revision)[1]["files"]
    answers = []
    for asked in request.json()["files"]:
        large = is_large(asked["path"], asked["size"])
        answer = {"path": asked["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        known = files.get(asked["path"])
        if known is not None:
            answer["oid"] = known["sha256"] if known["lfs"] else known["oid"]
        answers.append(answer)
    return {"files": answers}


def _commit(store: Store, repo: Repo, repo_id: str, revision: str, request: Any) -> dict[str, Any]:
    """All of it or nothing: files are put together first, and one reference moves."""
    parent, commit = store.commit(repo, revision)
    proposes = bool(request.query.get("create_pr"))
    if not proposes and revision not in repo["refs"]:
        raise HubError(400, None, f"cannot commit to {revision}: not a branch")
    files: dict[str, File] = dict(commit["files"])
    message = ""
    for line in request.body.splitlines():
        operation = json.loads(line)
        key, value = operation["key"], operation["value"]
        if key == "header":
            message = value["summary"]
            if value.get("parentCommit") not in (None, parent):
                raise HubError(412, None, "A commit has happened since. Please refresh and try again.")
        elif key == "file":
            files[value["path"]] = store.regular(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            files[value["path"]] = store.large(repo, value["oid"])
        elif key == "deletedFile":
            if files.pop(value["path"], None) is None:
                raise HubError(404, "EntryNotFound", "A file with this name doesn't exist")
        elif key == "deletedFolder":
            folder = value["path"].rstrip("/") + "/"
            files = {path: file for path, file in files.items() if not path.startswith(folder)}
        else:
            raise HubError(400, None, f"unknown operation {key}")
    branch = store.open_pull_request(repo, parent) if proposes else revision
    sha = store.add(repo, branch, files, message, request.user, parent)
    answer = {"success": True, "commitOid": sha, "commitUrl": f"{request.base}/{repo_id}/commit/{sha}", "hookOutput": ""}
    if proposes:
        answer["pullRequestUrl"] = f"{request.base}/{repo_id}/discussions/{branch.rpartition('/')[2]}"
    return answer
