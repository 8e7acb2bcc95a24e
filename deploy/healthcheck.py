"""``healthcheck PORT [PATH]``: exit code 0 when ``/health/ready`` on this port answers 200.

Only `socket` is imported, and `ssl` where the gateway serves TLS: it runs every few seconds in a container.
"""

import os
import socket
import sys

TIMEOUT_S = 5.0


def encrypted(door: socket.socket) -> socket.socket:
    """The connection over TLS; nothing secret is sent, so whose certificate it is does not matter."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context.wrap_socket(door)


def main() -> int:
    """Ask once."""
    port, path = int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "/health/ready"
    try:
        tls = os.environ.get("TIDEGATE_TLS_CERT") and port == int(
            os.environ.get("TIDEGATE_GATEWAY_PORT") or 8000
        )
        plain = socket.create_connection(("127.0.0.1", port), TIMEOUT_S)
        with encrypted(plain) if tls else plain as door:
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
