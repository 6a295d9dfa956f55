"""The server's own description of itself, tried out by schemathesis."""

import pytest

pytest.importorskip("uvicorn", reason="smoe[serve]")
schemathesis = pytest.importorskip("schemathesis", reason="what tries a description out")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from schemathesis import checks  # noqa: E402
from support.server import serving, with_template  # noqa: E402

# A body may be as described and ask for what this model cannot do: that is a 400 with a sentence.
EXCEPT = [checks.positive_data_acceptance]


def test_what_is_described_is_so(goldens, tmp_path):
    bundle, tried = with_template(goldens[-1], tmp_path / "pico.smoe"), []
    with serving(bundle) as served:
        schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{served.port}/openapi.json")
        for found in schema.get_all_operations():
            operation = found.ok()

            @given(operation.as_strategy())
            @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
            def behaves(case):
                case.call_and_validate(excluded_checks=EXCEPT)

            behaves()
            tried.append(operation.label)
    assert {"POST /v1/chat/completions", "POST /v1/completions", "GET /health"} <= {*tried}
