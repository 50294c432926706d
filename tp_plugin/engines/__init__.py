"""Adapters: each makes one library see a TP group as one process. The only rooms that patch are this and ``launch``."""
