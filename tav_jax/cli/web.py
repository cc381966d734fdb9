"""`tav web`: a page to tune and edit in."""

import argparse
import contextlib
import importlib.util
import os
import secrets
import socket
import sys
import time

from tav_jax.errors import InputError, MissingError, install_command
from tav_jax.io import paths

USER, PASSWORD = "tav", "TAV_WEB_PASSWORD"  # the name to log in with; an environment variable
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def run(arguments: argparse.Namespace) -> int:
    if importlib.util.find_spec("gradio") is None:
        raise MissingError(f"`tav web` needs Gradio, which is not installed; `{install_command('web')}`")
    if not 1 <= arguments.max_upload <= 100_000:
        raise InputError(f"--max-upload is {arguments.max_upload}; it must be 1 to 100000, in MB")
    check_port(arguments.host, arguments.port)
    exposed = arguments.share or arguments.host not in LOOPBACK
    given = read_password(arguments.password_file)
    password = given or (secrets.token_urlsafe(12) if exposed else "")

    from tav_jax.web.jobs import JobQueue
    from tav_jax.web.runs import Workspace

    workspace = Workspace(arguments.workdir)
    with contextlib.closing(JobQueue(workspace.state / "jobs")) as queue:  # keeps the environment as it is now
        # Gradio's settings. The server sends requests to itself, which must not go through a proxy.
        settings = {"GRADIO_TEMP_DIR": str(workspace.cache), "GRADIO_ANALYTICS_ENABLED": "False"}
        no_proxy = ",".join(filter(None, (os.environ.get("NO_PROXY"), *LOOPBACK[:2], arguments.host)))
        os.environ |= {**settings, "GRADIO_ALLOWED_PATHS": "", "NO_PROXY": no_proxy, "no_proxy": no_proxy}
        print("Starting …", file=sys.stderr)
        from tav_jax.web import page

        max_bytes = arguments.max_upload * 10**6
        app = page.build(workspace, queue, max_bytes)
        options = {"server_name": arguments.host, "server_port": arguments.port, "share": arguments.share}
        options |= {"max_file_size": max_bytes, "auth": (USER, password) if password else None}
        try:
            _, url, share_url = page.launch(app, **options)
            print(f"Tune and edit in {workspace.root} at {url} (Ctrl-C stops the page, but not a job that runs)")
            if arguments.share and not share_url:
                print("tav: no public link could be made; check the network", file=sys.stderr)
            if exposed:
                print(exposure(share_url or f"{arguments.host}:{arguments.port}"))
            if password and not given:
                print(f"Log in as {USER} with the password {password}")
            sys.stdout.flush()
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            pass
        finally:
            app.close(verbose=False)
    if (job := queue.current) and job.state == "running":
        print(f"A job goes on as process {job.pid}: {' '.join(job.command[:3])} …; `kill {job.pid}` stops it.")
    return 0


def exposure(where: str) -> str:
    return (
        f"Whoever reaches {where} and knows the password can upload clips, use this machine to tune and edit, see and "
        "download all edits in this directory, and load any model that this user can read."
    )


def check_port(host: str, port: int) -> None:
    """Refuse an address that Gradio cannot listen on, before it is imported; if the port is in use, name one that is
    free. The address is bound and released at once: nothing listens here."""
    if not 1 <= port <= 65535:
        raise InputError(f"--port is {port}; it must be 1 to 65535")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise InputError(f"--host={host} is not an address of this machine; use 127.0.0.1 or 0.0.0.0") from error
    for free in range(port, min(port + 1000, 65536)):
        with socket.socket(family) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                server.bind((address[0], free, *address[2:]))
            except PermissionError as error:
                raise InputError(f"--port={port} needs the rights of root; use one from 1024 on") from error
            except OSError as error:
                if not paths.reason(error).startswith("address already"):
                    fix = "use 127.0.0.1, or 0.0.0.0 for all addresses of this machine"
                    raise InputError(f"--host={host} cannot be used ({paths.reason(error)}); {fix}") from error
                continue
        if free != port:
            raise InputError(f"port {port} of {host} is in use; add --port={free}, which is free")
        return
    raise InputError(f"the ports from {port} on are in use; give another --port")


def read_password(file: str | None) -> str:
    """From the file, or from the environment: an argument could be read by all users of the machine."""
    if file is None:
        return os.environ.get(PASSWORD, "")
    if text := (paths.read_text(file) or "").strip():
        return text
    raise InputError(f"{file} does not exist or is empty; write the password for --password-file into it")
