"""`hf-compress push`: publish the folder of a saved model, with its card, in one commit."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import Wrong, add_common, filled, repository
from .models import find

DESCRIPTION = "Publish the folder of a saved model, with its card, in one commit."
EXAMPLES = """\
examples:
  hf-compress push runs/minilm-sst2-small me/minilm-sst2-small
  hf-compress push runs/minilm-sst2-small me/minilm-sst2-small --private --revision int8
  hf-compress push runs/minilm-sst2-small someone/their-model --create-pr

Checkpoints, logs and optimizer states stay behind. Log in first (`hf auth login`), or set HF_TOKEN. A push that failed can be
run again: what arrived is not sent twice.
"""


def add(commands: Any) -> None:
    parser = commands.add_parser("push", help="publish a folder on the Hub", description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("folder", metavar="FOLDER", help="what `run`, a Trainer or save_pretrained wrote")
    parser.add_argument("repo", metavar="REPO", type=repository, help="owner/name, or name for one of yours; made if need be")
    parser.add_argument("--private", action="store_true", help="a new repository is private")
    parser.add_argument("--revision", metavar="BRANCH", type=filled, help="a branch; made if need be")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request")
    parser.add_argument("--message", metavar="TEXT", type=filled, help="of the commit")
    parser.add_argument("--token", metavar="TOKEN", type=filled, help="of the Hub; better: hf auth login, which nobody sees")
    add_common(parser)
    parser.set_defaults(run=run, path=("push",))


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The text and the data of `push`."""
    from ..hub import push_folder

    folder = find(args.folder, "FOLDER")
    if not Path(folder).is_dir():
        raise Wrong(f"FOLDER: there is no folder {args.folder!r}.")
    try:
        info = push_folder(
            folder,
            args.repo,
            private=args.private or None,
            revision=args.revision,
            create_pr=args.create_pr,
            token=args.token,
            commit_message=args.message,
        )
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"{folder} is whole, and {args.repo} is as it was; the same command goes on.") from error
    data = {"repo": args.repo, "commit_url": info.commit_url, "oid": info.oid, "pr_url": info.pr_url}
    return str(info.pr_url or info.commit_url), data
