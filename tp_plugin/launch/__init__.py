"""What runs when a ``tp_size`` key is found: autoload, the launchers' command lines, checks before the launch."""
