"""Files of passwords, and the URLs that they complete."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from services.gateway.settings import GatewaySettings
from services.worker.settings import WorkerSettings
from tidegate.kernel import credentials
from tidegate.kernel.broker import topology
from tidegate.kernel.broker.permissions import BROKER, JOB_STORE, LIVE_STORE
from tidegate.kernel.settings.base import Settings
from tidegate.stack import accounts

pytestmark = pytest.mark.unit


def test_every_service_has_a_password_of_its_own_at_every_server(tmp_path):
    credentials.ensure(tmp_path)
    found = [credentials.read_all(tmp_path, server) for server in credentials.SERVERS]
    passwords = [password for each in found for password in each.values()]
    assert len(set(passwords)) == len(credentials.SERVERS) * len(credentials.SERVICES)
    assert all(len(password) >= 43 for password in passwords)


def test_passwords_are_for_their_owner_only_and_stay_what_they_are(tmp_path):
    credentials.ensure(tmp_path)
    before = credentials.read_all(tmp_path, "rabbitmq")
    wide = tmp_path / "rabbitmq" / "worker"
    wide.chmod(0o644)
    credentials.ensure(tmp_path)
    assert credentials.read_all(tmp_path, "rabbitmq") == before
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}


def test_a_url_gets_the_password_of_the_service_that_asks(tmp_path):
    credentials.ensure(tmp_path)
    password = credentials.read(tmp_path, "rabbitmq", "router")
    url = credentials.logged_in("amqp://host:1/v", tmp_path, "rabbitmq", "router")
    assert url == f"amqp://router:{password}@host:1/v"
    named = "amqp://somebody:secret@host:1/v"
    assert credentials.logged_in(named, tmp_path, "rabbitmq", "router") == named
    assert credentials.logged_in("amqp://host/", tmp_path, "rabbitmq", "nobody") == "amqp://host/"


def test_settings_log_in_at_the_embedded_servers_only(tmp_path, monkeypatch):
    monkeypatch.delenv("TIDEGATE_SECRETS_DIR", raising=False)
    credentials.ensure(tmp_path / "secrets")
    gateway = GatewaySettings(state_dir=tmp_path, rabbitmq_port=1, redis_url="redis://store.example/0")
    password = credentials.read(tmp_path / "secrets", "rabbitmq", "gateway")
    assert gateway.amqp_url == f"amqp://gateway:{password}@127.0.0.1:1/"
    assert gateway.redis_url == "redis://store.example/0"
    assert gateway.server_urls == {"amqp_url": "", "redis_url": "redis://store.example/0", "jobs_url": ""}
    assert Settings(state_dir=tmp_path, rabbitmq_port=1).amqp_url == "amqp://127.0.0.1:1/"


def test_a_folder_of_secrets_that_is_named_is_for_every_url_without_a_user(tmp_path):
    credentials.ensure(tmp_path / "mine")
    found = GatewaySettings(
        state_dir=tmp_path,
        secrets_dir=tmp_path / "mine",
        amqp_url="amqp://rabbitmq:5672/",
        redis_url="redis://me:mine@valkey:6379/0",
    )
    password = credentials.read(tmp_path / "mine", "rabbitmq", "gateway")
    assert found.amqp_url == f"amqp://gateway:{password}@rabbitmq:5672/"
    assert found.redis_url == "redis://me:mine@valkey:6379/0"


def test_a_worker_never_has_the_service_token(tmp_path, monkeypatch):
    (tmp_path / "token").write_text("kept\n")
    assert GatewaySettings(state_dir=tmp_path).service_token == "kept"
    assert WorkerSettings(state_dir=tmp_path).service_token == ""
    monkeypatch.setenv("TIDEGATE_SERVICE_TOKEN", "told")
    assert WorkerSettings(state_dir=tmp_path).service_token == ""


@pytest.mark.parametrize("service", ["registry", "autoscaler", "worker"])
def test_only_the_gateway_and_the_router_reach_every_queue(service):
    assert not re.match(BROKER[service].write, "amq.default")
    assert re.match(BROKER["gateway"].write, "amq.default")
    assert re.match(BROKER["router"].write, "amq.default")


def test_a_worker_reads_no_replies_and_binds_nothing_to_what_workers_publish():
    worker = BROKER["worker"]
    for name in ("replies.v1.0a", topology.USAGE.name, topology.EXCEPTIONS.name, topology.WORKERS.name):
        assert not re.match(worker.read, name), name
    for name in (topology.EVENTS.name, topology.CANCELS.name, topology.WARM.name, "requests.v1.m"):
        assert not re.match(worker.write, name), name


def test_names_are_matched_whole():
    for permissions in BROKER.values():
        for pattern in (permissions.configure, permissions.write, permissions.read):
            assert pattern.startswith("^(")
            assert pattern.endswith(")$")
            assert not re.match(pattern, "xtidegateyeventszv1")


def test_the_definitions_hold_no_password_and_lock_the_default_user():
    passwords = dict.fromkeys(credentials.SERVICES, "pass-word")
    text = accounts.rabbitmq_definitions(passwords)
    assert "pass-word" not in text
    assert text == accounts.rabbitmq_definitions(passwords)
    document = json.loads(text)
    assert {user["name"] for user in document["users"]} == {*credentials.SERVICES, *accounts.LOCKED}
    for guest in [each for each in document["permissions"] if each["user"] in accounts.LOCKED]:
        assert {guest["configure"], guest["write"], guest["read"]} == {"^$"}
    for rules in (LIVE_STORE, JOB_STORE):
        assert "pass-word" not in accounts.valkey_users(passwords, rules)


def test_stale_folders_do_not_matter(tmp_path: Path):
    assert credentials.read(tmp_path / "missing", "valkey", "worker") == ""
    assert credentials.read_all(tmp_path / "missing", "valkey") == {}


def test_servers_in_containers_read_hashes_from_folders_of_their_own(tmp_path):
    accounts.write(tmp_path / "secrets", tmp_path / "servers")
    files = sorted(path for path in (tmp_path / "servers").rglob("*") if path.is_file())
    assert [str(path.relative_to(tmp_path / "servers")) for path in files] == [
        "rabbitmq/definitions.json",
        "rabbitmq/rabbitmq.conf",
        "valkey/users.acl",
        "valkey-jobs/users.acl",
    ]
    texts = "".join(path.read_text() for path in files)
    for server in credentials.SERVERS:
        for password in credentials.read_all(tmp_path / "secrets", server).values():
            assert password not in texts
    assert {path.stat().st_mode & 0o777 for path in files} == {0o644}


def test_two_writers_of_a_secret_agree(tmp_path, monkeypatch):
    place = tmp_path / "token"
    fdopen = os.fdopen

    def slowly(*given: Any) -> Any:
        monkeypatch.undo()
        credentials.write_once(place, "of the other one")  # between the look of the first one and its write
        return fdopen(*given)

    monkeypatch.setattr(os, "fdopen", slowly)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    credentials.write_once(place, "of the first one")
    assert place.read_text() == "of the other one\n"
    assert list(tmp_path.iterdir()) == [place]


def test_an_empty_file_is_no_secret(tmp_path):
    place = tmp_path / "token"
    place.touch(mode=0o644)
    credentials.write_once(place, "secret")
    assert place.read_text() == "secret\n"
    assert place.stat().st_mode & 0o777 == 0o600
