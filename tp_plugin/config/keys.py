"""The name of every key and environment variable of the plugin. Runs inside ``import torch``: imports nothing."""

TP_SIZE = "tp_size"
"""Key in an Accelerate or DeepSpeed config, and ``--tp_size`` on a command line: ranks per TP group."""

PP_SIZE = "pp_size"
"""Key beside ``tp_size``, and ``--pp_size``: pipeline stages per model."""

TP_PLUGIN = "tp_plugin"
"""Key of the optional mapping beside ``tp_size``, and ``--tp_plugin`` on a command line."""

KEYS = (TP_SIZE, PP_SIZE, TP_PLUGIN)
"""The top-level keys that are ours in a config file."""

ENV_TP_SIZE = "TP_PLUGIN_TP_SIZE"
"""Ranks per TP group; set by the user, or by the launcher for its workers."""

ENV_PP_SIZE = "TP_PLUGIN_PP_SIZE"
"""Pipeline stages per model; set by the user, or by the launcher for its workers."""

ENV_OPTIONS = "TP_PLUGIN_OPTIONS"
"""The ``tp_plugin`` mapping as JSON; set by the user, or by the launcher for its workers."""

ENV_DISABLE = "TP_PLUGIN_DISABLE"
"""Anything but "" and "0" turns the plugin off; the keys stay legal in config files."""

ENV_VERBOSE = "TP_PLUGIN_VERBOSE"
"""Anything but "" and "0": of a failed run, every rank's traceback is printed, not the first one's only."""

ENV_SUMMARISED = "TP_PLUGIN_SUMMARISED"
"""Set by a launcher that prints one summary of a failed run, for its workers: they leave their errors to it."""

ENV_REPORT = "TP_PLUGIN_REPORT"
"""A directory into which every rank writes what it held and sent."""

ENV_READ_TIMEOUT = "TP_PLUGIN_READ_TIMEOUT"
"""Seconds to wait for a weight that another rank holds."""

ENV_ABORT_AFTER = "TP_PLUGIN_ABORT_AFTER"
"""Seconds after which ranks that wait for each other for good are ended."""

ENV_NOTICE_AFTER = "TP_PLUGIN_NOTICE_AFTER"
"""Seconds after which a rank that waits in a collective says so."""
