"""What makes the ranks of one model look like one process: transport, sync points, guards, reports."""
