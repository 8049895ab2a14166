"""The in-process grid behaves like Flower's runtimes where a server or a client can tell."""

from __future__ import annotations

import time

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedtune.errors import Interrupted, WireError
from simulations.engines.local_grid import Faults, LocalGrid

PAYLOAD = bytes(range(256))


def echo(message: Message, context: Context) -> Message:
    """Send back what came, with the partition and the number of messages that the node has seen."""
    seen = int(context.state.metric_records["seen"]["n"]) if "seen" in context.state else 0  # type: ignore[call-overload]
    context.state["seen"] = MetricRecord({"n": seen + 1})
    about = ConfigRecord({"partition": context.node_config["partition-id"], "seen": seen + 1})
    return Message(RecordDict({**message.content, "about": about}), reply_to=message)


def client_app(handler=echo) -> ClientApp:
    app = ClientApp()
    app.train("zo")(handler)
    return app


def ask(node_id: int, ttl: float | None = None, **records) -> Message:
    return Message(RecordDict(records), node_id, "train.zo", ttl=ttl, group_id="3")


def about(reply: Message) -> dict:
    return dict(reply.content.config_records["about"])


def test_every_client_answers_its_own_message():
    grid = LocalGrid(client_app(), 5, {"rounds": 2})
    assert isinstance(grid, Grid)
    nodes = grid.get_node_ids()
    assert len(set(nodes)) == 5
    messages = [ask(node) for node in reversed(nodes)]
    replies = grid.send_and_receive(messages)
    assert [r.metadata.reply_to_message_id for r in replies] == [m.metadata.message_id for m in messages]
    assert [r.metadata.src_node_id for r in replies] == list(reversed(nodes))
    assert [about(r)["partition"] for r in replies] == [4, 3, 2, 1, 0]
    assert {r.metadata.group_id for r in replies} == {"3"}
    ids = [m.metadata.message_id for m in [*messages, *replies]]
    assert len(set(ids)) == 10
    assert "" not in ids


def test_nodes_are_registered_as_in_a_deployment_unless_they_are_not():
    nodes = LocalGrid(client_app(), 3, {}, node_configs={1: {"client-id": "another"}}).get_nodes()
    assert [node.name for node in nodes] == ["0", "1", "2"]
    assert len({node.public_key for node in nodes}) == 3
    unknown = LocalGrid(client_app(), 2, {}, registered=False)
    assert [(node.node_id, node.name, node.public_key) for node in unknown.get_nodes()] == [
        (node, "", b"") for node in unknown.get_node_ids()
    ]


def test_node_ids_are_repeatable_and_say_nothing_about_the_client():
    first, again, other = (list(LocalGrid(echo, 20, {}, seed=seed).get_node_ids()) for seed in (1, 1, 2))
    assert first == again
    assert not set(first) & set(other)
    assert first != sorted(first)
    assert all(1 < node < 2**63 for node in first)


def test_configuration_reaches_the_client():
    seen: list[Context] = []

    def remember(message: Message, context: Context) -> Message:
        seen.append(context)
        return echo(message, context)

    grid = LocalGrid(client_app(remember), 2, {"lr": 0.5, "model": "embedded"}, node_configs={1: {"site": "b"}})
    grid.send_and_receive([ask(node) for node in grid.get_node_ids()])
    assert [c.run_config for c in seen] == [{"lr": 0.5, "model": "embedded"}] * 2
    assert [c.node_config for c in seen] == [
        {"partition-id": 0, "num-partitions": 2},
        {"partition-id": 1, "num-partitions": 2, "site": "b"},
    ]
    assert grid.server_context().run_config == {"lr": 0.5, "model": "embedded"}


def test_replies_are_pulled_once_and_by_id():
    grid = LocalGrid(client_app(), 3, {})
    ids = grid.push_messages([ask(node) for node in grid.get_node_ids()])
    assert [about(r)["partition"] for r in grid.pull_messages([ids[2], "unknown"])] == [2]
    assert [about(r)["partition"] for r in grid.pull_messages(ids)] == [0, 1]
    assert grid.pull_messages(ids) == []


def test_state_lives_as_long_as_the_grid_and_only_on_its_node():
    grid = LocalGrid(client_app(), 2, {})
    first, second = grid.get_node_ids()
    seen = [about(grid.send_and_receive([ask(node)])[0])["seen"] for node in (first, first, second, first)]
    assert seen == [1, 2, 1, 3]


def test_a_client_that_raises_becomes_an_error_and_its_state_is_as_before():
    def fail_on_second(message: Message, context: Context) -> Message:
        reply = echo(message, context)
        if about(reply)["seen"] == 2 and "fail" in message.content:
            raise WireError("truncated 'header'")
        return reply

    grid = LocalGrid(client_app(fail_on_second), 1, {})
    (node,) = grid.get_node_ids()
    fail = {"fail": ConfigRecord({"now": True})}
    replies = [grid.send_and_receive([ask(node, **extra)])[0] for extra in ({}, fail, fail, {})]
    assert [r.has_error() for r in replies] == [False, True, True, False]
    error = replies[1].error
    assert error.code == 2
    assert error.reason == "<class 'fedtune.errors.WireError'>:<'truncated 'header''>"
    assert not replies[1].has_content()
    assert about(replies[3])["seen"] == 2


def test_an_unknown_action_and_a_reply_that_is_no_message_are_errors_of_the_client(caplog):
    grid = LocalGrid(client_app(lambda message, context: "done"), 1, {})
    (node,) = grid.get_node_ids()
    wrong = Message(RecordDict(), node, "train.other")
    replies = grid.send_and_receive([wrong, ask(node)])
    assert [r.error.code for r in replies] == [2, 2]
    assert "No train function registered with name 'other'" in replies[0].error.reason
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    assert "Client 0 raised" in caplog.text


@pytest.mark.parametrize("stop", [Interrupted("stopped"), KeyboardInterrupt(), SystemExit(3)])
def test_a_stop_leaves_the_grid_and_runs_no_further_client(stop):
    called = []

    def handler(message: Message, context: Context) -> Message:
        called.append(context.node_config["partition-id"])
        if len(called) == 2:
            raise stop
        return echo(message, context)

    grid = LocalGrid(client_app(handler), 3, {})
    with pytest.raises(type(stop)):
        grid.send_and_receive([ask(node) for node in grid.get_node_ids()])
    assert called == [0, 1]


@pytest.mark.parametrize("serialise", [True, False])
def test_content_arrives_as_sent(serialise):
    content = {
        "config": ConfigRecord({"payload": PAYLOAD, "text": "ä", "flag": True, "numbers": [1, -(2**63)], "x": 0.1}),
        "metrics": MetricRecord({"loss": float("inf"), "list": [0.5, 1.5]}),
        "arrays": ArrayRecord({"w": Array(np.arange(6, dtype=np.float32).reshape(2, 3))}),
    }
    received: list[RecordDict] = []

    def handler(message: Message, context: Context) -> Message:
        received.append(message.content)
        return Message(message.content, reply_to=message)

    grid = LocalGrid(client_app(handler), 1, {}, serialise=serialise)
    message = ask(grid.get_node_ids()[0], **content)
    (reply,) = grid.send_and_receive([message])
    for got in (received[0], reply.content):
        assert dict(got["config"]) == dict(content["config"])
        assert dict(got["metrics"]) == dict(content["metrics"])
        assert np.array_equal(got["arrays"]["w"].numpy(), np.arange(6).reshape(2, 3))
    assert (received[0] is message.content) is not serialise


def test_content_that_cannot_be_sent_is_refused_only_when_serialised():
    def handler(message: Message, context: Context) -> Message:
        reply = Message(RecordDict({"c": ConfigRecord({"x": 1})}), reply_to=message)
        dict.__setitem__(reply.content["c"].__dict__["_data"], "x", object())
        return reply

    outcomes = {}
    for serialise in (True, False):
        grid = LocalGrid(client_app(handler), 1, {}, serialise=serialise)
        (reply,) = grid.send_and_receive([ask(grid.get_node_ids()[0])])
        outcomes[serialise] = reply.has_error()
    assert outcomes == {True: True, False: False}


def slow_second(message: Message, context: Context) -> Message:
    time.sleep(0.4 if context.node_config["partition-id"] == 1 else 0.0)
    return echo(message, context)


def test_time_to_live_counts_each_clients_own_time():
    grid = LocalGrid(client_app(slow_second), 3, {})
    replies = grid.send_and_receive([ask(node, ttl=0.2) for node in grid.get_node_ids()])
    assert [r.has_error() for r in replies] == [False, True, False]
    late = replies[1]
    assert (late.error.code, late.metadata.src_node_id) == (3, 1)
    assert late.error.reason == "The reply came after the time to live of 0.2 s."
    assert late.metadata.reply_to_message_id == "local-1-2"


def test_a_client_beyond_the_timeout_is_missing_and_can_be_pulled_later():
    grid = LocalGrid(client_app(slow_second), 3, {})
    messages = [ask(node) for node in grid.get_node_ids()]
    replies = grid.send_and_receive(messages, timeout=0.2)
    assert [about(r)["partition"] for r in replies] == [0, 2]
    assert [about(r)["partition"] for r in grid.pull_messages([messages[1].metadata.message_id])] == [1]


def test_the_client_can_tell_how_much_time_it_has():
    left = []

    def handler(message: Message, context: Context) -> Message:
        left.append(message.metadata.created_at + message.metadata.ttl - time.time())
        return slow_second(message, context)

    grid = LocalGrid(client_app(handler), 3, {})
    grid.send_and_receive([ask(node, ttl=5.0) for node in grid.get_node_ids()])
    assert left == pytest.approx([5.0, 5.0, 5.0], abs=0.3)


def test_faults_drop_tamper_and_a_late_federation():
    def tamper(message: Message, reply: Message) -> Message:
        if about(reply)["partition"] == 2:
            return Message(Error(code=5, reason="node gone"), reply_to=message)
        return reply

    faults = Faults(drop=lambda m: about_to_drop == m.metadata.dst_node_id, tamper=tamper, empty_polls=2)
    grid = LocalGrid(client_app(), 3, {}, faults=faults)
    assert [grid.get_node_ids(), grid.get_nodes()] == [[], []]
    nodes = grid.get_node_ids()
    about_to_drop = nodes[0]
    messages = [ask(node) for node in nodes]
    replies = grid.send_and_receive(messages)
    assert [r.metadata.reply_to_message_id for r in replies] == [m.metadata.message_id for m in messages[1:]]
    assert [r.has_error() for r in replies] == [False, True]
    assert [n.node_id for n in grid.get_nodes()] == nodes


def test_a_message_cannot_be_sent_twice_nor_to_a_stranger():
    grid = LocalGrid(client_app(), 1, {})
    message = ask(grid.get_node_ids()[0])
    grid.push_messages([message])
    with pytest.raises(ValueError, match="must be new and for one of the grid's nodes"):
        grid.push_messages([message])
    with pytest.raises(ValueError, match="must be new and for one of the grid's nodes"):
        grid.push_messages([ask(7)])


def test_a_server_app_runs_on_it_and_its_exceptions_come_out_as_they_are():
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        content = RecordDict({"r": ConfigRecord({"n": context.run_config["rounds"]})})
        replies = [grid.create_message(content, "train.zo", node, "1") for node in grid.get_node_ids()]
        assert [r.content["r"]["n"] for r in grid.send_and_receive(replies)] == [2, 2]
        raise WireError("as it is")

    grid = LocalGrid(client_app(), 2, {"rounds": 2})
    with pytest.raises(WireError, match="as it is"):
        app(grid, grid.server_context())


@pytest.mark.parametrize(("serialise", "limit"), [(False, 0.001), (True, 0.05)])
def test_overhead_of_a_message_is_small(serialise, limit):
    grid = LocalGrid(client_app(), 1, {}, serialise=serialise)
    (node,) = grid.get_node_ids()
    took = []
    for _ in range(200):
        message = ask(node, c=ConfigRecord({"payload": bytes(16384)}))
        started = time.perf_counter()
        grid.send_and_receive([message])
        took.append(time.perf_counter() - started)
    assert sorted(took)[100] < limit
