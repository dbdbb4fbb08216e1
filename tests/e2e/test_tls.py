"""A cluster that speaks TLS computes the same, lets only its members in, and says why it does."""

import asyncio
import json
import socket
import time
from pathlib import Path

import pytest

from step3rt import AsyncClient, Client, SamplingParams, _core
from step3rt.errors import ConfigError, Unavailable
from step3rt.model.monolithic import MonolithicModel
from tests.e2e.clusters import PATIENCE_S, running_cluster, wait_until
from tests.e2e.commands import Commands, run
from tests.fixtures.certificates import DAY, Authority, as_flags
from tests.fixtures.checkpoint import Checkpoint

EX_CONFIG = 78
PROMPTS = ([5, 6, 7, 8], [9, 10, 11], list(range(5, 60)))
NUM_TOKENS = 12
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ours")


@pytest.fixture
def strangers(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "theirs")


def continuations(client: Client) -> list[list[int]]:
    return [client.generate(prompt, GREEDY).result().outputs[0].token_ids for prompt in PROMPTS]


def test_two_attention_and_two_ffn_instances_over_tls_generate_what_one_process_does(
    tiny_checkpoint: Checkpoint, authority: Authority
) -> None:
    model = tiny_checkpoint.directory
    alone = MonolithicModel.load(model)
    expected = [alone.generate_greedy(prompt, NUM_TOKENS)[0] for prompt in PROMPTS]
    files = authority.issue("member")
    with (
        running_cluster(model, attention=2, ffn=2, fabric="tcp", **files) as cluster,
        Client(cluster.address, ca=authority.ca) as client,
    ):
        assert continuations(client) == expected
        links = [link for item in cluster.instances() for link in item["links"]]  # type: ignore[attr-defined]
        assert len(links) == 4
        for link in links:
            assert link["fabric"] == "tcp"
            assert "; encrypted by TLS 1.3, " in link["reason"]
        assert asyncio.run(first_continuation(cluster.address, authority.ca)) == expected[0]
        assert_clients_are_refused(cluster.address, authority)


async def first_continuation(address: str, ca: Path) -> list[int]:
    async with AsyncClient(address, ca=ca) as client:
        output = await client.generate(PROMPTS[0], GREEDY).result()
        return output.outputs[0].token_ids


def assert_clients_are_refused(address: str, authority: Authority) -> None:
    """In clear text, with another CA, and with bytes that mean nothing; a good one is served."""
    begun_s = time.monotonic()
    with Client(address, ca="") as client, pytest.raises(ConfigError, match="speaks TLS only"):
        client.model_info()
    # Any other certificate will do for a CA that did not issue the server's.
    stranger = authority.issue("no-ca")["tls_cert"]
    with Client(address, ca=stranger) as client, pytest.raises(Unavailable):
        client.model_info()
    host, _, port = address.rpartition(":")
    dawdlers = [socket.create_connection((host, int(port))) for _ in range(200)]
    for dawdler in dawdlers[::2]:
        dawdler.sendall(b"\x16\x03\x01\x02\x00\x01\x00")
    with socket.create_connection((host, int(port))) as garbage:
        garbage.sendall(b"\x16\x03\x01\x00\x40" + b"x" * 64)
        garbage.settimeout(20)
        assert len(garbage.recv(1000)) < 20
    with Client(address, ca=authority.ca) as client:
        client.model_info()
    for dawdler in dawdlers:
        dawdler.settimeout(20)
        assert dawdler.recv(1) == b""
        dawdler.close()
    assert time.monotonic() - begun_s < 60


def test_an_instance_and_a_coordinator_that_disagree_about_tls_say_so(
    tiny_checkpoint: Checkpoint, commands: Commands, authority: Authority, strangers: Authority
) -> None:
    model = tiny_checkpoint.directory
    member = as_flags(authority.issue("member"))
    secure = commands.serve(model, *member)
    plain = commands.serve(model)
    # It trusts both clusters, and is trusted by the other one only.
    both = authority.ca.with_name("both.pem")
    both.write_bytes(authority.ca.read_bytes() + strangers.ca.read_bytes())
    cases = {
        "it speaks TLS only, and the caller has no certificate": (secure, []),
        "it does not speak TLS, and this end was given certificates": (plain, member),
        "its certificate was not issued by the CA in `tls_ca`": (
            secure,
            as_flags(strangers.issue("stranger")),
        ),
        "(issued by a CA that it does not know)": (
            secure,
            as_flags({**strangers.issue("guest"), "tls_ca": both}),
        ),
        "expired on": (secure, as_flags(authority.issue("old", valid_for=-DAY))),
        "and 'tls_ca' is not": (secure, member[:2]),
    }
    nodes = {
        text: commands.node("ffn", model, coordinator, *flags)
        for text, (coordinator, flags) in cases.items()
    }
    for text, node in nodes.items():
        wait_until(lambda node=node: node.process.poll() is not None, text)  # type: ignore[misc]
        assert node.process.returncode == EX_CONFIG, node.output()
        assert text in node.output().strip().splitlines()[-1]


def test_a_cluster_moves_to_another_ca_while_it_serves(
    tiny_checkpoint: Checkpoint, commands: Commands, authority: Authority, strangers: Authority
) -> None:
    """Nothing is started again, and an instance that only the new CA knows is linked at the end."""
    model = tiny_checkpoint.directory
    expected = MonolithicModel.load(model).generate_greedy(PROMPTS[0], NUM_TOKENS)[0]
    files = authority.issue("member")
    old_ca, new_ca = authority.ca.read_bytes(), strangers.ca.read_bytes()
    both = authority.ca.with_name("both.pem")
    both.write_bytes(old_ca + new_ca)
    coordinator = commands.serve(model, "--fabric=tcp", *as_flags(files))
    address = coordinator.address
    cluster = [
        coordinator,
        commands.node("ffn", model, coordinator, *as_flags(files)),
        commands.node("attention", model, coordinator, *as_flags(files)),
    ]

    paths = (files["tls_cert"], files["tls_key"], files["tls_ca"])

    def num_links() -> int:
        instances = json.loads(
            _core.list_instances(coordinator.control_address, PATIENCE_S, paths)
        )["instances"]
        return sum(len(item["links"]) for item in instances)

    def renewed(num_times: int) -> None:
        text = "new connections go by the renewed tls_cert"
        for process in cluster:
            wait_until(lambda of=process: of.output().count(text) == num_times, text)  # type: ignore[misc]

    wait_until(lambda: num_links() == 1, "a link")
    with Client(address, ca=both) as client:
        assert client.generate(PROMPTS[0], GREEDY).result().outputs[0].token_ids == expected
        files["tls_ca"].write_bytes(old_ca + new_ca)
        renewed(1)
        fresh = strangers.issue("member")
        for name in ("tls_key", "tls_cert"):
            fresh[name].replace(files[name])
        renewed(2)
        files["tls_ca"].write_bytes(new_ca)
        renewed(3)
        late = commands.node("attention", model, coordinator, *as_flags(strangers.issue("late")))
        cluster.append(late)
        wait_until(lambda: num_links() == 2, "another link")
        assert client.generate(PROMPTS[0], GREEDY).result().outputs[0].token_ids == expected
    with Client(address, ca=strangers.ca) as client:
        assert client.generate(PROMPTS[0], GREEDY).result().outputs[0].token_ids == expected
    old_client = authority.ca.with_name("old.pem")
    old_client.write_bytes(old_ca)
    with Client(address, ca=old_client) as client, pytest.raises(Unavailable):
        client.model_info()
    for process in cluster:
        assert process.process.poll() is None
        assert "WARN" not in process.output()


def test_doctor_looks_at_certificate_key_and_ca(authority: Authority, strangers: Authority) -> None:
    files = authority.issue("member")
    found = run("doctor", *as_flags(files)).stdout
    assert "was issued by the CA, and is valid until" in found
    files["tls_key"].chmod(0o644)
    assert f"-> chmod o= {files['tls_key']}" in run("doctor", *as_flags(files)).stdout
    for wrong, text in (
        (authority.issue("old", valid_for=-DAY), "it expired on"),
        (authority.issue("soon", valid_for=5 * DAY), "and expires on"),
        ({**files, "tls_ca": strangers.ca}, "the CA in `tls_ca` did not issue it"),
        ({**files, "tls_key": strangers.issue("other")["tls_key"]}, "is not the key of tls_cert"),
    ):
        assert text in run("doctor", *as_flags(wrong)).stdout
    ended = run("doctor", *as_flags(files)[:2])
    assert ended.returncode != 0
    assert "--tls-ca" in ended.stderr


def test_a_client_whose_ca_cannot_be_read_is_told_at_once(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        Client(ca=tmp_path / "absent.pem")
    monkeypatch.setenv("STEP3RT_CA", str(authority.issue("member")["tls_key"]))
    with pytest.raises(ConfigError, match="holds no certificate"):
        Client()
    Client(ca="").close()
    Client(ca=authority.ca).close()
