"""``tp-plugin …``"""

from tp_plugin.cli.main import main

__all__ = ["main"]
