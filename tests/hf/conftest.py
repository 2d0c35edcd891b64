"""Where transformers is not installed, the committed fixtures stand for it."""

from importlib.util import find_spec

HAS_ORACLE = find_spec('transformers') is not None and find_spec('torch') is not None
collect_ignore = [] if HAS_ORACLE else ['test_import.py', 'test_export.py', 'test_checkpoint.py', 'test_from_hf.py']


def pytest_report_header() -> str:
    return (
        'hf: transformers is the oracle' if HAS_ORACLE else 'hf: no transformers and torch, only the committed fixtures are run'
    )
