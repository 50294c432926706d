"""Roles of ranks on torch's DeviceMesh, and collectives that count what they send."""
