"""One precedence for every way in: which of the places that hold the plugin's keys counts."""

from __future__ import annotations

from tp_plugin.config import environment as environment_reader
from tp_plugin.config.keys import PP_SIZE, TP_SIZE
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
    """The config of this run. Of ``tp_size``, ``pp_size`` and ``tp_plugin``, each from the first place that has it:

    1. the command line of ``accelerate launch``,
    2. Accelerate's config file,
    3. the environment, by which the launcher also hands its result to the workers,
    4. the DeepSpeed config, which the workers meet again: a size in it must agree with the one that counts.

    Args: what the readers of this package found in each place; None for a place that does not exist in this process.

    Raises:
        TPError: naming the key, what was found and where, and what to write.
    """
    places = [place for place in (command_line, accelerate_yaml, environment, deepspeed) if place is not None]
    options = next((place for place in places if place.options is not None), Written(""))
    tp_size, pp_size = (_size(key, places, deepspeed) for key in (TP_SIZE, PP_SIZE))
    return RunConfig.parse(tp_size, options.options, options.origin, pp_size)


def _size(key: str, places: list[Written], deepspeed: Written | None) -> int:
    """What the first place says that has ``key``."""

    def read(place: Written) -> int:
        size: int = getattr(RunConfig.parse(**{key: getattr(place, key)}, origin=place.origin), key)
        return size

    place = next((place for place in places if getattr(place, key) is not None), None)
    if place is None:
        return 1
    size = read(place)
    if deepspeed is not None and getattr(deepspeed, key) is not None:
        found = read(deepspeed)
        if found != size:
            raise TPError(
                f"{key} is {size} in {place.origin}, but {found} in {deepspeed.origin}; write it in one place"
            )
    return size


def current_config() -> RunConfig:
    """The config of this worker, as the launcher or the user put it into the environment; tp_size 1 if they did not.

    Raises:
        TPError: a variable holds something that is not a value of its key.
    """
    return resolve(environment=environment_reader.read())
