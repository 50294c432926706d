"""Stands for the process that a server forks: hands it what it inherited, passes signals on, and ends as it does."""

import json
import os
import signal
import socket
import sys

LAUNCHERS = ("accelerate", "torchrun", "trl")
LAUNCHING_MODULES = ("accelerate.commands.accelerate_cli", "accelerate.commands.launch", "torch.distributed.run")
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGABRT, signal.SIGUSR1, signal.SIGUSR2)


def is_launcher(argv: list[str]) -> bool:
    if argv[0] == "-m":
        return argv[1] in LAUNCHING_MODULES
    return os.path.basename(argv[0]) in LAUNCHERS


def server_for(argv: list[str]) -> str:
    off = os.environ.get("TP_PLUGIN_DISABLE", "") not in ("", "0")
    if off or is_launcher(argv) or os.environ.get("TP_PLUGIN_TP_SIZE", "") in ("", "1"):
        return "plain"
    return "odd" if int(os.environ.get("RANK", "0")) % 2 else "even"


def main() -> None:
    folder, *argv = sys.argv[1:]
    if argv[0] == "-u":  # the server's forks write at once in any case
        del argv[0]
    server = os.path.join(folder, server_for(argv))
    try:
        code = ask(server, argv)
    except ConnectionError as error:
        with open(f"{server}.log") as log:
            sys.exit(f"{error}; the server that forks Python processes wrote:\n{log.read()}")
    if code < 0:
        if -code in FORWARDED:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def ask(server: str, argv: list[str]) -> int:
    """Have it run, and wait for its exit code."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(server)
    for number in FORWARDED:
        signal.signal(number, lambda number, _: connection.send(bytes([number])))
    request = {"argv": argv, "env": dict(os.environ), "cwd": os.getcwd(), "launches": is_launcher(argv)}
    reader, writer = os.pipe()
    socket.send_fds(connection, [b"0"], [0, 1, 2, reader])
    os.close(reader)
    with open(writer, "w") as stream:
        json.dump(request, stream)
    answer = connection.recv(4)
    if not answer:
        raise ConnectionError("it has ended")
    return int.from_bytes(answer, "big", signed=True)


main()
