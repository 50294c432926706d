"""One precedence for every way in: which of the places that hold the plugin's keys counts."""

from __future__ import annotations

from tp_plugin.config import environment as environment_reader
from tp_plugin.config.keys import TP_SIZE
from tp_plugin.config.run_config import RunConfig
from tp_plugin.config.written import Written
from tp_plugin.errors import TPError


def resolve(
    *,
    command_line: Written | None = None,
    accelerate_yaml: Written | None = None,
    environment: Written | None = None,
    deepspeed: Written | None = None,
) -> RunConfig:
    """The config of this run. For each of ``tp_size`` and ``tp_plugin`` the first place that holds it counts:

    1. the command line of ``accelerate launch``,
    2. Accelerate's config file,
    3. the environment, by which the launcher also hands its result to the workers,
    4. the DeepSpeed config, which the workers meet again: a ``tp_size`` in it must agree with the one that counts.

    Args: what the readers of this package found in each place; None for a place that does not exist in this process.

    Raises:
        TPError: naming the key, what was found and where, and what to write.
    """
    places = [place for place in (command_line, accelerate_yaml, environment, deepspeed) if place is not None]
    size = next((place for place in places if place.tp_size is not None), Written("", 1))
    options = next((place for place in places if place.options is not None), Written(""))
    tp_size = RunConfig.parse(size.tp_size, origin=size.origin).tp_size
    if deepspeed is not None and deepspeed.tp_size is not None:
        found = RunConfig.parse(deepspeed.tp_size, origin=deepspeed.origin).tp_size
        if found != tp_size:
            raise TPError(
                f"{TP_SIZE} is {tp_size} in {size.origin}, but {found} in {deepspeed.origin}; write it in one place"
            )
    return RunConfig.parse(tp_size, options.options, options.origin)


def current_config() -> RunConfig:
    """The config of this worker, as the launcher or the user put it into the environment; tp_size 1 if they did not.

    Raises:
        TPError: a variable holds something that is not a value of its key.
    """
    return resolve(environment=environment_reader.read())
