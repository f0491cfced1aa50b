"""`hf-compress demo`: train a small ViT on real digits, prune, distil and quantize it, measure it, write its card; offline."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
from pathlib import Path
from typing import Any

from .arguments import Failed, Wrong, add_common, filled
from .run import AGAIN, check_output, run_checked

DESCRIPTION = "Train a small ViT on real digits, prune, distil and quantize it, measure it, write its card; offline."
EXAMPLES = """\
examples:
  hf-compress demo
  hf-compress demo --output /tmp/demo

It is `hf-compress run` on FOLDER/recipe.yaml, which you can edit and run again. Needs pip install 'hf_compress[demo]'.
"""
RECIPE = """\
# A small ViT on 1,797 handwritten digits of 8x8 pixels (UCI, Alpaydin & Kaynak 1998).
model: MODEL
task: image-classification
data:
  path: DIGITS
  image: image
  label: label
metric: accuracy
seed: 0
steps:
  - finetune: {epochs: 12, learning_rate: 1.0e-3, batch_size: 32}
  - prune: {heads: 0.5, neurons: 0.5, epochs: 6, learning_rate: 1.0e-3, batch_size: 32, teacher: previous}
  - quantize: {bits: 8}
  - measure: {batch_sizes: [1, 32]}
output: OUTPUT
"""
NEEDED = ("datasets", "sklearn", "PIL")


def add(commands: Any) -> None:
    parser = commands.add_parser("demo", help="all of it on a small model, offline", description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("--output", metavar="FOLDER", type=filled, default="runs/cli-demo", help="default: runs/cli-demo")
    add_common(parser)
    parser.set_defaults(run=run, path=("demo",), live=True)


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The text and the data of `demo`."""
    check_output(args.output)
    _check_made_here(args.output)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise Failed(f"{', '.join(missing)} not installed: pip install 'hf_compress[demo]'. Nothing was done.")
    try:
        recipe = write(Path(args.output).expanduser())
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(AGAIN) from error
    text, data = run_checked(recipe, None)
    made = recipe.parent / "model"
    return (
        f"{text}\n\nThe model, its card and its report are in {made}. Next: hf-compress inspect {shlex.quote(str(made))}",
        data,
    )


def _check_made_here(output: str) -> None:
    """Refuse a folder that holds other things: the demo's would end up among them."""
    folder = Path(output).expanduser()
    recipe = folder / "recipe.yaml"
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not recipe.is_file() or not recipe.read_bytes().startswith(RECIPE.encode().partition(b"\n")[0]):
        raise Wrong(
            f"argument --output: the folder {output!r} holds other things, and no demo (whose recipe.yaml begins with "
            "'# A small ViT'); name a new or empty one."
        )


def write(folder: Path, recipe: str = RECIPE) -> Path:
    """A model with random weights, a data set of pictures, and a recipe for both; what is there already stays.

    Args:
        folder (`Path`): where to.
        recipe (`str`): its text.

    Returns:
        `Path`: of `recipe.yaml`.
    """
    import torch
    from PIL import Image
    from sklearn import datasets
    from sklearn.model_selection import train_test_split
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    from ..recipe.template import quoted

    path = folder / "recipe.yaml"
    if not path.exists():  # first, since it tells that all of this is a demo
        folder.mkdir(parents=True, exist_ok=True)
        # a recipe's paths are looked for in the working directory first, where others may have such names
        here = folder.resolve() if any(Path(name).exists() for name in ("vit", "digits")) else Path()
        for word, place in (("MODEL", here / "vit"), ("DIGITS", here / "digits"), ("OUTPUT", folder / "model")):
            recipe = recipe.replace(f" {word}\n", f" {quoted(str(place))}\n")
        path.write_text(recipe, encoding="utf-8")
    if not (folder / "vit" / "model.safetensors").is_file():
        torch.manual_seed(0)
        sizes: Any = dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=8, intermediate_size=512)
        config = ViTConfig(image_size=8, patch_size=2, **sizes)
        ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder / "vit")
        ViTForImageClassification(config).save_pretrained(folder / "vit")
    if sum(1 for _ in folder.glob("digits/*/*/*.png")) < 1797:
        data: Any = datasets.load_digits()
        indices = range(len(data.target))
        train, test = train_test_split(indices, test_size=0.25, random_state=0, stratify=data.target)
        for split, rows in (("train", train), ("test", test)):
            for i in rows:
                place = folder / "digits" / split / str(data.target[i])
                place.mkdir(parents=True, exist_ok=True)
                pixels = (data.images[i] * 15.9375).astype("uint8")  # 0 to 16 there
                Image.fromarray(pixels).convert("RGB").save(place / f"{i:04d}.png")
    return path
