"""JSON documents of every shape near a given one: what other servers send instead of what they should."""

from typing import Any

from hypothesis import strategies as st

ANYTHING: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=8), values, max_size=3),
    max_leaves=6,
)


def mutations(document: Any) -> st.SearchStrategy[Any]:
    """The document, or the same with any of its parts missing or replaced by anything."""
    if isinstance(document, dict):
        fields = {name: mutations(value) for name, value in document.items()}
        return st.one_of(st.fixed_dictionaries({}, optional=fields), ANYTHING)
    if isinstance(document, list):
        items = st.one_of(*(mutations(item) for item in document)) if document else st.nothing()
        return st.one_of(st.lists(items, max_size=len(document) + 1), ANYTHING)
    return st.one_of(st.just(document), ANYTHING)
