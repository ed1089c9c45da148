"""Every node class has a schema that ComfyUI accepts."""

from turnaround.nodes import NODES


def test_every_schema_is_valid():
    ids = set()
    for node in NODES:
        schema = node.GET_SCHEMA()
        assert schema.node_id.startswith("Turnaround")
        assert schema.node_id not in ids
        ids.add(schema.node_id)
