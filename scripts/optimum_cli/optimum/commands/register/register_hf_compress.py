"""`optimum-cli compress ...` is `hf-compress ...`.

optimum-cli looks for files in the namespace `optimum.commands.register`, whoever ships them. It opens them whenever it starts,
so nothing is imported here before the command runs.
"""

import sys
from argparse import REMAINDER, ArgumentParser
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

PROG = "optimum-cli compress"


def run(arguments: list[str]) -> int:
    from hf_compress.cli import main

    return main(arguments, PROG)


class CompressCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="compress", help="Prune, distil, quantize and publish any model of transformers (hf_compress).")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument("arguments", nargs=REMAINDER, metavar="...", help="as for hf-compress")

        def print_help(file: Any = None) -> None:
            run(["--help"])

        parser.print_help = print_help  # that of hf-compress, whose commands it has

    def run(self) -> None:
        sys.exit(run(self.args.arguments))


REGISTER_COMMANDS = [CompressCommand]
