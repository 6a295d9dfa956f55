"""What `smoe-prep simulate` prints for people."""

from __future__ import annotations

from smoe.prep.replay.routing_trace import Trace


def simulation_text(trace: Trace, report: dict, substituted: bool) -> str:
    """A line for every policy and budget."""
    cycle, tokens = (
        trace.show(trace.token_cycle),
        sum(s.decode for s in trace.steps) // len(trace.experts),
    )
    lines = [
        f"{trace.name}: {len(trace.experts)} MoE layers, {sum(trace.experts)} experts, "
        f"{trace.show(trace.total)}; "
        f"{tokens} tokens decoded, each of which uses {cycle}",
    ]
    if not report["trace"]["exact_bound"]:
        lines.append(
            "records differ in length between layers: belady is then near the bound in bytes, not "
            "it"
        )
    lines.append(
        f"{'budget':>12}  {'policy':14} {'hits':>7}  {'decode':>7}  {'to belady':>9}  "
        f"{'read':>12}  {'per token':>10}"
        + ("  after substitution  substituted" if substituted else "")
    )
    for row in report["rows"]:
        read = row["bytes_read"]
        lines.append(
            f"{trace.show(row['budget']):>12}  {row['policy']:14} {row['hit_rate']:7.2%}  "
            f"{row['decode_hit_rate']:7.2%}  "
            f"{row['to_bound']:9.2%}  {trace.show(read):>12}  {row['loads'] / max(1, tokens):10.1f}"
            + (
                f"  {row['after_hit_rate']:18.2%}  {row['substituted_share']:11.2%}"
                if substituted
                else ""
            )
        )
    return "\n".join(lines)
