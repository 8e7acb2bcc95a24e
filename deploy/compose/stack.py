"""Start the stack in containers, run the example in the stack, and remove the stack."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deploy.compose.tool import SERVICE, ComposeFailed, Tool

ONCE = {"accounts", "migrate", "worker"}
LAUNCHED = "tidegate.replica"
WAIT_S = 300.0
POLL_S = 1.0
DRAIN_S = 60
STATE = "/var/lib/tidegate"


def up(tool: Tool, *, build: bool = True) -> None:
    """Start the stack and wait until every container is healthy. Raise ComposeFailed if this fails."""
    if build:
        # Workers have an image of their own. All other services of Tidegate share the image of `migrate`.
        tool.compose("build", "migrate", "worker")
    tool.compose("up", "-d", "--no-build")
    wait(tool)


def wait(tool: Tool, timeout_s: float = WAIT_S) -> None:
    """Wait until every container is healthy. A container that runs only once is healthy if it exited with 0.

    Raise ComposeFailed if a container is broken, or if one is not healthy within ``timeout_s`` seconds. The
    error contains the last output of this container.
    """
    deadline = time.monotonic() + timeout_s
    while waiting := [(name, state) for name, state in states(tool.containers()) if state != "healthy"]:
        broken = [name for name, state in waiting if state == "broken"]
        if broken:
            raise ComposeFailed(f"{broken[0]} does not work:\n{_logs(tool, broken[0])}")
        if time.monotonic() > deadline:
            names = ", ".join(f"{name} ({state})" for name, state in waiting)
            raise ComposeFailed(f"Not healthy within {timeout_s:g} s: {names}.\n{_logs(tool, waiting[0][0])}")
        time.sleep(POLL_S)


def states(containers: Iterable[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return each container's name and state: healthy, waiting or broken.

    Workers that the autoscaler launched are left out.
    """
    return [
        (each["Name"].lstrip("/"), _state(each))
        for each in containers
        if LAUNCHED not in each["Config"]["Labels"]
    ]


def _state(container: dict[str, Any]) -> str:
    state = container["State"]
    if container["Config"]["Labels"].get(SERVICE) in ONCE:
        if state["Status"] != "exited":
            return "waiting"
        return "healthy" if state["ExitCode"] == 0 else "broken"
    if not state["Running"]:
        return "waiting" if state.get("Restarting") or state["Status"] == "created" else "broken"
    health = (state.get("Health") or {}).get("Status", "healthy")
    return {"healthy": "healthy", "starting": "waiting"}.get(health, "broken")


def _logs(tool: Tool, name: str) -> str:
    try:
        return tool.engine("logs", "--tail", "20", name)
    except ComposeFailed as error:
        return str(error)


def down(tool: Tool, *, volumes: bool) -> None:
    """Drain the workers, then remove the containers. Remove the data only with ``volumes``."""
    if any(LAUNCHED in each["Config"]["Labels"] for each in tool.containers()):
        tool.compose("stop", "autoscaler", quiet=True)
        try:
            command = ["python", "-P", "-m", "services.autoscaler", "sweep", "--grace", str(DRAIN_S)]
            tool.compose("run", "--rm", "--no-deps", "-T", "autoscaler", *command, quiet=True)
        except ComposeFailed as error:  # continue: `down` also removes workers that did not drain
            print(f"The workers were not drained: {error}")
    tool.compose("down", "--remove-orphans", *(["--volumes"] if volumes else []))


def write_environment(tool: Tool, folder: Path) -> Path:
    """Write the CLI's environment variables for this stack to the file ``env``. Return the file's path.

    Only the file's owner can read it, because it contains the stack's service token, which has all rights.
    """
    gateway = next(each for each in tool.containers() if each["Config"]["Labels"].get(SERVICE) == "gateway")
    ports = gateway["NetworkSettings"]["Ports"]
    token = gateway_token(tool, gateway["Name"].lstrip("/"))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "env"
    path.touch(0o600)
    path.chmod(0o600)
    path.write_text(
        f"export TIDEGATE_GATEWAY_URL=http://127.0.0.1:{ports['8000/tcp'][0]['HostPort']}\n"
        f"export TIDEGATE_GATEWAY_GRPC_PORT={ports['8001/tcp'][0]['HostPort']}\n"
        f"export TIDEGATE_API_KEY={token}\n"
    )
    return path


def gateway_token(tool: Tool, container: str) -> str:
    """Return the stack's service token from the environment, otherwise from the stack's state folder."""
    configured = tool.environ.get("TIDEGATE_SERVICE_TOKEN", "")
    return configured or tool.engine("exec", container, "cat", f"{STATE}/token").strip()


def example(tool: Tool) -> None:
    """Train, deploy and call the digits example, all inside the stack."""
    by_service = {each["Config"]["Labels"].get(SERVICE): each for each in tool.containers()}
    image, name = by_service["worker"]["Config"]["Image"], by_service["gateway"]["Name"].lstrip("/")
    tool.engine(
        "run", "--rm", "-v", f"{tool.project}_state:{STATE}", image,
        "/opt/tidegate/runtime/model-env/bin/python3", "/opt/tidegate/examples/digits/train.py",
        "--out", f"{STATE}/examples/digits",
    )  # fmt: skip
    output = tool.engine("exec", name, "python", "-P", "-m", "tidegate.cli.example")
    # The rest of the output shows an example call. It is not printed, because this call works only in the
    # container. A call from outside needs another address and a key.
    print(output.partition("Ask it yourself:")[0].rstrip())
