"""What a transcript says of itself is documented."""

import ast
from pathlib import Path

import unique_asr
from unique_asr.longform.coverage import BREAKS
from unique_asr.transcript import STOP_REASONS

ATTRIBUTES = ("stop_reason", "broken")  # `broken` of a pass becomes its stop reason


def collect_strings(node):
    return {each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)}


def collect_stop_reasons(tree):
    """The strings that a module assigns to a stop reason, alone or in a tuple."""
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = zip(target.elts, node.value.elts, strict=True)
            for name, value in pairs:
                if isinstance(name, ast.Attribute) and name.attr in ATTRIBUTES:
                    found |= collect_strings(value)
    return found - {""}


def test_every_stop_reason_is_documented():
    folder = Path(unique_asr.__file__).parent
    found = {reason for path in folder.rglob("*.py") for reason in collect_stop_reasons(ast.parse(path.read_text()))}
    assert found | set(BREAKS) == set(STOP_REASONS)
    assert found >= {"end", "length", "gap", "lost", "silence", "interrupted", "error"}


def test_stop_reasons_are_found_however_they_are_assigned():
    source = 'a.stop_reason = b or "x"\nc.broken, d = "y", "z"\nself.stop_reason: str = "" if e else "w"'
    assert collect_stop_reasons(ast.parse(source)) == {"x", "y", "w"}
