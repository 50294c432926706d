"""What the user wrote: one reader per place it can stand in, one precedence (`resolve.py`), one `RunConfig`."""
