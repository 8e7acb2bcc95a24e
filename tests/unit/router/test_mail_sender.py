"""E-mails about alerts: errors are results, so that no message stops the others."""

from __future__ import annotations

import pytest

from services.router.adapters.mail_sender import MailSender

pytestmark = pytest.mark.unit


async def test_a_wrong_url_is_the_result_of_the_attempt() -> None:
    result = await MailSender("smtp://127.0.0.1:99999", "a@b", 1.0).send(b"To: x@y\n\nhello")
    assert result.status is None
    assert "Port out of range" in result.problem
