"""Send e-mails over SMTP in a thread. Each e-mail has its own connection."""

from __future__ import annotations

import asyncio
import smtplib
import ssl
import time
from email import message_from_bytes, policy
from urllib.parse import unquote, urlsplit

from services.router.domain.webhooks import WebhookAttempt

MAX_PROBLEM_LENGTH = 200
_OK = 250


class MailSender:
    """A client of the SMTP server at ``url``.

    ``smtp://USER:PASSWORD@HOST:587`` uses STARTTLS if the server offers it; ``smtps://`` uses TLS from the
    start. If the server refuses a message (5xx), the alert sender tries again later, as after any other
    error.
    """

    def __init__(self, url: str, sender: str, timeout_s: float) -> None:
        self._url = url
        self.sender = sender
        self._timeout_s = timeout_s

    @property
    def configured(self) -> bool:
        """Return True if an SMTP server is configured."""
        return bool(self._url)

    async def send(self, raw: bytes) -> WebhookAttempt:
        """Send a message once. Return errors in the result instead of raising them.

        In the result, status 250 means that the server accepted the message.
        """
        began = time.perf_counter()
        status: int | None = None
        problem = ""
        try:
            await asyncio.to_thread(self._send, raw)
            status = _OK
        except smtplib.SMTPResponseException as error:
            status = error.smtp_code
            text = error.smtp_error
            problem = text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
        except smtplib.SMTPRecipientsRefused as error:
            status, text = next(iter(error.recipients.values()))
            problem = text.decode("utf-8", "replace")
        # A ValueError means that the URL is invalid, or that its user name or password is not ASCII.
        except (OSError, ValueError, smtplib.SMTPException) as error:
            problem = str(error) or type(error).__name__
        return WebhookAttempt(status, problem[:MAX_PROBLEM_LENGTH], (time.perf_counter() - began) * 1e3)

    def _send(self, raw: bytes) -> None:
        if not self._url:
            raise OSError("no SMTP server is configured: set TIDEGATE_SMTP_URL")
        parts = urlsplit(self._url)
        host, secure = parts.hostname or "localhost", parts.scheme == "smtps"
        context = ssl.create_default_context()
        if secure:
            client: smtplib.SMTP = smtplib.SMTP_SSL(
                host, parts.port or 465, timeout=self._timeout_s, context=context
            )
        else:
            client = smtplib.SMTP(host, parts.port or 25, timeout=self._timeout_s)
        with client:
            client.ehlo()
            if not secure and client.has_extn("starttls"):
                client.starttls(context=context)
                client.ehlo()
            if parts.username:
                client.login(unquote(parts.username), unquote(parts.password or ""))
            client.send_message(message_from_bytes(raw, policy=policy.SMTP))
