"""Policies of this project: one file per family, each a table. They reach the registry as entry points."""
