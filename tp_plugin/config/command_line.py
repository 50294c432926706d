"""The command line of ``accelerate launch``: ``--tp_size``, ``--pp_size`` and ``--tp_plugin``.

TRL needs no reader of its own: ``trl`` hands Accelerate's parser what it does not know of its file and its arguments.
"""

from __future__ import annotations

import argparse
import sys

import yaml

from tp_plugin.config.keys import KEYS, PP_SIZE, TP_PLUGIN, TP_SIZE
from tp_plugin.config.misspelt import ALIASES, meant
from tp_plugin.config.written import Written
from tp_plugin.errors import TPError


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--tp_size``, ``--pp_size`` and ``--tp_plugin`` to the parser of ``accelerate launch``."""
    parser.add_argument(f"--{TP_SIZE}", default=None, help="tp_plugin: ranks per tensor-parallel group.")
    parser.add_argument(f"--{PP_SIZE}", default=None, help="tp_plugin: pipeline stages per model.")
    parser.add_argument(f"--{TP_PLUGIN}", default=None, help='tp_plugin: options, such as "{sequence_parallel: true}".')
    for name in (*ALIASES, *(key.replace("_", "") for key in KEYS)):
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        parser.add_argument(*spellings, action=_Misspelt, nargs="?", dest=argparse.SUPPRESS, help=argparse.SUPPRESS)


class _Misspelt(argparse.Action):
    """An option that is there to be refused: argparse by itself would take its value for the script."""

    def __call__(self, parser: object, namespace: object, values: object, option: object = None) -> None:
        sys.exit(f"tp_plugin: unknown option {option}: did you mean --{meant(str(option).lstrip('-'))}?")


def read(args: argparse.Namespace) -> Written:
    """The keys among the parsed arguments of ``accelerate launch``; none if another parser made them.

    Raises:
        TPError: ``--tp_plugin`` is not YAML.
    """
    options = getattr(args, TP_PLUGIN, None)
    if isinstance(options, str):
        try:
            options = yaml.safe_load(options)
        except yaml.YAMLError as error:
            raise TPError(f"--{TP_PLUGIN}: expected a YAML mapping, found {options!r} ({error})") from error
    return Written("the command line", getattr(args, TP_SIZE, None), options, getattr(args, PP_SIZE, None))
