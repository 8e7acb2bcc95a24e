"""``healthcheck PORT [PATH]``: exit with 0 if PATH (default: ``/health/ready``) answers 200.

It runs every few seconds in a container. To start fast, it imports only `os`, `socket` and `sys`. It also
imports `ssl` if the gateway serves TLS.
"""

import os
import socket
import sys

TIMEOUT_S = 5.0


def encrypted(connection: socket.socket) -> socket.socket:
    """Wrap the connection in TLS. The certificate is not verified, because no secret is sent."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context.wrap_socket(connection)


def main() -> int:
    """Send one request. Return the exit code."""
    port, path = int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "/health/ready"
    try:
        tls = os.environ.get("TIDEGATE_TLS_CERT") and port == int(
            os.environ.get("TIDEGATE_GATEWAY_PORT") or 8000
        )
        plain = socket.create_connection(("127.0.0.1", port), TIMEOUT_S)
        with encrypted(plain) if tls else plain as connection:
            connection.sendall(
                f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
            )
            response = b""
            while chunk := connection.recv(4096):
                response += chunk
    except OSError as error:
        print(error)
        return 1
    print(response.partition(b"\r\n\r\n")[2][:1000].decode(errors="replace"))
    return 0 if response.split(b" ", 2)[1:2] == [b"200"] else 1


if __name__ == "__main__":
    sys.exit(main())
