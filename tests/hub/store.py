"""What a Hub holds: repositories with branches, tags, pull requests and commits; files by their content."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import yaml

Repo = dict[str, Any]
File = dict[str, Any]  # oid (git's sha1), size, sha256, lfs


class HubError(Exception):
    """An answer that is an error: status, the Hub's `X-Error-Code` (if it has one), message, further headers."""

    def __init__(self, status: int, code: str | None, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers or {}


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Store:
    """Repositories of one Hub, in `state.json` and `blobs/` of a folder. One lock; every change is on disk before it counts."""

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        self.lock = threading.RLock()
        (self.folder / "blobs").mkdir(parents=True, exist_ok=True)
        (self.folder / "parts").mkdir(exist_ok=True)
        path = self.folder / "state.json"
        self.repos: dict[str, Repo] = json.loads(path.read_text()) if path.is_file() else {}

    def save(self) -> None:
        stage = self.folder / "state.json.part"
        stage.write_text(json.dumps(self.repos))
        os.replace(stage, self.folder / "state.json")

    # --- content -------------------------------------------------------------------------------------------------

    def blob(self, sha256: str) -> Path:
        return self.folder / "blobs" / sha256

    def put(self, data: bytes) -> str:
        sha = hashlib.sha256(data).hexdigest()
        stage = self.folder / "blobs" / f".{sha}.{threading.get_ident()}"
        stage.write_bytes(data)
        os.replace(stage, self.blob(sha))
        return sha

    def regular(self, data: bytes) -> File:
        return {"oid": git_oid(data), "size": len(data), "sha256": self.put(data), "lfs": False}

    def large(self, repo: Repo, sha256: str) -> File:
        if sha256 not in repo["objects"]:
            raise HubError(400, None, f"LFS object {sha256} was never uploaded")
        size = self.blob(sha256).stat().st_size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return {"oid": git_oid(pointer), "size": size, "sha256": sha256, "lfs": True}

    def read(self, repo_id: str, path: str, revision: str = "main", kind: str = "models") -> bytes:
        """A file's content, for tests."""
        files = self.commit(self.repos[f"{kind}/{repo_id}"], revision)[1]["files"]
        return self.blob(files[path]["sha256"]).read_bytes()

    def paths(self, repo_id: str, revision: str = "main", kind: str = "models") -> list[str]:
        """The names of a repository's files, for tests."""
        return sorted(self.commit(self.repos[f"{kind}/{repo_id}"], revision)[1]["files"])

    def history(self, repo_id: str, revision: str = "main", kind: str = "models") -> list[str]:
        """The messages of its commits, newest first, for tests."""
        repo = self.repos[f"{kind}/{repo_id}"]
        sha, messages = self.commit(repo, revision)[0], []
        while sha:
            messages.append(repo["commits"][sha]["message"])
            sha = repo["commits"][sha]["parent"]
        return messages

    # --- repositories --------------------------------------------------------------------------------------------

    def create(self, kind: str, repo_id: str, private: bool, user: str) -> Repo:
        repo: Repo = {
            "private": private,
            "gated": False,
            "granted": [],
            "objects": [],  # what was uploaded through LFS
            "refs": {},
            "tags": {},
            "commits": {},
            "created": _now(),
            "discussions": 0,
        }
        self.repos[f"{kind}/{repo_id}"] = repo
        attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        self.add(repo, "main", {".gitattributes": self.regular(attributes)}, "initial commit", user, None)
        return repo

    def repo(self, kind: str, repo_id: str, user: str | None, *, write: bool = False, role: str = "write") -> Repo:
        """The repository, if this user may see it (or write to it)."""
        repo = self.repos.get(f"{kind}/{repo_id}")
        owner = user == repo_id.split("/")[0]
        if repo is None or (repo["private"] and not owner):
            if user is None:
                raise HubError(401, "RepoNotFound", "Invalid username or password.")
            raise HubError(404, "RepoNotFound", "Repository not found")
        if write and user is None:
            raise HubError(401, None, "Invalid username or password.")
        if write and (not owner or role != "write"):
            raise HubError(403, None, f"You don't have the rights to write to {repo_id}")
        return repo

    def commit(self, repo: Repo, revision: str | None) -> tuple[str, dict[str, Any]]:
        revision = revision or "main"
        sha = repo["refs"].get(revision.removeprefix("refs/heads/")) or repo["tags"].get(revision.removeprefix("refs/tags/"))
        if sha is None and re.fullmatch(r"[0-9a-f]{7,40}", revision):
            sha = next((known for known in repo["commits"] if known.startswith(revision)), None)
        if sha is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repo["commits"][sha]

    def add(self, repo: Repo, branch: str, files: dict[str, File], message: str, user: str, parent: str | None) -> str:
        commit = {"files": files, "message": message, "user": user, "date": _now(), "parent": parent}
        sha = hashlib.sha1(json.dumps([commit, time.time_ns()]).encode()).hexdigest()
        repo["commits"][sha] = commit
        repo["refs"][branch] = sha
        repo["modified"] = commit["date"]
        self.save()
        return sha

    def open_pull_request(self, repo: Repo, start: str) -> str:
        repo["discussions"] += 1
        ref = f"refs/pr/{repo['discussions']}"
        repo["refs"][ref] = start
        return ref

    # --- what the Hub tells about a repository ---------------------------------------------------------------------

    def info(self, kind: str, repo_id: str, repo: Repo, revision: str = "main", blobs: bool = False) -> dict[str, Any]:
        sha, commit = self.commit(repo, revision)
        files = commit["files"]
        card = self.card(files)
        config = json.loads(self.blob(files["config.json"]["sha256"]).read_bytes()) if "config.json" in files else {}
        return {
            "_id": "0",
            "id": repo_id,
            "modelId": repo_id,
            "author": repo_id.split("/")[0],
            "sha": sha,
            "lastModified": repo["modified"],
            "createdAt": repo["created"],
            "private": repo["private"],
            "gated": repo["gated"],
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": _tags(card),
            "pipeline_tag": card.get("pipeline_tag"),
            "library_name": card.get("library_name"),
            "cardData": card,
            "config": {key: config[key] for key in ("architectures", "model_type") if key in config},
            "siblings": [_sibling(path, file, blobs) for path, file in sorted(files.items())],
            "usedStorage": 0,
        }

    def card(self, files: dict[str, File]) -> dict[str, Any]:
        """The metadata of README.md; nothing where it is no YAML."""
        if "README.md" not in files:
            return {}
        try:
            found = front_matter(self.blob(files["README.md"]["sha256"]).read_text())
        except yaml.YAMLError:
            return {}
        return found if isinstance(found, dict) else {}


def front_matter(text: str) -> Any:
    found = re.match(r"\s*---\r?\n(.*?)\r?\n---", text, re.S)
    return yaml.safe_load(found[1]) if found else None


def card_errors(text: str) -> list[str]:
    """What the Hub refuses in a card's metadata (a few of its rules)."""
    try:
        card = front_matter(text)
    except yaml.YAMLError as error:
        return [f"not valid YAML: {error}"]
    if card is None:
        return []
    if not isinstance(card, dict):
        return ["metadata must be a mapping"]
    errors = []
    for key in ("license", "library_name", "pipeline_tag", "base_model_relation"):
        if key in card and not isinstance(card[key], str):
            errors.append(f'"{key}" must be a string')
    for key in ("tags", "datasets", "metrics", "base_model"):
        values = card.get(key, [])
        if not isinstance(values, str) and not (isinstance(values, list) and all(isinstance(v, str) for v in values)):
            errors.append(f'"{key}" must be an array of strings')
    if card.get("base_model_relation", "finetune") not in ("adapter", "merge", "quantized", "finetune"):
        errors.append('"base_model_relation" must be one of adapter, merge, quantized, finetune')
    for model in card.get("model-index", []):
        if not isinstance(model, dict) or not isinstance(model.get("name"), str) or not isinstance(model.get("results"), list):
            errors.append('"model-index[0]" must have a name and results')
        else:
            for result in model["results"]:
                if not {"task", "dataset", "metrics"} <= set(result):
                    errors.append('"model-index[0].results" must have task, dataset and metrics')
    return errors


def _tags(card: dict[str, Any]) -> list[str]:
    bases = card.get("base_model") or []
    bases = [bases] if isinstance(bases, str) else bases
    relation = card.get("base_model_relation", "finetune")
    tags = [*(card.get("tags") or [])]
    tags += [card["library_name"]] if "library_name" in card else []
    tags += [f"license:{card['license']}"] if "license" in card else []
    tags += [tag for base in bases for tag in (f"base_model:{base}", f"base_model:{relation}:{base}")]
    return list(dict.fromkeys(tags))


def _sibling(path: str, file: File, blobs: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"rfilename": path}
    if blobs:
        found.update(size=file["size"], blobId=file["oid"])
        if file["lfs"]:
            found["lfs"] = {"sha256": file["sha256"], "size": file["size"], "pointerSize": 134}
    return found


def entry(path: str, file: File) -> dict[str, Any]:
    found = {"type": "file", "path": path, "oid": file["oid"], "size": file["size"]}
    if file["lfs"]:
        found["lfs"] = {"oid": file["sha256"], "size": file["size"], "pointerSize": 134}
    return found


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
