"""The replies of QEMU 7.2.22, recorded byte for byte, against ours; whole and byte by byte.

Where ours differ on purpose (`qmp/DIFFERENCES.md`) the case says why:

ONE     QEMU sends an error for each stray token of a bad message; we send one for the message.
INF     QEMU echoes an id of 1e400 as `inf`, which is not JSON; we refuse the message.
HEX     QEMU writes \\u017C, we \\u017c: the same JSON.
RANGE   QEMU accepts a bandwidth of -1 (a slip).
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from tests.qmp.validation import Judge
from tests.vmm.control.fakes import FakeClient, fake_vm

STATUS = b'{"return": {"status": "prelaunch", "singlestep": false, "running": false}'


def error(text: str, id_: str = "", kind: str = "GenericError") -> bytes:
    """An error line in QEMU's order of members."""
    body = json.dumps({"class": kind, "desc": text})
    return f'{{{id_ and f"{chr(34)}id{chr(34)}: {id_}, "}"error": {body}}}\r\n'.encode()


BEFORE = [
    (
        b'{"execute":"query-status","id":1}',
        error("Expecting capabilities negotiation with 'qmp_capabilities'", "1", "CommandNotFound"),
    ),
    (
        b'{"execute":"qmp_capabilities","arguments":{"enable":["nope"]}}',
        error("Parameter 'null' does not accept value 'nope'"),
    ),
    (b'{"exec-oob":"qmp_capabilities"}', error("QMP input member 'exec-oob' is unexpected")),
    (
        b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]},"id":null}',
        b'{"return": {}, "id": null}\r\n',
    ),
    (
        b'{"execute":"qmp_capabilities"}',
        error("Capabilities negotiation is already complete, command ignored", kind="CommandNotFound"),
    ),
]

PAUSE = "migrate-pause is currently only supported during postcopy-active state"
JSON = "JSON parse error, "

AFTER: list[tuple[bytes, bytes]] = [
    (
        b'{"execute":"foo","id":{"a":[1,2,"x"]}}',
        error("The command foo has not been found", '{"a": [1, 2, "x"]}', "CommandNotFound"),
    ),
    (
        b'{"execute":"query-status","foo":1,"id":"k"}',
        error("QMP input member 'foo' is unexpected", '"k"'),
    ),
    (b'{"execute":"query-status","arguments":{"x":1}}', error("Parameter 'x' is unexpected")),
    (
        b'{"execute":"query-status","arguments":[1]}',
        error("QMP input member 'arguments' must be an object"),
    ),
    (b'{"execute":"getfd"}', error("Parameter 'fdname' is missing")),
    (
        b'{"execute":"getfd","arguments":{"fdname":5}}',
        error("Invalid parameter type for 'fdname', expected: string"),
    ),
    (
        b'{"execute":"migrate-set-capabilities","arguments":{"capabilities":'
        b'[{"capability":"zzz","state":true}]}}',
        error("Parameter 'capability' does not accept value 'zzz'"),
    ),
    (
        b'{"execute":"migrate-set-capabilities","arguments":{"capabilities":'
        b'[{"capability":"events","state":1}]}}',
        error("Invalid parameter type for 'capabilities[0].state', expected: boolean"),
    ),
    (b"[1,2]", error("QMP input must be a JSON object")),
    (b"5 \n", error("QMP input must be a JSON object")),
    (b'"abc"', error("QMP input must be a JSON object")),
    (b"null\n", error("QMP input must be a JSON object")),
    (
        b'{"execute":"stop","exec-oob":"stop"}',
        error("QMP input member 'execute' clashes with 'exec-oob'"),
    ),
    (b'{"id":7}', error("QMP input lacks member 'execute'", "7")),
    (b'{"execute":5}', error("QMP input member 'execute' must be a string")),
    (
        b'{"exec-oob":"query-status","id":3}',
        error("The command query-status does not support OOB", "3"),
    ),
    (b'{"exec-oob":"migrate-pause","id":4}', error(PAUSE, "4")),
    (b'{"exec-oob":"migrate-pause"}', error(PAUSE)),
    (b"{'execute':'query-status','id':'it\\'s'}", STATUS + b', "id": "it\'s"}\r\n'),
    (b'{"execute":"query-status","id":1,"id":2}', error(JSON + "duplicate key")),
    (b'{ "execute": }', error(JSON + "expecting value")),
    (b'{"execute":"query-status",}', error(JSON + "expecting value")),
    (b'{"execute":"que\xff', error(JSON + "stray '\"que\ufffd'")),
    (b'{"execute":"query-status","id":"ok"}', STATUS + b', "id": "ok"}\r\n'),
    (b'{"execute":"a\x01b"}', error(JSON + "stray '\"a\x01'")),  # ONE
    (b'\n{"execute":"query-status","id":"ok2"}', STATUS + b', "id": "ok2"}\r\n'),
    (
        b'{"execute":"query-status","id":"\xc3("}',
        error(JSON + "invalid UTF-8 sequence in string"),
    ),
    (
        '{"execute":"query-status","id":"żółw😀"}'.encode(),
        STATUS + b', "id": "\\u017c\\u00f3\\u0142w\\ud83d\\ude00"}\r\n',  # HEX
    ),
    (
        b'{"execute":"query-status","id":"\\ud83d\\ude00"}',
        STATUS + b', "id": "\\ud83d\\ude00"}\r\n',  # HEX
    ),
    (
        b'{"execute":"query-status","id":"\\ud83d"}',
        error(JSON + "\\ud83d is not a valid Unicode character"),
    ),
    (b'{"execute":"query-status","id":"\\u0000"}', STATUS + b', "id": "\\u0000"}\r\n'),
    (b'{"execute":"query-status","id":%d}', error(JSON + "stray '%'")),  # ONE
    (b'\x00{"execute":"query-status","id":"r"}', error(JSON + "stray ''") + STATUS + b', "id": "r"}\r\n'),
    (
        b'{"execute":"query-name","id":1}{"execute":"query-uuid","id":2}',
        b'{"return": {}, "id": 1}\r\n'
        b'{"return": {"UUID": "00000000-0000-0000-0000-000000000000"}, "id": 2}\r\n',
    ),
    (b'{"execute":"query-', b""),
    (b'name","id":9}', b'{"return": {}, "id": 9}\r\n'),
    (
        b'{"execute":"query-name","id":18446744073709551616}',
        b'{"return": {}, "id": 1.8446744073709552e+19}\r\n',
    ),
    (
        b'{"execute":"query-name","id":18446744073709551615}',
        b'{"return": {}, "id": 18446744073709551615}\r\n',
    ),
    (b'{"execute":"query-name","id":1.50}', b'{"return": {}, "id": 1.5}\r\n'),
    (b'{"execute":"query-name","id":1e400}', error(JSON + "number out of range")),  # INF
    (b'{"execute":"query-name","id":007}', error(JSON + "stray '00'")),  # ONE
    (b'{"execute":"query-name","id":NaN}', error(JSON + "stray 'N'")),  # ONE
    (
        b'/* x */{"execute":"query-name","id":1}',
        error(JSON + "stray '/'") + b'{"return": {}, "id": 1}\r\n',
    ),
    (
        b'{"execute":"query-name","id":' + b"[" * 1022 + b"]" * 1022 + b"}",
        b'{"return": {}, "id": ' + b"[" * 1022 + b"]" * 1022 + b"}\r\n",
    ),
    (
        b'{"execute":"query-name","id":' + b"[" * 1024 + b"]" * 1024 + b"}",
        error("JSON nesting depth limit exceeded"),  # ONE
    ),
    (b'{"execute":"query-name","id":"d"}', b'{"return": {}, "id": "d"}\r\n'),
    (
        b'{"execute":"human-monitor-command","arguments":{"command-line":"info status"}}',
        b'{"return": "VM status: paused (prelaunch)\\r\\n"}\r\n',
    ),
    (
        b'{"execute":"human-monitor-command","arguments":{"command-line":"foo"}}',
        b'{"return": "unknown command: \'foo\'\\r\\n"}\r\n',
    ),
    (
        b'{"execute":"human-monitor-command","arguments":{"command-line":"info name","cpu-index":7}}',
        error("Parameter 'cpu-index' expects a CPU number"),
    ),
    (
        b'{"execute":"query-version"}',
        b'{"return": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "pageferry-0.1.0"}}\r\n',
    ),
    (
        b'{"execute":"getfd","arguments":{"fdname":"a"}}',
        error("No file descriptor supplied via SCM_RIGHTS"),
    ),
    (
        b'{"execute":"closefd","arguments":{"fdname":"a"}}',
        error("File descriptor named 'a' not found"),
    ),
    (
        b'{"execute":"migrate","arguments":{"uri":"zzz:1"}}',
        error("Parameter 'uri' expects a valid migration protocol"),
    ),
    (b'{"execute":"migrate"}', error("Parameter 'uri' is missing")),
    (b'{"execute":"query-migrate"}', b'{"return": {}}\r\n'),
    (b'{"execute":"migrate_cancel"}', b'{"return": {}}\r\n'),
    (
        b'{"execute":"migrate-continue","arguments":{"state":"pre-switchover"}}',
        error("Migration not in expected state: none"),
    ),
    (
        b'{"execute":"migrate-start-postcopy"}',
        error("Enable postcopy with migrate_set_capability before the start of migration"),
    ),
    (
        b'{"exec-oob":"migrate-recover","arguments":{"uri":"unix:/x"},"id":1}',
        error("Migrate recover can only be run when postcopy is paused.", "1"),
    ),
    (
        b'{"execute":"migrate-incoming","arguments":{"uri":"unix:/x"}}',
        error("'-incoming' was not specified on the command line"),
    ),
    (
        b'{"execute":"migrate-set-parameters","arguments":{"downtime-limit":99999999}}',
        error("Parameter 'downtime_limit' expects an integer in the range of 0 to (2000 * 1000) ms"),
    ),
    (
        b'{"execute":"migrate-set-parameters","arguments":{"max-bandwidth":-1}}',
        error(f"Parameter 'max_bandwidth' expects an integer in the range of 0 to {2**64 - 1} bytes/second"),
    ),  # RANGE
    (
        b'{"execute":"migrate-set-parameters","arguments":{"multifd-channels":0}}',
        error("Parameter 'multifd_channels' expects a value between 1 and 255"),
    ),
]


def _lines(reply: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in reply.split(b"\r\n") if line]


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "bytewise"])
def test_recorded_replies(whole: bool) -> None:
    def say(client: FakeClient, data: bytes) -> bytes:
        if whole:
            return client.say(data)
        return b"".join(client.say(data[i : i + 1]) for i in range(len(data)))

    with fake_vm() as vm:
        client = vm.client()
        assert client.say(b"") == (
            b'{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, '
            b'"package": "pageferry-0.1.0"}, "capabilities": ["oob"]}}\r\n'
        )
        for data, expected in [*BEFORE, *AFTER]:
            assert say(client, data) == expected, data
        event, reply = _lines(say(client, b'{"execute":"quit"}'))
        assert event["event"] == "SHUTDOWN"
        assert event["data"] == {"guest": False, "reason": "host-qmp-quit"}
        assert reply == {"return": {}}
        Judge(vm.control.dispatcher.schema).check_event(event)


def test_no_event_before_the_negotiation() -> None:
    with fake_vm() as vm:
        client = vm.client()
        client.say(b"")
        vm.machine.notify("STOP")
        assert client.say(b"") == b""
        client.negotiate()
        vm.machine.notify("STOP")
        assert b'"event": "STOP"}\r\n' in client.say(b"")


def test_every_command_replies_as_the_schema_says() -> None:
    arguments = {
        "getfd": {"fdname": "a"},
        "migrate": {"uri": "tcp:h:1"},
        "migrate-set-capabilities": {"capabilities": [{"capability": "x-postcopy-ram", "state": True}]},
        "migrate-set-parameters": {"x-postcopy-start-time": 5, "tls-creds": None},
        "human-monitor-command": {"command-line": "info migrate"},
        "x-migrate-take-back": {"destination-is-gone": True},
    }
    with fake_vm() as vm:
        schema = vm.control.dispatcher.schema
        assert sorted(schema.commands) == sorted(vm.control.dispatcher.names)
        judge = Judge(schema)
        client = vm.client()
        client.negotiate()
        client.fds.receive([os.open("/dev/null", os.O_RDONLY), os.open("/dev/null", os.O_RDONLY)])
        vm.migrator.pretend_completed()
        answered = 0
        for name in schema.commands.keys() - {
            "memsave",
            "pmemsave",
            "x-query-ram-digest",
        }:  # these need a loop
            request = {"execute": name, "arguments": arguments.get(name, {}), "id": name}
            for line in _lines(client.say(json.dumps(request).encode())):
                if "event" in line:
                    judge.check_event(line)
                elif "return" in line:
                    assert line["id"] == name
                    judge.check_return(name, line["return"])
                    answered += 1
                else:
                    assert line["error"]["class"] in ("GenericError", "CommandNotFound", "DeviceNotActive")
        client.fds.close()
        vm.control.dispatcher.fdsets.clear()
        assert answered >= len(schema.commands) - 15


def test_pretty_is_the_same_on_several_lines() -> None:
    with fake_vm() as vm:
        for command in (b"query-status", b"query-qmp-schema", b"query-migrate-parameters"):
            request = b'{"execute":"%b","id":1}' % command
            plain, pretty = vm.client(), vm.client(pretty=True)
            plain.negotiate()
            pretty.say(b'{"execute":"qmp_capabilities"}')
            text = pretty.say(request)
            assert text.count(b"\n") > 2
            assert json.loads(text) == json.loads(plain.say(request))


def test_unstable_output_can_be_hidden() -> None:
    with fake_vm(hide_unstable=True) as vm:
        client = vm.client()
        client.negotiate()
        vm.machine.notify("POSTCOPY_STATE", state="listening")
        reply = json.loads(client.say(b'{"execute":"query-migrate-parameters"}'))["return"]
        assert "x-postcopy-start-time" not in reply
        assert "x-checkpoint-delay" not in reply
        assert reply["downtime-limit"] == 300
    with fake_vm() as vm:
        client = vm.client()
        client.negotiate()
        vm.machine.notify("POSTCOPY_STATE", state="listening")
        event, reply = _lines(client.say(b'{"execute":"query-migrate-parameters"}'))
        assert event["data"] == {"state": "listening"}
        assert reply["return"]["x-postcopy-start-time"] == 0
