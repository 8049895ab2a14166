"""Who may call himself what: ids, keys, registered names, numbers of samples; without a model and without messages."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.config import RunConfig
from fedtune.errors import FedtuneError, MalformedMessageError, MismatchError, ModelError, RunError, WireError
from fedtune.progress import Event, Note, listening
from server.nodes import Node, connected_nodes
from server.roster import Roster

CONFIG = RunConfig(clients=4)
A, B, C = Node(1, "a", "key-a"), Node(2, "b", "key-b"), Node(3, "c", "key-c")
NO_KEYS: Mapping[str, str] = {}
PLAIN = {number: Node(number) for number in range(1, 5)}  # nobody is registered


def all_of(*nodes: Node) -> dict[int, Node]:
    return {node.id: node for node in nodes}


def fits(record: ConfigRecord) -> None:
    if record.get("fingerprint") == b"other":
        raise ModelError("it holds another base model.")


def reply_of(question: str, record: ConfigRecord) -> Message:
    """The answer to a question, without the rest of a message."""
    answers, content = SimpleNamespace(reply_to_message_id=question), RecordDict({"fedtune": record})
    return SimpleNamespace(metadata=answers, has_error=lambda: False, content=content)  # type: ignore[return-value]


class Said:
    """A roster, and what it says. `say` is the introduction of a node; it returns the refusal, if it is one."""

    def __init__(
        self, config: RunConfig = CONFIG, keys: Mapping[str, str] | None = None, dropped: tuple[str, ...] = ()
    ) -> None:
        self.roster = Roster(config, fits, dropped, keys or {})
        self.notes: list[Note] = []

    def say(self, node: Node, here: Mapping[int, Node], client: object = None, examples: object = 10) -> FedtuneError | None:
        record = ConfigRecord({"client": node.name if client is None else client, "examples": examples})  # type: ignore[dict-item]
        return self.record(node, here, record)

    def record(self, node: Node, here: Mapping[int, Node], record: ConfigRecord) -> FedtuneError | None:
        with listening(self.listen):
            problems = self.roster.accept({"question": node}, [reply_of("question", record)], here)
        return problems[0] if problems else None

    def listen(self, event: Event) -> None:
        if isinstance(event, Note):
            self.notes.append(event)

    @property
    def nodes(self) -> dict[str, int]:
        return {name: client.node for name, client in self.roster.clients.items()}


# ---------------------------------------------------------------------------------------------------- whose id


def test_nobody_may_use_the_name_that_another_node_is_registered_under() -> None:
    said = Said()
    refusal = said.say(A, all_of(A, B), "b")
    assert str(refusal) == (
        "Client b was refused: another node is registered under the name 'b': give this one an id of its own "
        "(CLIENT_ID in node.env)."
    )
    assert type(refusal) is MismatchError
    assert said.say(B, all_of(A, B)) is None
    assert said.nodes == {"b": B.id}


def test_an_id_belongs_to_the_key_that_had_it_first_also_when_that_node_is_away_and_after_a_resume() -> None:
    said = Said()
    assert said.say(A, all_of(A), "hospital") is None
    keys = said.roster.new_keys()
    assert keys == {"hospital": "key-a"}
    assert said.roster.new_keys() == {}
    for later in (said, Said(keys=keys)):
        refusal = later.say(B, all_of(B), "hospital")
        assert "client id 'hospital' belongs to the key of the node that had it first" in str(refusal)
        assert "register that under the name 'hospital'" in str(refusal)
        assert later.say(Node(9), {9: Node(9)}, "hospital") is not None  # nor a node that nobody registered
        assert later.say(Node(7, "a", "key-a"), {7: Node(7, "a", "key-a")}, "hospital") is None
        assert later.nodes == {"hospital": 7}


def test_the_registered_node_takes_its_id_back_from_who_took_it_while_it_was_away() -> None:
    """Flower lists the nodes that are connected, so the name of one that is away is not known."""
    said = Said()
    assert said.say(A, all_of(A), "b") is None
    assert said.say(B, all_of(A, B)) is None
    assert said.nodes == {"b": B.id}
    assert [note.text for note in said.notes if note.warning] == [
        "Client b is from now on the node that is registered under that name."
    ]
    assert said.roster.new_keys() == {"b": "key-b"}
    assert said.say(A, all_of(A), "b") is not None


def test_a_new_key_that_is_registered_under_the_name_takes_the_id_over() -> None:
    said = Said(keys={"b": "key-b"})
    again = Node(8, "b", "another key")
    assert said.say(again, all_of(again)) is None
    assert said.roster.new_keys() == {"b": "another key"}


def test_without_keys_an_id_moves_only_while_the_node_before_is_away() -> None:
    said = Said()
    assert said.say(PLAIN[1], PLAIN, "0") is None
    assert "Two nodes call themselves client 0: give each its own" in str(said.say(PLAIN[2], PLAIN, "0"))
    assert said.say(PLAIN[2], {2: PLAIN[2]}, "0") is None
    assert said.nodes == {"0": 2}
    assert said.roster.new_keys() == {}


def test_two_nodes_that_are_registered_under_one_name_are_told_apart() -> None:
    said, twin = Said(), Node(5, "a", "key-a2")
    assert said.say(A, all_of(A, twin)) is None
    assert "Two nodes call themselves client a" in str(said.say(twin, all_of(A, twin)))


@pytest.mark.parametrize("nodes", [(A, B), (PLAIN[1], PLAIN[2])], ids=["registered", "not"])
def test_ids_that_differ_in_case_only_are_the_same(nodes: tuple[Node, Node]) -> None:
    said, here = Said(), all_of(*nodes)
    assert said.say(nodes[0], here, "Site") is None
    assert said.say(nodes[1], here, "site") is not None
    assert said.say(nodes[0], here, "site") is None  # itself, spelled anew
    assert said.nodes == {"site": nodes[0].id}


def test_a_node_under_another_id_is_not_asked_under_its_old_one() -> None:
    said = Said()
    assert said.say(A, all_of(A)) is None
    assert said.say(A, all_of(A), "renamed") is None
    assert said.nodes == {"renamed": A.id}
    assert said.notes[-1].text == "Client a calls itself renamed now: nobody is asked as a any more."


def test_two_nodes_that_swap_their_ids_in_one_answer_keep_one_each() -> None:
    said = Said()
    for node, client in ((1, "x"), (2, "y"), (1, "z"), (2, "x"), (1, "y")):
        assert said.say(PLAIN[node], PLAIN, client) is None
    assert said.nodes == {"x": 2, "y": 1}


@pytest.mark.parametrize("client", ["b", "B", "renamed"])
def test_a_dropped_client_stays_dropped_also_under_another_id(client: str) -> None:
    said = Said(keys={"b": "key-b"}, dropped=("b",))
    assert said.say(B, all_of(B), client) is None
    assert said.nodes == {}
    assert "was dropped from the run" in said.notes[-1].text


def test_an_id_that_a_dropped_node_gives_up_can_be_taken_in_the_same_answers() -> None:
    """Node 1 was client x and says now that it is the dropped one; node 2 says that it is x."""
    said = Said(dropped=("gone",))
    assert said.say(PLAIN[1], PLAIN, "x") is None
    both = {"q1": (PLAIN[1], "gone"), "q2": (PLAIN[2], "x")}
    replies = [reply_of(question, ConfigRecord({"client": client, "examples": 1})) for question, (_, client) in both.items()]
    said.roster.accept({question: node for question, (node, _) in both.items()}, replies, {2: PLAIN[2]})
    assert said.nodes == {"x": 2}


# ---------------------------------------------------------------------------------------------------- how many samples


@pytest.mark.parametrize("examples", [0, -1, 1_000_001, 2**41, 2**64 - 1, True, 1.5, float("nan"), "10", b"10", [10]])
def test_samples_are_a_whole_number_within_the_limit(examples: object) -> None:
    said = Said()
    refusal = said.say(A, all_of(A), examples=examples)
    assert isinstance(refusal, MalformedMessageError)
    assert "Client a was refused: it says that it has " in str(refusal)
    assert "a whole number from 1 to 1000000 was expected (raise max_examples if it is right)" in str(refusal)
    assert said.nodes == {}


def test_the_limit_is_a_setting_and_one_party_may_have_the_samples_of_all() -> None:
    assert Said(CONFIG.replace(max_examples=9)).say(A, all_of(A)) is not None
    assert Said(CONFIG.replace(max_examples=10)).say(A, all_of(A)) is None
    alone = RunConfig(algorithm="central", clients=4, max_examples=3)
    assert Said(alone).say(A, all_of(A), examples=12) is None
    assert Said(alone).say(A, all_of(A), examples=13) is not None


def warned(weighting: str, *examples: int) -> list[str]:
    said = Said(CONFIG.replace(weighting=weighting))
    for node, count in zip(PLAIN.values(), examples, strict=False):
        assert said.say(node, PLAIN, str(node.id), count) is None
    with listening(said.listen):
        said.roster.warn_of_weight()
        said.roster.warn_of_weight()
    return [note.text for note in said.notes if note.warning]


def test_who_has_more_than_half_of_all_samples_is_named_once() -> None:
    assert warned("examples", 10, 31, 20) == [
        "Client 2 says that it has 31 of all 61 training samples, so that its updates outweigh all others. If that is not so: "
        'weighting = "equal", or a lower max_examples.'
    ]
    assert warned("examples", 10, 30, 20) == []
    assert warned("examples", 10, 31) == []  # of two, one always has half
    assert warned("equal", 10, 31, 20) == []


# ---------------------------------------------------------------------------------------------------- enough of them


@pytest.mark.parametrize(
    ("config", "dropped", "wanted", "needed"),
    [
        (CONFIG.replace(clients_per_round=3), (), 4, 3),
        (CONFIG.replace(clients_per_round=3, min_clients=3), (), 3, 3),
        (CONFIG.replace(clients_per_round=3), ("x", "y"), 2, 2),
        (RunConfig(algorithm="central", clients=4), (), 4, 1),
    ],
    ids=["a round's", "fewer to start with", "two dropped", "one party"],
)
def test_a_run_starts_with_the_clients_of_its_first_round_and_not_with_fewer(
    config: RunConfig, dropped: tuple[str, ...], wanted: int, needed: int
) -> None:
    said = Said(config, dropped=dropped)
    assert said.roster.wanted == wanted
    problems = [MismatchError("the first."), ModelError("the second.")]
    for here in range(needed):
        with pytest.raises(MismatchError, match="the first"):
            said.roster.check_enough(4, problems)
        with pytest.raises(RunError, match=rf"Only {here} of 4 nodes introduced themselves; a round asks {needed}\."):
            said.roster.check_enough(4, [])
        assert said.say(PLAIN[here + 1], PLAIN, str(here)) is None
    said.roster.check_enough(4, problems)


def test_a_node_is_asked_again_once_and_only_if_it_is_known() -> None:
    said = Said()
    assert said.say(A, all_of(A)) is None
    said.roster.ask_again("a")
    said.roster.ask_again("nobody")
    assert said.roster.doubtful() == {A.id}
    assert said.roster.doubtful() == set()


# ---------------------------------------------------------------------------------------------------- anything at all


VALUES = st.one_of(
    st.text(max_size=80), st.binary(max_size=80), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(width=64),
    st.lists(st.integers(-9, 9), max_size=3), st.lists(st.text(max_size=5), max_size=3),
    st.sampled_from(["a", "b", "Interrupted"]),
)  # fmt: skip
FIELDS = st.sampled_from(["client", "examples", "fingerprint", "layout", "selftest", "problem", "text", "payload", "other"])


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(FIELDS, VALUES, max_size=6))
def test_whatever_an_introduction_holds_it_is_taken_or_refused_by_name(fields: dict[str, object]) -> None:
    said = Said()
    assert said.say(B, all_of(A, B)) is None
    refusal = said.record(A, all_of(A, B), ConfigRecord(fields))  # type: ignore[arg-type]
    assert said.nodes["b"] == B.id
    if refusal is None:
        assert sorted(said.nodes.values()) == [A.id, B.id]
    else:
        assert list(said.nodes) == ["b"]
        assert "\n" not in str(refusal)
        assert str(refusal).startswith(("Node a was refused: ", "Client "))
        assert len(str(refusal)) < 3000


def test_what_a_client_refuses_itself_is_told_with_its_type_and_its_name() -> None:
    said = Said()
    refusal = said.record(A, all_of(A), ConfigRecord({"problem": "ModelError", "text": "no\x1b[31m model"}))
    assert type(refusal) is ModelError
    assert str(refusal) == "Node a was refused: no\\x1b[31m model"
    assert said.record(Node(77), {77: Node(77)}, ConfigRecord({})) is not None
    assert said.notes[-1].text.startswith("Node 77 was refused: A client id is")
    twice = [note.text for note in said.notes if note.text.count("refused") > 1]
    assert twice == []


def test_an_answer_to_another_question_is_no_introduction() -> None:
    said = Said()
    reply = SimpleNamespace(metadata=SimpleNamespace(reply_to_message_id="another"))
    assert said.roster.accept({"question": A}, [reply], all_of(A)) == []  # type: ignore[list-item]


# ---------------------------------------------------------------------------------------------------- nodes


def test_only_a_registered_node_has_a_key_that_says_something() -> None:
    info = SimpleNamespace(node_id=5, name="a", public_key=b"pem")
    own = SimpleNamespace(node_id=6, name="", public_key=b"made at its start")
    found = connected_nodes(SimpleNamespace(get_nodes=lambda: iter([info, own])))  # type: ignore[arg-type]
    assert found[5].name == "a"
    assert len(found[5].key) == 32
    assert found[6] == Node(6)


def test_a_grid_that_knows_ids_only_is_enough() -> None:
    def missing() -> None:
        raise RuntimeError("not made")

    for grid in (SimpleNamespace(get_node_ids=lambda: [5]), SimpleNamespace(get_node_ids=lambda: [5], get_nodes=missing)):
        assert connected_nodes(grid) == {5: Node(5)}  # type: ignore[arg-type]


def test_a_wire_error_is_what_all_refusals_of_ids_are() -> None:
    assert issubclass(MismatchError, WireError)
