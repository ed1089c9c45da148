"""What a creator reads on every node: ids, categories, descriptions, tooltips."""

import pytest
from turnaround.nodes import NODES


@pytest.mark.parametrize("node", NODES, ids=lambda n: n.__name__)
def test_node_explains_itself(node):
    schema = node.GET_SCHEMA()
    assert schema.node_id.startswith("Turnaround")
    assert schema.category.startswith("Turnaround/") and schema.category[11].isdigit()
    assert len(schema.description) > 30
    for part in (*(schema.inputs or []), *(schema.outputs or [])):
        assert part.tooltip, f"{schema.node_id}: {part.id or part.display_name} has no tooltip"


def test_node_ids_are_unique():
    ids = [node.GET_SCHEMA().node_id for node in NODES]
    assert len(ids) == len(set(ids))
