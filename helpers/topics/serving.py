"""A server started for a while, and what it says to a request: for notebooks/08_deployment and the server's tests."""

import contextlib
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx


@contextlib.contextmanager
def served(*command: str, folder: str | Path = ".", patience: float = 300) -> Iterator[str]:
    """Run a server's command in `folder`, with `--port` of a free port added; yields its address, and ends it.

    Raises RuntimeError with what the command has written, where it ends or is not there after `patience` seconds.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address, start = f"http://127.0.0.1:{port}", time.monotonic()
    with tempfile.TemporaryFile("w+") as log:  # a pipe that nobody reads would fill, and stop the server
        process = subprocess.Popen([*command, "--port", str(port)], cwd=folder, stdout=subprocess.DEVNULL, stderr=log)
        try:
            while not _is_up(address):
                if process.poll() is not None or time.monotonic() - start > patience:
                    log.seek(0)
                    raise RuntimeError(f"{' '.join(command)}: no server: {log.read().strip()[-2000:]}")
                time.sleep(0.2)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:  # `transformers serve` waits for its threads
                process.kill()
                process.wait()


def _is_up(address: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{address}/health", timeout=5).is_success
    return False


def reply(address: str, model: str, url: str, text: str) -> str:
    """The status of a request for the completion of a picture and a text, and what the server says."""
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    body = {"model": model, "messages": [{"role": "user", "content": content}]}
    got = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=120)
    if "json" not in got.headers["content-type"]:
        return f"{got.status_code} {got.text}"
    said = got.json()
    return f"{got.status_code} " + (said["choices"][0]["message"]["content"] if "choices" in said
                                    else said["error"]["message"] if "error" in said else str(said["detail"]))
