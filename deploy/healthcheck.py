"""``healthcheck PORT [PATH]``: exit code 0 when ``/health/ready`` on this port answers 200.

Only `socket` is imported: it runs every few seconds in every container.
"""

import socket
import sys

TIMEOUT_S = 5.0


def main() -> int:
    """Ask once."""
    port, path = int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "/health/ready"
    try:
        with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as door:
            door.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            answer = b""
            while chunk := door.recv(4096):
                answer += chunk
    except OSError as error:
        print(error)
        return 1
    print(answer.partition(b"\r\n\r\n")[2][:1000].decode(errors="replace"))
    return 0 if answer.split(b" ", 2)[1:2] == [b"200"] else 1


if __name__ == "__main__":
    sys.exit(main())
