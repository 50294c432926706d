"""Before the launch: what a layout holds, sends and takes, from a model's shapes alone."""
