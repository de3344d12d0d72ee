"""`whet serve`: models with OpenAI's API, and a chat page."""

import contextlib
import errno
import socket
import sys
import time

from whet.errors import UserError
from whet.flags.serve import Config

STOP_S = 5
"""Seconds that replies under way get at the end."""


def main(config: Config) -> int:
    """Run `whet serve` until Ctrl-C."""
    try:
        import uvicorn

        from whet.serve.app import Server
    except ImportError as error:
        if error.name not in ("uvicorn", "starlette"):
            raise
        raise UserError(f"{error.name} is not installed; pip install 'whet[serve]'") from None
    from whet.serve.models import open_models

    with contextlib.closing(listen(config.host, config.port)) as listening:
        models = open_models(config, int(time.time()))
        app = Server(models, config.api_key, config.timeout).app()
        settings = uvicorn.Config(
            app,
            log_level="info" if config.verbose else "warning",
            timeout_graceful_shutdown=STOP_S,
            server_header=False,
        )
        tell_where(config, listening, list(models))
        uvicorn.Server(settings).run(sockets=[listening])
    return 0


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at `host` and `port`. Raises UserError if it can't be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    except OSError as error:
        raise UserError(f"--host {host}: {error.strerror}") from None
    try:
        found.bind((host, port))
        found.listen(1024)
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"--port {port}: is in use; take another, such as {port + 1}") from None
        raise UserError(f"--host {host} --port {port}: {error.strerror}") from None
    return found


def tell_where(config: Config, listening: socket.socket, names: list[str]) -> None:
    """Print where to go, and a warning if everybody can."""
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    lines = [
        f"Serving {', '.join(names)}",
        f"  chat page  http://{shown}:{port}/",
        f"  API        http://{shown}:{port}/v1",
        "Ctrl-C stops.",
    ]
    if config.api_key is None and not host.startswith("127.") and host != "::1":
        lines.insert(3, "Everybody who reaches this address can use the models: set --api_key.")
    print("\n".join(lines), file=sys.stderr, flush=True)
