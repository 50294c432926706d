"""What the plugin raises. Every message names the key, module or parameter, what was found, and what to write."""


class TPError(ValueError):
    """Bad input or an impossible combination, found before anything was lost."""


class PolicyError(TPError):
    """A policy that does not fit the model, or no policy at all."""


class DivergenceError(RuntimeError):
    """Ranks of one TP group are no longer one process: different batches, different replicas, different calls."""


class LostRankError(DivergenceError):
    """Other ranks of a collective are gone, or did not come in the time that torch grants it."""
